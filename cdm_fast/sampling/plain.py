"""Plain samplers (DDPM, DDIM, DPM-Solver++, Heun, Euler): one explicit loop per algorithm.

Legend: B batch, t a level, t_prev the next one towards data, a = a[t], s = s[t], sigma = s/a.

Every loop visits the levels of a grid, such as `model.schedule.grid(50)`, from T down to 0, where it returns
x0_hat. `sample` starts it from x ~ N(0, I). Level T still contains a little signal, so the exact starting
distribution has mean a_T E[x_0] and covariance a_T^2 Cov[x_0] + s_T^2 I: the difference is of order a_T (0.1
for `uniform` at T = 200, 0.001 for `ot` at T = 1000) and vanishes as T grows.

The grid of the second-order samplers is evenly spaced in log-SNR by default: on data with closed-form scores
they reach their order of convergence only on such a grid (with even spacing in the level index the first
steps are too long). The other samplers do better with even spacing in the level index.

These samplers use only `schedule`, `denoise` and `predict_x0` of a model, so a wrapper that changes what
these return (`Guided`) needs no sampler of its own. The samplers of `corrected.py` also use `log p_t`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import expm1, sqrt

import torch
from torch import Tensor

from cdm_fast.errors import UserError
from cdm_fast.model import Denoiser
from cdm_fast.model.schedule import Spacing
from cdm_fast.sampling.sampler import Callback, Noise, Run, Sampler, Step


def ddpm(
    model: Denoiser,
    x: Tensor,  # (B, ...) at level grid[0]
    noise: Noise,
    grid: Sequence[int],
    label: Tensor | None = None,  # (B,) int64
    *,
    callback: Callback | None = None,
) -> Tensor:
    """Ancestral sampling: x_prev ~ q(x_prev | x_t, x0_hat), the exact posterior of a step of any length.

    With `x_t = r x_prev + sqrt(v) z`, `r = a/a_prev`, `v = s^2 - r^2 s_prev^2` it is Gaussian with mean
    `a_prev (v/s^2) x0_hat + r (s_prev^2/s^2) x_t` and variance `v s_prev^2/s^2`; for a variance-preserving
    schedule, DDPM eqs. 6-7 (arXiv 2006.11239). `ddim` with eta = 1 samples from the same distribution.
    """
    a, s = model.schedule.a.tolist(), model.schedule.s.tolist()
    for t, t_prev in pairwise(grid):
        x0_hat = model.predict_x0(x, t, label)
        r = a[t] / a[t_prev]
        v = s[t] ** 2 - (r * s[t_prev]) ** 2
        x = a[t_prev] * (v / s[t] ** 2) * x0_hat + r * (s[t_prev] / s[t]) ** 2 * x
        if t_prev > 0:
            x = x + sqrt(v) * (s[t_prev] / s[t]) * noise()
        if callback is not None:
            callback(Step(t_prev, x))
    return x


def ddim(
    model: Denoiser,
    x: Tensor,  # (B, ...) at level grid[0]
    noise: Noise,
    grid: Sequence[int],
    label: Tensor | None = None,  # (B,) int64
    *,
    eta: float = 0.0,
    callback: Callback | None = None,
) -> Tensor:
    """DDIM eq. 12 (arXiv 2010.02502) for any schedule: deterministic at eta = 0, as DDPM at eta = 1.

    `x_prev = a_prev x0_hat + sqrt(s_prev^2 - c^2) eps_hat + c z` with
    `c = eta s_prev sqrt(1 - (sigma_prev/sigma)^2)`.
    """
    a, s = model.schedule.a.tolist(), model.schedule.s.tolist()
    for t, t_prev in pairwise(grid):
        eps_hat = model.denoise(x, t, label)
        x0_hat = (x - s[t] * eps_hat) / a[t]
        c = eta * s[t_prev] * sqrt(1 - (s[t_prev] * a[t] / (a[t_prev] * s[t])) ** 2)
        x = a[t_prev] * x0_hat + sqrt(s[t_prev] ** 2 - c**2) * eps_hat
        if c > 0:
            x = x + c * noise()
        if callback is not None:
            callback(Step(t_prev, x))
    return x


def dpm_solver_pp_2m(
    model: Denoiser,
    x: Tensor,  # (B, ...) at level grid[0]
    noise: Noise,
    grid: Sequence[int],
    label: Tensor | None = None,  # (B,) int64
    *,
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++(2M), arXiv 2211.01095, algorithm 2: second order, one evaluation per step; deterministic.

    With `lambda = log(a/s)` and `h = lambda_prev - lambda` a step is
    `x_prev = (s_prev/s) x - a_prev (exp(-h) - 1) D`, `D = x0_hat + h/(2 h_before) (x0_hat - x0_hat_before)`.
    `x0_hat_before` and `h_before` are those of the previous step. The first step has no previous one and the
    last has h = inf: both use D = x0_hat.
    """
    a, s, log_snr = (table.tolist() for table in (model.schedule.a, model.schedule.s, model.schedule.log_snr))
    x0_before, h_before = None, 0.0
    for t, t_prev in pairwise(grid):
        x0_hat = model.predict_x0(x, t, label)
        h = (log_snr[t_prev] - log_snr[t]) / 2
        data = x0_hat
        if x0_before is not None and t_prev > 0:
            data = x0_hat + (x0_hat - x0_before) * (h / (2 * h_before))
        x = (s[t_prev] / s[t]) * x - a[t_prev] * expm1(-h) * data
        x0_before, h_before = x0_hat, h
        if callback is not None:
            callback(Step(t_prev, x))
    return x


