"""The mixture at which the networks of a density start, and what is learned on top of it."""

import math

import numpy as np
import pytest
import torch

from benchmarks.support.analytic import GaussianMixture, random_mixture
from cdm_fast.errors import UserError
from cdm_fast.model.constants import fit_constants
from cdm_fast.model.schedule import even_in_log_noise
from cdm_fast.tables import CDMDensity
from cdm_fast.tables.density import LARGEST_EXCESS, _unless_overflowing, mixture_log_integral
from cdm_fast.tables.mixture import Mixture, choose_components, fit_mixture, held_out_scores
from cdm_fast.tables.network import new_model, start_at_mixture, table_network

DIM, COMPONENTS = 3, 4
SCHEDULE = even_in_log_noise(12, 0.05)


@pytest.fixture
def exact():
    """A random mixture, and a model in fp64 that starts at it."""
    density = random_mixture(DIM, COMPONENTS, seed=2)
    mixture = Mixture(density.means, density.covariances, density.weights.log())
    generator = torch.Generator().manual_seed(0)
    model = new_model([DIM], SCHEDULE, 16, 1, DIM, None, None, generator, components=COMPONENTS)
    start_at_mixture(model, mixture)
    return density, mixture, model.double().eval()


def test_the_start_is_the_mixture_at_every_level(exact):
    density, _, model = exact
    x = 2 * torch.randn(50, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    truth = density.log_prob(x, SCHEDULE.a, SCHEDULE.s)
    torch.testing.assert_close(model.log_prob_levels(x), truth, atol=2e-4, rtol=1e-5)
    for level in (0, 5, SCHEDULE.num_levels - 1):
        point = x.clone().requires_grad_(True)
        (score,) = torch.autograd.grad(density.log_prob(point, SCHEDULE.a, SCHEDULE.s)[:, level].sum(), point)
        torch.testing.assert_close(model.score(x, level), score, atol=1e-3, rtol=1e-4)


def assert_gradient_after_change(model, dim):
    """Changes all parameters at random and compares the score of rows (7, dim), returned, with autograd's."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=torch.float64))
    x = torch.randn(7, dim, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(model.log_prob_levels(x)[:, 3].sum(), x)
    torch.testing.assert_close(model.score(x.detach(), 3), gradient)
    return x.detach()


def test_the_adjoint_is_the_gradient_after_the_correction_has_changed(exact):
    _, _, model = exact
    x = assert_gradient_after_change(model, DIM)
    ratio = model.log_prob_levels(x) - model.log_prob_levels(x)[:, -1:]
    correction = table_network(model).correction(x)
    start_at_mixture(model.float(), exact[1])
    before = model.double().log_prob_levels(x)
    torch.testing.assert_close(ratio - correction, before - before[:, -1:], atol=1e-4, rtol=1e-4)


def test_constants_of_levels_are_found_without_labels(exact):
    density, _, model = exact
    wrong = torch.linspace(-1, 1, SCHEDULE.num_levels, dtype=torch.float64)
    table_network(model).linear_layer.shift(wrong)
    generator = torch.Generator().manual_seed(3)
    fit_constants(model, lambda num, _: (density.sample(num, generator), None), 60_000, generator)
    x = density.sample(100, generator)
    found = model.log_prob_levels(x) - density.log_prob(x, SCHEDULE.a, SCHEDULE.s)
    assert float(found.detach().abs().max()) < 0.1


def test_an_integral_above_one_is_seen_and_not_kept(exact):
    _, mixture, model = exact
    generator = torch.Generator().manual_seed(4)
    validate = _unless_overflowing(lambda model: 1.25, mixture, generator)
    assert mixture_log_integral(model, mixture.draw(100, generator)) == pytest.approx(0, abs=1e-9)
    assert validate(model) == 1.25
    by = torch.zeros(SCHEDULE.num_levels, dtype=torch.float64)
    by[0] = 2 * LARGEST_EXCESS
    table_network(model).linear_layer.shift(by)
    assert mixture_log_integral(model, mixture.draw(100, generator)) == pytest.approx(2 * LARGEST_EXCESS)
    assert validate(model) == math.inf
    with torch.no_grad():
        table_network(model).linear_layer.bias.fill_(math.nan)
    assert validate(model) == math.inf


def test_draws_of_a_mixture_have_its_moments(exact):
    density, mixture, _ = exact
    drawn = mixture.draw(200_000, torch.Generator().manual_seed(5))
    weights = mixture.log_weights.exp()
    mean = weights @ mixture.means
    second = torch.einsum("k,kij->ij", weights, mixture.covariances)
    second += torch.einsum("k,ki,kj->ij", weights, mixture.means, mixture.means)
    torch.testing.assert_close(drawn.mean(0), mean, atol=0.03, rtol=0)
    torch.testing.assert_close(drawn.T @ drawn / len(drawn), second, atol=0.1, rtol=0.02)


def test_the_number_of_components_is_that_of_separate_clusters():
    generator = torch.Generator().manual_seed(6)
    centres = 6 * torch.eye(3, dtype=torch.float64)
    z = centres[torch.randint(3, (600,), generator=generator)]
    z = z + 0.3 * torch.randn(600, 3, generator=generator, dtype=torch.float64)
    train, held_out = z.split([400, 200])
    assert choose_components(train, held_out_scores(train, held_out, 0), 0) == 3
    assert choose_components(train[:, :1] * 0 + torch.randn(400, 1).double(), np.zeros((10, 5)), 0) == 1
    fitted = fit_mixture(train, 3, 0)
    torch.testing.assert_close(fitted.means.sum(0), centres.sum(0), atol=0.2, rtol=0)


def test_a_narrow_mode_is_learned_from_few_rows_and_the_density_integrates_to_one():
    """Three quarters of the rows lie in a mode a fiftieth as wide as the rest."""
    generator = np.random.default_rng(7)
    narrow = generator.random(600) < 0.75
    x = np.where(narrow, 0.02 * generator.normal(size=600), generator.normal(2, 1, size=600))[:, None]
    density = CDMDensity(max_iter=200, random_state=0).fit(x[:300])
    assert density.num_components_ >= 2
    z = x[300:, 0]
    truth = np.logaddexp(
        math.log(0.75 / 0.02) - (z / 0.02) ** 2 / 2, math.log(0.25) - (z - 2) ** 2 / 2
    ) - 0.5 * math.log(2 * math.pi)
    assert density.score(x[300:]) > truth.mean() - 0.1
    grid = np.r_[np.linspace(-6, -0.2, 2000), np.linspace(-0.2, 0.2, 4000)[1:], np.linspace(0.2, 9, 3000)[1:]]
    assert np.trapezoid(np.exp(density.score_samples(grid[:, None])), grid) == pytest.approx(1, abs=0.03)
    drawn = density.sample(2000, random_state=1)[:, 0]
    assert np.mean(np.abs(drawn) < 0.1) == pytest.approx(0.75, abs=0.08)


def test_the_mixture_of_many_rows_is_as_good_as_their_number_allows():
    """Eight overlapping Gaussians, 47 parameters: the mean squared log ratio is about 47/n."""
    truth, num = random_mixture(2, 8, seed=0), 20_000
    rows = truth.sample(num + 5000, torch.Generator().manual_seed(0))
    rows, test = rows.split([num, 5000])
    mean, scale = rows.mean(0), rows.std(0)
    found = fit_mixture((rows - mean) / scale, 8, seed=0)
    one, zero = torch.ones(1).double(), torch.zeros(1).double()
    got = GaussianMixture(found.log_weights.exp(), found.means, found.covariances)
    log_prob = got.log_prob((test - mean) / scale, one, zero)[:, 0] - scale.log().sum()
    error = log_prob - truth.log_prob(test, one, zero)[:, 0]
    assert float(error.mean()) > -0.004 and float(error.square().mean()) < 3 * 47 / num


def test_one_component_on_request_and_bad_numbers_are_refused():
    x = np.random.default_rng(0).normal(size=(60, 2))
    density = CDMDensity(num_components=1, max_iter=20, random_state=0).fit(x)
    assert density.num_components_ == 1
    with pytest.raises(UserError, match="num_components is 0"):
        CDMDensity(num_components=0).fit(x)
    with pytest.raises(UserError, match="31 for 60 different rows: give at most 30"):
        CDMDensity(num_components=31).fit(x)


def test_scores_with_noise_are_those_of_the_noised_density():
    x = np.random.default_rng(1).normal(3.0, 2.0, size=(400, 1))
    density = CDMDensity(num_components=1, max_iter=20, score_noise=0.5, random_state=0).fit(x)
    z = np.linspace(-3, 9, 7)
    variance = x.var() * 1.25
    expected = -((z - x.mean()) ** 2) / (2 * variance) - math.log(2 * math.pi * variance) / 2
    np.testing.assert_allclose(density.score_samples(z[:, None]), expected, atol=0.1)
    np.testing.assert_allclose(
        density.decision_function(x), density.score_samples(x) - density.offset_, atol=1e-12
    )
    with pytest.raises(UserError, match="score_noise is -1"):
        CDMDensity(score_noise=-1).fit(x)
