"""Samplers on exact denoisers: order of convergence, distribution of the samples, determinism, bad values."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from benchmarks.support.analytic import (
    ExactDenoiser,
    ExactNetwork,
    GaussianMixture,
    flow_1d,
    gaussian_flow,
    random_mixture,
)
from cdm_fast.errors import UserError
from cdm_fast.model import CDM
from cdm_fast.model.schedule import SCHEDULES, NoiseSchedule
from cdm_fast.nn import UNet
from cdm_fast.sampling import DDIM, SAMPLERS, ImageNoise, ddim, ddpm, dpm_solver_pp_2m, euler_ot, heun, sample
from tests.accuracy import relative_error

GAUSSIAN = random_mixture(dim=3, components=1, seed=5)
MIXTURE = GaussianMixture(
    torch.tensor([0.3, 0.7]), torch.tensor([[-1.0], [0.6]]), torch.tensor([[[0.09]], [[0.16]]])
)
PROBLEMS = {"gaussian": (GAUSSIAN, gaussian_flow), "mixture": (MIXTURE, flow_1d)}

every_schedule = pytest.mark.parametrize("schedule_name", sorted(SCHEDULES))
every_problem = pytest.mark.parametrize("problem", sorted(PROBLEMS))


def silent() -> Tensor:
    raise AssertionError("a deterministic sampler drew noise")


def start(dim: int, num: int = 16) -> Tensor:
    return torch.randn(num, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def run_of(sampler):
    """The loop of a plain sampler, which needs to know nothing to be ready."""
    return sampler.prepare(None, [], (), None)


def errors(sampler, problem, schedule, steps, spacing):
    """Largest distance to the exact probability-flow map, for each number of steps."""
    density, flow = PROBLEMS[problem]
    model, x = ExactDenoiser(density, schedule), start(density.dim)
    exact = flow(density, schedule, x, schedule.T)
    return [float((sampler(model, x, silent, schedule.grid(n, spacing)) - exact).abs().max()) for n in steps]


@every_schedule
@every_problem
@pytest.mark.parametrize(
    ("name", "order", "final_error"),
    [
        pytest.param("ddim", 1, 0.05, id="ddim"),
        pytest.param("heun", 2, 0.003, id="heun"),
        pytest.param("dpm_solver_pp_2m", 2, 0.002, id="dpm_solver_pp_2m"),
    ],
)
def test_order_of_convergence(name, order, final_error, problem, schedule_name):
    steps, sampler = [32, 64, 128], SAMPLERS[name]
    schedule = NoiseSchedule.by_name(schedule_name, 4096)
    error = errors(run_of(sampler), problem, schedule, steps, sampler.spacing)
    assert error[-1] < final_error
    measured = math.log(error[0] / error[-1]) / math.log(steps[-1] / steps[0])
    assert order - 0.15 < measured < order + 0.35


@every_problem
def test_multistep_order_on_an_uneven_grid(problem):
    """Steps of changing log-SNR: the extrapolation has to use the ratio of the last two."""
    error = errors(dpm_solver_pp_2m, problem, NoiseSchedule.cosine(4096), [32, 128], "level")
    assert error[-1] < 4e-4
    assert math.log(error[0] / error[1]) / math.log(4) > 1.85


@every_problem
def test_euler_order_of_convergence(problem):
    error = errors(euler_ot, problem, NoiseSchedule.ot(4096), [32, 128], "level")
    assert error[-1] < 0.03
    assert 0.85 < math.log(error[0] / error[1]) / math.log(4) < 1.15


def test_a_cdm_is_sampled_like_the_exact_denoiser():
    """The whole chain: logits, input gradient, sampler, and the ODE's exact map."""
    schedule = NoiseSchedule.uniform(400)
    model = CDM(ExactNetwork(MIXTURE, schedule), schedule)
    x = start(1)
    grid = schedule.grid(60, "log_snr")
    got = dpm_solver_pp_2m(model, x, silent, grid)
    torch.testing.assert_close(got, dpm_solver_pp_2m(ExactDenoiser(MIXTURE, schedule), x, silent, grid))
    torch.testing.assert_close(got, flow_1d(MIXTURE, schedule, x, schedule.T), rtol=0, atol=0.01)


