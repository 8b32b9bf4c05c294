"""The probability-flow likelihood against closed forms, Hutchinson's estimate against exact divergence."""

import math
import sys

import pytest
import torch
from torch import nn

from benchmarks.support.analytic import ExactDenoiser, ExactNetwork, noisy_sample, random_mixture
from cdm_fast import CDM, MLP, NoiseSchedule, UserError
from cdm_fast.likelihood import flow_log_prob
from cdm_fast.model import DDM
from cdm_fast.model.schedule import SCHEDULES

MIXTURE_2D = random_mixture(2, 8, seed=1)
MIXTURE_16D = random_mixture(16, 8, seed=2)
GAUSSIAN_4D = random_mixture(4, 1, seed=3)


def exact_log_prob(density, schedule, x, level):
    """(B,) nats."""
    return density.log_prob(x, schedule.a[level : level + 1], schedule.s[level : level + 1])[:, 0]


@pytest.mark.parametrize("level", [0, 1, 40], ids=lambda level: f"level-{level}")
@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize("density", [GAUSSIAN_4D, MIXTURE_2D], ids=["gaussian-4d", "mixture-2d"])
def test_flow_gives_the_closed_form_density(density, name, level):
    """What is left is the interpolation between 400 levels: 0.03 nats at worst, 0.002 on average."""
    schedule = NoiseSchedule.by_name(name, 400)
    x = noisy_sample(density, schedule, level, 100)
    got = flow_log_prob(ExactDenoiser(density, schedule), x, level)
    error = got.log_prob - exact_log_prob(density, schedule, x, level)
    assert float(error.abs().max()) < 0.03 and float(error.mean().abs()) < 0.002
    assert not got.probe_stderr.any()


def test_flow_single_pass_and_truth_agree_in_16_dimensions():
    schedule = NoiseSchedule.ot(200)
    model = CDM(ExactNetwork(MIXTURE_16D, schedule), schedule)
    x = MIXTURE_16D.sample(20, torch.Generator().manual_seed(0))
    truth = exact_log_prob(MIXTURE_16D, schedule, x, 0)
    torch.testing.assert_close(model.log_prob(x), truth, rtol=0, atol=1e-9)
    bits = 16 * math.log(2)
    flow = flow_log_prob(ExactDenoiser(MIXTURE_16D, schedule), x, tolerance=1e-4)
    error = (flow.log_prob - truth) / bits
    assert float(error.abs().mean()) < 0.002 and float(error.abs().max()) < 0.01  # bits/dim


def test_the_flow_is_blind_to_the_normalisation():
    """A network whose levels are off by constants has the same score: only the single pass is fooled."""
    schedule = NoiseSchedule.uniform(50)
    lie = torch.linspace(1, 9, 52)
    honest = CDM(ExactNetwork(MIXTURE_2D, schedule), schedule)
    lying = CDM(ExactNetwork(MIXTURE_2D, schedule, lie), schedule)
    x = noisy_sample(MIXTURE_2D, schedule, 5, 10)
    torch.testing.assert_close(flow_log_prob(lying, x, 5).log_prob, flow_log_prob(honest, x, 5).log_prob)
    shift = lying.log_prob(x, 5) - honest.log_prob(x, 5)
    torch.testing.assert_close(shift, (lie[5] / lie[51]).log().double().expand(10), rtol=0, atol=1e-6)


def test_hutchinson_agrees_with_the_exact_divergence_within_its_error_bar():
    schedule = NoiseSchedule.ot(60)
    model = ExactDenoiser(MIXTURE_16D, schedule)
    x = MIXTURE_16D.sample(40, torch.Generator().manual_seed(1))
    exact = flow_log_prob(model, x, probes=0, tolerance=1e-3)
    estimate = flow_log_prob(model, x, probes=8, seed=3, tolerance=1e-3)
    deviation = (estimate.log_prob - exact.log_prob) / estimate.probe_stderr
    # Student's t with 7 degrees of freedom: standard deviation 1.18, beyond 6 once in 2,000.
    assert 0.8 < float(deviation.std()) < 1.7 and float(deviation.abs().max()) < 6
    assert float((estimate.log_prob - exact.log_prob).mean().abs()) < 3 * float(
        estimate.probe_stderr.square().sum().sqrt() / 40
    )
    few = flow_log_prob(model, x[:3], probes=8, seed=3, tolerance=1e-3)
    assert bool(((few.log_prob - estimate.log_prob[:3]).abs() < 0.3 * few.probe_stderr).all())  # same probes


