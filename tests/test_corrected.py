"""Corrected samplers draw from the model's distribution where the same steps without correction do not."""

import pytest
import torch

from benchmarks.support.analytic import ExactNetwork, random_mixture
from cdm_fast import CDM, DDM, MLP, MLPDenoiser, NoiseSchedule, UserError, sample
from cdm_fast.evaluation.quality import two_sample_test
from cdm_fast.model.conditioned import GuidedEnergy
from cdm_fast.sampling import MALA, SMC, ImageNoise, MoveLog

SCHEDULE = NoiseSchedule.uniform(60)
MIXTURE_2D = random_mixture(2, 8, seed=1)
MIXTURE_16D = random_mixture(16, 2, seed=2, spread=0.3)
LEVEL = 0.05  # of the two-sample tests, by 499 permutations: the smallest p-value is 0.002
NUM = 600


def exact_model(density):
    return CDM(ExactNetwork(density, SCHEDULE), SCHEDULE, input_shape=(density.dim,))


def p_value(density, sampler, steps):
    drawn = sample(exact_model(density), NUM, sampler, steps, seed=1, batch_size=NUM)
    return two_sample_test(drawn, density.sample(NUM, torch.Generator().manual_seed(2)), 499).p_value


@pytest.mark.parametrize(
    ("density", "steps"), [(MIXTURE_2D, 6), (MIXTURE_16D, 10)], ids=["2-d mixture", "16-d mixture"]
)
def test_moves_mend_few_steps(density, steps):
    """At the same levels: the plain sampler is found out, the corrected one is not."""
    assert p_value(density, "ddim", steps) < 0.01
    assert p_value(density, "mala", steps) > LEVEL


def test_paths_mend_few_steps():
    """Moves of several leapfrog steps: HMC."""
    assert p_value(MIXTURE_16D, MALA(moves=1, leapfrog=3), 10) > LEVEL


def test_particles_draw_from_the_model():
    assert p_value(MIXTURE_2D, "smc", 10) > LEVEL


def test_particles_part_after_resampling():
    drawn = sample(exact_model(MIXTURE_16D), 100, SMC(leapfrog=2), 5)
    apart = torch.cdist(drawn, drawn) + 9 * torch.eye(100)
    assert float((apart.min(1).values > 1e-9).double().mean()) > 0.6


@pytest.mark.parametrize("conditioning", ["joint", "embedding"])
def test_the_guided_energy_is_one_function(conditioning):
    """Its value is the guided combination of log-densities, its score that value's gradient."""
    torch.manual_seed(0)
    network = MLP(3, SCHEDULE.num_levels, hidden=16, num_classes=4, conditioning=conditioning).double()
    model = CDM(network, SCHEDULE, class_prior=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    guided = GuidedEnergy(model, 1.5)
    x, label = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 3, -1, 2, 1])
    log_prob, score = guided.log_prob_levels_and_score(x, 7, label)
    expected = 2.5 * model.log_prob_levels(x, label=label) - 1.5 * model.log_prob_levels(x)
    torch.testing.assert_close(log_prob, expected)
    variable = x.clone().requires_grad_()
    given = model.log_prob(variable, 7, label=label).sum() * 2.5 - model.log_prob(variable, 7).sum() * 1.5
    torch.testing.assert_close(score, torch.autograd.grad(given, variable)[0])
    torch.testing.assert_close(guided.denoise(x, 7, label), -SCHEDULE.s[7] * score)
    torch.testing.assert_close(guided.log_prob(x, 7, label=label), expected[:, 7])


@pytest.mark.parametrize("sampler", ["mala", "smc"])
def test_classes(sampler):
    """Components of a mixture as classes: every image is of its class, and the log tells of every level."""
    density = random_mixture(2, 2, seed=4, spread=2.0)
    label, log = torch.arange(60) % 2, MoveLog()
    drawn = sample(exact_model(density), 60, sampler, 12, label=label, callback=log)
    nearest = torch.cdist(drawn, density.means).argmin(1)
    assert bool((nearest == label).all())
    found = log.to_json()
    assert found["levels"][0] == 60 and found["levels"][-1] == 1 and len(found["step_size"]) == 12
    assert all(0.2 < rate < 0.95 for rate in found["acceptance"])
    assert set(log.moved.values()) == {120}
    torch.testing.assert_close(drawn, sample(exact_model(density), 60, sampler, 12, label=label))


@pytest.mark.parametrize("leapfrog", [1, 3])
def test_batches_do_not_change_an_image(leapfrog):
    model = exact_model(MIXTURE_2D)
    whole = sample(model, 10, MALA(1, leapfrog), 5, seed=3)
    again = sample(model, 10, MALA(1, leapfrog), 5, seed=3, batch_size=4)
    torch.testing.assert_close(again, whole)
    assert not torch.allclose(whole, sample(model, 10, MALA(moves=2), 5, seed=3))


def test_uniform_draws():
    noise = ImageNoise(0, slice(0, 4000), (2,), torch.zeros(1))
    u = noise.uniform()
    assert u.dtype == torch.float64 and float(u.min()) > 0 and float(u.max()) < 1
    assert float(u.mean()) == pytest.approx(0.5, abs=0.02) and float(u.var()) == pytest.approx(
        1 / 12, rel=0.05
    )
    assert not torch.equal(u, noise.uniform())
    part = ImageNoise(0, slice(5, 9), (2,), torch.zeros(1))
    torch.testing.assert_close(part.uniform(), u[5:9], rtol=0, atol=0)


@pytest.mark.parametrize("sampler", [MALA, SMC])
def test_what_is_refused(sampler):
    plain = DDM(MLPDenoiser(2, hidden=16), SCHEDULE)
    with pytest.raises(UserError, match="plain denoiser .DDM. does not"):
        sample(plain, 2, sampler(), 3)
    with pytest.raises(UserError, match="moves is 0"):
        sampler(moves=0)
    with pytest.raises(UserError, match="leapfrog is 0"):
        sampler(leapfrog=0)
    with pytest.raises(UserError, match=f"'{sampler.name}' compares log-densities, .* bf16 is too coarse"):
        sample(exact_model(MIXTURE_2D), 2, sampler(), 3, precision="bf16")
