"""What every measurement of likelihood shares: images at a noise level, units, standard errors.

# B batch, n images, d = C*H*W, N grey levels
"""

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from cdm_fast.data import ImageData, bits_of_interval, dequantize
from cdm_fast.discriminative import Classifier
from cdm_fast.errors import UserError
from cdm_fast.model import CDM, DDM, Denoiser, prototype
from cdm_fast.schedule import NoiseSchedule

Protocol = Literal["dequantized", "paper"]


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


def draw_generator(seed: int, draw: int) -> torch.Generator:
    """The randomness of one dequantisation draw of a whole data set."""
    return torch.Generator().manual_seed(seed * 1_000_003 + draw)


def batches(
    data: ImageData, batch_size: int, generator: torch.Generator, protocol: Protocol = "dequantized"
) -> Iterator[tuple[int, Tensor]]:
    """(index of the first image, images in [-1, 1]) of one pass over `data`."""
    for first in range(0, len(data.images), batch_size):
        images = data.images[first : first + batch_size]
        if protocol == "paper":  # the public code's 2u/255 - 1
            yield first, dequantize(images, data.num_grey_levels, torch.full(images.shape, 0.5), "points")
        else:
            yield first, dequantize(images, data.num_grey_levels, generator, data.pixels)


def draw_images(data: ImageData, num: int, generator: torch.Generator) -> Tensor:
    """(num, C, H, W) dequantised images, drawn with replacement."""
    index = torch.randint(len(data.images), (num,), generator=generator)
    return dequantize(data.images[index], data.num_grey_levels, generator, data.pixels)


def choose(count: int, num: int | None, generator: torch.Generator) -> Tensor:
    """(m,) which of `count` images: `num` different ones, or all, in order."""
    return torch.randperm(count, generator=generator)[:num].sort().values


def choose_images(data: ImageData, num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(index, dequantised images) of `num` different images, or of all if there are fewer, in order."""
    index = choose(len(data.images), num, generator)
    return index, dequantize(data.images[index], data.num_grey_levels, generator, data.pixels)


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
