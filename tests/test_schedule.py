"""Every schedule follows the one convention, at any T, and has the values of its source."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cdm_fast.errors import UserError
from cdm_fast.model import Denoiser
from cdm_fast.model.schedule import GRIDS, SCHEDULES, NoiseSchedule

names = st.sampled_from(sorted(SCHEDULES))
sizes = st.integers(1, 3000)


@settings(deadline=None)
@given(names, sizes)
def test_convention(name, T):
    schedule = NoiseSchedule.by_name(name, T)
    a, s = schedule.a, schedule.s
    assert (schedule.name, schedule.T, schedule.num_levels) == (name, T, T + 2)
    assert a.shape == s.shape == schedule.log_snr.shape == (T + 2,)
    assert a.dtype == s.dtype == torch.float64
    assert (a[0], s[0], a[-1], s[-1]) == (1, 0, 0, 1)
    assert bool(((a >= 0) & (a <= 1) & (s >= 0) & (s <= 1)).all())
    assert bool((schedule.log_snr.diff() < 0).all())
    assert schedule.log_snr[0] == math.inf and schedule.log_snr[-1] == -math.inf
    assert schedule.sigma[0] == 0 and schedule.sigma[-1] == math.inf


@settings(deadline=None)
@given(st.sampled_from(["linear", "uniform", "cosine"]), sizes)
def test_variance_preserving(name, T):
    schedule = NoiseSchedule.by_name(name, T)
    torch.testing.assert_close(schedule.a**2 + schedule.s**2, torch.ones(T + 2).double(), rtol=0, atol=1e-14)


@settings(deadline=None)
@given(sizes)
def test_ot_paths_are_straight(T):
    schedule = NoiseSchedule.ot(T)
    torch.testing.assert_close(schedule.a + schedule.s, torch.ones(T + 2).double(), rtol=0, atol=1e-15)
    torch.testing.assert_close(
        schedule.s.diff(), torch.full((T + 1,), 1 / (T + 1), dtype=torch.float64), rtol=0, atol=1e-15
    )


@settings(deadline=None)
@given(sizes)
def test_uniform_noise_is_even(T):
    expected = torch.full((T + 1,), 1 / (T + 1), dtype=torch.float64)
    torch.testing.assert_close(NoiseSchedule.uniform(T).s.diff(), expected, rtol=0, atol=1e-15)


def test_linear_is_ddpm():
    schedule = NoiseSchedule.linear(1000)
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    torch.testing.assert_close(schedule.a[1:-1] ** 2, (1 - beta).cumprod(0), rtol=1e-12, atol=0)
    assert float(schedule.s[1]) == pytest.approx(0.01, rel=1e-12)  # sqrt(1e-4)
    assert float(schedule.a[1000] ** 2) == pytest.approx(
        4.0358e-5, rel=1e-3
    )  # DDPM, section 4: KL(x_T) ~ 1e-5


@pytest.mark.parametrize("T", [100, 250, 4000])
def test_linear_scales_with_T(T):
    """The same noise at the same fraction of the way, up to terms of order 1/T - 1/1000."""
    expected, got = NoiseSchedule.linear(1000), NoiseSchedule.linear(T)
    for fraction in (0.25, 0.5, 1.0):
        difference = got.log_snr[round(T * fraction)] - expected.log_snr[round(1000 * fraction)]
        assert abs(float(difference)) < 100 * abs(1 / T - 1 / 1000)


@pytest.mark.parametrize("T", [1, 2, 5, 10, 20])
def test_linear_small_T_is_clipped(T):
    """Betas stretched past 1 keep a thousandth of the signal's variance."""
    ratio = NoiseSchedule.linear(T).a[1:-1] / NoiseSchedule.linear(T).a[:-2]
    assert float(ratio.min()) >= math.sqrt(1e-3) * (1 - 1e-12)


def test_cosine_is_nichol_dhariwal():
    schedule = NoiseSchedule.cosine(1000)
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    expected = torch.tensor([f[t] / f[0] for t in range(999)], dtype=torch.float64)
    torch.testing.assert_close(schedule.a[:999] ** 2, expected, rtol=1e-9, atol=0)
    assert float(schedule.a[1000] / schedule.a[999]) == pytest.approx(math.sqrt(1e-3))  # clipped at 0.999


@settings(deadline=None)
@given(names, st.integers(1, 400), st.sampled_from(sorted(GRIDS)), st.data())
def test_grids_fall_from_T_to_0(name, T, spacing, data):
    steps = data.draw(st.integers(1, T))
    grid = NoiseSchedule.by_name(name, T).grid(steps, spacing)
    assert len(grid) == steps + 1
    assert grid[0] == T and grid[-1] == 0
    assert all(t > t_prev for t, t_prev in pairwise(grid))


def test_all_levels_are_visited_in_T_steps():
    for spacing in GRIDS:
        assert NoiseSchedule.cosine(30).grid(30, spacing) == list(range(30, -1, -1))


def test_grid_even_in_level():
    assert NoiseSchedule.uniform(1000).grid(4) == [1000, 750, 500, 250, 0]


