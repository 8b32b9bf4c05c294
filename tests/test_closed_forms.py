"""The two theorems of CDM on densities with known noisy marginals, at every level of every schedule, in fp64.

The network returns exact logits, so every output of the model must be exact as well.
"""

import math

import pytest
import torch

from benchmarks.support.analytic import (
    ExactDenoiser,
    ExactNetwork,
    GaussianMixture,
    UniformPixels,
    eps_hat,
    flow_1d,
    gaussian_flow,
    log_posterior,
    noisy_sample,
    random_mixture,
)
from cdm_fast.errors import UserError
from cdm_fast.likelihood import flow_log_prob
from cdm_fast.model import CDM
from cdm_fast.model.schedule import SCHEDULES, NoiseSchedule
from cdm_fast.sampling import sample

T = 30
EXACT = {"rtol": 1e-8, "atol": 1e-8}

DENSITIES = {
    "gaussian-5d": random_mixture(dim=5, components=1, seed=1),
    "mixture-2d": random_mixture(dim=2, components=3, seed=2),
    "mixture-1d": random_mixture(dim=1, components=2, seed=3),
    "uniform-4d": UniformPixels(width=0.5, dim=4),
}


@pytest.fixture(params=sorted(SCHEDULES))
def schedule(request):
    return NoiseSchedule.by_name(request.param, T)


@pytest.fixture(params=sorted(DENSITIES))
def density(request):
    return DENSITIES[request.param]


@pytest.fixture(params=["flat-prior", "falling-prior"])
def level_prior(request):
    return None if request.param == "flat-prior" else torch.linspace(3, 1, T + 2, dtype=torch.float64)


@pytest.fixture
def model(density, schedule, level_prior):
    return CDM(ExactNetwork(density, schedule, level_prior), schedule, level_prior)


def lowest_level(density):
    """Bounded support has no score and no likelihood ratio at level 0."""
    return 1 if isinstance(density, UniformPixels) else 0


def test_log_posterior(model, density, schedule, level_prior):
    x = noisy_sample(density, schedule, level=4, num=20)
    torch.testing.assert_close(
        model.log_posterior(x), log_posterior(density, schedule, x, level_prior), **EXACT
    )
    torch.testing.assert_close(model.log_posterior(x).exp().sum(1), torch.ones(20).double(), **EXACT)


def test_log_prob_of_every_level(model, density, schedule):
    x = noisy_sample(density, schedule, level=4, num=20)
    expected = density.log_prob(x, schedule.a, schedule.s)
    torch.testing.assert_close(model.log_prob_levels(x), expected, **EXACT)
    for level in range(T + 2):
        torch.testing.assert_close(model.log_prob(x, level), expected[:, level], **EXACT)
    mixed = torch.arange(20) % (T + 2)
    torch.testing.assert_close(model.log_prob(x, mixed), expected.gather(1, mixed[:, None])[:, 0], **EXACT)


def test_denoiser_and_score(model, density, schedule):
    for level in range(lowest_level(density), T + 2):
        x = noisy_sample(density, schedule, level, num=10, seed=level)
        expected = eps_hat(density, schedule, x, level)
        torch.testing.assert_close(model.denoise(x, level), expected, **EXACT)
        score = density.score(x, float(schedule.a[level]), float(schedule.s[level]))
        torch.testing.assert_close(model.score(x, level), score, **EXACT)


def test_predict_x0(model, density, schedule):
    for level in range(1, T + 1):
        a, s = schedule.a[level], schedule.s[level]
        x = noisy_sample(density, schedule, level, num=10, seed=level)
        got = model.predict_x0(x, level)
        # The error of eps_hat is magnified by s/a, which passes 1e4 at the noisy end of a clipped schedule.
        torch.testing.assert_close(
            got * a / (1 + a), (x - s * eps_hat(density, schedule, x, level)) / (1 + a), **EXACT
        )


def test_predict_x0_is_the_posterior_mean():
    """For a Gaussian E[x_0 | x_t] is the Kalman update, derived without a score."""
    density, schedule = DENSITIES["gaussian-5d"], NoiseSchedule.ot(T)
    mean, covariance = density.means[0], density.covariances[0]
    model = CDM(ExactNetwork(density, schedule), schedule)
    for level in range(1, T + 1):
        a, s = schedule.a[level], schedule.s[level]
        x = noisy_sample(density, schedule, level, num=10)
        gain = a * covariance @ torch.linalg.inv(a**2 * covariance + s**2 * torch.eye(5).double())
        torch.testing.assert_close(model.predict_x0(x, level), mean + (x - a * mean) @ gain.mT, **EXACT)


def test_predict_x0_refuses_pure_noise():
    schedule = NoiseSchedule.uniform(T)
    model = CDM(ExactNetwork(DENSITIES["mixture-2d"], schedule), schedule)
    with pytest.raises(UserError, match=f"level {T + 1} is pure noise"):
        model.predict_x0(torch.zeros(1, 2).double(), T + 1)


def test_levels_differ_within_a_batch(model, density, schedule):
    level = torch.arange(lowest_level(density), T + 2)
    x = noisy_sample(density, schedule, level=6, num=len(level))
    each = torch.cat([model.denoise(x[i : i + 1], int(t)) for i, t in enumerate(level)])
    torch.testing.assert_close(model.denoise(x, level), each, **EXACT)


