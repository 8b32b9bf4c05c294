"""What corrected samplers and compositions draw: the tables and the picture of docs/energy.md.

    python -m benchmarks.energy_tables samplers
    python -m benchmarks.energy_tables composition
    python -m benchmarks.energy_tables digits RUN OUT.png   # of a class-conditional run

The first two print, for each target and sampler, the p-values of a two-sample test (energy distance, 499
permutations, 500 draws on each side, three seeds) against exact draws.
"""

import sys
from pathlib import Path

import torch

from cdm_fast import CDM, NoiseSchedule, load, sample
from cdm_fast.checkpoint import read_config
from cdm_fast.composition import Mixture, OfClass, Product, negation
from cdm_fast.data import write_grid
from cdm_fast.quality import two_sample_test
from cdm_fast.report import displayable
from tests.analytic import ExactNetwork, GaussianMixture, mixture, product, random_mixture

NUM, SEEDS, PERMUTATIONS = 500, 3, 499


def exact_model(density, T):
    schedule = NoiseSchedule.uniform(T)
    return CDM(ExactNetwork(density, schedule), schedule, input_shape=(density.dim,))


def p_values(model, density, sampler, steps, moves):
    found = []
    for seed in range(SEEDS):
        drawn = sample(model, NUM, sampler, steps, seed=seed, moves=moves, batch_size=NUM)
        exact = density.sample(NUM, torch.Generator().manual_seed(100 + seed))
        found.append(two_sample_test(drawn, exact, PERMUTATIONS).p_value)
    return found


def samplers():
    """Two mixtures, uniform schedule, T = 200."""
    ways = [
        ("ddim", 5, 1),
        ("ddim", 10, 1),
        ("ddim", 40, 1),
        ("mala", 5, 2),
        ("mala", 10, 1),
        ("mala", 10, 3),
    ]
    targets = {
        "2-D": random_mixture(2, 8, seed=1),
        "16-D": random_mixture(16, 2, seed=2, spread=0.3),
    }
    return [(name, exact_model(p, 200), p, way) for name, p in targets.items() for way in ways]


def composition():
    """Product, mixture and negation of mixtures in 2-D, uniform schedule, T = 100."""
    a, b = random_mixture(2, 4, seed=1), random_mixture(2, 4, seed=7)
    wide = GaussianMixture.gaussian(torch.tensor([0.3, -0.2]), 1.2 * torch.eye(2))
    A, B, W = (exact_model(density, 100) for density in (a, b, wide))
    ways = [("ddim", 20, 1), ("ddim", 100, 1), ("mala", 20, 2), ("mala", 20, 5)]
    targets = {
        "product": (Product([A, B]), product(a, b)),
        "mixture": (Mixture([A, B], [0.3, 0.7]), mixture(a, b, 0.3)),
        "negation": (negation(A, W), product(a, wide, -1.0)),
    }
    return [(name, model, density, way) for name, (model, density) in targets.items() for way in ways]


def digits(run, out):
    """Rows of 10: a 3, an 8, 3 times 8, 3 or 8, 3 but not 8, 4 times 9, 1 times 7."""
    model = load(run)

    def of(label):
        return OfClass(model, label)

    rows = [of(3), of(8), Product([of(3), of(8)]), Mixture([of(3), of(8)]), negation(of(3), of(8), 0.5)]
    rows += [Product([of(4), of(9)]), Product([of(1), of(7)])]
    images = torch.cat([sample(row, 10, "mala", 20, moves=2) for row in rows])
    write_grid(displayable(images, read_config(run).image.num_grey_levels), out, columns=10)


if __name__ == "__main__":
    if sys.argv[1] == "digits":
        digits(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        for name, model, density, (sampler, steps, moves) in {
            "samplers": samplers,
            "composition": composition,
        }[sys.argv[1]]():
            found = ", ".join(f"{p:.3f}" for p in p_values(model, density, sampler, steps, moves))
            told = f"{steps} steps" + (f", {moves} moves" if sampler == "mala" else "")
            print(f"{name:9} {sampler} {told}: {found}", flush=True)
