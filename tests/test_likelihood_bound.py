"""The variational bound on densities known in closed form."""

import math

import pytest
import torch

from benchmarks.support.analytic import ExactDenoiser, GaussianMixture, random_mixture
from cdm_fast import NoiseSchedule, UserError
from cdm_fast.likelihood import variational_bound
from tests.test_trained_densities import even_in_log_snr

MIXTURE = random_mixture(2, 8, seed=1)


def bound_and_truth(density, schedule, num=2000, levels=None):
    """(bound, exact -log p_0, both (n,) nats) on draws of the density itself."""
    x = density.sample(num, torch.Generator().manual_seed(0))
    truth = -density.log_prob(x, schedule.a[:1], schedule.s[:1])[:, 0]
    return variational_bound(ExactDenoiser(density, schedule), x, levels=levels), truth


def stderr(values):
    return float(values.std() / math.sqrt(len(values)))


@pytest.mark.parametrize("schedule", [NoiseSchedule.uniform(50), NoiseSchedule.ot(50)], ids=["uniform", "ot"])
def test_the_bound_lies_above_and_is_tight_for_fine_schedules(schedule):
    coarse, truth = bound_and_truth(MIXTURE, schedule, levels=range(1, 51, 7))
    medium, _ = bound_and_truth(MIXTURE, schedule)
    fine, _ = bound_and_truth(MIXTURE, even_in_log_snr(T=400, smallest=0.005))
    gaps = [bound.nats - truth for bound in (coarse, medium, fine)]
    assert all(float(gap.mean()) > -3 * stderr(gap) for gap in gaps)
    assert float(gaps[0].mean()) > float(gaps[1].mean()) + 0.05
    assert float(gaps[2].mean()) == pytest.approx(0, abs=0.03 + 3 * stderr(gaps[2]))


def test_a_gaussian_pays_what_the_formulas_say():
    """For N(0, v I) every step with the best variance is the true one: no gap but the prior's."""
    v, schedule = 0.5, NoiseSchedule.uniform(20)
    density = GaussianMixture.gaussian(torch.zeros(4), v * torch.eye(4))
    bound, truth = bound_and_truth(density, schedule, num=20_000)
    a, s = schedule.a[-2], schedule.s[-2]
    marginal = float(a**2 * v + s**2)
    # The chain starts from N(0, I) instead of N(0, marginal I); all of its steps are exact.
    gap = 0.5 * 4 * (marginal - 1 - math.log(marginal))
    difference = bound.nats - truth
    assert float(difference.mean()) == pytest.approx(gap, abs=4 * stderr(difference))
    assert stderr(difference) < 0.03
    expected = [float(a**2 * v / (a**2 * v + s**2)) for a, s in zip(schedule.a, schedule.s, strict=True)]
    assert bound.mse == pytest.approx(expected[1:-1], abs=0.02)
    assert float(bound.nats.mean()) == pytest.approx(
        bound.prior + sum(bound.steps) + bound.reconstruction, abs=1e-6
    )
    assert bound.levels == list(range(1, 21)) and len(bound.steps) == 19


def test_values_of_unlike_certainty_cost_no_more_than_they_must():
    """Coordinates of deviation 0.01, 0.2 and 0.7, told apart by where they lie: each has its best variance.

    One variance for all of a level, their mean, costs 0.4 nats more.
    """
    schedule = NoiseSchedule.uniform(100)
    mean, v = torch.tensor([-0.9, 0.5, 4.0]), torch.tensor([1e-4, 0.04, 0.5])
    density = GaussianMixture.gaussian(mean, v.diag())
    bound, truth = bound_and_truth(density, schedule, num=10_000)
    x = density.sample(10_000, torch.Generator().manual_seed(0))
    single = variational_bound(ExactDenoiser(density, schedule), x, groups=1)
    assert float((single.nats - bound.nats).mean()) == pytest.approx(0.42, abs=0.03)
    a, s = schedule.a[-2], schedule.s[-2]
    marginal = a**2 * v + s**2
    gap = 0.5 * float((marginal - 1 - marginal.log() + a**2 * mean**2).sum())  # of the prior alone
    difference = bound.nats - truth
    assert float(difference.mean()) == pytest.approx(gap, abs=0.02 + 4 * stderr(difference))
    assert 4 * stderr(difference) < 0.1


def test_the_bound_depends_on_the_seed_alone():
    schedule = NoiseSchedule.uniform(10)
    model, x = ExactDenoiser(MIXTURE, schedule), MIXTURE.sample(11, torch.Generator().manual_seed(0))
    first, again = variational_bound(model, x, seed=1), variational_bound(model, x, seed=1, batch_size=3)
    torch.testing.assert_close(first.nats, again.nats)
    assert not torch.equal(first.nats, variational_bound(model, x, seed=2).nats)


def test_levels_measured_on_a_part_of_the_images_give_the_same_bound():
    schedule = even_in_log_snr(T=60, smallest=0.05)
    model, x = ExactDenoiser(MIXTURE, schedule), MIXTURE.sample(2000, torch.Generator().manual_seed(0))
    whole, part = variational_bound(model, x), variational_bound(model, x, every=7, seed=1)
    assert part.nats.shape == whole.nats.shape and len(part.steps) == len(whole.steps)
    error = math.hypot(stderr(whole.nats), stderr(part.nats))
    assert stderr(whole.nats) < stderr(part.nats) < 3 * stderr(whole.nats)
    assert float(part.nats.mean()) == pytest.approx(float(whole.nats.mean()), abs=3 * error)
    assert sum(part.steps) == pytest.approx(sum(whole.steps), abs=3 * error)
    with pytest.raises(UserError, match="13 images: .* give 14"):
        variational_bound(model, x[:13], every=7)


@pytest.mark.parametrize(
    ("num", "levels", "told"),
    [(1, None, "1 image"), (4, [0, 3], "1 to T = 10"), (4, [3, 11], "1 to T = 10"), (4, [], "1 to T = 10")],
    ids=["one image", "level 0", "above T", "none"],
)
def test_bad_requests_are_named(num, levels, told):
    model = ExactDenoiser(MIXTURE, NoiseSchedule.uniform(10))
    with pytest.raises(UserError, match=told):
        variational_bound(model, torch.zeros(num, 2).double(), levels=levels)


def test_there_is_at_least_one_group():
    model = ExactDenoiser(MIXTURE, NoiseSchedule.uniform(10))
    with pytest.raises(UserError, match="groups is 0"):
        variational_bound(model, torch.zeros(4, 2).double(), groups=0)
