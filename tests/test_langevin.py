"""Langevin moves leave the density of their level unchanged, and annealing measures its integral."""

import pytest
import torch

from benchmarks.support.analytic import ExactNetwork, GaussianMixture, noisy_sample, random_mixture
from cdm_fast import CDM, NoiseSchedule, UserError
from cdm_fast.sampling.langevin import DrawFrom, Particles, anneal, hmc, ladder, resample, tune_step_sizes

MIXTURE_2D = random_mixture(2, 8, seed=1)
MIXTURE_16D = random_mixture(16, 2, seed=2, spread=0.3)
SCHEDULE = NoiseSchedule.uniform(40)


def exact_model(density, prior=None):
    return CDM(ExactNetwork(density, SCHEDULE, prior), SCHEDULE, input_shape=(density.dim,))


def normal(num, density):
    return torch.randn(num, density.dim, dtype=torch.float64)


@pytest.mark.parametrize(
    ("step_size", "leapfrog"),
    [(0.02, 1), (0.1, 1), (0.5, 1), (0.2, 3)],
    ids=lambda value: str(value),
)
def test_moves_leave_the_density_unchanged(step_size, leapfrog):
    """Draws of p_20 stay draws of p_20: mean, covariance and mean log-density, for steps of any size."""
    level, num = 20, 4000
    before = noisy_sample(MIXTURE_2D, SCHEDULE, level, num)
    model, draw = exact_model(MIXTURE_2D), DrawFrom(torch.Generator().manual_seed(1))
    particles = Particles.at(model, before, level)
    for _ in range(10):
        particles, _ = hmc(model, particles, step_size, draw, leapfrog)
    assert float((particles.x - before).norm(dim=1).mean()) > 0.2  # they did move
    torch.testing.assert_close(particles.x.mean(0), before.mean(0), rtol=0, atol=0.06)
    torch.testing.assert_close(particles.x.T.cov(), before.T.cov(), rtol=0, atol=0.08)
    again = Particles.at(model, particles.x, level)
    torch.testing.assert_close(particles.log_prob, again.log_prob)
    torch.testing.assert_close(particles.score, again.score)
    kept = Particles.at(model, before, level).log_prob[:, level]
    assert float(again.log_prob[:, level].mean()) == pytest.approx(float(kept.mean()), abs=0.07)


