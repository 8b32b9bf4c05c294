"""Means over pixels as features, with their adjoints.

# B batch, C channels, H W pixels, N = H*W, D features
"""

from typing import Any

import torch
from torch import Tensor

from cdm_fast.nn.layers import (
    Conv2d,
    GroupNorm,
    Layer,
    Residuals,
    for_adjoint,
    full_precision,
    pixels,
    tokens,
)
from cdm_fast.ops import linear
from cdm_fast.ops.precision import compute_dtype


class ConvMeanPool(Conv2d):
    """A 3x3 convolution followed by the mean over all pixels, without computing the convolution.

    The mean of a zero-padded convolution depends on its input only through one sum per kernel tap: the sum
    over the pixels that the tap reads, which are all except a border row or column. So nine pooled vectors
    times the kernel give the exact result, and the adjoint combines nine constant spatial patterns.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels)
        self.casts = False  # the means are taken in full precision

    def _touched(self, x: Tensor) -> Tensor:
        """(9, N): 1/N where the tap reads the pixel, else 0."""
        height, width = x.shape[2:]
        rows = _touched_positions(height, x)
        columns = rows if width == height else _touched_positions(width, x)
        return (rows[:, None, :, None] * columns[None, :, None, :]).reshape(9, -1) / (x.shape[2] * x.shape[3])

    def forward(self, x: Tensor) -> tuple[Tensor, Residuals]:  # type: ignore[override]
        """(B, C, H, W) -> (B, D) in the parameters' precision, D = out_channels."""
        touched = self._touched(x)
        with full_precision(x):
            pooled = touched @ tokens(x).to(touched.dtype)  # (B, 9, C)
            kernel = self.weight.permute(0, 2, 3, 1).flatten(1)  # (D, 9 C)
            return linear(pooled.flatten(1), kernel, self.bias), (touched, x.shape, x.dtype)

    def adjoint(self, residuals: Residuals, g: Tensor) -> Tensor:
        touched, (_, channels, height, width), dtype = residuals
        with full_precision(g):
            kernel = for_adjoint(self, "weight").permute(0, 2, 3, 1).flatten(1)
            per_tap = (g @ kernel).unflatten(1, (9, channels))
            return pixels((touched.t() @ per_tap).to(dtype), height, width)


def _touched_positions(size: int, like: Tensor) -> Tensor:
    """(3, size): whether tap -1, 0, +1 of a padded kernel ever reads each position of a row of pixels."""
    dtype = compute_dtype(like.dtype)
    reads = torch.ones((3, size), dtype=dtype, device=like.device)
    reads[0, -1:].zero_()  # tap k reads position p for the output p - k, which must lie inside the image
    reads[2, :1].zero_()
    return reads


class EnergyPool(Layer):
    """Means over pixels of a 3x3 convolution and of the squares of a 1x1 convolution: (B, C, H, W) -> (B, D).

    The derivative of a square is proportional to the feature map itself. The input gradient therefore has a
    linear path at full resolution, which the mean of a gated map lacks.
    """

    def __init__(self, channels: int, num_groups: int, num_means: int, num_squares: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels, num_groups)
        self.means = ConvMeanPool(channels, num_means)
        self.squares = Conv2d(channels, num_squares, kernel_size=1)
        self.out_features = num_means + num_squares

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        h, norm_residuals = self.norm(x)
        means, mean_residuals = self.means(h)
        root, _ = self.squares(h)
        with full_precision(x):
            squares = root.to(means.dtype).square().mean((2, 3))
        return torch.cat([means, squares], dim=1), (norm_residuals, mean_residuals, root)

    def adjoint(self, residuals: Any, g: Tensor) -> Tensor:
        norm_residuals, mean_residuals, root = residuals
        g_means, g_squares = g.split([self.means.out_channels, self.squares.out_channels], dim=1)
        h = self.means.adjoint(mean_residuals, g_means)
        scale = (g_squares * (2 / (root.shape[2] * root.shape[3]))).to(root.dtype)
        h = h + self.squares.adjoint(None, scale[:, :, None, None] * root)
        return self.norm.adjoint(norm_residuals, h)
