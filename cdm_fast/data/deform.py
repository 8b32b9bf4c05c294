"""Small random deformations of images, for training sets of few images.

# B images, C channels, H W pixels, N grey levels (0..N-1)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Standard deviations: of the angles of rotation and shear in radians, of the factors of width and height from
# 1, and of the shifts as shares of half the width and half the height.
ROTATION, SHEAR, SCALE, SHIFT_X, SHIFT_Y = 0.08, 0.08, 0.05, 0.05, 0.03


def deform(
    images: Tensor,  # (B, C, H, W) uint8 in 0..N-1
    num_grey_levels: int,
    generator: torch.Generator,  # on the device of the images
) -> Tensor:
    """Rotates, shears, scales and shifts every image a little, by its own normally distributed amounts.

    Pixels are interpolated (bicubic) and rounded up or down at random, which keeps their mean. Beyond the
    edge the outermost pixels are repeated. Returns (B, C, H, W) uint8 in 0..N-1.

    >>> black = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    >>> bool((deform(black, 17, torch.Generator().manual_seed(0)) == 0).all())
    True
    """
    draws = torch.randn(6, len(images), generator=generator, device=images.device)
    grid = F.affine_grid(
        _maps(draws, images.shape[3] / images.shape[2]), list(images.shape), align_corners=False
    )
    moved = F.grid_sample(images.float(), grid, "bicubic", padding_mode="border", align_corners=False)
    rounding = torch.rand(moved.shape, generator=generator, device=images.device)
    return (moved + rounding).floor().clamp(0, num_grey_levels - 1).to(torch.uint8)


def deform_some(images: Tensor, share: float, num_grey_levels: int, generator: torch.Generator) -> Tensor:
    """`deform` applied to a random `share` (0..1) of the images (B, C, H, W); the others do not change."""
    chosen = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device) < share
    return torch.where(chosen, deform(images, num_grey_levels, generator), images)


def _maps(
    draws: Tensor,  # (6, B) N(0, 1)
    aspect: float,  # width / height
) -> Tensor:  # (B, 2, 3)
    """Where the pixels of each image come from: affine maps of (x, y), both in [-1, 1]."""
    spread = draws.new_tensor([ROTATION, SHEAR, SCALE, SCALE, SHIFT_X, SHIFT_Y])
    angle, shear, width, height, right, down = draws * spread[:, None]
    cosine, sine = angle.cos(), angle.sin()
    x = torch.stack([cosine * (1 + width), (shear - sine) / aspect, right], dim=1)
    y = torch.stack([sine * aspect, cosine * (1 + height), down], dim=1)
    return torch.stack([x, y], dim=1)
