"""The op `cdm_fast::group_norm_silu` and its derivatives: tensor preparation and registration.

`cdm_fast/ops/group_norm_silu.py` has the definitions and the reference. The op and its VJP have a first
derivative. The two ops that compute these derivatives have none, so a second differentiation raises. All of
them take the results of `dense`, `laid_out_as` and `parameters`; arguments that belong to `skip` are None
without it.

B batch, C channels, G groups
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cdm_fast.ops.precision import compute_dtype
from cdm_fast.ops.registry import define, overload


def whole_shape(x: Tensor, skip: Tensor | None) -> torch.Size:
    """The shape of cat((x, skip), 1)."""
    if skip is None:
        return x.shape
    return torch.Size((x.shape[0], x.shape[1] + skip.shape[1], *x.shape[2:]))


def dense(x: Tensor, skip: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x and skip without gaps and in the memory order of x: contiguous or channels-last."""
    if not x.is_contiguous() and not _is_channels_last(x):
        x = x.contiguous()
    return x, None if skip is None else laid_out_as(x, skip)


def laid_out_as(x: Tensor, tensor: Tensor) -> Tensor:
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


def parameters(weight: Tensor, bias: Tensor, x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """weight and bias in the precision of the statistics, both (C,) or both (B, C).

    Without gaps, except that Triton reads expanded (B, C) parameters without a copy.
    """
    if weight.dim() != bias.dim():
        shape = x.shape[0], weight.shape[-1]
        weight, bias = weight.expand(shape), bias.expand(shape)
    dtype = compute_dtype(x.dtype)
    if weight.dtype != dtype or bias.dtype != dtype:
        weight, bias = weight.to(dtype), bias.to(dtype)
    if backend == "triton" and weight.stride() == bias.stride() == (0, 1):
        return weight, bias
    return weight.contiguous(), bias.contiguous()


def _empty_pair(x: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Two uninitialised (B, columns) tensors in the precision of the statistics."""
    shape, dtype = (x.shape[0], columns), compute_dtype(x.dtype)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape, dtype=dtype)


def _empty_whole(x: Tensor, skip: Tensor | None) -> Tensor:
    """An uninitialised y, laid out like x."""
    if skip is None:
        return torch.empty_like(x)
    batch, channels, *spatial = whole_shape(x, skip)
    if x.is_contiguous():
        return x.new_empty(batch, channels, *spatial)
    return x.new_empty(batch, *spatial, channels).movedim(-1, 1)


def _empty_pieces(x: Tensor, skip: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Uninitialised gradients of x and skip."""
    return torch.empty_like(x), None if skip is None else torch.empty_like(skip)


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
    return *backward(laid_out_as(x, grad_y), x, *saved, *ctx.options), *(None,) * 5


def _save_vjp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.options = inputs[8:]


def _differentiate_vjp(ctx: Any, v: Tensor, v_skip: Tensor | None) -> tuple[Tensor | None, ...]:
    g, x, *saved = ctx.saved_tensors
    v, v_skip = laid_out_as(x, v), None if v_skip is None else laid_out_as(x, v_skip)
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