def heun(
    model: Denoiser,
    x: Tensor,  # (B, ...) at level grid[0]
    noise: Noise,
    grid: Sequence[int],
    label: Tensor | None = None,  # (B,) int64
    *,
    callback: Callback | None = None,
) -> Tensor:
    """Heun's method on the probability-flow ODE, arXiv 2206.00364, algorithm 1; deterministic.

    With `y = x/a` the ODE is `dy/dsigma = eps_hat(a y, t)`. Two evaluations per step, one in the last.
    """
    a, sigma = model.schedule.a.tolist(), model.schedule.sigma.tolist()
    y = x / a[grid[0]]
    for t, t_prev in pairwise(grid):
        slope = model.denoise(a[t] * y, t, label)
        y_prev = y + (sigma[t_prev] - sigma[t]) * slope
        if t_prev > 0:
            slope_prev = model.denoise(a[t_prev] * y_prev, t_prev, label)
            y_prev = y + (sigma[t_prev] - sigma[t]) * (slope + slope_prev) / 2
        y = y_prev
        if callback is not None:
            callback(Step(t_prev, a[t_prev] * y))
    return y


def euler_ot(
    model: Denoiser,
    x: Tensor,  # (B, ...) at level grid[0]
    noise: Noise,
    grid: Sequence[int],
    label: Tensor | None = None,  # (B,) int64
    *,
    callback: Callback | None = None,
) -> Tensor:
    """Euler steps along `dx/ds = eps_hat - x0_hat`, the velocity of straight paths (arXiv 2210.02747).

    For the schedule `ot` it is the same map as `ddim` with eta = 0. Raises UserError unless a + s = 1.
    """
    a, s = model.schedule.a, model.schedule.s
    if not torch.allclose(a + s, torch.ones_like(s), rtol=0, atol=1e-9):
        raise UserError(
            f"sampler 'euler_ot' needs the schedule 'ot', and this model has {model.schedule.name!r}: "
            "choose another sampler, such as 'ddim'"
        )
    for t, t_prev in pairwise(grid):
        eps_hat = model.denoise(x, t, label)
        x0_hat = (x - float(s[t]) * eps_hat) / float(a[t])
        x = x + float(s[t_prev] - s[t]) * (eps_hat - x0_hat)
        if callback is not None:
            callback(Step(t_prev, x))
    return x


@dataclass(frozen=True)
class Plain(Sampler):
    """A sampler without options, built from its loop.

    Args:
        name: used in messages.
        run: the loop, such as `heun`.
        spacing: spacing of the levels if only their number is given.
    """

    name: str
    run: Run
    spacing: Spacing = "level"

    def prepare(
        self, model: Denoiser, grid: Sequence[int], shape: tuple[int, ...], label: Tensor | None
    ) -> Run:
        """`run` itself."""
        return self.run


@dataclass(frozen=True)
class DDIM(Sampler):
    """DDIM with an option for its noise (`ddim`).

    Args:
        eta: 0..1; 0 is deterministic, 1 samples from the distribution of DDPM.

    Raises:
        UserError: an eta outside 0..1.

    >>> DDIM(eta=1.0)
    DDIM(eta=1.0)
    """

    eta: float = 0.0
    name = "ddim"

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise UserError(
                f"eta is {self.eta}: it must lie between 0 (deterministic) and 1 (as noisy as DDPM)"
            )

    def prepare(
        self, model: Denoiser, grid: Sequence[int], shape: tuple[int, ...], label: Tensor | None
    ) -> Run:
        """`ddim` with this eta."""
        return partial(ddim, eta=self.eta)
