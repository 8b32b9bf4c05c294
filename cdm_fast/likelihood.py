"""Likelihood of real data in bits per dimension, checks of it, and what else the level posterior tells.

Every bits/dim figure of one forward pass is *unaudited*: it is as good as the normalisation that the
classifier has learned. `ratio_check` is the first test of that.

# B batch, n images, d = C*H*W, L = T+2 noise levels, N grey levels
"""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cdm_fast.data import ImageData, dequantize
from cdm_fast.errors import UserError
from cdm_fast.model import CDM, Denoiser, measures

Protocol = Literal["dequantized", "paper"]


@dataclass(frozen=True)
class RatioCheck:
    """How far the model's neighbouring levels are from normalised densities, measured on real images.

    The mean of `p_t / p_{t+1}` under `p_{t+1}` is 1 for the true densities.

    Fields:
        levels: the t that were checked.
        log_mean_ratio: `log E[p_t / p_{t+1}]` in nats at each of them; 0 for true densities.
        worst: the largest absolute value among them, in nats.
        worst_level: where.
        sum_bits_per_dim: their sum in bits/dim, if every t in 0..T was checked, else None: by how much
            bits/dim at level 0 would rise were every level rescaled to ratio 1. Positive means that the
            figure is too good.
        num_images: images per level.
    """

    levels: list[int]
    log_mean_ratio: list[float]
    worst: float
    worst_level: int
    sum_bits_per_dim: float | None
    num_images: int


@dataclass(frozen=True)
class LikelihoodReport:
    """bits/dim of a data set and how it was measured; `per_image` (n,) holds the mean over draws.

    Fields:
        bits_per_dim: mean over images and draws.
        bits_per_dim_stderr: standard error over images of that mean.
        draw_spread: standard deviation of the mean between dequantisation draws; 0 for one draw.
    """

    bits_per_dim: float
    bits_per_dim_stderr: float
    draw_spread: float
    draws: int
    level: int
    method: str
    protocol: str
    num_images: int
    seconds: float
    images_per_second: float
    data: str
    split: str
    ratio_check: RatioCheck | None
    per_image: Tensor

    def to_json(self) -> dict[str, Any]:
        """Everything but the per-image values, ready for `json.dumps`."""
        fields = asdict(self)
        del fields["per_image"]
        return fields


@measures
def evaluate(
    model: CDM,
    data: ImageData,
    level: int = 0,
    draws: int = 3,
    batch_size: int = 500,
    seed: int = 0,
    protocol: Protocol = "dequantized",
    check_levels: int | None = None,
) -> LikelihoodReport:
    """bits/dim of `data` under the model's one-pass likelihood at `level`.

    `bits/dim = -log2 p_t(x_t) / d + log2(N / 2)`, with `x = 2 (u + U[0,1)) / N - 1` for grey values u (the
    protocol "paper" leaves the noise U out, as the paper's code does: a density at points, not comparable).

    Args:
        level: 0 for the data; above 0, `x_t = a x + s eps` is scored.
        draws: independent draws of dequantisation noise (and of eps).
        batch_size: images per forward pass.
        seed: of every draw; the result is a pure function of it.
        check_levels: at most this many levels in `ratio_check`; 0 skips the check. By default every level of
            a schedule of up to 256, or 64 levels of a longer one.

    Raises:
        UserError: a model without likelihood, a level outside 0..T+1, draws below 1, or an unknown protocol.
    """
    _require_likelihood(model)
    if draws < 1:
        raise UserError(f"draws is {draws}: at least one is needed")
    if protocol not in ("dequantized", "paper"):
        raise UserError(f"unknown protocol {protocol!r}: choose 'dequantized' or 'paper'")
    device = model.a.device
    dim = data.images[0].numel()
    offset = math.log2(data.num_grey_levels / 2)
    start = time.perf_counter()
    bits = torch.empty(draws, len(data.images), dtype=torch.float64)
    for draw in range(draws):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + draw)
        for first, x in _batches(data, batch_size, generator, protocol):
            x_t = _noise(model, x, level, generator).to(device)
            log_prob = model.log_prob(x_t, level).double().cpu()
            bits[draw, first : first + len(x)] = -log_prob / (dim * math.log(2)) + offset
    seconds = time.perf_counter() - start
    if check_levels is None:
        check_levels = 256 if model.schedule.T < 256 else 64
    check = ratio_check(model, data, check_levels, seed=seed) if check_levels else None
    per_image = bits.mean(dim=0)
    return LikelihoodReport(
        bits_per_dim=float(per_image.mean()),
        bits_per_dim_stderr=_stderr(per_image),
        draw_spread=float(bits.mean(dim=1).std()) if draws > 1 else 0.0,
        draws=draws,
        level=level,
        method="single",
        protocol=protocol,
        num_images=len(data.images),
        seconds=seconds,
        images_per_second=draws * len(data.images) / seconds,
        data=data.name,
        split=data.split,
        ratio_check=check,
        per_image=per_image,
    )


