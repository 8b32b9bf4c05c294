"""RMSNorm of tokens in one pass, its vector-Jacobian product (VJP), and the derivatives of both.

B batch, N tokens, C channels. Per token, with r = (mean(x^2) + eps)^(-1/2) and means over its channels,

    xhat = r x,   y = weight xhat.                                   Zhang and Sennrich 2019, eq. 4
    p = g weight,   grad_x = r (p - xhat mean(p xhat)).                                     the VJP

The VJP is J p with J = r (I - xhat xhat^T / C), a symmetric matrix, so its derivative along v is

    q = J v,   grad_g = q weight,   grad_weight = sum over tokens of q g,
    grad_x = r^2 (xhat (3 mean(v xhat) mean(p xhat) - mean(v p)) - v mean(p xhat) - p mean(v xhat)).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cdm_fast.ops import backend as _backend
from cdm_fast.ops import checks
from cdm_fast.ops.backend import Coverage
from cdm_fast.ops.precision import compute_dtype
from cdm_fast.ops.registry import define, overload

_backend.declare(
    "rms_norm",
    cpp=Coverage("cpu", (torch.float64, torch.float32, torch.bfloat16)),
    cuda=Coverage("cuda", (torch.float32, torch.bfloat16, torch.float16)),
    triton=Coverage("cuda", (torch.float64, torch.float32, torch.bfloat16, torch.float16)),
)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """The specification of `rms_norm` in plain PyTorch; see there."""
    wide = x.to(compute_dtype(x.dtype))
    rstd = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = _per_token(weight, x) * (wide * rstd)
    return y.to(x.dtype), rstd.detach().squeeze(-1)


def rms_norm_vjp_reference(g: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """The specification of `rms_norm_vjp` in plain PyTorch; see there."""
    wide = x.to(compute_dtype(x.dtype))
    # The value is the given one; the derivative with respect to x is that of the statistic of x.
    mean_square = wide.square().mean(-1, keepdim=True)
    given = rstd.detach().unsqueeze(-1) ** -2
    scale = (given + (mean_square - mean_square.detach())).rsqrt()
    xhat, p = wide * scale, g.to(wide.dtype) * _per_token(weight, x)
    return (scale * (p - xhat * (p * xhat).mean(-1, keepdim=True))).to(x.dtype)


def rms_norm(
    x: Tensor,  # (B, N, C)
    weight: Tensor,  # (C,) or (B, C)
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """`weight x / sqrt(mean(x^2) + eps)`, with the mean over the channels of each token: (y, rstd).

    Args:
        x: float tensor, any strides.
        weight: per channel, or per image and channel (a scale that an embedding modulates).
        eps: added to the mean square.

    Returns:
        (y, rstd): y like x, contiguous; rstd (B, N) in fp32 (fp64 for fp64), a constant to autograd.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape or device.

    Source: Zhang and Sennrich 2019, eq. 4 (arXiv 1910.07467).

    Example:
        >>> import torch
        >>> from cdm_fast.ops import rms_norm
        >>> y, rstd = rms_norm(torch.full((2, 3, 4), 5.0), torch.ones(4))
        >>> y.shape, rstd.shape, round(float(y.max()), 3)
        (torch.Size([2, 3, 4]), torch.Size([2, 3]), 1.0)
    """
    _check(x, weight)
    backend = _backend.resolve("rms_norm", x)
    if backend == "reference":
        return rms_norm_reference(x, weight, eps)
    return overload("rms_norm", backend)(x.contiguous(), _parameter(weight, x), eps)


def rms_norm_vjp(
    g: Tensor,  # (B, N, C)
    x: Tensor,  # (B, N, C)
    weight: Tensor,  # (C,) or (B, C)
    rstd: Tensor,  # (B, N)
) -> Tensor:
    """Gradient of `<g, rms_norm(x, weight)[0]>` with respect to x: a contiguous tensor like x.

    rstd: the result of `rms_norm` for this x. The result is differentiable once with respect to g, x and
    weight, where rstd counts as a function of x and gets no gradient of its own.

    Raises TypeError or ValueError for arguments of the wrong dtype, shape or device.
    """
    _check(x, weight)
    checks.check_tensor("g", g, dtypes=(x.dtype,), shape=tuple(x.shape), device=x.device)
    dtypes, shape = (compute_dtype(x.dtype),), tuple(x.shape[:2])
    checks.check_tensor("rstd", rstd, dtypes=dtypes, shape=shape, device=x.device)
    backend = _backend.resolve("rms_norm", x)
    if backend == "reference":
        return rms_norm_vjp_reference(g, x, weight, rstd)
    op = overload("rms_norm_vjp", backend)
    return op(g.contiguous(), x.contiguous(), _parameter(weight, x), rstd.contiguous())


def _per_token(weight: Tensor, x: Tensor) -> Tensor:
    """(C,) or (B, C) -> broadcastable to x, in the precision of the statistics."""
    return weight.to(compute_dtype(x.dtype)).reshape(-1, 1, x.shape[-1])


def _parameter(weight: Tensor, x: Tensor) -> Tensor:
    """The weight as the kernels read it: contiguous, in the precision of the statistics."""
    return weight.to(compute_dtype(x.dtype)).contiguous()


def _check(x: Tensor, weight: Tensor) -> None:
    checks.check_tensor("x", x, dtypes=checks.FLOATING, shape=(None, None, None))
    checks.check_batch("x", x)
    batch, _, channels = x.shape
    checks.check_tensor("weight", weight, dtypes=checks.FLOATING, device=x.device)
    if weight.shape != (channels,) and weight.shape != (batch, channels):
        expected = f"({channels},) or ({batch}, {channels})"
        raise ValueError(f"weight: expected shape {expected}, got {tuple(weight.shape)}")


def _empty_rstd(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=compute_dtype(x.dtype))


def _triton_forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from cdm_fast.kernels import rms_norm as kernels

    y, rstd = torch.empty_like(x), _empty_rstd(x)
    kernels.forward(x, weight, y, rstd, eps)
    return y, rstd


def _triton_vjp(g: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    from cdm_fast.kernels import rms_norm as kernels

    grad_x = torch.empty_like(x)
    kernels.vjp(g, x, weight, rstd, grad_x, None)
    return grad_x


def _triton_backward(g: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of <g, y> with respect to x and weight."""
    from cdm_fast.kernels import rms_norm as kernels

    grad_x, of_images = torch.empty_like(x), weight.new_empty(x.shape[0], x.shape[2])
    kernels.vjp(g, x, weight, rstd, grad_x, of_images)
    return grad_x, _like_parameter(of_images, weight)


