"""The noise paths of other programs in continuous time; each function returns a `NoisePath`."""

import math

import torch
from torch import Tensor

from cdm_fast.errors import UserError
from cdm_fast.model.schedule import NoisePath


def vp_path(beta_min: float = 0.1, beta_max: float = 20.0, least: float = 1e-5) -> NoisePath:
    """The variance-preserving SDE: `alpha = exp(-h/2)`, `beta = sqrt(1 - exp(-h))`, time 0 (data) to 1, with
    `h = beta_min time + (beta_max - beta_min) time^2 / 2` (arXiv 2011.13456, eq. 33).

    least: the time at which likelihoods begin, as in the authors' code.
    """
    _require_betas(beta_min, beta_max)

    def amplitudes(time: Tensor) -> tuple[Tensor, Tensor]:
        h = _integrated(time, beta_min, beta_max)
        return (-h / 2).exp(), (-torch.expm1(-h)).sqrt()

    return NoisePath("VP-SDE", amplitudes, least, 1.0, lambda T: _even(least, 1.0, T))


def sub_vp_path(beta_min: float = 0.1, beta_max: float = 20.0, least: float = 1e-5) -> NoisePath:
    """The sub-VP SDE: alpha as in `vp_path`, `beta = 1 - exp(-h)` (arXiv 2011.13456, eq. 29)."""
    _require_betas(beta_min, beta_max)

    def amplitudes(time: Tensor) -> tuple[Tensor, Tensor]:
        h = _integrated(time, beta_min, beta_max)
        return (-h / 2).exp(), -torch.expm1(-h)

    return NoisePath("sub-VP-SDE", amplitudes, least, 1.0, lambda T: _even(least, 1.0, T))


def ve_path(sigma_min: float = 0.01, sigma_max: float = 50.0, least: float = 1e-5) -> NoisePath:
    """The variance-exploding SDE: `alpha = 1`, `beta = sigma_min (sigma_max/sigma_min)^time`
    (arXiv 2011.13456, eq. 31)."""
    low, high = _log_sigmas(sigma_min, sigma_max)

    def amplitudes(time: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(time), (low + (high - low) * time).exp()

    return NoisePath("VE-SDE", amplitudes, least, 1.0, lambda T: _even(least, 1.0, T))


def sigma_path(sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> NoisePath:
    """EDM's path: `y = x_0 + sigma eps` from `sigma_min` to `sigma_max`, with log sigma as time.

    The grid of levels is evenly spaced in `sigma^(1/rho)` (arXiv 2206.00364, eq. 5).
    """
    low, high = _log_sigmas(sigma_min, sigma_max)

    def amplitudes(time: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(time), time.exp()

    def times(T: int) -> Tensor:
        return rho * _even(math.exp(low / rho), math.exp(high / rho), T).log()

    return NoisePath("sigma", amplitudes, low, high, times)


def straight_path(sigma_min: float = 0.0, data_first: bool = False) -> NoisePath:
    """Straight lines of flow matching (arXiv 2210.02747), along which the model's velocity is defined.

    sigma_min: noise at the data end: `y = (1 - t) x_0 + (sigma_min + (1 - sigma_min) t) eps`.
    data_first: t is 0 at the data, as in diffusers; by default t runs from 0 (noise) to 1 (data), as in the
        paper and most code: `y = t x_0 + (1 - (1 - sigma_min) t) eps`.
    """
    if not 0 <= sigma_min < 1:
        raise UserError(f"sigma_min is {sigma_min}: give a noise at the data end from 0 to below 1")

    def amplitudes(time: Tensor) -> tuple[Tensor, Tensor]:
        noise = time if data_first else 1 - time
        return 1 - noise, sigma_min + (1 - sigma_min) * noise

    def times(T: int) -> Tensor:
        noise = torch.arange(1, T + 1, dtype=torch.float64) / (T + 1)
        return noise if data_first else 1 - noise

    least, most = (0.0, 1.0) if data_first else (1.0, 0.0)
    return NoisePath("straight", amplitudes, least, most, times)


def _integrated(time: Tensor, beta_min: float, beta_max: float) -> Tensor:
    return beta_min * time + (beta_max - beta_min) / 2 * time**2


def _even(first: float, last: float, T: int) -> Tensor:
    return torch.linspace(first, last, T, dtype=torch.float64)


def _require_betas(beta_min: float, beta_max: float) -> None:
    if not 0 < beta_min <= beta_max < math.inf:
        raise UserError(f"beta from {beta_min} to {beta_max}: give 0 < beta_min <= beta_max")


def _log_sigmas(sigma_min: float, sigma_max: float) -> tuple[float, float]:
    if not 0 < sigma_min < sigma_max < math.inf:
        raise UserError(f"sigma from {sigma_min} to {sigma_max}: give 0 < sigma_min < sigma_max")
    return math.log(sigma_min), math.log(sigma_max)
