"""Changes of resolution by a factor of 2, with their adjoints.

# B batch, C channels, D output channels, H W pixels
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdm_fast.nn.layers import Conv2d, Layer, for_adjoint, to_trunk_dtype
from cdm_fast.ops.backend import copies_in_one_launch, kernel_layout


class Downsample(Layer):
    """Halve H and W: pad right and below by one pixel, then a 3x3 convolution of stride 2.

    Args:
        channels: C.
        halves: whether H and W are halved. A side of 1 is not: along it the kernel's middle row or column is
            the whole kernel, the only one that would meet a pixel.
    """

    def __init__(self, channels: int, halves: tuple[bool, bool] = (True, True)) -> None:
        super().__init__()
        self.halves = halves
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        if all(self.halves):
            return self.conv(F.pad(x, (0, 1, 0, 1))), None
        of_height, of_width = self.halves
        padded = F.pad(x, (0, int(of_width), 0, int(of_height)))
        return F.conv2d(padded, self._kernel(self.conv.weight), self.conv.bias, self._factors), None

    def adjoint(self, residuals: None, g: Tensor) -> Tensor:
        height, width = (factor * side for factor, side in zip(self._factors, g.shape[2:], strict=True))
        kernel = self._kernel(for_adjoint(self.conv, "weight"))
        padded = F.conv_transpose2d(g, kernel, stride=self._factors)
        return padded[:, :, :height, :width]

    @property
    def _factors(self) -> tuple[int, int]:
        return 1 + self.halves[0], 1 + self.halves[1]

    def _kernel(self, weight: Tensor) -> Tensor:
        """(D, C, 3, 3) without the rows or columns that meet no pixel."""
        if all(self.halves):
            return weight  # not a view, whose gradient would be added in another order
        rows, columns = (slice(None) if halves else slice(1, 2) for halves in self.halves)
        return weight[:, :, rows, columns]


# With fewer pixels in a batch, folding the kernel costs more than the smaller convolution saves.
_MIN_PIXELS_TO_FOLD = 1024


class Upsample(Layer):
    """Double H and W: repeat each pixel 2x2, then a 3x3 convolution.

    Every output pixel reads 2x2 pixels of the small image, so kernel taps that meet the same pixel can be
    summed first. Large inputs therefore use one convolution on the small grid with four 2x2 kernels, one per
    parity of the output's row and column: 4/9 of the multiplications, and the same function up to rounding.

    Args:
        channels: C.
        doubles: whether H and W are doubled; a side of 1 that `Downsample` has not halved is not.
    """

    def __init__(self, channels: int, doubles: tuple[bool, bool] = (True, True)) -> None:
        super().__init__()
        self.factors = 1 + doubles[0], 1 + doubles[1]
        self.conv = Conv2d(channels, channels)
        self.conv.casts = False  # the taps are summed first

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.factors != (2, 2) or x.numel() // x.shape[1] < _MIN_PIXELS_TO_FOLD:
            height, width = self.factors
            return self.conv(F.interpolate(x, scale_factor=(float(height), float(width)), mode="nearest"))
        kernels = to_trunk_dtype(parity_kernels(self.conv.weight), kernel_layout(x))
        bias = self.conv.bias
        y = F.conv2d(x, kernels, None if bias is None else bias.repeat(4), padding=1)
        return interleave_parities(y), kernels

    def adjoint(self, residuals: Tensor | None, g: Tensor) -> Tensor:
        if residuals is None:
            return F.avg_pool2d(self.conv.adjoint(None, g), self.factors, divisor_override=1)
        return F.conv_transpose2d(split_parities(g), residuals, padding=1)


def parity_kernels(weight: Tensor) -> Tensor:
    """(D, C, 3, 3) -> (4 D, C, 2, 2): one 2x2 kernel per parity of the output's row and column.

    Output row 2i reads row i-1 through the first tap and row i through the other two; output row 2i+1 reads
    row i through the first two taps and row i+1 through the last. The same holds for columns.
    """

    def fold(taps: Tensor, dim: int) -> Tensor:
        first, middle, last = taps.unbind(dim)
        even, odd = (first, middle + last), (first + middle, last)
        return torch.stack([torch.stack(pair, dim) for pair in (even, odd)])

    by_column = fold(weight, 3)  # (2, D, C, 3, 2)
    return fold(by_column, 3).flatten(0, 2)  # dims: row parity, column parity, D


def interleave_parities(y: Tensor) -> Tensor:
    """(B, 4 D, H+1, W+1) -> channels-last (B, D, 2H, 2W): (2i+p, 2j+q) is parity (p, q) at (i+p, j+q)."""
    return _Interleave.apply(y)


def split_parities(g: Tensor) -> Tensor:
    """The adjoint of `interleave_parities`: (B, D, 2H, 2W) -> (B, 4 D, H+1, W+1), 0 at unread pixels."""
    return _Split.apply(g)


def _parities(y: Tensor) -> Tensor:
    """A view of (B, 4 D, H+1, W+1) as (B, H, 2, W, 2, D): pixel (2i+p, 2j+q) is parity (p, q) at (i+p, j+q).

    Incrementing p moves by one row and one parity, which is a single stride; likewise for q. So one strided
    copy moves all four parities.
    """
    batch, channels, height, width = y.shape
    of_image, of_channel, of_row, of_column = y.stride()
    of_p, of_q = channels // 2 * of_channel, channels // 4 * of_channel
    shape = batch, height - 1, 2, width - 1, 2, channels // 4
    strides = of_image, of_row, of_row + of_p, of_column, of_column + of_q, of_channel
    return y.as_strided(shape, strides)


class _Interleave(torch.autograd.Function):
    """`interleave_parities`. Its derivative is `_Split`; autograd would fill and add one map per parity."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor) -> Tensor:
        batch, channels, height, width = y.shape
        parities = _parities(y)
        pixels = y.new_empty(parities.shape)
        if copies_in_one_launch(y):
            pixels.copy_(parities)
        else:  # the copy of one q has longer inner loops: up to 2.8 times as fast on a CPU
            for q in (0, 1):
                pixels[:, :, :, :, q].copy_(parities[:, :, :, :, q])
        return pixels.view(batch, 2 * (height - 1), 2 * (width - 1), channels // 4).permute(0, 3, 1, 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return _Split.apply(g)


class _Split(torch.autograd.Function):
    """`split_parities`. The derivative is `_Interleave`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(g: Tensor) -> Tensor:
        batch, channels, height, width = g.shape
        y = g.new_zeros(batch, height // 2 + 1, width // 2 + 1, 4 * channels).permute(0, 3, 1, 2)
        parities = _parities(y)
        parities.copy_(g.permute(0, 2, 3, 1).reshape(parities.shape))
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, y: Tensor) -> Tensor:
        return _Interleave.apply(y)
