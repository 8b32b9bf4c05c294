"""The sampler `blind`: the level that it finds, and what it draws from exact and from imperfect models."""

import pytest
import torch

from benchmarks.support.analytic import ExactNetwork, GaussianMixture
from cdm_fast import CDM, DDM, MLP, MLPDenoiser, NoiseSchedule, UserError
from cdm_fast.model.conditioned import Guided, OfClass
from cdm_fast.sampling import DDIM, Blind, blind, sample, sampler_name

SCHEDULE = NoiseSchedule.uniform(T=40)
DIM = 80


def gaussian():
    """Independent coordinates whose standard deviations are 0.1 to 0.6."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.rand(DIM, generator=generator) - 0.5
    return GaussianMixture.gaussian(mean, torch.linspace(0.1, 0.6, DIM).square().diag())


class Imperfect(CDM):
    """A model whose denoiser supposes a tenth less of the levels than it is told; its densities are exact."""

    def _less(self, level):
        return (0.9 * level).long().clamp(min=1)

    def ratio_gradient(self, x, level, label=None, guidance=0.0):
        return super().ratio_gradient(x, self._less(level), label, guidance)

    def logits_and_gradient_at(self, x, label=None, guidance=0.0):
        logits, gradient = super().logits_and_gradient_at(x, label, guidance)
        return logits, lambda level: gradient(self._less(level))


def drawn(kind, sampler, num=200):
    density = gaussian()
    model = kind(ExactNetwork(density, SCHEDULE), SCHEDULE, input_shape=(DIM,)).double()
    return density, sample(model, num, sampler, steps=40, seed=1, shape=(DIM,)).double()


def excess(density, x):
    """Mean over coordinates of the variance of x, over the true one, less 1."""
    return float((x.var(0) / density.covariances[0].diagonal() - 1).mean())


def test_draws_of_an_exact_model_have_the_mean_and_variance_of_the_data():
    """As far as those of DDPM with as many steps, whose variance is some 10 % too small here."""
    density, x = drawn(CDM, Blind())
    error = (x.mean(0) - density.mean()) / density.covariances[0].diagonal().sqrt()
    assert float(error.square().mean()) < 1.5 / len(x)
    assert abs(excess(density, x)) < abs(excess(*drawn(CDM, "ddpm")))


def test_noise_that_an_imperfect_model_mistakes_is_found_at_the_next_step():
    """What the imperfection does to the variance of the draws."""
    of_ddpm, of_blind = (
        abs(excess(*drawn(Imperfect, sampler)) - excess(*drawn(CDM, sampler)))
        for sampler in ("ddpm", Blind())
    )
    assert of_ddpm > 0.1
    assert of_blind < of_ddpm / 4


def test_an_image_is_denoised_at_its_own_level_whatever_the_grid_says():
    density = gaussian()
    model = CDM(ExactNetwork(density, SCHEDULE), SCHEDULE).double()
    generator = torch.Generator().manual_seed(2)
    x0, eps = density.sample(8, generator), torch.randn(8, DIM, dtype=torch.float64, generator=generator)
    x = SCHEDULE.noise(x0, torch.full((8,), 27), eps)
    level, _ = model.denoise_at_own_level(x, 15)
    assert bool(((level >= 20) & (level <= 27)).all())  # the nearest to 15 that is credible
    last = blind(model, x, None, [15, 0])
    torch.testing.assert_close(last, model.predict_x0(x, level))


def test_without_doubt_it_is_ddim():
    model = joint_model().double()
    for eta in (0.0, 0.7):
        expected = sample(model, 5, DDIM(eta), steps=12, label=1)
        torch.testing.assert_close(sample(model, 5, Blind(eta, credibility=1.0), steps=12, label=1), expected)


def test_the_level_is_the_nearest_that_is_credible():
    model, x = joint_model().double(), torch.randn(6, 5, dtype=torch.float64)
    posterior = model.log_prob_levels(x)[:, 1:-1].softmax(1).detach()
    for credibility in (0.0, 0.5, 0.9):
        for level in (1, 20, 40):
            own, _ = model.denoise_at_own_level(x, level, credibility=credibility)
            for p, found in zip(posterior, own.tolist(), strict=True):
                tails = [(float(p[: k + 1].sum()), float(p[k:].sum())) for k in range(len(p))]
                credible = [k + 1 for k, both in enumerate(tails) if min(both) >= (1 - credibility) / 2]
                assert found == min(credible, key=lambda k: abs(k - level))


@pytest.mark.parametrize("labelled", [False, True], ids=["unlabelled", "labelled"])
@pytest.mark.parametrize("conditioning", [None, "embedding", "joint"])
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_level_and_noise_of_one_evaluation_are_those_of_two(conditioning, labelled, guidance):
    if (labelled or guidance) and (conditioning is None or not labelled):
        pytest.skip("needs classes and a label")
    torch.manual_seed(0)
    classes = {} if conditioning is None else {"num_classes": 3, "conditioning": conditioning}
    network = MLP(5, SCHEDULE.num_levels, hidden=16, **classes)
    model = CDM(network, SCHEDULE, level_prior=torch.rand(SCHEDULE.num_levels) + 0.1).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    x = torch.linspace(0.1, 10, 7, dtype=torch.float64)[:, None] * torch.randn(7, 5, dtype=torch.float64)
    label = torch.arange(7) % 3 if labelled else None
    level, eps_hat = model.denoise_at_own_level(x, 20, label, guidance, credibility=0.0)
    assert len(level.unique()) > 1
    expected = model.guided_denoise(x, level, label, guidance) if guidance else model.denoise(x, level, label)
    torch.testing.assert_close(eps_hat, expected)


def joint_model():
    torch.manual_seed(0)
    model = CDM(MLP(5, SCHEDULE.num_levels, hidden=8, num_classes=3, conditioning="joint"), SCHEDULE)
    with torch.no_grad():
        model.network.linear_layer.weight.normal_()
    return model


def test_a_class_as_a_density_of_its_own_is_drawn_as_by_its_label():
    model = joint_model()
    of_class = sample(OfClass(model, 2), 4, Blind(), steps=10)
    torch.testing.assert_close(of_class, sample(model, 4, Blind(), steps=10, label=2))


def test_guidance_changes_the_draws():
    model = joint_model()
    plain, guided = (sample(model, 4, Blind(), steps=10, label=2, guidance=w) for w in (0.0, 2.0))
    assert not torch.allclose(plain, guided)


def test_auto_is_blind_where_the_model_knows_its_levels():
    model, ddm = joint_model(), DDM(MLPDenoiser(5, hidden=8, num_classes=3), SCHEDULE)
    assert [sampler_name("auto", each) for each in (model, OfClass(model, 0), Guided(model, 1.0))] == [
        "blind"
    ] * 3
    assert sampler_name("auto", ddm) == sampler_name("auto", Guided(ddm, 1.0)) == "ddim"
    torch.testing.assert_close(sample(ddm, 3, "auto", steps=5), sample(ddm, 3, DDIM(), steps=5))
    torch.testing.assert_close(sample(model, 3, "auto", steps=5), sample(model, 3, Blind(), steps=5))


def test_a_model_without_densities_is_refused():
    with pytest.raises(UserError, match="'blind' needs a CDM.*not DDM: choose 'ddpm'"):
        sample(DDM(MLPDenoiser(5, hidden=8), SCHEDULE), 3, "blind", steps=5)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_bad_eta(eta):
    with pytest.raises(UserError, match=f"is {eta}: it must lie between 0 and 1"):
        Blind(eta)
    with pytest.raises(UserError, match="credibility"):
        Blind(credibility=eta)
