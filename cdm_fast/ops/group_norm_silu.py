"""GroupNorm with SiLU and dropout in one pass, its vector-Jacobian product, and the derivatives of both.

B batch, C channels, G groups, n = C/G * pixels elements of a group. Per group of one image

    xhat = (x - mean) rstd,   u = weight xhat + bias,   y = mask silu(u).

GroupNorm: Wu and He 2018, eq. 1-3; SiLU: u sigmoid(u). With p = g mask silu'(u) weight the VJP is

    grad_x = rstd (p - mean(p) - xhat mean(p xhat)).
"""

from __future__ import annotations

from typing import overload as typed

import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_fast.ops.backend import Coverage, declare, resolve
from cdm_fast.ops.dropout import check_dropout, dropout_mask, with_first_image
from cdm_fast.ops.group_norm_silu_op import dense, laid_out_as, parameters, whole_shape
from cdm_fast.ops.precision import compute_dtype
from cdm_fast.ops.registry import overload

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
    """`mask silu(weight (x - mean) rstd + bias)`, with statistics per image and group.

    Args:
        x: float tensor of two or more dimensions.
        weight, bias: per channel, or per image and channel (the scale and shift of an embedding).
        num_groups: G, a divisor of the channels.
        eps: added to the variance.
        silu: False for plain GroupNorm.
        dropout: probability in [0, 1) of zeroing an element of the result; the others are multiplied by
            1/(1 - dropout).
        seed: seed of the dropout mask, which is a function of (seed, offset) and of the element's index in
            channels-last order. The third number is the number of images before the first, so that a part of
            a batch has the same mask as in the whole batch.
        skip: if given, cat((x, skip), 1) is normalised, and weight, bias and y have C + C2 channels. A group
            may contain channels of both. Kernels read both in place; the reference concatenates.

    Returns:
        (y, mean, rstd): y like x; mean and rstd (B, G) in fp32 (fp64 for fp64), constants to autograd.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device or range.

    Source: GroupNorm, Wu and He 2018, eq. 1-3 (arXiv 1803.08494).

    Example:
        >>> import torch
        >>> from cdm_fast.ops import group_norm_silu
        >>> x = torch.randn(2, 8, 4, 4)
        >>> y, mean, rstd = group_norm_silu(x, torch.ones(8), torch.zeros(8), num_groups=2)
        >>> y.shape, mean.shape
        (torch.Size([2, 8, 4, 4]), torch.Size([2, 2]))
    """
    _check(x, skip, weight, bias, num_groups, dropout, seed)
    backend = resolve("group_norm_silu", x)
    if backend == "reference":
        whole = x if skip is None else torch.cat((x, skip), 1)
        return group_norm_silu_reference(
            whole, weight, bias, num_groups, eps, silu=silu, dropout=dropout, seed=seed
        )
    x, skip = dense(x, skip)
    weight, bias = parameters(weight, bias, x, backend)
    op = overload("group_norm_silu", backend)
    return op(x, skip, weight, bias, with_first_image(seed), num_groups, silu, dropout, eps)


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

    mean, rstd: the results of `group_norm_silu` for this x. The result is differentiable once with respect to
    g, x, weight and bias, where mean and rstd count as functions of x and get no gradient of their own. With
    skip: the gradients with respect to x and skip.

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
    x, skip = dense(x, skip)
    weight, bias = parameters(weight, bias, x, backend)
    saved = mean.contiguous(), rstd.contiguous(), with_first_image(seed)
    op = overload("group_norm_silu_vjp", backend)
    grad_x, grad_skip = op(laid_out_as(x, g), x, skip, weight, bias, *saved, num_groups, silu, dropout)
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
    # The values are the given ones; the derivatives with respect to x are those of the statistics of x.
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


def _groups(x: Tensor, num_groups: int) -> Tensor:
    """(B, C, *spatial) -> (B, G, C/G, *spatial), in the precision of the statistics."""
    return x.to(compute_dtype(x.dtype)).unflatten(1, (num_groups, -1))


def _per_channel(parameter: Tensor, x: Tensor) -> Tensor:
    """(C,) or (B, C) -> broadcastable to x, in the precision of the statistics."""
    shape = (-1, x.shape[1]) + (1,) * (x.dim() - 2)
    return parameter.to(compute_dtype(x.dtype)).reshape(shape)


def _with_value(function_of_x: Tensor, value: Tensor) -> Tensor:
    """`value` in the forward pass, with the derivatives of `function_of_x`."""
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
    batch, channels = whole_shape(x, skip)[:2]
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
    check_dropout(dropout, seed, x.device)


def _check_skip(skip: Tensor, x: Tensor) -> None:
    whole = x.dim() == skip.dim() and x.shape[0] == skip.shape[0] and x.shape[2:] == skip.shape[2:]
    if not whole or skip.shape[1] == 0 or skip.dtype != x.dtype or skip.device != x.device:
        expected = f"a tensor like x, {tuple(x.shape)} {x.dtype} on {x.device}, but for its channels"
        got = f"{tuple(skip.shape)} {skip.dtype} on {skip.device}"
        raise ValueError(f"skip: expected {expected}, got {got}")


def _check_cotangent(
    g: Tensor, x: Tensor, skip: Tensor | None, mean: Tensor, rstd: Tensor, num_groups: int
) -> None:
    whole = whole_shape(x, skip)
    if g.shape != whole or g.dtype != x.dtype or g.device != x.device:
        expected = f"{tuple(whole)} {x.dtype} on {x.device}"
        raise ValueError(
            f"g: expected a tensor like y, {expected}, got {tuple(g.shape)} {g.dtype} on {g.device}"
        )
    shape, dtype = (x.shape[0], num_groups), compute_dtype(x.dtype)
    for name, statistic in (("mean", mean), ("rstd", rstd)):
        if statistic.shape != shape or statistic.dtype != dtype or statistic.device != x.device:
            got = f"{tuple(statistic.shape)} {statistic.dtype} on {statistic.device}"
            raise ValueError(f"{name}: expected {shape} {dtype} on {x.device}, got {got}")
