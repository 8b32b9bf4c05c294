"""The fifteen standard corruptions at five severities (Hendrycks & Dietterich, arXiv 1903.12261), vectorised.

For grey or colour images of any size, designed for 8x8 to 64x64. The strengths are those of the benchmark's
version for 32x32 images, and every length scales with the longer side of the picture: a blur covers the same
share of it at any size. Weather is drawn on a 32x32 canvas, then resized; a picture that is not square gets
the middle of it. Noise, brightness, contrast and JPEG quality do not depend on size.

These differ from the published code, so figures can be compared only with each other:

- defocus is a disk with the same second moment as the published kernels, sampled between pixels;
- glass displaces every pixel at random, further at higher severity, where the original swaps neighbours
  sequentially and balances swaps against blur;
- elastic is only a smooth random displacement, of growing size, where the original balances an affine part
  against a finer field; pixelate has larger cells, without the original's shifts by whole pixels. Neither
  original changes a small picture more at every higher severity; both of ours do, like all kinds here;
- frost is synthesised from ridges of fractal noise, where the original pastes photographs, with our
  own weights;
- all severities of an image share their random numbers, so that a curve shows only the effect of severity.

# B images, C channels, H W pixels, x in [0, 1]
"""

import io
import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor

from cdm_fast.errors import UserError
from cdm_fast.host.optional import need

SEVERITIES = (1, 2, 3, 4, 5)
BASE = 32  # side of the images for which the strengths below are given, pixels
STEPS = 24  # pictures averaged in a trail
BATCH = 512  # images corrupted at a time, which bounds the memory of the blurs

Corruption = Callable[[Tensor, int, torch.Generator], Tensor]  # x, severity 0..4, randomness -> x


def corrupt(
    images: Tensor,  # (n, C, H, W) uint8, 0..N-1
    kind: str,
    severity: int,
    num_grey_levels: int = 256,
    seed: int = 0,
) -> Tensor:
    """`images` with one of `KINDS` at severity 1..5, as uint8 on the same N grey levels.

    A deterministic function; an image's result depends on its index in `images`, not on later images.
    Raises UserError for an unknown kind, a severity outside 1..5, or images of another dtype or shape.
    """
    if kind not in KINDS:
        raise UserError(f"unknown corruption {kind!r}: choose one of {', '.join(KINDS)}")
    if severity not in SEVERITIES:
        raise UserError(f"severity is {severity}: it must be a whole number from 1 to 5")
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
        raise UserError(
            f"images are {images.dtype} of shape {tuple(images.shape)}: give uint8 (n, 1 or 3, H, W)"
        )
    generator = torch.Generator().manual_seed(seed * len(KINDS) + list(KINDS).index(kind))
    white = num_grey_levels - 1
    parts = []
    for batch in images.split(BATCH):
        x = KINDS[kind](batch.float() / white, severity - 1, generator)
        parts.append((x.clamp(0, 1) * white).round().to(torch.uint8))
    return torch.cat(parts) if parts else images


# Noise.


