"""GroupNorm followed by SiLU and dropout in one pass, its vector-Jacobian product, the derivative of both.

B batch, C channels, G groups, n = C/G * pixels elements of a group. Per group of one image

    xhat = (x - mean) rstd,   u = weight xhat + bias,   y = mask silu(u).

GroupNorm: Wu and He 2018, eq. 1-3; SiLU: u sigmoid(u). With p = g mask silu'(u) weight the VJP is

    grad_x = rstd (p - mean(p) - xhat mean(p xhat)).
"""

from __future__ import annotations

from typing import Any
from typing import overload as typed

import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_fast.ops.backend import Coverage, declare, resolve
from cdm_fast.ops.philox import Stream, check_seed, philox_words
from cdm_fast.ops.registry import define, overload

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
    seed: Tensor | None = None,  # (2,) or (3,) int64: (seed, offset), number of the first image
    skip: Tensor | None = None,  # (B, C2, *spatial)
) -> tuple[Tensor, Tensor, Tensor]:
    """`mask silu(weight (x - mean) rstd + bias)`, statistics per image and group: returns (y, mean, rstd).

    x: float tensor of two or more dimensions. weight, bias: per channel, or per image and channel (the scale
    and shift of an embedding). silu=False: plain GroupNorm. dropout: probability in [0, 1) of zeroing an
    element of the result, kept ones grow by 1/(1 - dropout); the mask is a function of `seed` and of the
    element's index in channels-last order. A third number in `seed` says how many images come before the
    first, so that a part of a batch has the mask that it has within the whole. y: like x. mean, rstd: (B, G)
    in fp32 (fp64 for fp64), constants to autograd.

    skip: the input is then cat((x, skip), 1), of C + C2 channels, and so are weight, bias and y; a group may
    have channels of both. The kernels read the two where they lie; the reference concatenates them, with the
    same result.

    Raises TypeError or ValueError for arguments of the wrong dtype, shape, device or range.
    """
    _check(x, skip, weight, bias, num_groups, dropout, seed)
    backend = resolve("group_norm_silu", x)
    if backend == "reference":
        whole = x if skip is None else torch.cat((x, skip), 1)
        return group_norm_silu_reference(
            whole, weight, bias, num_groups, eps, silu=silu, dropout=dropout, seed=seed
        )
    x, skip = _dense(x, skip)
    weight, bias = _parameters(weight, bias, x, backend)
    op = overload("group_norm_silu", backend)
    return op(x, skip, weight, bias, _with_first_image(seed), num_groups, silu, dropout, eps)


