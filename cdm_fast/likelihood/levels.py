"""Noise levels of single images, estimated from their density at every level; denoising errors by level.

# B batch, n images, L = T+2 noise levels, d = C*H*W, N bins of neighbouring levels, P probes
"""

import math
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cdm_fast.data import ImageData
from cdm_fast.data.draws import choose_images, draw_images
from cdm_fast.host.device import upload
from cdm_fast.host.distributed import by_rows
from cdm_fast.likelihood.units import require_denoiser
from cdm_fast.model import CDM, Denoiser, evaluation_mode
from cdm_fast.model.cdm import require_likelihood
from cdm_fast.model.schedule import evenly_spaced


@evaluation_mode
def estimate_level(model: Denoiser, y: Tensor, batch_size: int = 256) -> tuple[Tensor, Tensor]:
    """The noise of `y = x_0 + sigma n` by maximum likelihood over levels: `(level (n,) int64, sigma (n,))`.

    At the true level `a_t y` is distributed as `x_t`, so the density of y at level t is `p_t(a_t y) a_t^d`;
    levels 0..T are searched, first on a coarse grid and then around its best point. For a model that only
    denoises, the density as a function of sigma is integrated from its denoiser (`_by_diffusion`).

    Args:
        y: (n, *input_shape) in the units of the data ([-1, 1] plus noise); sigma is in the same units.
        batch_size: levels per evaluation.

    Raises:
        UserError: a classifier.
    """
    if not isinstance(model, CDM):
        level = _by_diffusion(model, y)
        return level, model.schedule.sigma.to(y.device, y.dtype)[level]
    T = model.schedule.T
    stride = max(1, math.isqrt(T))
    coarse = sorted({*range(0, T + 1, stride), T})
    levels = []
    for image in y:
        best = _most_likely(model, image, coarse, batch_size)
        fine = list(range(max(0, best - stride), min(T, best + stride) + 1))
        levels.append(_most_likely(model, image, fine, batch_size))
    level = upload(torch.tensor(levels), y.device)
    return level, model.schedule.sigma.to(y.device, y.dtype)[level]


@dataclass(frozen=True)
class SigmaCalibration:
    """Known noise against estimated noise, in units of the data ([-1, 1]).

    Fields:
        sigma: standard deviations of the added noise.
        median, low, high: median, 10th and 90th percentile over images of its estimates.
        num_images: number of images.
    """

    sigma: list[float]
    median: list[float]
    low: list[float]
    high: list[float]
    num_images: int

    def to_json(self) -> dict[str, Any]:
        """The fields, ready for `json.dumps`."""
        return asdict(self)


SIGMAS = (0.01, 2.0)  # range of the noise that a calibration adds, as far as the schedule covers it


@evaluation_mode
def calibrate_sigma(
    model: CDM, data: ImageData, num_images: int = 16, points: int = 8, seed: int = 0, batch_size: int = 256
) -> SigmaCalibration:
    """Adds noise with `points` known sigmas, evenly spaced in logarithm, to images, and estimates it.

    Args:
        num_images: number of images, drawn from `data` without replacement; all if there are fewer.
        points: number of sigmas.
        seed: seed of the images and their noise.
        batch_size: passed to `estimate_level`.

    Raises:
        UserError: a model without likelihood.
    """
    require_likelihood(model)
    generator = torch.Generator().manual_seed(seed)
    index, x = choose_images(data, num_images, generator)
    noisy = model.schedule.sigma[1:-1]
    least, most = max(SIGMAS[0], float(noisy[0])), min(SIGMAS[1], float(noisy[-1]))
    sigma = torch.logspace(math.log10(least), math.log10(most), points, dtype=torch.float64)
    q = torch.tensor([0.5, 0.1, 0.9], dtype=torch.float64)
    found = []
    for known in sigma.tolist():
        y = upload(x + known * torch.randn(x.shape, generator=generator), model.a.device)
        estimate = estimate_level(model, y, batch_size)[1].double().cpu()
        found.append(estimate.quantile(q))
    median, low, high = (values.tolist() for values in torch.stack(found, 1))
    return SigmaCalibration(sigma.tolist(), median, low, high, len(index))