def test_the_figure_converges_with_the_tolerance():
    schedule = NoiseSchedule.ot(100)
    model = ExactDenoiser(MIXTURE_2D, schedule)
    x = MIXTURE_2D.sample(30, torch.Generator().manual_seed(1))
    loose, medium, tight = (flow_log_prob(model, x, tolerance=tol) for tol in (1e-3, 1e-5, 1e-7))
    first, second = ((a.log_prob - tight.log_prob).abs().max() for a in (loose, medium))
    assert float(second) < 1e-3 and float(second) < float(first) / 3
    assert loose.evaluations < medium.evaluations < tight.evaluations


def test_levels_on_the_way_have_their_own_densities():
    """One solve tells `log p_t` of its trajectory at every level above the start."""
    schedule = NoiseSchedule.ot(300)
    x = noisy_sample(MIXTURE_2D, schedule, 1, 50)
    flow = flow_log_prob(ExactDenoiser(MIXTURE_2D, schedule), x, 1, levels=[30, 150, 300])
    assert flow.levels == [30, 150, 300] and flow.x.shape == (3, 50, 2)
    for t, x_t, log_prob in zip(flow.levels, flow.x, flow.log_prob_at, strict=True):
        torch.testing.assert_close(log_prob, exact_log_prob(MIXTURE_2D, schedule, x_t, t), rtol=0, atol=0.01)


def test_a_network_with_an_adjoint_has_the_divergence_of_autograd():
    """The derivative of the explicit adjoint against the Hessian of the logits, through the whole flow."""
    schedule = NoiseSchedule.uniform(10)
    network = MLP(3, schedule.num_levels, hidden=16, depth=2).double()

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network

        def forward(self, x):
            return self.inner(x)

    x = torch.randn(5, 3, dtype=torch.float64)
    fast = flow_log_prob(CDM(network, schedule), x)
    general = flow_log_prob(CDM(Plain(), schedule), x)
    torch.testing.assert_close(fast.log_prob, general.log_prob, rtol=0, atol=1e-4)
    assert not any(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"level": 31}, "level 31"),
        ({"level": -1}, "level -1"),
        ({"level": 4, "levels": [4]}, "records levels above it"),
        ({"tolerance": 0.0}, "tolerance is 0.0"),
        ({"probes": 1}, "probes is 1"),
    ],
    ids=["above T", "below 0", "not above", "tolerance", "one probe"],
)
def test_bad_requests_are_named(arguments, told):
    schedule = NoiseSchedule.uniform(30)
    with pytest.raises(UserError, match=told):
        flow_log_prob(ExactDenoiser(MIXTURE_2D, schedule), torch.zeros(1, 2).double(), **arguments)


def test_a_missing_solver_is_a_user_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    schedule = NoiseSchedule.uniform(30)
    with pytest.raises(UserError, match=r"cdm_fast\[audit\]"):
        flow_log_prob(ExactDenoiser(MIXTURE_2D, schedule), torch.zeros(1, 2).double())


class Broken(nn.Module):
    """A noise predictor gone wrong."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(math.nan))

    def forward(self, x, level, label):
        return self.weight * x


def test_a_network_that_is_not_finite_is_a_user_error():
    with pytest.raises(UserError, match="gave up"):
        flow_log_prob(DDM(Broken(), NoiseSchedule.uniform(30)), torch.zeros(1, 2))