@typed
def group_norm_silu_vjp(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    *,
    silu: bool = ...,
    dropout: float = ...,
    seed: Tensor | None = ...,
    skip: None = ...,
) -> Tensor: ...
@typed
def group_norm_silu_vjp(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    *,
    silu: bool = ...,
    dropout: float = ...,
    seed: Tensor | None = ...,
    skip: Tensor,
) -> tuple[Tensor, Tensor]: ...
def group_norm_silu_vjp(
    g: Tensor,  # like y
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
    skip: Tensor | None = None,  # (B, C2, *spatial)
) -> Tensor | tuple[Tensor, Tensor]:
    """Gradient of `<g, group_norm_silu(x, ...)[0]>` with respect to x: a tensor like x.

    mean, rstd: as `group_norm_silu` returned them for this x. The result is differentiable once with respect
    to g, x, weight and bias; mean and rstd count as functions of x there, and get no gradient of their own.
    With skip: the gradients with respect to x and to skip, tensors like these.

    Raises TypeError or ValueError for arguments of the wrong dtype, shape, device or range.
    """
    _check(x, skip, weight, bias, num_groups, dropout, seed)
    _check_cotangent(g, x, skip, mean, rstd, num_groups)
    backend = resolve("group_norm_silu", x)
    if backend == "reference":
        whole = x if skip is None else torch.cat((x, skip), 1)
        grad = group_norm_silu_vjp_reference(
            g, whole, weight, bias, mean, rstd, num_groups, silu=silu, dropout=dropout, seed=seed
        )
        return grad if skip is None else (grad[:, : x.shape[1]], grad[:, x.shape[1] :])
    x, skip = _dense(x, skip)
    weight, bias = _parameters(weight, bias, x, backend)
    saved = mean.contiguous(), rstd.contiguous(), _with_first_image(seed)
    op = overload("group_norm_silu_vjp", backend)
    grad_x, grad_skip = op(_laid_out_as(x, g), x, skip, weight, bias, *saved, num_groups, silu, dropout)
    return grad_x if skip is None else (grad_x, grad_skip)


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

    Element i, counted in channels-last order from the image that `seed` calls the first, survives if word i
    of the DROPOUT stream is at least `drop_threshold(dropout)`.
    """
    if seed is None:
        raise ValueError("seed: dropout > 0 needs a (2,) int64 tensor (seed, offset), got None")
    before = None if len(seed) == 2 else seed[2] * (x.numel() // len(x))
    words = philox_words(seed[:2], x.numel(), Stream.DROPOUT, before)
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
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    dropout: float,
    seed: Tensor | None,
) -> None:
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating-point tensor, got {x.dtype}")
    if x.dim() < 2 or x.numel() == 0:
        raise ValueError(f"x: expected a non-empty (B, C, *spatial) tensor, got shape {tuple(x.shape)}")
    if skip is not None:
        _check_skip(skip, x)
    batch, channels = _whole_shape(x, skip)[:2]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups: expected a divisor of the {channels} channels, got {num_groups}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter.shape != (channels,) and parameter.shape != (batch, channels):
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
        check_seed(seed[:2] if isinstance(seed, Tensor) and seed.shape == (3,) else seed, x.device)


def _with_first_image(seed: Tensor | None) -> Tensor | None:
    """(3,) int64, as the kernels read it: 0 is the number of the first image where none is given."""
    return seed if seed is None or len(seed) == 3 else F.pad(seed, (0, 1))


def _check_skip(skip: Tensor, x: Tensor) -> None:
    whole = x.dim() == skip.dim() and x.shape[0] == skip.shape[0] and x.shape[2:] == skip.shape[2:]
    if not whole or skip.shape[1] == 0 or skip.dtype != x.dtype or skip.device != x.device:
        expected = f"a tensor like x, {tuple(x.shape)} {x.dtype} on {x.device}, but for its channels"
        got = f"{tuple(skip.shape)} {skip.dtype} on {skip.device}"
        raise ValueError(f"skip: expected {expected}, got {got}")


def _check_cotangent(
    g: Tensor, x: Tensor, skip: Tensor | None, mean: Tensor, rstd: Tensor, num_groups: int
) -> None:
    whole = _whole_shape(x, skip)
    if g.shape != whole or g.dtype != x.dtype or g.device != x.device:
        expected = f"{tuple(whole)} {x.dtype} on {x.device}"
        raise ValueError(
            f"g: expected a tensor like y, {expected}, got {tuple(g.shape)} {g.dtype} on {g.device}"
        )
    shape, dtype = (x.shape[0], num_groups), _statistics_dtype(x)
    for name, statistic in (("mean", mean), ("rstd", rstd)):
        if statistic.shape != shape or statistic.dtype != dtype or statistic.device != x.device:
            got = f"{tuple(statistic.shape)} {statistic.dtype} on {statistic.device}"
            raise ValueError(f"{name}: expected {shape} {dtype} on {x.device}, got {got}")


def _dense(x: Tensor, skip: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x and skip without gaps and in one order, that of x: contiguous or channels-last."""
    if not x.is_contiguous() and not _is_channels_last(x):
        x = x.contiguous()
    return x, None if skip is None else _laid_out_as(x, skip)


def _laid_out_as(x: Tensor, tensor: Tensor) -> Tensor:
    """The tensor without gaps, in the order of the dense x."""
    if x.is_contiguous():
        return tensor.contiguous()
    if _is_channels_last(tensor):
        return tensor
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def _is_channels_last(x: Tensor) -> bool:
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.movedim(1, -1).is_contiguous()


