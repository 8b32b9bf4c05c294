"""Seeded draws of a data set: dequantised batches, and images chosen at random.

# B batch, n images, C channels, H W pixels
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from cdm_fast.data.load import ImageData
from cdm_fast.data.pixels import dequantize

Protocol = Literal["dequantized", "paper"]


def draw_generator(seed: int, draw: int) -> torch.Generator:
    """The generator of one dequantisation draw of a data set, different for each `draw` of a seed."""
    return torch.Generator().manual_seed(seed * 1_000_003 + draw)


def batches(
    data: ImageData, batch_size: int, generator: torch.Generator, protocol: Protocol = "dequantized"
) -> Iterator[tuple[int, Tensor]]:
    """One pass over `data` in order: yields (index of its first image, images (B, C, H, W)) per batch.

    `protocol` "dequantized" adds uniform noise from the generator; "paper" uses the points 2u/(N-1) - 1, as
    in the public code of CDM.
    """
    for first in range(0, len(data.images), batch_size):
        images = data.images[first : first + batch_size]
        if protocol == "paper":
            yield first, dequantize(images, data.num_grey_levels, torch.full(images.shape, 0.5), "points")
        else:
            yield first, dequantize(images, data.num_grey_levels, generator, data.pixels)


def draw_images(data: ImageData, num: int, generator: torch.Generator) -> Tensor:
    """(num, C, H, W) dequantised images in [-1, 1], drawn with replacement."""
    index = torch.randint(len(data.images), (num,), generator=generator)
    return dequantize(data.images[index], data.num_grey_levels, generator, data.pixels)


def choose(count: int, num: int | None, generator: torch.Generator) -> Tensor:
    """(m,) int64 ascending indices of `num` of `count` images, drawn without replacement; None for all."""
    return torch.randperm(count, generator=generator)[:num].sort().values


def choose_images(data: ImageData, num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """min(num, n) images without replacement: (ascending index (m,) int64, dequantised (m, C, H, W))."""
    index = choose(len(data.images), num, generator)
    return index, dequantize(data.images[index], data.num_grey_levels, generator, data.pixels)