def test_grid_even_in_log_snr():
    schedule = NoiseSchedule.uniform(100_000)
    levels = schedule.grid(8, "log_snr")[:-1]
    gaps = schedule.log_snr[levels].diff()
    assert levels[-1] == 1
    torch.testing.assert_close(gaps, gaps.mean().expand(7), rtol=0.1, atol=0)


def test_amplitudes_shapes_and_values():
    schedule = NoiseSchedule.ot(9)
    x = torch.zeros(3, 2, 4, 4)
    a, s = schedule.amplitudes(torch.tensor([0, 5, 10]), x)
    assert a.shape == s.shape == (3, 1, 1, 1) and a.dtype == s.dtype == torch.float32
    assert a.flatten().tolist() == [1.0, 0.5, 0.0] and s.flatten().tolist() == [0.0, 0.5, 1.0]
    assert schedule.amplitudes(5, x)[0].flatten().tolist() == [0.5, 0.5, 0.5]
    model = Denoiser(nn.Identity(), schedule)
    of_model = model.amplitudes(torch.tensor([0, 5, 10]), x)
    assert all(torch.equal(one, other) for one, other in zip(of_model, (a, s), strict=True))
    assert schedule.levels(7, x).tolist() == [7, 7, 7]
    assert schedule.levels(torch.zeros(0, dtype=torch.int64), x[:0]).shape == (0,)


def test_noise_is_the_definition():
    """At one level and at many, with given and with drawn noise, on the data's dtype; level 0 is the data."""
    schedule = NoiseSchedule.cosine(9)
    for dtype in (torch.float32, torch.float64):
        x0, eps = torch.randn(2, 3, 2, 4, dtype=dtype).unbind(0)
        level = torch.tensor([0, 4, 10])
        a, s = schedule.a[level].to(dtype).view(3, 1, 1), schedule.s[level].to(dtype).view(3, 1, 1)
        torch.testing.assert_close(schedule.noise(x0, level, eps), a * x0 + s * eps)
        torch.testing.assert_close(schedule.noise(x0, 4, eps)[1], schedule.noise(x0, level, eps)[1])
        drawn = torch.randn(x0.shape, generator=torch.Generator().manual_seed(5), dtype=dtype)
        found = schedule.noise(x0, level, generator=torch.Generator().manual_seed(5))
        torch.testing.assert_close(found, a * x0 + s * drawn)
        assert found.dtype == dtype
        assert schedule.noise(x0, 0) is x0
    with pytest.raises(UserError, match="level 11 does not exist"):
        schedule.noise(x0, 11)


@pytest.mark.parametrize("T", [0, -3, 2.5, True, "10", None], ids=str)
@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_bad_T(name, T):
    with pytest.raises(UserError, match="integer of at least 1"):
        NoiseSchedule.by_name(name, T)


def test_bad_name():
    with pytest.raises(UserError, match="'quadratic': choose one of linear, uniform, ot, cosine"):
        NoiseSchedule.by_name("quadratic", 10)


@pytest.mark.parametrize("steps", [0, -1, 11, 2.5], ids=str)
def test_bad_steps(steps):
    with pytest.raises(UserError, match="from 1 to T = 10"):
        NoiseSchedule.uniform(10).grid(steps)


def test_bad_spacing():
    with pytest.raises(UserError, match="'karras': choose one of level, log_snr"):
        NoiseSchedule.uniform(10).grid(5, "karras")


@pytest.mark.parametrize(
    ("level", "message"),
    [
        pytest.param(-1, "level -1 does not exist", id="negative"),
        pytest.param(12, "level 12 does not exist", id="beyond-noise"),
        pytest.param(torch.tensor([3, 12]), "level 12 does not exist", id="tensor-beyond-noise"),
        pytest.param(torch.tensor([3.0, 4.0]), "float32", id="float-tensor"),
        pytest.param(torch.tensor([3, 4, 5]), r"shape \(3,\)", id="other-batch"),
    ],
)
def test_bad_level(level, message):
    with pytest.raises(UserError, match=message):
        NoiseSchedule.uniform(10).amplitudes(level, torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("a", "s", "message"),
    [
        pytest.param([1.0, 0.5, 0.0], [0.0, 1.0], "one length", id="lengths"),
        pytest.param([0.9, 0.5, 0.0], [0.0, 0.5, 1.0], "clean data", id="start"),
        pytest.param([1.0, 0.5, 0.1], [0.0, 0.5, 1.0], "pure noise", id="end"),
        pytest.param([1.0, 1.5, 0.0], [0.0, 0.5, 1.0], r"\[0, 1\]", id="range"),
        pytest.param([1.0, 0.3, 0.6, 0.0], [0.0, 0.7, 0.4, 1.0], "must fall", id="order"),
        pytest.param([1.0, math.nan, 0.0], [0.0, 0.5, 1.0], r"\[0, 1\]", id="nan"),
    ],
)
def test_bad_amplitudes(a, s, message):
    with pytest.raises(UserError, match=message):
        NoiseSchedule("mine", torch.tensor(a), torch.tensor(s))


def test_own_amplitudes():
    schedule = NoiseSchedule("mine", torch.tensor([1.0, 0.7, 0.2, 0.0]), torch.tensor([0.0, 0.5, 0.9, 1.0]))
    assert schedule.T == 2 and schedule.grid(2) == [2, 1, 0]
