"""GroupNorm followed by SiLU and dropout in one pass, its vector-Jacobian product, the derivative of both.

B batch, C channels, G groups, n = C/G * pixels elements of a group. Per group of one image

    xhat = (x - mean) rstd,   u = weight xhat + bias,   y = mask silu(u).

GroupNorm: Wu and He 2018, eq. 1-3; SiLU: u sigmoid(u). With p = g mask silu'(u) weight the VJP is

    grad_x = rstd (p - mean(p) - xhat mean(p xhat)).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_fast.ops._backend import Coverage, declare, kernels, resolve
from cdm_fast.ops._registry import define, overload
from cdm_fast.ops.philox import Stream, check_seed, philox_words

declare(
    "group_norm_silu",
    cpp=Coverage("cpu", (torch.float64, torch.float32, torch.bfloat16)),
    cuda=Coverage("cuda", (torch.float32, torch.bfloat16, torch.float16)),
    triton=Coverage("cuda", (torch.float64, torch.float32, torch.bfloat16, torch.float16)),
)


def group_norm_silu(
    x: Tensor,  # (B, C, *spatial), contiguous or channels-last
    weight: Tensor,  # (C,) or (B, C)
    bias: Tensor,  # (C,) or (B, C)
    num_groups: int,
    eps: float = 1e-6,
    *,
    silu: bool = True,
    dropout: float = 0.0,
    seed: Tensor | None = None,  # (2,) int64: (seed, offset)
) -> tuple[Tensor, Tensor, Tensor]:
    """`mask silu(weight (x - mean) rstd + bias)`, statistics per image and group: returns (y, mean, rstd).

    x: float tensor of two or more dimensions. weight, bias: per channel, or per image and channel (the scale
    and shift of an embedding). silu=False: plain GroupNorm. dropout: probability in [0, 1) of zeroing an
    element of the result, kept ones grow by 1/(1 - dropout); the mask is a function of `seed` and of the
    element's index in channels-last order. y: like x. mean, rstd: (B, G) in fp32 (fp64 for fp64), constants
    to autograd.

    Raises TypeError or ValueError for arguments of the wrong dtype, shape, device or range.
    """
    _check(x, weight, bias, num_groups, dropout, seed)
    backend = resolve("group_norm_silu", x)
    if backend == "reference":
        return group_norm_silu_reference(
            x, weight, bias, num_groups, eps, silu=silu, dropout=dropout, seed=seed
        )
    op = overload("group_norm_silu", backend)
    return op(x, weight, bias, seed, num_groups, silu, dropout, eps)


def group_norm_silu_vjp(
    g: Tensor,  # like x
    x: Tensor,  # (B, C, *spatial)
    weight: Tensor,  # (C,) or (B, C)
    bias: Tensor,  # (C,) or (B, C)
    mean: Tensor,  # (B, G)
    rstd: Tensor,  # (B, G)
    num_groups: int,
    *,
    silu: bool = True,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Gradient of `<g, group_norm_silu(x, ...)[0]>` with respect to x: a tensor like x.

    mean, rstd: as `group_norm_silu` returned them for this x. The result is differentiable once with respect
    to g, x, weight and bias; mean and rstd count as functions of x there, and get no gradient of their own.

    Raises TypeError or ValueError for arguments of the wrong dtype, shape, device or range.
    """
    _check(x, weight, bias, num_groups, dropout, seed)
    _check_cotangent(g, x, mean, rstd, num_groups)
    backend = resolve("group_norm_silu", x)
    if backend == "reference":
        return group_norm_silu_vjp_reference(
            g, x, weight, bias, mean, rstd, num_groups, silu=silu, dropout=dropout, seed=seed
        )
    op = overload("group_norm_silu_vjp", backend)
    return op(g, x, weight, bias, mean, rstd, seed, num_groups, silu, dropout)


def group_norm_silu_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-6,
    *,
    silu: bool = True,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification of `group_norm_silu` in plain PyTorch; see there."""
    groups = _groups(x, num_groups)
    dims = list(range(2, groups.dim()))
    mean = groups.mean(dims, keepdim=True)
    rstd = (groups.var(dims, correction=0, keepdim=True) + eps).rsqrt()
    u = _per_channel(weight, x) * ((groups - mean) * rstd).flatten(1, 2) + _per_channel(bias, x)
    y = F.silu(u) if silu else u
    if dropout > 0:
        y = y * dropout_mask(x, dropout, seed)
    stats = mean.detach().flatten(1), rstd.detach().flatten(1)
    return y.to(x.dtype), *stats


def group_norm_silu_vjp_reference(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    *,
    silu: bool = True,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The specification of `group_norm_silu_vjp` in plain PyTorch; see there."""
    groups = _groups(x, num_groups)
    dims = list(range(2, groups.dim()))
    # The values are those given; the derivatives with respect to x are those of the statistics of x.
    shift = _with_value(groups.mean(dims, keepdim=True), mean)
    scale = _with_value(groups.var(dims, correction=0, keepdim=True), rstd**-2).rsqrt()
    xhat = (groups - shift) * scale
    p = g.to(groups.dtype)
    if dropout > 0:
        p = p * dropout_mask(x, dropout, seed)
    if silu:
        u = _per_channel(weight, x) * xhat.flatten(1, 2) + _per_channel(bias, x)
        sigmoid = u.sigmoid()
        p = p * sigmoid * (1 + u * (1 - sigmoid))
    p = _groups(p * _per_channel(weight, x), num_groups)
    grad = scale * (p - p.mean(dims, keepdim=True) - xhat * (p * xhat).mean(dims, keepdim=True))
    return grad.flatten(1, 2).to(x.dtype)


