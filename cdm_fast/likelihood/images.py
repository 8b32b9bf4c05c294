"""What every measurement of likelihood shares: images at a noise level, units, standard errors.

# B batch, n images, d = C*H*W, N grey levels
"""

import math

import torch
from torch import Tensor

from cdm_fast.data import ImageData, bits_of_interval
from cdm_fast.discriminative import Classifier
from cdm_fast.errors import UserError
from cdm_fast.model import CDM, DDM, Denoiser, prototype
from cdm_fast.schedule import NoiseSchedule


def require_denoiser(model: Denoiser) -> None:
    """UserError for a classifier, which has neither denoiser nor likelihood."""
    if isinstance(model, Classifier):
        raise UserError("this is a classifier, which has no likelihood: train with --objective cdm")


def require_likelihood(model: Denoiser) -> None:
    """UserError for a model without a likelihood."""
    if not isinstance(model, CDM):
        kind = "plain denoising model (DDM)" if isinstance(model, DDM) else "classifier"
        raise UserError(f"this is a {kind}, which has no likelihood: train with --objective cdm")


def like_network(model: Denoiser, x: Tensor) -> Tensor:
    """`x` in the dtype and on the device of the network's numbers."""
    return x.to(prototype(model))


def add_noise(schedule: NoiseSchedule, x: Tensor, level: int | Tensor, generator: torch.Generator) -> Tensor:
    """`x_t = a x + s eps`; `x` itself at level 0."""
    if isinstance(level, int) and level == 0:
        return x
    a, s = schedule.gather(level, x)
    return a * x + s * torch.randn(x.shape, generator=generator)


def bits_per_dim(log_prob: Tensor, data: ImageData) -> Tensor:
    """`-log2 p(x) / d + log2(N/2)` from nats; `log2((N-1)/2)` for pixels around points."""
    return -log_prob / nats_per_bit_per_dim(data) + bits_of_interval(data.num_grey_levels, data.pixels)


def nats_per_bit_per_dim(data: ImageData) -> float:
    """`d ln 2`: nats of a whole image in one bit per dimension."""
    return data.images[0].numel() * math.log(2)


def spread(first: int, last: int, most: int) -> list[int]:
    """All integers first..last, or `most` of them spread evenly."""
    count = min(most, last - first + 1)
    return sorted({round(float(t)) for t in torch.linspace(first, last, count, dtype=torch.float64)})
