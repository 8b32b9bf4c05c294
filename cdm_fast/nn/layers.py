"""Layers that know their own adjoint.

Every layer maps `x` to `(y, residuals)`, and its `adjoint(residuals, g)` returns the gradient of `<g, y>`
with respect to `x`, written out as an ordinary forward computation. A loss that contains an input gradient is
then a first-order function of the parameters: no autograd call inside the loss, no double backward.

Residuals hold only what the adjoint reads; convolutions and linear layers need none.

# B batch, C channels, H W pixels, N = H*W tokens, G groups, K classes, E embedding width
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdm_fast.ops import attention, attention_vjp, group_norm_silu, group_norm_silu_vjp, linear
from cdm_fast.ops.backend import kernel_layout, resolve
from cdm_fast.ops.precision import ieee_fp32

Residuals = Any  # whatever a layer's own adjoint reads: a tensor, a tuple, or None


@contextmanager
def full_precision(x: Tensor) -> Iterator[None]:
    """A region in which autocast leaves fp32 computations in fp32, and a GPU computes them in IEEE fp32."""
    with torch.autocast(device_type=x.device.type, enabled=False), ieee_fp32():
        yield


def to_trunk_dtype(x: Tensor, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
    """`x` in the dtype that autocast has chosen for matrix products here; without autocast in its own."""
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype, memory_format=memory_format)


def for_adjoint_name(name: str) -> str:
    """The attribute for a second alias of a module's weight `name`, for the adjoint."""
    return f"{name}_for_adjoint"


def for_adjoint(module: nn.Module, name: str) -> Tensor:
    """The weight as the adjoint reads it: the module's own, or the alias that `working_weights` lends."""
    alias: Tensor | None = getattr(module, for_adjoint_name(name), None)
    return getattr(module, name) if alias is None else alias


# The attribute of a norm for what `working_weights` lends besides: (name, weight, B) -> the same (B, C).
FOR_IMAGES = "for_images"


class Layer(nn.Module):
    """A map with an adjoint."""

    def forward(self, x: Tensor) -> tuple[Tensor, Residuals]:
        raise NotImplementedError

    def adjoint(self, residuals: Residuals, g: Tensor) -> Tensor:
        """Gradient of `<g, y>` with respect to the layer's input."""
        raise NotImplementedError


def run(layers: Sequence[Layer], x: Tensor) -> tuple[Tensor, list[Residuals]]:
    """Apply `layers` one after the other, keeping what their adjoints need."""
    residuals = []
    for layer in layers:
        x, kept = layer(x)
        residuals.append(kept)
    return x, residuals


def run_adjoint(layers: Sequence[Layer], residuals: list[Residuals], g: Tensor) -> Tensor:
    """The adjoint of `run`: the layers' adjoints in reverse order."""
    for layer, kept in zip(reversed(layers), reversed(residuals), strict=True):
        g = layer.adjoint(kept, g)
    return g


class Linear(nn.Linear):
    """`y = x W^T + b`; adjoint `g W`."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return linear(x, self.weight, self.bias), None

    def adjoint(self, residuals: None, g: Tensor) -> Tensor:
        return linear(g, self.weight.t())


class SiLU(Layer):
    """`y = x sigmoid(x)`; adjoint `g sigmoid(x) (1 + x (1 - sigmoid(x)))`."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.silu(x), x

    def adjoint(self, residuals: Tensor, g: Tensor) -> Tensor:
        gate = torch.sigmoid(residuals)
        return g * (gate * (1 + residuals * (1 - gate)))


class Conv2d(nn.Conv2d):
    """Convolution with square kernel, stride 1 and "same" padding; the adjoint is the transposed convolution.

    Args:
        in_channels, out_channels: C before and after.
        kernel_size: 1 or 3.
        exact: compute in the parameters' precision even under autocast. The first convolution needs it: bf16
            rounding of `x_t` is as large as the smallest noise level.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, exact: bool = False
    ) -> None:
        self.pad = kernel_size // 2
        super().__init__(in_channels, out_channels, kernel_size, padding=self.pad)
        self.exact = exact
        self.casts = not exact  # whether autocast may cast the weights as they are

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        if not self.exact:
            return F.conv2d(x, self.weight, self.bias, padding=self.pad), None
        with full_precision(x):
            y = F.conv2d(x.to(self.weight.dtype), self.weight, self.bias, padding=self.pad)
        return to_trunk_dtype(y), None

    def adjoint(self, residuals: None, g: Tensor) -> Tensor:
        weight = for_adjoint(self, "weight")
        if not self.exact:
            return F.conv_transpose2d(g, weight, padding=self.pad)
        with full_precision(g):
            return F.conv_transpose2d(g.to(weight.dtype), weight, padding=self.pad)


class Downsample(Layer):
    """Halve H and W: pad right and below by one pixel, then a 3x3 convolution of stride 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.conv(F.pad(x, (0, 1, 0, 1))), None

    def adjoint(self, residuals: None, g: Tensor) -> Tensor:
        height, width = 2 * g.shape[2], 2 * g.shape[3]
        padded = F.conv_transpose2d(g, for_adjoint(self.conv, "weight"), stride=2)
        return padded[:, :, :height, :width]


# Below so many pixels of a batch, folding the kernel costs more than the smaller convolution saves.
_MIN_PIXELS_TO_FOLD = 1024


class Upsample(Layer):
    """Double H and W: each pixel becomes 2x2, then a 3x3 convolution.

    Every output reads 2x2 pixels of the small image, through kernel taps that are summed where they meet the
    same pixel. So large inputs take one convolution of four 2x2 kernels, one for each parity of the output's
    row and column, on the small grid: 4/9 of the multiplications, and the same function up to rounding.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels)
        self.conv.casts = False  # the taps are summed first

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if x.numel() // x.shape[1] < _MIN_PIXELS_TO_FOLD:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        kernels = to_trunk_dtype(parity_kernels(self.conv.weight), kernel_layout(x))
        bias = self.conv.bias
        y = F.conv2d(x, kernels, None if bias is None else bias.repeat(4), padding=1)
        return _interleave_parities(y), kernels

    def adjoint(self, residuals: Tensor | None, g: Tensor) -> Tensor:
        if residuals is None:
            return F.avg_pool2d(self.conv.adjoint(None, g), 2, divisor_override=1)
        return F.conv_transpose2d(_split_parities(g), residuals, padding=1)


def parity_kernels(weight: Tensor) -> Tensor:
    """(D, C, 3, 3) -> (4 D, C, 2, 2): what outputs of even/odd row, even/odd column read of the small image.

    Row 2i reads row i-1 by the first tap and row i by the others; row 2i+1 reads i by the first two taps and
    i+1 by the last. Columns alike.
    """

    def fold(taps: Tensor, dim: int) -> Tensor:
        first, middle, last = taps.unbind(dim)
        even, odd = (first, middle + last), (first + middle, last)
        return torch.stack([torch.stack(pair, dim) for pair in (even, odd)])

    by_column = fold(weight, 3)  # (2, D, C, 3, 2)
    return fold(by_column, 3).flatten(0, 2)  # row parity slowest, then column parity, then D


def _interleave_parities(y: Tensor) -> Tensor:
    """(B, 4 D, H+1, W+1) -> channels-last (B, D, 2H, 2W): (2i+p, 2j+q) is parity (p, q) at (i+p, j+q)."""
    return _Interleave.apply(y)


def _split_parities(g: Tensor) -> Tensor:
    """The adjoint of `_interleave_parities`, zero where that reads nothing."""
    return _Split.apply(g)


def _parities(y: Tensor) -> Tensor:
    """A view of (B, 4 D, H+1, W+1) as (B, H, 2, W, 2, D): pixel (2i+p, 2j+q) is parity (p, q) at (i+p, j+q).

    Where p moves the pixel, its stride is that of a row and of a parity: no slice, and one copy for all.
    """
    batch, channels, height, width = y.shape
    of_image, of_channel, of_row, of_column = y.stride()
    of_p, of_q = channels // 2 * of_channel, channels // 4 * of_channel
    shape = batch, height - 1, 2, width - 1, 2, channels // 4
    strides = of_image, of_row, of_row + of_p, of_column, of_column + of_q, of_channel
    return y.as_strided(shape, strides)


class _Interleave(torch.autograd.Function):
    """Its derivative is `_Split`: autograd would fill and add a whole map for each parity."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor) -> Tensor:
        batch, channels, height, width = y.shape
        shape = batch, 2 * (height - 1), 2 * (width - 1), channels // 4
        return _parities(y).reshape(shape).permute(0, 3, 1, 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return _Split.apply(g)


class _Split(torch.autograd.Function):
    """Its derivative is `_Interleave`."""

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


class GroupNorm(Layer):
    """GroupNorm with affine parameters, then (unless `silu=False`) SiLU and dropout, as one op.

    Args:
        channels: C, those of a skip connection included.
        num_groups: G, a divisor of C.
        silu: apply `x sigmoid(x)` to the normalised input.
        dropout: probability of zeroing an output, where `forward` is given a seed.
    """

    def __init__(self, channels: int, num_groups: int, silu: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.num_groups = num_groups
        self.silu = silu
        self.dropout = dropout
        self.eps = 1e-6

    def forward(
        self, x: Tensor, skip: Tensor | None = None, seed: Tensor | None = None
    ) -> tuple[Tensor, Residuals]:
        """`x` (B, C1, H, W); `skip` the channels that follow those of `x`, or None.

        seed: (2,) or (3,) int64. The dropout mask is a function of it: forward and adjoint see the same one
        and nothing is stored; None for no dropout.
        """
        dropout = 0.0 if seed is None else self.dropout
        y, mean, rstd = group_norm_silu(
            x,
            *self._for_images(x, self.weight, self.bias),
            self.num_groups,
            self.eps,
            silu=self.silu,
            dropout=dropout,
            seed=seed,
            skip=skip,
        )
        return y, (x, skip, mean, rstd, seed)

    def adjoint(self, residuals: Residuals, g: Tensor) -> Any:
        """Like `x`; with a skip connection the two gradients, like `x` and like `skip`."""
        x, skip, mean, rstd, seed = residuals
        dropout = 0.0 if seed is None else self.dropout
        options = {"silu": self.silu, "dropout": dropout, "seed": seed, "skip": skip}
        parameters = self._for_images(x, for_adjoint(self, "weight"), for_adjoint(self, "bias"))
        return group_norm_silu_vjp(g, x, *parameters, mean, rstd, self.num_groups, **options)

    def _for_images(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The parameters as the op reads them: (C,), or (B, C) where somebody sums their gradients later."""
        lent = self.__dict__.get(FOR_IMAGES)
        if lent is None or resolve("group_norm_silu", x) != "triton":
            return weight, bias
        return lent("weight", weight, len(x)), lent("bias", bias, len(x))


def tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) as (B, N, C): a view when `x` is channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def pixels(x: Tensor, height: int, width: int) -> Tensor:
    """(B, N, C) as a channels-last (B, C, H, W): the inverse of `tokens`."""
    return x.unflatten(1, (height, width)).permute(0, 3, 1, 2)


class AttentionBlock(Layer):
    """Single-head self-attention over all pixels, with a residual connection; 1x1 q, k, v and output."""

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels, num_groups, silu=False)
        self.q = Conv2d(channels, channels, kernel_size=1)
        self.k = Conv2d(channels, channels, kernel_size=1)
        self.v = Conv2d(channels, channels, kernel_size=1)
        self.proj_out = Conv2d(channels, channels, kernel_size=1)
        self.scale = channels**-0.5

    def forward(self, x: Tensor) -> tuple[Tensor, Residuals]:
        normed, norm_residuals = self.norm(x)
        q, k, v = (tokens(layer(normed)[0]) for layer in (self.q, self.k, self.v))
        out, lse = attention(q, k, v, self.scale)
        y, _ = self.proj_out(pixels(out, *x.shape[2:]))
        return x + y, (norm_residuals, q, k, v, out, lse)

    def adjoint(self, residuals: Residuals, g: Tensor) -> Tensor:
        norm_residuals, q, k, v, out, lse = residuals
        height, width = g.shape[2:]
        g_out = tokens(self.proj_out.adjoint(None, g))
        grads = attention_vjp(g_out, q, k, v, out, lse, self.scale)
        g_q, g_k, g_v = (
            layer.adjoint(None, pixels(grad, height, width))
            for layer, grad in zip((self.q, self.k, self.v), grads, strict=True)
        )
        return g + self.norm.adjoint(norm_residuals, g_q + g_k + g_v)


class ResnetBlock(Layer):
    """norm-SiLU-conv3x3-(+ embedding)-norm-SiLU-dropout-conv3x3, plus the input (through 1x1 if C changes).

    Args:
        in_channels, out_channels: C before (a skip connection's included) and after; they differ where there
            is a skip connection.
        num_groups: G of both norms.
        dropout: after the second SiLU.
        embedding_width: E of the class or time embedding, or None for a block without one.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_groups: int,
        dropout: float = 0.0,
        embedding_width: int | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = GroupNorm(in_channels, num_groups)
        self.conv1 = Conv2d(in_channels, out_channels)
        if embedding_width is not None:
            self.temb_proj = nn.Linear(embedding_width, out_channels)
            self.temb_proj.casts = True  # type: ignore[assignment]
        self.norm2 = GroupNorm(out_channels, num_groups, dropout=dropout)
        self.conv2 = Conv2d(out_channels, out_channels)
        if in_channels != out_channels:
            self.nin_shortcut = Conv2d(in_channels, out_channels, kernel_size=1)
        self.has_shortcut = in_channels != out_channels

    def forward(
        self,
        x: Tensor,
        embedding: Tensor | None = None,
        skip: Tensor | None = None,
        seed: Tensor | None = None,
    ) -> tuple[Tensor, Residuals]:
        """`x` (B, C1, H, W) and, from a skip connection, the other input channels (B, C2, H, W).

        embedding: (B, E), already through its SiLU, or None. seed: of the dropout, or None; see `GroupNorm`.
        """
        h, norm1_residuals = self.norm1(x, skip)
        h, _ = self.conv1(h)
        if embedding is not None:
            h = h + self.temb_proj(embedding).to(h.dtype)[:, :, None, None]
        h, norm2_residuals = self.norm2(h, seed=seed)
        h, _ = self.conv2(h)
        shortcut, pieces = self._shortcut(x, skip)
        return shortcut + h, (norm1_residuals, norm2_residuals, pieces)

    def adjoint(self, residuals: Residuals, g: Tensor) -> Any:
        """Like `x`; with a skip connection the two gradients, like `x` and like `skip`."""
        norm1_residuals, norm2_residuals, pieces = residuals
        h = self.norm2.adjoint(norm2_residuals, self.conv2.adjoint(None, g))
        h = self.norm1.adjoint(norm1_residuals, self.conv1.adjoint(None, h))
        if not isinstance(h, tuple):
            return h + (self.nin_shortcut.adjoint(None, g) if self.has_shortcut else g)
        return tuple(part + F.conv_transpose2d(g, weight) for part, weight in zip(h, pieces, strict=True))

    def _shortcut(self, x: Tensor, skip: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """The shortcut of the input, and its kernel's pieces for `x` and for `skip`, if there is one.

        The pieces have no gaps: convolutions would copy them, each once more.
        """
        if not self.has_shortcut:
            return x, None
        if skip is None:
            return self.nin_shortcut(x)[0], None
        weight, bias = self.nin_shortcut.weight, self.nin_shortcut.bias
        of_x, of_skip = (part.contiguous() for part in weight.split([x.shape[1], skip.shape[1]], dim=1))
        return F.conv2d(x, of_x, bias) + F.conv2d(skip, of_skip), (of_x, of_skip)


class ConvMeanPool(Conv2d):
    """A 3x3 convolution followed by the mean over all pixels, without computing the convolution.

    The mean of a zero-padded convolution reads its input only through one sum per kernel tap: the sum of the
    pixels which that tap ever touches, that is all of them but a border row and column. So nine pooled
    vectors times the kernel give the exact result, and the adjoint is nine constant spatial patterns.
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
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    reads = torch.ones((3, size), dtype=dtype, device=like.device)
    reads[0, -1:].zero_()  # tap k reads position p for the output p - k, which must lie inside the image
    reads[2, :1].zero_()
    return reads