def test_euler_is_ddim_on_straight_paths():
    model, x = ExactDenoiser(GAUSSIAN, NoiseSchedule.ot(100)), start(3)
    grid = model.schedule.grid(13)
    torch.testing.assert_close(euler_ot(model, x, silent, grid), ddim(model, x, silent, grid))


@every_schedule
def test_one_step_returns_x0_hat(schedule_name):
    schedule = NoiseSchedule.by_name(schedule_name, 60)
    model, x = ExactDenoiser(MIXTURE, schedule), start(1)
    for sampler in (ddpm, ddim, dpm_solver_pp_2m, heun):
        torch.testing.assert_close(sampler(model, x, silent, [60, 0]), model.predict_x0(x, 60))


def reverse_step(schedule, t, t_prev):
    """q(x_prev | x_t, x_0) = N(to_x0 x_0 + to_x x_t, variance I), by conditioning their joint Gaussian."""
    a, a_prev, s, s_prev = schedule.a[t], schedule.a[t_prev], schedule.s[t], schedule.s[t_prev]
    covariance = (a / a_prev) * s_prev**2  # of x_prev and x_t, given x_0
    to_x = covariance / s**2
    return a_prev - to_x * a, to_x, s_prev**2 - to_x * covariance


def law_of_ddpm(density, schedule, steps):
    """Exact mean and covariance of what DDPM returns on a Gaussian: every step is affine in x plus noise."""
    mean_0, covariance_0 = density.means[0], density.covariances[0]
    eye = torch.eye(density.dim, dtype=torch.float64)
    mean, covariance = torch.zeros(density.dim, dtype=torch.float64), eye
    for t, t_prev in pairwise(schedule.grid(steps)):
        a, s = schedule.a[t], schedule.s[t]
        # x0_hat = mean_0 + gain (x - a mean_0)
        gain = a * covariance_0 @ torch.linalg.inv(a**2 * covariance_0 + s**2 * eye)
        to_x0, to_x, variance = reverse_step(schedule, t, t_prev)
        matrix = to_x0 * gain + to_x * eye
        mean = matrix @ mean + to_x0 * (mean_0 - a * gain @ mean_0)
        covariance = matrix @ covariance @ matrix.mT + variance * eye
    return mean, covariance


def assert_law(x, mean, covariance, slack=0.0):
    """Mean and covariance of draws x (N, d) within 4.5 standard errors (of Gaussian data) plus slack."""
    num, deviation = len(x), covariance.diagonal().sqrt()
    mean_error = ((x.mean(0) - mean).abs() - slack) / (deviation / math.sqrt(num))
    assert float(mean_error.max()) < 4.5
    scale = (deviation[:, None] ** 2 * deviation**2 + covariance**2).sqrt() / math.sqrt(num)
    covariance_error = ((x.mT.cov().view_as(covariance) - covariance).abs() - slack) / scale
    assert float(covariance_error.max()) < 4.5


@every_schedule
@pytest.mark.parametrize("steps", [4, 25])
@pytest.mark.parametrize("sampler", ["ddpm", DDIM(eta=1.0)], ids=["ddpm", "ddim-eta-1"])
def test_ancestral_law_with_strided_steps(sampler, steps, schedule_name):
    """The samples follow the exact law of the exact posterior's chain, however long the strides."""
    schedule = NoiseSchedule.by_name(schedule_name, 200)
    model = ExactDenoiser(GAUSSIAN, schedule)
    x = sample(model, 20_000, sampler, steps, seed=2, batch_size=20_000)
    assert_law(x, *law_of_ddpm(GAUSSIAN, schedule, steps))


@every_schedule
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0], ids="eta-{}".format)
def test_ddim_reaches_the_data(eta, schedule_name):
    """Any eta, half the levels skipped: mean and covariance of a mixture within sampling error + 2 %."""
    schedule = NoiseSchedule.by_name(schedule_name, 200)
    x = sample(ExactDenoiser(MIXTURE, schedule), 10_000, DDIM(eta), 100, seed=3, batch_size=10_000)
    assert_law(x, MIXTURE.mean(), MIXTURE.covariance(), slack=0.02)
    assert float((x < -0.3).double().mean()) == pytest.approx(_mass_below(-0.3), abs=0.02)


