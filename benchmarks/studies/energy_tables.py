"""What corrected samplers and compositions draw: the tables and the picture of docs/measurements/sampling.md.

    python -m benchmarks.studies.energy_tables samplers
    python -m benchmarks.studies.energy_tables composition
    python -m benchmarks.studies.energy_tables restoration
    python -m benchmarks.studies.energy_tables log_z
    python -m benchmarks.studies.energy_tables digits RUN OUT.png   # of a class-conditional run
    python -m benchmarks.studies.energy_tables restored RUN         # errors of restored test images

The first three print, for each target and sampler, the p-values of a two-sample test (energy distance, 499
permutations, 500 draws on each side, three seeds) against exact draws, and the evaluations of an image.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import avg_pool2d

from benchmarks.support.analytic import (
    ExactNetwork,
    GaussianMixture,
    given,
    mixture,
    product,
    random_mixture,
    smooth_pixels,
)
from cdm_fast import CDM, NoiseSchedule, load, sample
from cdm_fast.data.pixels import displayable, from_display, levels_to_display
from cdm_fast.evaluation.quality import two_sample_test
from cdm_fast.model.composition import Mixture, Product, negation
from cdm_fast.model.conditioned import OfClass
from cdm_fast.plots.sheet import write_rows
from cdm_fast.runs.checkpoint import read_config
from cdm_fast.runs.data import run_data
from cdm_fast.sampling import MALA
from cdm_fast.sampling.langevin import DrawFrom, anneal, ladder, tune_step_sizes
from cdm_fast.sampling.restoration import Known, MeanPool, Posterior, restore

NUM, SEEDS, PERMUTATIONS = 500, 3, 499


class Way(NamedTuple):
    """How to sample."""

    sampler: str
    steps: int
    moves: int = 1
    leapfrog: int = 1

    def __str__(self):
        told = f"{self.sampler:4} {self.steps:3} steps"
        if self.sampler == "mala":
            told += f", {self.moves} moves of {self.leapfrog}"
        return f"{told}, {self.evaluations} evaluations"

    @property
    def evaluations(self):
        """Of one image; the pilot that tunes the moves is another 64 walks, however many images there are."""
        return self.steps * (1 + self.moves * self.leapfrog * (self.sampler == "mala"))


def exact_model(density, T, shape=None):
    schedule = NoiseSchedule.uniform(T)
    return CDM(ExactNetwork(density, schedule), schedule, input_shape=shape or (density.dim,))


def p_values(model, density, way):
    found = []
    for seed in range(SEEDS):
        sampler = MALA(way.moves, way.leapfrog) if way.sampler == "mala" else way.sampler
        drawn = sample(model, NUM, sampler, way.steps, seed=seed, batch_size=NUM)
        exact = density.sample(NUM, torch.Generator().manual_seed(100 + seed))
        found.append(two_sample_test(drawn.flatten(1), exact, PERMUTATIONS).p_value)
    return found


def targets():
    """A mixture of 8 Gaussians in 2-D, and 2 in 16-D."""
    return {"2-D": random_mixture(2, 8, seed=1), "16-D": random_mixture(16, 2, seed=2, spread=0.3)}


def samplers():
    """Two mixtures, uniform schedule, T = 200."""
    ways = [Way("ddim", steps) for steps in (5, 7, 10, 14, 20, 28, 40)]
    ways += [Way("mala", steps) for steps in (5, 7, 10, 14)]
    ways += [Way("mala", 5, 2), Way("mala", 10, 2), Way("mala", 5, 1, 3), Way("mala", 10, 1, 3)]
    return [(name, exact_model(p, 200), p, way) for name, p in targets().items() for way in ways]


def composition():
    """Product, mixture and negation of mixtures in 2-D, uniform schedule, T = 100."""
    a, b = random_mixture(2, 4, seed=1), random_mixture(2, 4, seed=7)
    wide = GaussianMixture.gaussian(torch.tensor([0.3, -0.2]), 1.2 * torch.eye(2))
    A, B, W = (exact_model(density, 100) for density in (a, b, wide))
    ways = [Way("ddim", 20), Way("ddim", 100), Way("mala", 20, 2), Way("mala", 20, 5), Way("mala", 20, 2, 3)]
    targets = {
        "product": (Product([A, B]), product(a, b)),
        "mixture": (Mixture([A, B], [0.3, 0.7]), mixture(a, b, 0.3)),
        "negation": (negation(A, W), product(a, wide, -1.0)),
    }
    return [(name, model, density, way) for name, (model, density) in targets.items() for way in ways]


def restoration():
    """4x4 correlated Gaussian pixels, half of them known, all with noise 0.3, or 2x2 means; T = 60."""
    density, shape = smooth_pixels(4), (1, 4, 4)
    prior, eye = exact_model(density, 60, shape), torch.eye(16, dtype=torch.float64).view(16, *shape)
    y = density.sample(1, torch.Generator().manual_seed(5)).view(shape)
    y = y + 0.3 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    tasks = {
        "inpaint": Known(y, 0.3, (torch.arange(16) % 4 < 2).view(shape)),
        "denoise": Known(y, 0.3),
        "super": MeanPool(avg_pool2d(y, 2), 2, 0.15),
    }
    ways = [Way("ddim", 60), Way("mala", 10, 4), Way("mala", 30), Way("mala", 30, 4)]
    return [
        (name, Posterior(prior, task), given(density, task(eye).T, task.y, task.sigma**2), way)
        for name, task in tasks.items()
        for way in ways
    ]


def restored(run, count=12, candidates=8):
    """Root mean squared errors over the pixels of test images: of the mean, the best candidate, any."""
    model, config = load(run), read_config(run)
    data = run_data(config, "test").take(slice(count))
    grey = data.num_grey_levels
    x = from_display(levels_to_display(data.images, grey), grey)
    rounding, height = 1 / (grey * 3**0.5), config.image.height
    known = torch.ones_like(x[0], dtype=torch.bool)
    known[:, height // 2 :] = False
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    tasks = {
        "lower half": lambda i: Known(x[i], rounding, known),
        "noise 0.3": lambda i: Known(x[i] + 0.3 * noise[i], 0.3),
        "factor 2": lambda i: MeanPool(avg_pool2d(x[i], 2), 2, rounding / 2),
    }
    for name, task in tasks.items():
        found = [restore(model, task(i), candidates, steps=25, seed=i) for i in range(len(x))]
        errors = {
            "mean": [r.mean - x[i] for i, r in enumerate(found)],
            "best": [r.images[0] - x[i] for i, r in enumerate(found)],
            "any": [r.images - x[i] for i, r in enumerate(found)],
            "last": [r.images[-1] - x[i] for i, r in enumerate(found)],
        }
        told = (f"{key} {torch.stack(e).square().mean().sqrt():.3f}" for key, e in errors.items())
        print(f"{name}: {', '.join(told)}", flush=True)


def log_z(particles=500, runs=3):
    """log Z of exact models, 0 at every level: at level 1 and where it is worst, means over runs; T = 100."""
    for name, density in targets().items():
        model, generator = exact_model(density, 100), torch.Generator().manual_seed(0)
        levels, draw = ladder(model.schedule), DrawFrom(generator)
        x = torch.empty(particles, density.dim, dtype=torch.float64)
        sizes = tune_step_sizes(model, draw.normal(x[:64]), levels, generator)
        walks = [anneal(model, draw.normal(x), levels, sizes, generator) for _ in range(runs)]
        each = torch.stack([walk.log_ratio for walk in walks])
        last, worst = each[:, -1], each.mean(0).abs().max()
        print(f"{name}: {last.mean():+.3f} +- {last.std() / runs**0.5:.3f} at level 1, {worst:.3f} at worst")


def digits(run, out):
    """Rows of 10 images of classes and of their compositions, by paths of three leapfrog steps."""
    model = load(run)

    def of(label):
        return OfClass(model, label)

    rows = {
        "3": of(3),
        "8": of(8),
        "3 or 8": Mixture([of(3), of(8)]),
        "3 and 8": Product([of(3), of(8)]),
        "3, not 8": negation(of(3), of(8), 0.5),
        "4 and 9": Product([of(4), of(9)]),
        "1 and 7": Product([of(1), of(7)]),
    }
    grey = read_config(run).image.num_grey_levels
    drawn = {name: displayable(sample(row, 10, MALA(3, 3), 20), grey) for name, row in rows.items()}
    write_rows(drawn, out, "compositions of classes: mala, 20 steps, 3 moves of 3")


TABLES = {"samplers": samplers, "composition": composition, "restoration": restoration}

if __name__ == "__main__":
    if sys.argv[1] == "digits":
        digits(Path(sys.argv[2]), Path(sys.argv[3]))
    elif sys.argv[1] == "log_z":
        log_z()
    elif sys.argv[1] == "restored":
        restored(Path(sys.argv[2]))
    else:
        for name, model, density, way in TABLES[sys.argv[1]]():
            found = ", ".join(f"{p:.3f}" for p in p_values(model, density, way))
            print(f"{name:9} {way}: {found}", flush=True)