@evaluation_mode
def denoise_blind(model: Denoiser, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Denoises `y = x_0 + sigma n` with unknown sigma: `(x0_hat like y, sigma (n,), level (n,) int64)`.

    Arguments and errors as in `estimate_level`.
    """
    level, sigma = estimate_level(model, y)
    a, _ = model.amplitudes(level, y)
    return model.predict_x0(a * y, level), sigma, level


@evaluation_mode
def mse_per_level(
    model: Denoiser, data: ImageData, max_levels: int = 25, num_images: int = 128, seed: int = 0
) -> tuple[list[int], list[float]]:
    """Denoising error by level: `(levels in 1..T, mean((eps_hat - eps)^2) at each)`.

    The error is per value, in units of the noise variance, on `num_images` images of `data`, drawn with
    replacement for each of at most `max_levels` evenly spaced levels.
    """
    levels = evenly_spaced(1, model.schedule.T, max_levels)
    generator = torch.Generator().manual_seed(seed)
    errors = []
    for t in levels:
        x = draw_images(data, num_images, generator)
        eps = torch.randn(x.shape, generator=generator)
        x_t = upload(model.schedule.noise(x, t, eps), model.a.device)
        eps_hat = by_rows(partial(model.denoise, level=t), x_t).cpu()
        errors.append(float((eps_hat - eps).square().mean()))
    return levels, errors


@evaluation_mode
def level_confusion(
    model: CDM, data: ImageData, bins: int = 25, num_images: int = 64, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The level posterior by true level, in N bins of levels: `(edges (N+1,) int64, matrix (N, N) float64)`.

    Row i is the mean posterior mass in every bin over `num_images` images at levels of bin i, and sums to 1.
    With fewer levels than `bins` every level has its own bin. Raises UserError for a model without
    likelihood.
    """
    require_likelihood(model)
    num_levels = model.schedule.num_levels
    edges = torch.linspace(0, num_levels, min(bins, num_levels) + 1).round().long()
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        x = draw_images(data, num_images, generator)
        level = torch.randint(low, high, (num_images,), generator=generator)
        x_t = upload(model.schedule.noise(x, level, generator=generator), model.a.device)
        posterior = by_rows(model.log_posterior, x_t).exp()
        mass = posterior.double().mean(dim=0).cpu().cumsum(0)
        rows.append(torch.diff(mass[edges[1:] - 1], prepend=torch.zeros(1, dtype=mass.dtype)))
    return edges, torch.stack(rows)


BLIND_LEVELS, BLIND_PROBES = 64, 8  # for the search without likelihood


def _by_diffusion(model: Denoiser, y: Tensor) -> Tensor:
    """The level (n,) in 1..T that maximises the density of `y = x_0 + sigma_t n`, from eps_hat alone.

    The density of y follows the heat equation, so its logarithm at fixed y has the slope
    `|eps_hat|^2 - sigma div_y eps_hat` in log sigma. The slope is integrated over levels evenly spaced in log
    sigma; the divergence is Hutchinson's estimate with fixed random signs.
    """
    require_denoiser(model)
    steps = min(BLIND_LEVELS, model.schedule.T)
    levels = model.schedule.grid(steps, "log_snr")[-2::-1]
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (BLIND_PROBES, *y.shape), generator=generator).to(y) * 2 - 1
    slope = torch.stack([_slope(model, y, t, signs) for t in levels])  # (m, n)
    log_sigma = model.schedule.sigma[levels].log().to(slope)
    rises = (slope[1:] + slope[:-1]) / 2 * log_sigma.diff()[:, None]
    best = torch.cat([torch.zeros_like(slope[:1]), rises.cumsum(0)]).argmax(0)
    return torch.tensor(levels, device=y.device)[best]


def _slope(model: Denoiser, y: Tensor, t: int, signs: Tensor) -> Tensor:
    """`d log p(y) / d log sigma` (n,), float64, at level t, from random signs (P, n, ...)."""
    a, s = float(model.schedule.a[t]), float(model.schedule.s[t])
    with torch.enable_grad():
        x = (a * y).requires_grad_()
        eps_hat = model.denoise(x, t)
    divergence = torch.stack(
        [(torch.autograd.grad(eps_hat, x, v, retain_graph=True)[0] * v).flatten(1).sum(1) for v in signs]
    ).mean(0)
    return eps_hat.detach().double().square().flatten(1).sum(1) - s * divergence.double()


def _most_likely(model: CDM, y: Tensor, levels: list[int], batch_size: int) -> int:
    """The t among `levels` that maximises `log p_t(a_t y) + d log a_t` for one `y` (*input_shape)."""
    log_density = []
    for first in range(0, len(levels), batch_size):
        level = upload(torch.tensor(levels[first : first + batch_size]), y.device)
        copies = y.expand(len(level), *y.shape)
        a, _ = model.amplitudes(level, copies)
        log_prob = model.log_prob(a * copies, level).double()
        log_density.append(log_prob + y.numel() * model.a[level].log())
    return levels[int(torch.cat(log_density).argmax())]
