"""Other programs' denoisers: a mixture's exact denoiser in each interface, against its closed form."""

from functools import partial

import pytest
import torch
from torch import nn

from benchmarks.support.analytic import random_mixture
from cdm_fast import UserError, sample
from cdm_fast.evaluation.class_scores import denoising_scores, ode_log_prob_classes
from cdm_fast.interop import (
    FlowMatching,
    LevelDenoiser,
    PathDenoiser,
    ScoreSDE,
    SigmaDenoiser,
    sigma_path,
    straight_path,
    sub_vp_path,
    ve_path,
    vp_path,
)
from cdm_fast.likelihood import denoise_blind, flow_log_prob, variational_bound
from cdm_fast.model.schedule import NoiseSchedule

MIXTURE = random_mixture(2, 3, seed=1, spread=0.5)
PATHS = {
    "vp": vp_path(),
    "sub-vp": sub_vp_path(),
    "ve": ve_path(),
    "sigma": sigma_path(),
    "straight": straight_path(),
    "straight-data-first": straight_path(1e-4, data_first=True),
}


def exact_score(y, alpha, beta, label=None):
    """(n, d) score of `y = alpha x_0 + beta eps`, alpha and beta (n, 1); label 3 is the whole mixture."""
    variance = alpha[:, None] ** 2 * MIXTURE.variances + beta[:, None] ** 2  # (n, M, d), along the axes
    along = torch.einsum("nd,mde->nme", y, MIXTURE.axes)
    residual = along - alpha[:, None] * torch.einsum("md,mde->me", MIXTURE.means, MIXTURE.axes)
    each = MIXTURE.weights.log() - 0.5 * (residual**2 / variance + variance.log()).sum(-1)
    if label is not None:
        other = (torch.arange(3) != label[:, None]) & (label < 3)[:, None]
        each = each.masked_fill(other, -torch.inf)
    return -torch.einsum("nm,mde,nme->nd", each.softmax(-1), MIXTURE.axes, residual / variance)


def exact_output(predicts, y, alpha, beta, rates=(0, 0), label=None):
    """What a perfect network says of y (n, d), from the density's score."""
    score = exact_score(y, alpha, beta, label)
    eps = -beta * score
    x0 = torch.where(alpha > 0, (y + beta**2 * score) / alpha, MIXTURE.mean())
    return {
        "eps": eps,
        "x0": x0,
        "score": score,
        "v": alpha * eps - beta * x0,
        "velocity": rates[0] * x0 + rates[1] * eps,
    }[predicts]


def by_time(path, predicts, y, time, label=None):
    """The exact network of a path, for a batch of any times and labels."""
    time = time.detach().double()
    columns = [value[:, None] for value in (*path.amplitudes(time), *path.rates(time))]
    return exact_output(predicts, y, *columns[:2], columns[2:], label)


def exact_log_prob(path, x):
    """(n,) nats, of the least noisy time."""
    alpha, beta = path.amplitudes(torch.tensor([path.least]).double())
    return MIXTURE.log_prob(x, alpha, beta)[:, 0]


def draw(num, seed=0):
    return MIXTURE.sample(num, torch.Generator().manual_seed(seed))


def wrapped(kind, path):
    """The kind's own wrapper around the exact network, called as that kind's networks are."""
    if kind in ("vp", "sub-vp"):
        return ScoreSDE(lambda y, label: by_time(path, "eps", y, label.double() / 999), kind, levels=100)
    if kind == "ve":
        low, high = 0.01, 50.0

        def network(y, sigma):
            time = (sigma.double() / low).log() / torch.tensor(high / low).double().log()
            return by_time(path, "score", y, time)

        return ScoreSDE(network, "ve", levels=100)
    if kind == "sigma":
        return SigmaDenoiser(lambda y, sigma: by_time(path, "x0", y, sigma.double().log()), levels=100)
    options = {"sigma_min": 1e-4, "data_first": True} if kind.endswith("first") else {}
    return FlowMatching(partial(by_time, path, "velocity"), levels=100, **options)


