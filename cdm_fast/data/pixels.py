"""Conversion between grey levels and a model's inputs: dequantisation, quantisation, display."""

# B images, C channels, H W pixels, N grey levels (0..N-1)

import math

import torch
from torch import Tensor

from cdm_fast.config import PixelMap
from cdm_fast.errors import UserError


def dequantize(
    images: Tensor, num_grey_levels: int, noise: Tensor | torch.Generator, pixels: PixelMap = "intervals"
) -> Tensor:
    """Dequantise: spread each grey level u over its interval, x = 2 (u + noise)/N - 1, noise ~ U[0,1).

    With `pixels="points"`, `x = 2 (u + noise - 1/2)/(N-1) - 1`: intervals around the points 2u/(N-1) - 1.
    The density of x and the probability of u differ by `bits_of_interval` bits per dimension.

    Args:
        images: (..., H, W) uint8 in 0..N-1.
        num_grey_levels: N, 2..256.
        noise: noise in [0,1) with the shape of `images`, or a generator on their device.

    Returns: float32 like `images`, in [-1, 1); for "points" up to half a grey level beyond both ends.
    Raises UserError if images are not uint8, hold a level above N-1, or the noise has another shape.
    Source: Theis et al., arXiv 1511.01844, section 3.1.
    """
    _check_levels(images, num_grey_levels)
    if isinstance(noise, torch.Generator):
        noise = torch.rand(images.shape, generator=noise, device=images.device)
    if noise.shape != images.shape:
        raise UserError(
            f"noise of shape {tuple(noise.shape)} for images of shape {tuple(images.shape)}; make them equal"
        )
    if pixels == "points":
        return (images + (noise.float() - 0.5)).mul_(2 / (num_grey_levels - 1)).sub_(1)
    return (images + noise.float()).mul_(2 / num_grey_levels).sub_(1)


def to_points(images: Tensor, num_grey_levels: int) -> Tensor:
    """Grey level u of N (any dtype) at its point 2u/(N-1) - 1, float32, without noise.

    >>> to_points(torch.tensor([0, 1, 2]), 3).tolist()
    [-1.0, 0.0, 1.0]
    """
    return images.float() * (2 / (num_grey_levels - 1)) - 1


def bits_of_interval(num_grey_levels: int, pixels: PixelMap = "intervals") -> float:
    """`-log2` of the width of a grey level's interval: log2(N/2), or log2((N-1)/2) around points."""
    return math.log2((num_grey_levels - (pixels == "points")) / 2)


def quantize(x: Tensor, num_grey_levels: int, pixels: PixelMap = "intervals") -> Tensor:
    """The grey level whose interval holds x, clamped to the range: floor(N (x+1)/2); inverse of `dequantize`.

    Args: x: float, in [-1, 1] or slightly beyond; num_grey_levels: N, 2..256; pixels: with "points" the level
    of the nearest point 2u/(N-1) - 1. Returns uint8 like x.
    Raises UserError if x holds NaN.
    """
    if torch.isnan(x).any():
        raise UserError(
            f"{int(torch.isnan(x).sum())} of {x.numel()} pixel values are NaN; the model has diverged"
        )
    levels = (x.float() + 1) * (num_grey_levels / 2)
    if pixels == "points":
        levels = (x.float() + 1) * ((num_grey_levels - 1) / 2) + 0.5
    return levels.floor().clamp(0, num_grey_levels - 1).to(torch.uint8)


def _check_levels(images: Tensor, num_grey_levels: int) -> None:
    if images.dtype != torch.uint8:
        raise UserError(f"images of dtype {images.dtype}; grey levels are torch.uint8")
    if not 2 <= num_grey_levels <= 256:
        raise UserError(f"{num_grey_levels} grey levels; uint8 images have 2 to 256")
    # With 256 levels every uint8 is in range; this common case needs no pass over the data, nor a GPU sync.
    if num_grey_levels < 256 and images.numel() and int(images.max()) >= num_grey_levels:
        raise UserError(
            f"grey level {int(images.max())} in images; {num_grey_levels} levels end at {num_grey_levels - 1}"
        )


def displayable(x: Tensor, num_grey_levels: int, pixels: PixelMap = "intervals") -> Tensor:
    """Model images (B,C,H,W) in [-1,1] as uint8 0..255: the grey level of each pixel, N-1 being white."""
    return levels_to_display(quantize(x, num_grey_levels, pixels), num_grey_levels)


def levels_to_display(levels: Tensor, num_grey_levels: int) -> Tensor:
    """Grey levels 0..N-1 as uint8 0..255, N-1 being white."""
    return (levels.float() * (255 / (num_grey_levels - 1))).round().to(torch.uint8)


def from_display(pixels: Tensor, num_grey_levels: int, pixel_map: PixelMap = "intervals") -> Tensor:
    """uint8 0..255 as model images in [-1, 1]: the inverse of `displayable`, also between grey levels."""
    return from_brightness(pixels.float(), num_grey_levels, pixel_map, white=255)


def from_brightness(
    brightness: Tensor, num_grey_levels: int, pixel_map: PixelMap = "intervals", white: float = 1
) -> Tensor:
    """Brightness from 0 (black) to `white` as model images in [-1, 1], differentiable, in its own dtype.

    `x = 2 (u + 1/2)/N - 1` with `u = (N-1) brightness/white`, not rounded: black and white are the centres of
    the outermost intervals. With `pixels="points"` black is -1 and white 1.
    """
    if pixel_map == "points":
        return brightness * (2 / white) - 1
    return (brightness * ((num_grey_levels - 1) / white) + 0.5) * (2 / num_grey_levels) - 1


def to_brightness(x: Tensor, num_grey_levels: int, pixel_map: PixelMap = "intervals") -> Tensor:
    """Model images as brightness, white being 1, without clipping: the inverse of `from_brightness`."""
    if pixel_map == "points":
        return (x + 1) / 2
    return ((x + 1) * (num_grey_levels / 2) - 0.5) / (num_grey_levels - 1)


def noise_of_inputs(sigma: float, num_grey_levels: int, pixels: PixelMap = "intervals") -> float:
    """Converts a standard deviation `sigma` of noise from units of white to the model's units, [-1, 1]."""
    return 2 * sigma * (1 if pixels == "points" else (num_grey_levels - 1) / num_grey_levels)