def gaussian_noise(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """`x + c eps`."""
    return x + (0.04, 0.06, 0.08, 0.09, 0.10)[severity] * torch.randn(x.shape, generator=generator)


def shot_noise(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """`Poisson(c x) / c`: white is c photons."""
    photons = (500, 250, 100, 75, 50)[severity]
    return torch.poisson(x * photons, generator=generator) / photons


def impulse_noise(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Sets a share of the values to 0 or 1, half each."""
    share = (0.01, 0.02, 0.03, 0.05, 0.07)[severity]
    u = torch.rand(x.shape, generator=generator)
    salt = torch.rand(x.shape, generator=generator) < 0.5
    return torch.where(u < share, salt.to(x.dtype), x)


# Blur: means of pictures shifted by fractions of a pixel, read between pixels by bilinear interpolation.


def defocus_blur(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """The mean over a disk."""
    radius = (0.8, 1.0, 1.2, 1.3, 1.6)[severity] * _scale(x)
    return _mean([_shift(x, *(radius * p for p in point)) for point in _disk()])


def glass_blur(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """A slight Gaussian blur, a random displacement of every pixel, and the blur again."""
    largest, sigma = (0.6, 0.8, 1.0, 1.25, 1.5)[severity], 0.25 * _scale(x)
    offset = torch.rand(len(x), 2, *x.shape[2:], generator=generator) * 2 - 1
    return _gaussian(_displace(_gaussian(x, sigma), largest * _scale(x) * offset), sigma)


def motion_blur(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """A one-sided trail with Gaussian weights at an angle of -45..45 degrees, drawn for each image."""
    radius, sigma = ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))[severity]
    angle = (torch.rand(len(x), generator=generator) - 0.5) * math.pi / 2
    return _trail(x, angle, radius * _scale(x), sigma * _scale(x))


def zoom_blur(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """The mean of the picture and its enlargements in steps of 1 %."""
    steps = (6, 11, 16, 21, 26)[severity]
    return _mean([x, *(_zoom(x, 1 + 0.01 * step) for step in range(steps))])


# Weather.


def snow(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """A whitened picture, and flakes blown across it in two directions."""
    mean, std, size, threshold, radius, sigma, kept = (
        (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
        (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
        (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
        (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
        (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
    )[severity]
    field = _zoom(mean + std * torch.randn(len(x), 1, BASE, BASE, generator=generator), size)
    flakes = torch.where(field < threshold, 0.0, field).clamp(0, 1)
    angle = math.pi / 4 + math.pi / 2 * torch.rand(len(x), generator=generator)
    flakes = _resize(_trail(flakes, angle, radius, sigma), x)
    whitened = torch.maximum(x, 1.5 * _grey(x) + 0.5)
    return kept * x + (1 - kept) * whitened + flakes + flakes.rot90(2, (2, 3))


def frost(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Synthetic ice over a dimmed picture: bright ridges of fractal noise, bluish in colour images."""
    kept, weight = ((1, 0.2), (1, 0.3), (0.9, 0.45), (0.85, 0.55), (0.75, 0.7))[severity]
    ridges = 1 - (2 * _plasma(len(x), 1.25, generator) - 1).abs()
    ice = _resize((0.3 + 0.7 * ridges.square()).clamp(0, 1), x)
    if x.shape[1] == 3:
        ice = ice * torch.tensor([0.85, 0.95, 1.0])[:, None, None]
    return kept * x + weight * ice


def fog(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Adds plasma clouds, and rescales to the picture's brightest value."""
    weight, decay = ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))[severity]
    brightest = x.amax((1, 2, 3), keepdim=True)
    clouds = _resize(_plasma(len(x), decay, generator), x)
    return (x + weight * clouds) * brightest / (brightest + weight)


def brightness(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """`V + c` in HSV; hue and saturation are unchanged."""
    value = x.amax(1, keepdim=True)
    brighter = (value + (0.05, 0.1, 0.15, 0.2, 0.3)[severity]).clamp(max=1)
    return torch.where(value > 0, x * brighter / value.clamp(min=1e-6), brighter)


# Digital.


def contrast(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """`m + c (x - m)`, m the mean of each image and channel."""
    mean = x.mean((2, 3), keepdim=True)
    return mean + (0.75, 0.5, 0.4, 0.3, 0.15)[severity] * (x - mean)


def elastic_transform(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """A smooth random displacement of 1 to 3 % of the side (root mean square), correlated over 6 % of it."""
    size = (0.010, 0.015, 0.020, 0.025, 0.030)[severity] * max(x.shape[2:])
    field = torch.randn(2 * len(x), 1, BASE, BASE, generator=generator)
    field = _gaussian(field, 0.06 * BASE)
    field = field / field.square().mean((1, 2, 3), keepdim=True).sqrt()
    side = max(x.shape[2:])
    field = _middle(nnf.interpolate(field, size=(side, side), mode="bilinear", align_corners=False), x)
    return _displace(x, size * field.unflatten(0, (-1, 2)).squeeze(2))


def pixelate(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Downsamples to a share of the pixels per side and upsamples again, both by area."""
    share = (0.8, 0.65, 0.5, 0.4, 0.3)[severity]
    rows, columns = (_through_cells(side, max(1, int(share * side))) for side in x.shape[2:])
    return rows @ x @ columns.T


def jpeg_compression(x: Tensor, severity: int, generator: torch.Generator) -> Tensor:
    """Pillow's JPEG of 8-bit pixels at quality 80 to 40."""
    quality = (80, 65, 58, 50, 40)[severity]
    pixels = (x.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    pillow = need("PIL.Image", "JPEG compression")
    decoded = []
    for image in pixels:
        file = io.BytesIO()
        pillow.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(file, "JPEG", quality=quality)
        with pillow.open(file) as read:
            decoded.append(np.asarray(read).reshape(image.shape))
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).float() / 255


KINDS: dict[str, Corruption] = {
    kind.__name__: kind
    for kind in (
        gaussian_noise,
        shot_noise,
        impulse_noise,
        defocus_blur,
        glass_blur,
        motion_blur,
        zoom_blur,
        snow,
        frost,
        fog,
        brightness,
        contrast,
        elastic_transform,
        pixelate,
        jpeg_compression,
    )
}


def _scale(x: Tensor) -> float:
    """Pixels of x per pixel of a 32x32 picture."""
    return max(x.shape[2:]) / BASE


def _mean(pictures: list[Tensor]) -> Tensor:
    return torch.stack(pictures).mean(0)


def _grey(x: Tensor) -> Tensor:
    """(B, 1, H, W) luminance (ITU-R BT.601)."""
    if x.shape[1] == 1:
        return x
    return (x * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)


def _displace(x: Tensor, offset: Tensor) -> Tensor:
    """x read at every pixel plus `offset` (B, 2, H, W), in pixels (along x, along y); edges are repeated."""
    height, width = x.shape[2:]
    row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    at_x = (2 * (column + offset[:, 0]) + 1) / width - 1
    at_y = (2 * (row + offset[:, 1]) + 1) / height - 1
    grid = torch.stack([at_x, at_y], dim=-1)
    return nnf.grid_sample(x, grid.to(x.dtype), mode="bilinear", padding_mode="border", align_corners=False)


def _shift(x: Tensor, right: float | Tensor, down: float | Tensor) -> Tensor:
    """x shifted by fractions of a pixel, equal for all images or (B,) one per image."""
    offset = torch.stack([torch.as_tensor(-d).expand(len(x)) for d in (right, down)], dim=1)
    return _displace(x, offset[:, :, None, None].expand(-1, -1, *x.shape[2:]))


def _zoom(x: Tensor, factor: float) -> Tensor:
    """x enlarged about its centre and cropped to its size."""
    height, width = x.shape[2:]
    row = (torch.arange(height) - (height - 1) / 2) * (1 / factor - 1)
    column = (torch.arange(width) - (width - 1) / 2) * (1 / factor - 1)
    offset = torch.stack([column.expand(height, -1), row[:, None].expand(-1, width)])
    return _displace(x, offset.expand(len(x), -1, -1, -1))


def _trail(x: Tensor, angle: Tensor, radius: float, sigma: float) -> Tensor:
    """A mean over shifts of 0..radius along `angle` (B,), weights `exp(-r^2 / 2 sigma^2)`."""
    distances = [radius * (step + 0.5) / STEPS for step in range(STEPS)]
    weights = [math.exp(-0.5 * (distance / sigma) ** 2) for distance in distances]
    total = torch.zeros_like(x)
    for distance, weight in zip(distances, weights, strict=True):
        total += weight * _shift(x, distance * angle.cos(), distance * angle.sin())
    return total / sum(weights)


def _gaussian(x: Tensor, sigma: float) -> Tensor:
    """A separable Gaussian blur; edges are repeated."""
    radius = max(1, math.ceil(4 * sigma))
    weight = (-0.5 * (torch.arange(-radius, radius + 1) / sigma).square()).exp()
    kernel = (weight / weight.sum()).to(x.dtype).expand(x.shape[1], 1, -1)
    padded = nnf.pad(x, (radius,) * 4, mode="replicate")
    rows = nnf.conv2d(padded, kernel[:, :, None], groups=x.shape[1])
    return nnf.conv2d(rows, kernel[:, :, :, None], groups=x.shape[1])


def _disk(rings: int = 3) -> list[tuple[float, float]]:
    """Points that cover the unit disk evenly: 1 in the middle, 6, 12, ... on rings of equal width."""
    points = [(0.0, 0.0)]
    for ring in range(1, rings + 1):
        radius = 2 * ring / (2 * rings + 1)  # the middle of the ring
        turns = [2 * math.pi * i / (6 * ring) for i in range(6 * ring)]
        points += [(radius * math.cos(turn), radius * math.sin(turn)) for turn in turns]
    return points


def _plasma(num: int, decay: float, generator: torch.Generator) -> Tensor:
    """(num, 1, 32, 32) fractal noise in [0, 1]: random grids of 2, 4, .. 32 cells, `decay^2` apart."""
    sides = [2**octave + 1 for octave in range(1, BASE.bit_length())]
    total = torch.zeros(num, 1, BASE, BASE)
    for octave, side in enumerate(sides):
        cells = torch.rand(num, 1, side, side, generator=generator)
        smooth = nnf.interpolate(cells, size=(BASE, BASE), mode="bilinear", align_corners=True)
        total += smooth / decay ** (2 * octave)
    low, high = total.amin((2, 3), keepdim=True), total.amax((2, 3), keepdim=True)
    return (total - low) / (high - low)


def _through_cells(side: int, cells: int) -> Tensor:
    """(side, side) matrix that averages a line of pixels over equal cells and reads them at the pixels."""
    return _overlap(side, cells) @ _overlap(cells, side)


def _overlap(out: int, cells: int) -> Tensor:
    """(out, cells): how much of each of `out` equal parts of a line lies in each of `cells`."""
    edges = torch.arange(out + 1) / out
    other = torch.arange(cells + 1) / cells
    low = torch.maximum(edges[:-1, None], other[:-1])
    high = torch.minimum(edges[1:, None], other[1:])
    return (high - low).clamp(min=0) * out


def _resize(canvas: Tensor, x: Tensor) -> Tensor:
    """A canvas at the longer side of x, by area where it shrinks, else bilinear; cut to the size of x."""
    side = max(x.shape[2:])
    if side < BASE:
        return _middle(nnf.adaptive_avg_pool2d(canvas, (side, side)), x)
    return _middle(nnf.interpolate(canvas, size=(side, side), mode="bilinear", align_corners=False), x)


def _middle(canvas: Tensor, x: Tensor) -> Tensor:
    """The middle of a square canvas, of the size of x."""
    height, width = x.shape[2:]
    top, left = (canvas.shape[2] - height) // 2, (canvas.shape[3] - width) // 2
    return canvas[:, :, top : top + height, left : left + width]