def dropout_mask(x: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    """What dropout multiplies with: 0 or 1/(1 - dropout), of x's shape, in the precision of the statistics.

    Element i, counted in channels-last order, survives if word i of the DROPOUT stream is at least
    `drop_threshold(dropout)`.
    """
    if seed is None:
        raise ValueError("seed: dropout > 0 needs a (2,) int64 tensor (seed, offset), got None")
    words = philox_words(seed, x.numel(), Stream.DROPOUT)
    kept = (words >= drop_threshold(dropout)).to(_statistics_dtype(x)) / (1 - dropout)
    return kept.reshape(x.movedim(1, -1).shape).movedim(-1, 1)


def drop_threshold(dropout: float) -> int:
    """The 32-bit word below which an element is dropped."""
    return int(dropout * 2**32)


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _groups(x: Tensor, num_groups: int) -> Tensor:
    """(B, C, *spatial) -> (B, G, C/G, *spatial), in the precision of the statistics."""
    return x.to(_statistics_dtype(x)).unflatten(1, (num_groups, -1))


def _per_channel(parameter: Tensor, x: Tensor) -> Tensor:
    """(C,) or (B, C) -> broadcastable to x, in the precision of the statistics."""
    shape = (-1, x.shape[1]) + (1,) * (x.dim() - 2)
    return parameter.to(_statistics_dtype(x)).reshape(shape)


def _with_value(function_of_x: Tensor, value: Tensor) -> Tensor:
    """`value`, with the derivatives of `function_of_x`."""
    return value.detach().reshape(function_of_x.shape) + (function_of_x - function_of_x.detach())


def _check(
    x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, dropout: float, seed: Tensor | None
) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}")
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"x: expected a non-empty (B, C, *spatial) tensor, got shape {tuple(x.shape)}")
    batch, channels = x.shape[:2]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups: expected a divisor of x's {channels} channels, got {num_groups}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter.shape not in ((channels,), (batch, channels)):
            expected = f"({channels},) or ({batch}, {channels})"
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(parameter.shape)}")
        if not parameter.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {parameter.dtype}")
        if parameter.device != x.device:
            raise ValueError(f"{name}: expected it on x's device {x.device}, got {parameter.device}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
    if dropout > 0 and seed is None:
        raise ValueError("seed: dropout > 0 needs a (2,) int64 tensor (seed, offset), got None")
    if seed is not None:
        check_seed(seed, x.device)


def _check_cotangent(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, num_groups: int) -> None:
    if g.shape != x.shape or g.dtype != x.dtype or g.device != x.device:
        expected = f"{tuple(x.shape)} {x.dtype} on {x.device}"
        raise ValueError(
            f"g: expected a tensor like x, {expected}, got {tuple(g.shape)} {g.dtype} on {g.device}"
        )
    shape, dtype = (x.shape[0], num_groups), _statistics_dtype(x)
    for name, statistic in (("mean", mean), ("rstd", rstd)):
        if statistic.shape != shape or statistic.dtype != dtype or statistic.device != x.device:
            got = f"{tuple(statistic.shape)} {statistic.dtype} on {statistic.device}"
            raise ValueError(f"{name}: expected {shape} {dtype} on {x.device}, got {got}")


# Registration. The op and its VJP know their first derivative; the two ops that compute these know none, so
# that a second differentiation raises. The kernels of all languages fill outputs that are allocated here.


def _forward(
    backend: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    num_groups: int,
    silu: bool,
    dropout: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    x, channels_last = _dense(x)
    outputs = torch.empty_like(x), *_empty_pair(x, num_groups)
    inputs = x, *_parameters(weight, bias, x), seed
    run = kernels("group_norm_silu", backend).group_norm_silu_forward
    run(*inputs, *outputs, num_groups, eps, silu, dropout, channels_last)
    return outputs


def _vjp(
    backend: str,
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    num_groups: int,
    silu: bool,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The VJP and, per image, the gradients of weight and bias that come with it."""
    x, channels_last = _dense(x)
    outputs = torch.empty_like(x), *_empty_pair(x, x.shape[1])
    inputs = _laid_out(g, channels_last), x, *_parameters(weight, bias, x), mean, rstd, seed
    run = kernels("group_norm_silu", backend).group_norm_silu_vjp
    run(*inputs, *outputs, num_groups, silu, dropout, channels_last)
    return outputs


def _backward(
    backend: str, g: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of <g, y> with respect to x, weight and bias; arguments as in `_vjp`."""
    grad_x, grad_weight, grad_bias = _vjp(backend, g, x, weight, bias, *rest)
    return grad_x, _shaped(grad_weight, weight), _shaped(grad_bias, bias)


def _vjp_backward(
    backend: str,
    v: Tensor,
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    num_groups: int,
    silu: bool,
    dropout: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of <v, VJP> with respect to g, x, weight and bias."""
    x, channels_last = _dense(x)
    grad_g, grad_x = torch.empty_like(x), torch.empty_like(x)
    grad_weight, grad_bias = _empty_pair(x, x.shape[1])
    cotangents = _laid_out(v, channels_last), _laid_out(g, channels_last)
    inputs = *cotangents, x, *_parameters(weight, bias, x), mean, rstd, seed
    run = kernels("group_norm_silu", backend).group_norm_silu_vjp_backward
    run(*inputs, grad_g, grad_x, grad_weight, grad_bias, num_groups, silu, dropout, channels_last)
    return grad_g, grad_x, _shaped(grad_weight, weight), _shaped(grad_bias, bias)


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, seed, *options, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, bias, mean, rstd, seed)
    ctx.options = options


def _differentiate_forward(ctx: Any, grad_y: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    backward = overload("group_norm_silu_backward", ctx.backend)
    return *backward(grad_y, *ctx.saved_tensors, *ctx.options), *(None,) * 5


def _save_vjp(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[7:]


def _differentiate_vjp(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
    backward = overload("group_norm_silu_vjp_backward", ctx.backend)
    return *backward(v, *ctx.saved_tensors, *ctx.options), *(None,) * 6


def _define(name: str, schema: str, run: Callable[..., Any], **parts: Callable[..., Any]) -> None:
    native, triton = partial(run, "cpp"), partial(run, "triton")
    define(name, schema, cpu=native, cuda=native, triton=triton, **parts)


_PARAMETERS = "Tensor x, Tensor weight, Tensor bias, "
_OPTIONS = "Tensor? seed, int num_groups, bool silu, float dropout"
_SAVED = "Tensor mean, Tensor rstd, " + _OPTIONS
_define(
    "group_norm_silu",
    f"({_PARAMETERS}{_OPTIONS}, float eps) -> (Tensor, Tensor, Tensor)",
    _forward,
    fake=lambda x, weight, bias, seed, groups, *_: (_empty_dense(x), *_empty_pair(x, groups)),
    save=_save_forward,
    backward=_differentiate_forward,
)
_define(
    "group_norm_silu_backward",
    f"(Tensor g, {_PARAMETERS}{_SAVED}) -> (Tensor, Tensor, Tensor)",
    _backward,
    fake=lambda g, x, weight, bias, *_: (_empty_dense(x), _empty_shaped(weight), _empty_shaped(bias)),
)
_define(
    "group_norm_silu_vjp",
    f"(Tensor g, {_PARAMETERS}{_SAVED}) -> Tensor",
    lambda *inputs: _vjp(*inputs)[0],
    fake=lambda g, x, *_: _empty_dense(x),
    save=_save_vjp,
    backward=_differentiate_vjp,
)
_define(
    "group_norm_silu_vjp_backward",
    f"(Tensor v, Tensor g, {_PARAMETERS}{_SAVED}) -> (Tensor, Tensor, Tensor, Tensor)",
    _vjp_backward,
    fake=lambda v, g, x, weight, bias, *_: (
        _empty_dense(x),
        _empty_dense(x),
        _empty_shaped(weight),
        _empty_shaped(bias),
    ),
)


def _dense(x: Tensor) -> tuple[Tensor, bool]:
    """x or, if it has gaps, a copy without; and whether its layout is channels-last."""
    if x.is_contiguous():
        return x, False
    if x.movedim(1, -1).is_contiguous():
        return x, True
    return x.contiguous(), False


def _laid_out(g: Tensor, channels_last: bool) -> Tensor:
    return g.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else g.contiguous()


def _parameters(weight: Tensor, bias: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """weight and bias in the precision of the statistics, both (C,) or both (B, C)."""
    shape = x.shape[:2] if weight.dim() + bias.dim() > 2 else x.shape[1:2]
    dtype = _statistics_dtype(x)
    return weight.to(dtype).expand(shape).contiguous(), bias.to(dtype).expand(shape).contiguous()


def _empty_pair(x: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Two uninitialised (B, columns) tensors in the precision of the statistics."""
    shape, dtype = (x.shape[0], columns), _statistics_dtype(x)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


def _shaped(grad: Tensor, parameter: Tensor) -> Tensor:
    """(B, C) in the precision of the statistics -> like the parameter."""
    return (grad.sum(0) if parameter.dim() == 1 else grad).to(parameter.dtype)


def _empty_dense(x: Tensor) -> Tensor:
    return torch.empty_like(_dense(x)[0])


def _empty_shaped(parameter: Tensor) -> Tensor:
    return torch.empty_like(parameter, memory_format=torch.contiguous_format)