def _mass_below(value):
    deviations = (value - MIXTURE.means[:, 0]) / MIXTURE.variances[:, 0].sqrt()
    return float(torch.special.ndtr(deviations) @ MIXTURE.weights)


# `sample`: seeds, batches, labels, devices, bad values.


class TinyNetwork(nn.Module):
    """Float32 logits with dropout; x (B, 1, 3, 3)."""

    def __init__(self, num_levels: int, num_classes: int = 4) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(9, 16), nn.Linear(16, num_levels)
        self.embedding = nn.Embedding(num_classes, 16)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        h = self.hidden(x.flatten(1)).tanh()
        return self.head(self.dropout(h if label is None else h * self.embedding(label)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    schedule = NoiseSchedule.ot(20)
    return CDM(TinyNetwork(schedule.num_levels), schedule, input_shape=(1, 3, 3))


every_sampler = pytest.mark.parametrize("sampler", sorted(SAMPLERS))


@every_sampler
def test_same_seed_same_samples(model, sampler):
    first, again = (sample(model, 5, sampler, steps=6, seed=7) for _ in range(2))
    other = sample(model, 5, sampler, steps=6, seed=8)
    assert first.shape == (5, 1, 3, 3) and first.dtype == torch.float32
    assert torch.equal(first, again)
    assert not torch.isclose(first, other).any()
    assert not torch.isclose(first[0], first[1]).all()


@pytest.mark.parametrize("sampler", sorted(SAMPLERS.keys() - {"smc"}))  # whose batch is one population
def test_batch_size_does_not_matter(model, sampler):
    whole = sample(model, 11, sampler, steps=6, seed=1)
    for batch_size in (1, 4, 11):
        torch.testing.assert_close(sample(model, 11, sampler, steps=6, seed=1, batch_size=batch_size), whole)
    torch.testing.assert_close(sample(model, 3, sampler, steps=6, seed=1), whole[:3])


def test_bf16_rounds_the_network_and_not_the_images():
    torch.manual_seed(0)
    schedule = NoiseSchedule.uniform(T=10)
    model = CDM(
        UNet(
            8,
            1,
            schedule.num_levels,
            base_channels=32,
            multipliers=(1,),
            blocks_per_level=1,
            attention_resolutions=(),
            num_groups=8,
        ),
        schedule,
    )
    with torch.no_grad():
        model.network.linear_layer.weight *= 20
    exact, rounded = (sample(model, 4, steps=5, precision=precision) for precision in ("fp32", "bf16"))
    assert rounded.dtype == torch.float32
    assert 0 < relative_error(rounded, exact) < 0.02


def test_global_random_state_is_left_alone(model):
    before = torch.get_rng_state()
    first = sample(model, 4, "ddpm", steps=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(sample(model, 4, "ddpm", steps=5), first)


def test_dropout_is_off_and_every_mode_comes_back(model):
    model.train()
    first = sample(model, 4, steps=5)
    assert model.training and model.network.dropout.training
    model.network.dropout.eval()  # a frozen part of a network in training
    sample(model, 4, steps=5)
    assert model.training and model.network.training and not model.network.dropout.training
    model.eval()
    assert torch.equal(sample(model, 4, steps=5), first)
    assert not model.training


def test_labels_are_per_image(model):
    label = torch.tensor([0, 3, 1, 3, 2])
    mixed = sample(model, 5, steps=5, label=label, batch_size=2)
    for k in range(4):
        torch.testing.assert_close(mixed[label == k], sample(model, 5, steps=5, label=k)[label == k])


def test_labels_select_the_component():
    """Samples of a label follow that component's Gaussian."""
    density = random_mixture(dim=2, components=2, seed=4)
    schedule = NoiseSchedule.ot(100)
    model = CDM(ExactNetwork(density, schedule), schedule, input_shape=(2,))
    x = sample(model, 2000, "dpm_solver_pp_2m", 20, label=1, batch_size=2000)
    assert_law(x, density.means[1], density.covariances[1], slack=0.03)


def test_noise_is_standard_normal_and_independent():
    """Moments to the fourth, and no correlation between draws, images or pixels: 5 standard errors."""
    noise = ImageNoise(3, slice(0, 2000), (7, 5), torch.empty(0, dtype=torch.float64))
    first, second = noise().flatten(1), noise().flatten(1)
    limit = 5 / math.sqrt(first.numel())
    assert abs(float(first.mean())) < limit
    assert abs(float((first**2).mean()) - 1) < limit * math.sqrt(2)
    assert abs(float((first**4).mean()) - 3) < limit * math.sqrt(96)
    for one, other in ((first, second), (first[1:], first[:-1]), (first[:, 1:], first[:, :-1])):
        assert abs(float((one * other).mean())) < 1.1 * limit


@pytest.mark.parametrize(("num", "shape"), [(0, (1, 3, 3)), (1, (2,)), (3, (1,))])
def test_sizes(num, shape):
    schedule = NoiseSchedule.uniform(10)
    dim = math.prod(shape)
    network = ExactNetwork(random_mixture(dim, components=2), schedule)
    got = sample(CDM(network, schedule), num, steps=3, shape=shape)
    assert got.shape == (num, *shape) and got.dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"sampler": "magic"}, "unknown sampler 'magic': choose one of ddpm, ddim", id="sampler"),
        pytest.param({"steps": 0}, "from 1 to T = 20", id="no-steps"),
        pytest.param({"steps": 21}, "from 1 to T = 20", id="too-many-steps"),
        pytest.param({"num": -1}, "num is -1", id="num"),
        pytest.param({"batch_size": 0}, "batch_size is 0", id="batch-size"),
        pytest.param({"seed": -5}, "seed is -5", id="seed"),
        pytest.param(
            {"steps": [20, 5, 7, 0]}, r"steps is \[20, 5, 7, 0\]: give levels that fall", id="rising"
        ),
        pytest.param({"steps": [19, 5, 0]}, "fall from T = 20 to 0", id="grid-start"),
        pytest.param({"steps": [20, 5]}, "fall from T = 20 to 0", id="grid-end"),
        pytest.param({"steps": [20, 4.5, 0]}, "fall from T = 20 to 0", id="grid-of-floats"),
        pytest.param({"steps": []}, "fall from T = 20 to 0", id="no-grid"),
        pytest.param({"label": torch.tensor([1.0, 2.0])}, "float32", id="label-dtype"),
        pytest.param({"label": torch.tensor([1, 2, 3])}, r"pass int64 \(2,\)", id="label-shape"),
    ],
)
def test_bad_values(model, arguments, message):
    with pytest.raises(UserError, match=message):
        sample(model, **{"num": 2, "steps": 5, **arguments})