@pytest.mark.parametrize("kind", PATHS)
def test_each_kind_has_the_closed_form_likelihood(kind):
    """What is left is the prior at the path's end, N(0, beta^2 I): alpha |mean| |y| / beta^2 nats."""
    path = PATHS[kind]
    model, x = wrapped(kind, path), draw(16)
    flow = flow_log_prob(model, x, levels=[1, 50, 100])
    error = flow.log_prob - exact_log_prob(path, x)
    assert float(error.abs().max()) < 0.02 and float(error.mean().abs()) < 0.01
    for t, x_t, log_prob in zip(flow.levels, flow.x, flow.log_prob_at, strict=True):
        a, s = model.schedule.a[t : t + 1], model.schedule.s[t : t + 1]
        assert float((log_prob - MIXTURE.log_prob(x_t, a, s)[:, 0]).abs().max()) < 0.02
    later = flow_log_prob(model, flow.x[1], 50)
    torch.testing.assert_close(later.log_prob, flow.log_prob_at[1], rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "predicts"),
    [
        *(
            (kind, predicts)
            for kind in ("vp", "sub-vp", "ve", "sigma")
            for predicts in ("eps", "x0", "score")
        ),
        ("vp", "v"),
        ("vp", "velocity"),
        ("sigma", "velocity"),
        ("straight", "velocity"),
        ("straight", "score"),
    ],
)
def test_whatever_is_predicted_becomes_eps_hat(kind, predicts):
    path = PATHS[kind]
    model = PathDenoiser(partial(by_time, path, predicts), path, predicts, levels=10)
    x = draw(11)
    level = torch.arange(1, 11).repeat(2)[:11]
    for t in (1, 4, 10):
        a, s = float(model.schedule.a[t]), float(model.schedule.s[t])
        expected = -s * MIXTURE.score(x, a, s)
        torch.testing.assert_close(model.denoise(x, t), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(model.denoise(x, level)[level == t], expected[level == t])
    torch.testing.assert_close(model.denoise(x, 0), torch.zeros_like(x))
    torch.testing.assert_close(model.denoise(x, 11), x)


@pytest.mark.parametrize("kind", ["vp", "ve", "straight"])
def test_bound_and_samples(kind):
    path = PATHS[kind]
    model = PathDenoiser(partial(by_time, path, "velocity"), path, "velocity", levels=60, input_shape=(2,))
    x = draw(100)
    gap = variational_bound(model, x).nats + MIXTURE.log_prob(x, torch.ones(1), torch.zeros(1))[:, 0]
    assert 0 < float(gap.mean()) + 2 * float(gap.std()) / 10 and float(gap.mean()) < 0.4
    images = sample(model, 100, "dpm_solver_pp_2m", 20)
    assert float((images.mean(0) - MIXTURE.mean()).abs().max()) < 0.2
    assert float((images.T.cov() - MIXTURE.covariance()).abs().max()) < 0.15


@pytest.mark.parametrize("predicts", ["eps", "x0", "score", "v"])
def test_any_callable_on_levels(predicts):
    schedule = NoiseSchedule.cosine(100)

    def network(x, level):
        a, s = (table[level.long(), None] for table in (schedule.a, schedule.s))
        return exact_output(predicts, x, a, s)

    model = LevelDenoiser(network, schedule, predicts)
    x = draw(8)
    error = flow_log_prob(model, x).log_prob - MIXTURE.log_prob(x, schedule.a[:1], schedule.s[:1])[:, 0]
    assert float(error.mean().abs()) < 0.05 and float(error.abs().max()) < 0.3


def class_model():
    """A mixture's components as classes 0 to 2, and the mixture itself as the null class, 3."""
    return FlowMatching(
        partial(by_time, PATHS["straight"], "velocity"),
        levels=50,
        num_classes=3,
        null_label=3,
        input_shape=(2,),
    )


def test_classes():
    model, x = class_model(), draw(4)
    exact = torch.cat([MIXTURE.component(c).log_prob(x, torch.ones(1), torch.zeros(1)) for c in range(3)], 1)
    torch.testing.assert_close(ode_log_prob_classes(model, x, 3), exact.double(), rtol=0, atol=0.05)
    label = torch.tensor([0, 1, 2, -1])
    given = flow_log_prob(model, x, label=label).log_prob
    torch.testing.assert_close(given[:3], exact.double().diagonal(), rtol=0, atol=0.05)
    mixed = flow_log_prob(model, x).log_prob
    torch.testing.assert_close(mixed[3], given[3], rtol=0, atol=1e-3)
    scores = denoising_scores(model, x, 3, 40, torch.Generator().manual_seed(0))
    assert bool(((scores.argmax(1) == exact.argmax(1)).float().mean() >= 0.5).all())
    assert sample(model, 3, steps=5, label=1, guidance=1.0).shape == (3, 2)


def test_noise_blind_denoising_finds_the_noise():
    """48 pixels of one Gaussian: sigma is estimated to about sqrt(1/96) of itself."""
    from benchmarks.support.analytic import GaussianMixture

    density = GaussianMixture.gaussian(torch.zeros(48).double(), 0.04 * torch.eye(48).double())

    def network(y, sigma):
        return y * (0.04 / (0.04 + sigma.view(-1, 1).double() ** 2))

    model = SigmaDenoiser(network, levels=200)
    x = density.sample(40, torch.Generator().manual_seed(0))
    noise = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = x + 0.5 * noise
    clean, sigma, level = denoise_blind(model, y)
    assert float(sigma.median()) == pytest.approx(0.5, rel=0.1)
    assert bool(((sigma / 0.5 > 0.6) & (sigma / 0.5 < 1.6)).all())
    assert float((clean - x).square().mean()) < 1.1 * 0.04 * 0.25 / 0.29
    assert level.shape == (40,)


class Doubled(nn.Module):
    """A network of fp32 numbers that also returns a log-variance."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((), 0.5))

    def forward(self, y, t):
        assert y.dtype == torch.float32
        return torch.cat([self.weight * y, 9 * y], dim=1)


def test_a_learned_variance_is_left_out():
    model = PathDenoiser(Doubled(), vp_path(), "eps", levels=5)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(model.denoise(x, 2), 0.5 * x)


def constant(y, t, label=None):
    return y


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: PathDenoiser(constant, vp_path(), "noise"), "predicts is 'noise'"),
        (lambda: PathDenoiser(constant, ve_path(), "v"), "predicts is 'v'"),
        (lambda: LevelDenoiser(constant, NoiseSchedule.ot(5), "v"), "predicts is 'v'"),
        (lambda: LevelDenoiser(constant, NoiseSchedule.ot(5), "velocity"), "FlowMatching"),
        (lambda: ScoreSDE(constant, "vpsde"), "kind is 'vpsde'"),
        (lambda: vp_path(beta_min=-1.0), "beta from -1.0"),
        (lambda: sigma_path(sigma_min=0.0), "sigma from 0.0"),
        (lambda: straight_path(1.0), "sigma_min is 1.0"),
        (lambda: LevelDenoiser(constant, NoiseSchedule.ot(5), conditions=torch.ones(4)), "each of 5"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(build, told):
    with pytest.raises(UserError, match=told) as caught:
        build()
    assert "\n" not in str(caught.value)


def test_labels_are_asked_for_and_refused():
    model = PathDenoiser(constant, vp_path(), "eps", levels=5, num_classes=3)
    x = torch.randn(2, 4)
    with pytest.raises(UserError, match="no label was given"):
        model.denoise(x, 1)
    with pytest.raises(UserError, match="label 3 does not exist"):
        model.denoise(x, 1, torch.tensor([0, 3]))
    with pytest.raises(UserError, match="has no classes"):
        PathDenoiser(constant, vp_path(), "eps").denoise(x, 1, torch.tensor([0, 1]))
    with pytest.raises(UserError, match="returned"):
        PathDenoiser(lambda y, t: y[:, :1], vp_path(), "eps").denoise(x, 1)
