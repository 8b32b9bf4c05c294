"""A cheap check of the normalisation: do the densities of neighbouring levels agree?

# n images of each level, d = C*H*W, T+2 noise levels
"""

import math
from dataclasses import dataclass

import torch

from cdm_fast.data import ImageData
from cdm_fast.data.draws import draw_images
from cdm_fast.host.device import upload
from cdm_fast.host.distributed import by_rows
from cdm_fast.likelihood.units import nats_per_bit_per_dim
from cdm_fast.model import CDM, evaluation_mode
from cdm_fast.model.cdm import require_likelihood
from cdm_fast.model.schedule import evenly_spaced
from cdm_fast.statistics import standard_error


@dataclass(frozen=True)
class RatioCheck:
    """How far the model's neighbouring levels are from normalised densities, measured on real images.

    The mean of `p_t / p_{t+1}` under `p_{t+1}` is 1 for normalised densities. The ratio is heavy-tailed,
    especially near the data: few images dominate the mean, and the error bar, computed from the same images,
    is too small if no rare large ratio is among them.

    Fields:
        levels: the levels t that are checked.
        log_mean_ratio: `log E[p_t / p_{t+1}]` in nats at each level; 0 for true densities.
        log_mean_ratio_stderr: its standard error, `std(ratio) / (mean(ratio) sqrt(n))`, in nats.
        worst: the largest absolute value of `log_mean_ratio`, in nats.
        worst_level: its level.
        sum_bits_per_dim: the sum of `log_mean_ratio` in bits/dim if every t in 0..T is checked, else None:
            the increase of bits/dim at level 0 when every level is rescaled to ratio 1. A positive sum means
            that the figure is too good.
        sum_bits_per_dim_stderr: its standard error; every level has its own images.
        num_images: images per level.
    """

    levels: list[int]
    log_mean_ratio: list[float]
    log_mean_ratio_stderr: list[float]
    worst: float
    worst_level: int
    sum_bits_per_dim: float | None
    sum_bits_per_dim_stderr: float | None
    num_images: int


@evaluation_mode
def ratio_check(
    model: CDM, data: ImageData, max_levels: int = 256, num_images: int = 128, seed: int = 0
) -> RatioCheck:
    """Mean ratio of neighbouring levels' densities on noised images of `data`; see `RatioCheck`.

    Args:
        max_levels: checks every t in 0..T, or at most this many evenly spaced levels.
        num_images: images per level, drawn with replacement.
        seed: seed of the images and their noise.

    Raises:
        UserError: a model without likelihood.
    """
    require_likelihood(model)
    levels = evenly_spaced(0, model.schedule.T, max_levels)
    generator = torch.Generator().manual_seed(seed)
    log_mean, error = [], []
    for t in levels:
        x = draw_images(data, num_images, generator)
        x_next = upload(model.schedule.noise(x, t + 1, generator=generator), model.a.device)
        log_prob = by_rows(model.log_prob_levels, x_next)
        ratio = (log_prob[:, t] - log_prob[:, t + 1]).double()
        log_mean.append(float(ratio.logsumexp(0)) - math.log(num_images))
        error.append(standard_error((ratio - log_mean[-1]).exp()))
    worst = max(range(len(levels)), key=lambda i: abs(log_mean[i]))
    complete = len(levels) == model.schedule.T + 1
    unit = nats_per_bit_per_dim(data)
    return RatioCheck(
        levels=levels,
        log_mean_ratio=log_mean,
        log_mean_ratio_stderr=error,
        worst=abs(log_mean[worst]),
        worst_level=levels[worst],
        sum_bits_per_dim=sum(log_mean) / unit if complete else None,
        sum_bits_per_dim_stderr=math.hypot(*error) / unit if complete else None,
        num_images=num_images,
    )