@pytest.mark.parametrize("eta", [1.5, -0.1, math.nan])
def test_bad_eta(eta):
    with pytest.raises(UserError, match=f"eta is {eta}: it must lie between 0"):
        DDIM(eta)


@every_sampler
def test_own_levels_and_what_a_callback_is_told(model, sampler):
    """The levels of a grid, in order, and the result at the end; neither changes what is drawn."""
    steps = []
    grid = model.schedule.grid(6, SAMPLERS[sampler].spacing)
    found = sample(model, 5, sampler, grid, seed=7, callback=steps.append)
    assert torch.equal(found, sample(model, 5, sampler, 6, seed=7))
    corrected = sampler in ("mala", "smc")
    assert [step.level for step in steps] == (grid if corrected else grid[1:])
    assert all(step.x.shape == (5, 1, 3, 3) for step in steps)
    torch.testing.assert_close(steps[-1].x, found)
    moved = [step.moves.count for step in steps[:-1] if step.moves is not None]
    assert moved == ([2] * 6 if corrected else [])


def test_unknown_shape(model):
    model.input_shape = None
    with pytest.raises(UserError, match="pass shape="):
        sample(model, 2, steps=5)


@pytest.mark.parametrize("name", ["linear", "uniform", "cosine"])
def test_euler_needs_straight_paths(name):
    model = ExactDenoiser(GAUSSIAN, NoiseSchedule.by_name(name, 20))
    with pytest.raises(UserError, match=f"needs the schedule 'ot', and this model has '{name}'"):
        sample(model, 2, "euler_ot", steps=5)