def _triton_vjp_backward(
    v: Tensor, g: Tensor, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of <v, VJP> with respect to g, x and weight."""
    from cdm_fast.kernels import rms_norm as kernels

    grad_g, grad_x = torch.empty_like(x), torch.empty_like(x)
    of_images = weight.new_empty(x.shape[0], x.shape[2])
    kernels.vjp_backward(v, g, x, weight, rstd, grad_g, grad_x, of_images)
    return grad_g, grad_x, _like_parameter(of_images, weight)


def _like_parameter(of_images: Tensor, weight: Tensor) -> Tensor:
    """The gradient of a weight (C,) or (B, C) from those of the images, (B, C)."""
    return of_images if weight.dim() == 2 else of_images.sum(0)


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])


def _differentiate_forward(ctx: Any, grad_y: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    backward = overload("rms_norm_backward", ctx.backend)
    return *backward(grad_y.contiguous(), *ctx.saved_tensors), None


def _save_vjp(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_vjp(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
    backward = overload("rms_norm_vjp_backward", ctx.backend)
    return *backward(v.contiguous(), *ctx.saved_tensors), None


define(
    "rms_norm",
    "(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    fake=lambda x, weight, eps: (torch.empty_like(x), _empty_rstd(x)),
    triton=_triton_forward,
    save=_save_forward,
    backward=_differentiate_forward,
)
define(
    "rms_norm_backward",
    "(Tensor g, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
    fake=lambda g, x, weight, rstd: (torch.empty_like(x), torch.empty_like(weight)),
    triton=_triton_backward,
)
define(
    "rms_norm_vjp",
    "(Tensor g, Tensor x, Tensor weight, Tensor rstd) -> Tensor",
    fake=lambda g, x, weight, rstd: torch.empty_like(x),
    triton=_triton_vjp,
    save=_save_vjp,
    backward=_differentiate_vjp,
)
define(
    "rms_norm_vjp_backward",
    "(Tensor v, Tensor g, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor, Tensor)",
    fake=lambda v, g, x, weight, rstd: (torch.empty_like(x), torch.empty_like(x), torch.empty_like(weight)),
    triton=_triton_vjp_backward,
)