@measures
def ratio_check(
    model: CDM, data: ImageData, max_levels: int = 256, num_images: int = 128, seed: int = 0
) -> RatioCheck:
    """Mean ratio of neighbouring levels' densities on noised images of `data`; see `RatioCheck`.

    Args:
        max_levels: checks every t in 0..T, or this many of them spread evenly.
        num_images: images per level, drawn with replacement.
    """
    _require_likelihood(model)
    levels = _spread(0, model.schedule.T, max_levels)
    generator = torch.Generator().manual_seed(seed)
    log_mean = []
    for t in levels:
        x = _draw_images(data, num_images, generator)
        x_next = _noise(model, x, t + 1, generator).to(model.a.device)
        log_prob = model.log_prob_levels(x_next)
        ratio = (log_prob[:, t] - log_prob[:, t + 1]).double()
        log_mean.append(float(ratio.logsumexp(0)) - math.log(num_images))
    worst = max(range(len(levels)), key=lambda i: abs(log_mean[i]))
    complete = len(levels) == model.schedule.T + 1
    nats_per_bit_dim = data.images[0].numel() * math.log(2)
    return RatioCheck(
        levels=levels,
        log_mean_ratio=log_mean,
        worst=abs(log_mean[worst]),
        worst_level=levels[worst],
        sum_bits_per_dim=sum(log_mean) / nats_per_bit_dim if complete else None,
        num_images=num_images,
    )


@measures
def estimate_level(model: CDM, y: Tensor, batch_size: int = 256) -> tuple[Tensor, Tensor]:
    """The noise of `y = x_0 + sigma n`, by maximum likelihood over levels: `(level (n,) int64, sigma (n,))`.

    At the true level `a_t y` is distributed as `x_t`, so the density of y there is `p_t(a_t y) a_t^d`; levels
    0..T are searched, first on a coarse grid and then around its best.

    Args:
        y: (n, *input_shape) in the units of the data ([-1, 1] plus noise); sigma is in the same units.
    """
    _require_likelihood(model)
    T = model.schedule.T
    stride = max(1, math.isqrt(T))
    coarse = sorted({*range(0, T + 1, stride), T})
    levels = []
    for image in y:
        best = _most_likely(model, image, coarse, batch_size)
        fine = list(range(max(0, best - stride), min(T, best + stride) + 1))
        levels.append(_most_likely(model, image, fine, batch_size))
    level = torch.tensor(levels, device=y.device)
    return level, model.schedule.sigma.to(y.device, y.dtype)[level]