def test_labels_select_the_component(schedule):
    density = DENSITIES["mixture-2d"]
    model = CDM(ExactNetwork(density, schedule), schedule)
    label = torch.tensor([2, 0, 1, 0])
    x = noisy_sample(density, schedule, level=5, num=4)
    torch.testing.assert_close(
        model.denoise(x, 5, label), ExactDenoiser(density, schedule).denoise(x, 5, label), **EXACT
    )
    expected = density.components_log_prob(x, schedule.a, schedule.s)[torch.arange(4), :, label]
    torch.testing.assert_close(model.log_prob_levels(x, label=label), expected, **EXACT)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no-grad", "inference"])
def test_denoise_without_grad_mode(mode):
    density, schedule = DENSITIES["mixture-2d"], NoiseSchedule.uniform(T)
    model = CDM(ExactNetwork(density, schedule), schedule)
    x = noisy_sample(density, schedule, level=5, num=4)
    with mode():
        got = model.denoise(x, 5)
    torch.testing.assert_close(got, eps_hat(density, schedule, x, 5), **EXACT)


def test_image_shapes(schedule):
    density = DENSITIES["uniform-4d"]
    model = CDM(ExactNetwork(density, schedule), schedule, input_shape=(1, 2, 2))
    x = noisy_sample(density, schedule, level=5, num=3)
    images = x.view(3, 1, 2, 2)
    torch.testing.assert_close(model.denoise(images, 5), model.denoise(x, 5).view_as(images), **EXACT)
    torch.testing.assert_close(model.log_prob_levels(images), model.log_prob_levels(x), **EXACT)


NOT_SQUARE = [(1, 3, 4), (2, 3, 2), (1, 1, 12), (3, 4, 1)]


@pytest.mark.parametrize("shape", NOT_SQUARE, ids=str)
def test_theorems_of_images_that_are_not_square(schedule, shape):
    density = random_mixture(dim=12, components=1, seed=4)
    model = CDM(ExactNetwork(density, schedule), schedule, input_shape=shape)
    for level in (0, 1, 6, T + 1):
        x = noisy_sample(density, schedule, level, num=5)
        images = x.view(5, *shape)
        expected = eps_hat(density, schedule, x, level).view(5, *shape)
        torch.testing.assert_close(model.denoise(images, level), expected, **EXACT)
        exact = density.log_prob(x, schedule.a[level : level + 1], schedule.s[level : level + 1])[:, 0]
        torch.testing.assert_close(model.log_prob(images, level), exact, **EXACT)


@pytest.mark.parametrize("shape", NOT_SQUARE, ids=str)
def test_ode_and_draws_of_images_that_are_not_square(shape):
    """As of rows of pixels, whose ODE tests/test_likelihood_ode.py has on every schedule."""
    density, schedule = random_mixture(dim=12, components=1, seed=4), NoiseSchedule.uniform(T)
    model = CDM(ExactNetwork(density, schedule), schedule, input_shape=shape)
    flow = flow_log_prob(model, images := density.sample(3, generator()).view(3, *shape), 1).log_prob
    rows = CDM(ExactNetwork(density, schedule), schedule)
    torch.testing.assert_close(flow, flow_log_prob(rows, images.flatten(1), 1).log_prob, **EXACT)
    drawn = sample(model, 3, steps=5, seed=1)
    assert drawn.shape == (3, *shape)
    torch.testing.assert_close(drawn.flatten(1), sample(rows, 3, steps=5, seed=1, shape=(12,)), **EXACT)


def generator():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("width", [0.25, 0.5, 1.0, 2.0, 3.0])
def test_uniform_pixels_have_log_prob_minus_log_width(width):
    """The check of the paper, on exact logits: log p_0(x) / d = -ln(width)."""
    schedule = NoiseSchedule.uniform(T)
    density = UniformPixels(width, dim=4)
    model = CDM(ExactNetwork(density, schedule), schedule)
    x = density.sample(50, torch.Generator().manual_seed(0))
    expected = torch.full((50,), -math.log(width), dtype=torch.float64)
    torch.testing.assert_close(model.log_prob(x) / 4, expected, **EXACT)


# The closed forms themselves.


def test_score_is_the_gradient_of_log_prob(density, schedule):
    for level in range(1, T + 2):
        x = noisy_sample(density, schedule, level, num=10).requires_grad_()
        a, s = schedule.a[level], schedule.s[level]
        (expected,) = torch.autograd.grad(density.log_prob(x, a[None], s[None]).sum(), x)
        torch.testing.assert_close(density.score(x.detach(), float(a), float(s)), expected, **EXACT)


def test_densities_integrate_to_one(schedule):
    for name in ("mixture-1d", "uniform"):
        density = UniformPixels(width=0.5, dim=1) if name == "uniform" else DENSITIES[name]
        x = torch.linspace(-15, 15, 60_001, dtype=torch.float64)[:, None]
        mass = density.log_prob(x, schedule.a, schedule.s).exp().sum(0) * 30 / 60_000
        torch.testing.assert_close(mass, torch.ones(T + 2).double(), rtol=0, atol=2e-3)


def test_samples_have_the_stated_moments():
    density = DENSITIES["mixture-2d"]
    x = density.sample(200_000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(x.mean(0), density.mean(), rtol=0, atol=0.02)
    torch.testing.assert_close(x.T.cov(), density.covariance(), rtol=0, atol=0.02)


def test_the_two_flow_maps_agree(schedule):
    """Quantiles on the line and standard deviations along the axes are the same map for a 1-D Gaussian."""
    density = GaussianMixture.gaussian(torch.tensor([0.4]), torch.tensor([[0.3]]))
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    for level in (1, 6, T):
        quantiles = flow_1d(density, schedule, x, level)
        torch.testing.assert_close(quantiles, gaussian_flow(density, schedule, x, level), rtol=0, atol=1e-9)