def _parameters(weight: Tensor, bias: Tensor, x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """weight and bias in the precision of the statistics, both (C,) or both (B, C).

    Without gaps, but that Triton reads the same ones for all images where they are such (B, C).
    """
    if weight.dim() != bias.dim():
        shape = x.shape[0], weight.shape[-1]
        weight, bias = weight.expand(shape), bias.expand(shape)
    dtype = _statistics_dtype(x)
    if weight.dtype != dtype or bias.dtype != dtype:
        weight, bias = weight.to(dtype), bias.to(dtype)
    if backend == "triton" and weight.stride() == bias.stride() == (0, 1):
        return weight, bias
    return weight.contiguous(), bias.contiguous()


# Registration. The op and its VJP know their first derivative; the two ops that compute these know none, so
# that a second differentiation raises. All take what `_dense`, `_laid_out_as` and `_parameters` return. What
# belongs to skip is None where there is none.


def _triton_forward(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    num_groups: int,
    silu: bool,
    dropout: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from cdm_fast.kernels import group_norm_silu as kernels

    outputs = _empty_whole(x, skip), *_empty_pair(x, num_groups)
    kernels.forward(x, skip, weight, bias, seed, *outputs, num_groups, eps, silu, dropout)
    return outputs


def _triton_vjp(
    g: Tensor, x: Tensor, skip: Tensor | None, weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor | None]:
    from cdm_fast.kernels import group_norm_silu as kernels

    gradients = _empty_pieces(x, skip)
    kernels.vjp(g, x, skip, weight, *rest[:4], *gradients, *_empty_pair(x, weight.shape[-1]), *rest[4:])
    return gradients


def _triton_backward(
    g: Tensor,
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of <g, y> with respect to x, skip, weight and bias."""
    from cdm_fast.kernels import group_norm_silu as kernels

    grad_x, grad_skip = _empty_pieces(x, skip)
    of_parameters = _empty_pair(x, weight.shape[-1])
    gradients = grad_x, grad_skip, *of_parameters
    kernels.vjp(g, x, skip, weight, bias, mean, rstd, seed, *gradients, *options)
    return grad_x, grad_skip, *_like_parameters(of_parameters, weight)


def _triton_vjp_backward(
    v: Tensor,
    v_skip: Tensor | None,
    g: Tensor,
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Gradients of <v, VJP> with respect to g, x, skip, weight and bias."""
    from cdm_fast.kernels import group_norm_silu as kernels

    grad_g, (grad_x, grad_skip) = _empty_whole(x, skip), _empty_pieces(x, skip)
    of_parameters = _empty_pair(x, weight.shape[-1])
    gradients = grad_g, grad_x, grad_skip, *of_parameters
    kernels.vjp_backward(v, v_skip, g, x, skip, weight, bias, mean, rstd, seed, *gradients, *options)
    return grad_g, grad_x, grad_skip, *_like_parameters(of_parameters, weight)


def _like_parameters(of_images: tuple[Tensor, Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
    from cdm_fast.kernels import group_norm_silu as kernels

    if weight.dim() == 2:
        return of_images
    sums = torch.empty_like(weight), torch.empty_like(weight)
    kernels.sum_images(*of_images, *sums)
    return sums


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, skip, weight, bias, seed, *options, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, skip, weight, bias, mean, rstd, seed)
    ctx.options = options


def _differentiate_forward(ctx: Any, grad_y: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 9
    x, *saved = ctx.saved_tensors
    backward = overload("group_norm_silu_backward", ctx.backend)
    return *backward(_laid_out_as(x, grad_y), x, *saved, *ctx.options), *(None,) * 5


def _save_vjp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.options = inputs[8:]


def _differentiate_vjp(ctx: Any, v: Tensor, v_skip: Tensor | None) -> tuple[Tensor | None, ...]:
    g, x, *saved = ctx.saved_tensors
    v, v_skip = _laid_out_as(x, v), None if v_skip is None else _laid_out_as(x, v_skip)
    backward = overload("group_norm_silu_vjp_backward", ctx.backend)
    return *backward(v, v_skip, g, x, *saved, *ctx.options), *(None,) * 6


_PARAMETERS = "Tensor x, Tensor? skip, Tensor weight, Tensor bias, "
_OPTIONS = "Tensor? seed, int num_groups, bool silu, float dropout"
_SAVED = "Tensor mean, Tensor rstd, " + _OPTIONS
define(
    "group_norm_silu",
    f"({_PARAMETERS}{_OPTIONS}, float eps) -> (Tensor, Tensor, Tensor)",
    fake=lambda x, skip, weight, bias, seed, groups, *_: (_empty_whole(x, skip), *_empty_pair(x, groups)),
    triton=_triton_forward,
    save=_save_forward,
    backward=_differentiate_forward,
)
define(
    "group_norm_silu_backward",
    f"(Tensor g, {_PARAMETERS}{_SAVED}) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda g, x, skip, weight, bias, *_: (
        *_empty_pieces(x, skip),
        torch.empty_like(weight),
        torch.empty_like(bias),
    ),
    triton=_triton_backward,
)
define(
    "group_norm_silu_vjp",
    f"(Tensor g, {_PARAMETERS}{_SAVED}) -> (Tensor, Tensor)",
    fake=lambda g, x, skip, *_: _empty_pieces(x, skip),
    triton=_triton_vjp,
    save=_save_vjp,
    backward=_differentiate_vjp,
)
define(
    "group_norm_silu_vjp_backward",
    f"(Tensor v, Tensor? v_skip, Tensor g, {_PARAMETERS}{_SAVED})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=lambda v, v_skip, g, x, skip, weight, bias, *_: (
        _empty_whole(x, skip),
        *_empty_pieces(x, skip),
        torch.empty_like(weight),
        torch.empty_like(bias),
    ),
    triton=_triton_vjp_backward,
)


def _whole_shape(x: Tensor, skip: Tensor | None) -> torch.Size:
    """The shape of cat((x, skip), 1)."""
    if skip is None:
        return x.shape
    return torch.Size((x.shape[0], x.shape[1] + skip.shape[1], *x.shape[2:]))


def _empty_pair(x: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Two uninitialised (B, columns) tensors in the precision of the statistics."""
    shape, dtype = (x.shape[0], columns), _statistics_dtype(x)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


def _empty_whole(x: Tensor, skip: Tensor | None) -> Tensor:
    """An uninitialised y, laid out like x."""
    if skip is None:
        return torch.empty_like(x)
    batch, channels, *spatial = _whole_shape(x, skip)
    if x.is_contiguous():
        return x.new_empty(batch, channels, *spatial)
    return x.new_empty(batch, *spatial, channels).movedim(-1, 1)


def _empty_pieces(x: Tensor, skip: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Uninitialised gradients of x and skip."""
    return torch.empty_like(x), None if skip is None else torch.empty_like(skip)