@measures
def denoise_blind(model: CDM, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Denoise `y = x_0 + sigma n` of unknown sigma: `(x0_hat like y, sigma (n,), level (n,) int64)`."""
    level, sigma = estimate_level(model, y)
    a, _ = model.amplitudes(level, y)
    return model.predict_x0(a * y, level), sigma, level


@measures
def mse_per_level(
    model: Denoiser, data: ImageData, max_levels: int = 25, num_images: int = 128, seed: int = 0
) -> tuple[list[int], list[float]]:
    """`(levels in 1..T, mean((eps_hat - eps)^2) at each)` on `num_images` images of `data`."""
    levels = _spread(1, model.schedule.T, max_levels)
    generator = torch.Generator().manual_seed(seed)
    errors = []
    for t in levels:
        x = _draw_images(data, num_images, generator)
        eps = torch.randn(x.shape, generator=generator)
        a, s = model.schedule.gather(t, x)
        eps_hat = model.denoise((a * x + s * eps).to(model.a.device), t).cpu()
        errors.append(float((eps_hat - eps).square().mean()))
    return levels, errors


@measures
def level_confusion(
    model: CDM, data: ImageData, bins: int = 25, num_images: int = 64, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """`(edges (bins+1,), matrix (bins, bins))`: true range of levels against the posterior's mass in each.

    Rows are true ranges and sum to 1. Fewer levels than `bins` give one range per level.
    """
    _require_likelihood(model)
    num_levels = model.schedule.num_levels
    edges = torch.linspace(0, num_levels, min(bins, num_levels) + 1).round().long()
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        x = _draw_images(data, num_images, generator)
        level = torch.randint(low, high, (num_images,), generator=generator)
        posterior = model.log_posterior(_noise(model, x, level, generator).to(model.a.device)).exp()
        mass = posterior.double().mean(dim=0).cpu().cumsum(0)
        rows.append(torch.diff(mass[edges[1:] - 1], prepend=torch.zeros(1, dtype=mass.dtype)))
    return edges, torch.stack(rows)


def _require_likelihood(model: Denoiser) -> None:
    if not isinstance(model, CDM):
        raise UserError(
            "this is a plain denoising model (DDM), which has no likelihood: train with --objective cdm"
        )


def _batches(
    data: ImageData, batch_size: int, generator: torch.Generator, protocol: Protocol
) -> Iterator[tuple[int, Tensor]]:
    """(index of the first image, images in [-1, 1]) of one pass over `data`."""
    for first in range(0, len(data.images), batch_size):
        images = data.images[first : first + batch_size]
        noise = generator if protocol == "dequantized" else torch.zeros(images.shape)
        yield first, dequantize(images, data.num_grey_levels, noise)


def _draw_images(data: ImageData, num: int, generator: torch.Generator) -> Tensor:
    """(num, C, H, W) dequantised images, drawn with replacement."""
    index = torch.randint(len(data.images), (num,), generator=generator)
    return dequantize(data.images[index], data.num_grey_levels, generator)


def _noise(model: CDM, x: Tensor, level: int | Tensor, generator: torch.Generator) -> Tensor:
    """`x_t = a x + s eps`; `x` itself at level 0."""
    if isinstance(level, int) and level == 0:
        return x
    a, s = model.schedule.gather(level, x)
    return a * x + s * torch.randn(x.shape, generator=generator)


def _most_likely(model: CDM, y: Tensor, levels: list[int], batch_size: int) -> int:
    """The t among `levels` that maximises `log p_t(a_t y) + d log a_t` for one `y` (*input_shape)."""
    scores = []
    for first in range(0, len(levels), batch_size):
        level = torch.tensor(levels[first : first + batch_size], device=y.device)
        copies = y.expand(len(level), *y.shape)
        a, _ = model.amplitudes(level, copies)
        log_prob = model.log_prob(a * copies, level).double()
        scores.append(log_prob + y.numel() * model.a[level].log())
    return levels[int(torch.cat(scores).argmax())]


def _spread(first: int, last: int, most: int) -> list[int]:
    """All integers first..last, or `most` of them spread evenly."""
    count = min(most, last - first + 1)
    return sorted({round(float(t)) for t in torch.linspace(first, last, count, dtype=torch.float64)})


def _stderr(values: Tensor) -> float:
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan
