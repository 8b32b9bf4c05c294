"""Layers with an explicit adjoint.

Every layer maps `x` to `(y, residuals)`, and its `adjoint(residuals, g)` returns the gradient of `<g, y>`
with respect to `x`, written out as an ordinary forward computation. A loss that contains an input gradient is
then a first-order function of the parameters: no autograd call inside the loss, no double backward.

Residuals hold only what the adjoint reads; convolutions and linear layers need none.

# B batch, C channels, H W pixels, N = H*W tokens, G groups
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdm_fast.ops import group_norm_silu, group_norm_silu_vjp, linear
from cdm_fast.ops.backend import resolve
from cdm_fast.ops.precision import ieee_fp32

Residuals = Any  # what a layer's adjoint reads: a tensor, a tuple, or None


@contextmanager
def full_precision(x: Tensor) -> Iterator[None]:
    """Inside the block autocast is off, and a GPU computes fp32 in IEEE precision, not TF32."""
    with torch.autocast(device_type=x.device.type, enabled=False), ieee_fp32():
        yield


def to_trunk_dtype(x: Tensor, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
    """`x` in the dtype that autocast uses for matrix products; without autocast, in its own dtype."""
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype, memory_format=memory_format)


def for_adjoint_name(name: str) -> str:
    """Name of the attribute that holds the adjoint's alias of the weight `name`."""
    return f"{name}_for_adjoint"


def for_adjoint(module: nn.Module, name: str) -> Tensor:
    """The weight as the adjoint reads it: the module's own, or the alias that `working_weights` set."""
    alias: Tensor | None = getattr(module, for_adjoint_name(name), None)
    return getattr(module, name) if alias is None else alias


# Attribute of a norm that `working_weights` sets: (name, weight (C,), B) -> the weight expanded to (B, C).
FOR_IMAGES = "for_images"


class Layer(nn.Module):
    """A map with an adjoint."""

    def forward(self, x: Tensor) -> tuple[Tensor, Residuals]:
        raise NotImplementedError

    def adjoint(self, residuals: Residuals, g: Tensor) -> Tensor:
        """Gradient of `<g, y>` with respect to the layer's input."""
        raise NotImplementedError


def run_adjoint(layers: Sequence[Layer], residuals: list[Residuals], g: Tensor) -> Tensor:
    """The adjoint of a chain of layers: their adjoints in reverse order.

    residuals: one entry per layer, in the order in which the layers ran.
    """
    for layer, kept in zip(reversed(layers), reversed(residuals), strict=True):
        g = layer.adjoint(kept, g)
    return g


class Linear(nn.Linear):
    """`y = x W^T + b`; adjoint `g W`."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return linear(x, self.weight, self.bias), None

    def adjoint(self, residuals: None, g: Tensor) -> Tensor:
        return linear(g, for_adjoint(self, "weight").t())


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


class GroupNorm(Layer):
    """GroupNorm with affine parameters, then (unless `silu=False`) SiLU and dropout, as one op.

    Args:
        channels: C, including those of a skip connection.
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
        """`x` (B, C1, H, W); `skip` (B, C2, H, W): the channels that follow those of `x`, or None.

        seed: (2,) or (3,) int64, or None for no dropout. The mask is a function of the seed, so forward
        pass and adjoint use the same mask without storing it.
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
        """The gradient, like `x`; with a skip connection two, like `x` and like `skip`."""
        x, skip, mean, rstd, seed = residuals
        dropout = 0.0 if seed is None else self.dropout
        options = {"silu": self.silu, "dropout": dropout, "seed": seed, "skip": skip}
        parameters = self._for_images(x, for_adjoint(self, "weight"), for_adjoint(self, "bias"))
        return group_norm_silu_vjp(g, x, *parameters, mean, rstd, self.num_groups, **options)

    def _for_images(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The parameters as the op reads them: (C,), or (B, C) if `working_weights` sums their gradients."""
        expand = self.__dict__.get(FOR_IMAGES)
        if expand is None or resolve("group_norm_silu", x) != "triton":
            return weight, bias
        return expand("weight", weight, len(x)), expand("bias", bias, len(x))


def tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) as (B, N, C): a view when `x` is channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def pixels(x: Tensor, height: int, width: int) -> Tensor:
    """(B, N, C) as channels-last (B, C, H, W): the inverse of `tokens`."""
    return x.unflatten(1, (height, width)).permute(0, 3, 1, 2)