@pytest.mark.parametrize("leapfrog", [1, 3])
def test_moves_find_the_density_from_elsewhere(leapfrog):
    """From a cloud in the wrong place to the moments of p_20, which a biased acceptance would miss."""
    level, num = 20, 2000
    model, draw = exact_model(MIXTURE_2D), DrawFrom(torch.Generator().manual_seed(1))
    particles = Particles.at(model, torch.randn(num, 2, dtype=torch.float64) * 0.3 + 1, level)
    for _ in range(60 // leapfrog):
        particles, _ = hmc(model, particles, 0.4 / leapfrog, draw, leapfrog)
    exact = noisy_sample(MIXTURE_2D, SCHEDULE, level, 20_000)
    torch.testing.assert_close(particles.x.mean(0), exact.mean(0), rtol=0, atol=0.08)
    torch.testing.assert_close(particles.x.T.cov(), exact.T.cov(), rtol=0, atol=0.12)


def expected_acceptance(dim, length, leapfrog):
    """Of leapfrog steps of a length e in N(0, I), from draws of it, for many dimensions.

    In each of them L steps turn (x, p) by an angle L phi, cos phi = 1 - e^2/2, along an ellipse of axes r and
    1/r, r = (1 - e^2/4)^(-1/4). Energy is lost by N(m, 2m), m = dim/2 sin^2(L phi) (r^2 - r^-2)^2; hence
    2 Phi(-sqrt(m/2)).
    """
    ratio = (1 - length**2 / 4) ** -0.5  # r^2
    angle = leapfrog * torch.arccos(1 - length**2 / 2)
    mean = dim / 2 * angle.sin() ** 2 * (ratio - 1 / ratio) ** 2
    return float(2 * torch.special.ndtr(-(mean / 2).sqrt()).mean())


@pytest.mark.parametrize(("length", "leapfrog"), [(0.7, 1), (0.9, 1), (0.7, 4), (0.9, 3)])
def test_acceptance_is_that_of_a_gaussian(length, leapfrog):
    """In pure noise, N(0, I) in 80 dimensions; paths of several steps have lengths spread by 20 %."""
    dim, schedule = 80, NoiseSchedule.uniform(1)
    density = GaussianMixture.gaussian(torch.zeros(dim), torch.eye(dim))
    model = CDM(ExactNetwork(density, schedule), schedule, input_shape=(dim,))
    draw = DrawFrom(torch.Generator().manual_seed(3))
    particles = Particles.at(model, draw.normal(torch.empty(4000, dim, dtype=torch.float64)), 2)
    _, accepted = hmc(model, particles, length**2 / 2, draw, leapfrog)
    lengths = torch.linspace(0.8, 1.2, 1001) * length if leapfrog > 1 else torch.tensor([length])
    wanted = expected_acceptance(dim, lengths, leapfrog)
    assert 0.3 < wanted < 0.9
    assert float(accepted.double().mean()) == pytest.approx(wanted, abs=0.025)  # three standard errors


@pytest.mark.parametrize(("leapfrog", "wanted"), [(1, 0.574), (4, 0.651)])
def test_step_sizes_reach_the_wanted_acceptance(leapfrog, wanted):
    model, generator = exact_model(MIXTURE_16D), torch.Generator().manual_seed(0)
    levels = ladder(SCHEDULE)
    sizes = tune_step_sizes(model, normal(64, MIXTURE_16D), levels, generator, leapfrog=leapfrog)
    assert sorted(sizes) == list(range(1, 42))
    walk = anneal(model, normal(100, MIXTURE_16D), levels, sizes, generator, leapfrog=leapfrog)
    assert float(walk.acceptance[1:].mean()) == pytest.approx(wanted, abs=0.1)
    assert float(walk.acceptance[1:].min()) > 0.25


@pytest.mark.parametrize(
    ("density", "rungs", "height", "runs"),
    [(MIXTURE_2D, None, 0.0, 1), (MIXTURE_2D, 20, 2.0, 2), (MIXTURE_16D, None, 2.0, 3)],
    ids=["2-d normalised", "2-d 20 levels shifted", "16-d shifted"],
)
def test_annealing_reads_the_constants_of_the_levels(density, rungs, height, runs):
    """Exact logits have Z_t = 1; logits off by a constant c_t have log Z_t = c_t - c_{T+1}, up and down."""
    shift = torch.linspace(height, 0, 42, dtype=torch.float64)
    model, levels = exact_model(density, shift.exp()), ladder(SCHEDULE, rungs)
    generator = torch.Generator().manual_seed(4)
    sizes = tune_step_sizes(model, normal(64, density), levels, generator)
    downs, ups = [], []
    for run in range(runs):
        down = anneal(model, normal(500, density), levels, sizes, generator, moves=2)
        data = noisy_sample(density, SCHEDULE, levels[-1], 500, seed=5 + run)
        up = anneal(model, data, levels[::-1], sizes, generator, moves=2).log_ratio
        downs.append(down.log_ratio)
        ups.append(up.flip(0) - up[-1])
    for found in (torch.stack(downs).mean(0), torch.stack(ups).mean(0)):
        torch.testing.assert_close(found, shift[levels], rtol=0, atol=0.1)
    assert float(down.ess.min()) > 0.2 and float(down.log_weight.logsumexp(0)) == pytest.approx(0)


def test_annealed_particles_are_draws_of_the_data():
    model, generator = exact_model(MIXTURE_2D), torch.Generator().manual_seed(0)
    sizes = tune_step_sizes(model, normal(64, MIXTURE_2D), ladder(SCHEDULE), generator)
    walk = anneal(model, normal(1000, MIXTURE_2D), ladder(SCHEDULE), sizes, generator, moves=2)
    weight = walk.log_weight.exp()
    mean = weight @ walk.x
    torch.testing.assert_close(mean, MIXTURE_2D.mean(), rtol=0, atol=0.12)
    covariance = (walk.x - mean).T @ ((walk.x - mean) * weight[:, None])
    torch.testing.assert_close(covariance, MIXTURE_2D.covariance(), rtol=0, atol=0.15)


def test_systematic_resampling_keeps_the_shares():
    weight = torch.tensor([0.05, 0.4, 0.0, 0.3, 0.25], dtype=torch.float64).repeat_interleave(2) / 2
    index = resample(weight.log(), torch.Generator().manual_seed(0))
    copies = torch.bincount(index, minlength=10)
    assert int(copies.sum()) == 10 and bool(((copies - 10 * weight).abs() < 1).all())


def test_ladders():
    assert ladder(SCHEDULE) == list(range(41, 0, -1))
    assert ladder(SCHEDULE, 5) == [41, 31, 21, 11, 1]
    assert ladder(SCHEDULE, 500) == ladder(SCHEDULE)
    assert ladder(SCHEDULE, 2, lowest=40) == [41, 40]
    for rungs, lowest, told in ((1, 1, "1 rungs"), (None, 0, "level 0"), (None, 41, "level 41")):
        with pytest.raises(UserError, match=told):
            ladder(SCHEDULE, rungs, lowest)
