"""The gate of a gated MLP with dropout, its vector-Jacobian product (VJP), and the derivatives of both.

B batch, N tokens, H hidden channels. The two halves of h are the gate and what it lets through, (a, b):

    y = mask silu(a) b,   silu(a) = a sigmoid(a).                            Shazeer 2020, eq. 6
    grad_a = mask g b silu'(a),   grad_b = mask g silu(a).                              the VJP

The derivative of the VJP along (v_a, v_b) is

    grad_g = mask (v_a b silu'(a) + v_b silu(a)),
    grad_a = mask g (v_a b silu''(a) + v_b silu'(a)),   grad_b = mask g v_a silu'(a).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_fast.ops import backend as _backend
from cdm_fast.ops import checks
from cdm_fast.ops.backend import Coverage
from cdm_fast.ops.dropout import check_dropout, dropout_mask, with_first_image
from cdm_fast.ops.precision import compute_dtype
from cdm_fast.ops.registry import define, overload

_backend.declare(
    "swiglu",
    cpp=Coverage("cpu", (torch.float64, torch.float32, torch.bfloat16)),
    cuda=Coverage("cuda", (torch.float32, torch.bfloat16, torch.float16)),
    triton=Coverage("cuda", (torch.float64, torch.float32, torch.bfloat16, torch.float16)),
)


def swiglu_reference(h: Tensor, *, dropout: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """The specification of `swiglu` in plain PyTorch; see there."""
    gate, value = h.to(compute_dtype(h.dtype)).chunk(2, -1)
    return (_kept(F.silu(gate) * value, dropout, seed)).to(h.dtype)


def swiglu_vjp_reference(g: Tensor, h: Tensor, *, dropout: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """The specification of `swiglu_vjp` in plain PyTorch; see there."""
    gate, value = h.to(compute_dtype(h.dtype)).chunk(2, -1)
    g = _kept(g.to(gate.dtype), dropout, seed)
    sigmoid = gate.sigmoid()
    of_gate = g * value * (sigmoid * (1 + gate * (1 - sigmoid)))
    return torch.cat([of_gate, g * (gate * sigmoid)], -1).to(h.dtype)


def swiglu(
    h: Tensor,  # (B, N, 2 H)
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,  # (2,) or (3,) int64
) -> Tensor:  # (B, N, H)
    """`mask silu(a) b` of the two halves (a, b) of the channels of h.

    Args:
        h: float tensor, any strides; an even number of channels.
        dropout, seed: as in `group_norm_silu`; elements of the result are counted in contiguous order.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: an argument of the wrong shape, device or range.

    Source: Shazeer 2020, eq. 6 (arXiv 2002.05202).

    Example:
        >>> import torch
        >>> from cdm_fast.ops import swiglu
        >>> swiglu(torch.zeros(2, 3, 8)).shape
        torch.Size([2, 3, 4])
    """
    _check(h, dropout, seed)
    backend = _backend.resolve("swiglu", h)
    if backend == "reference":
        return swiglu_reference(h, dropout=dropout, seed=seed)
    return overload("swiglu", backend)(h.contiguous(), _seed(dropout, seed), dropout)


def swiglu_with_input(
    h: Tensor,  # (B, N, 2 H)
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # (B, N, H), (B, N, 2 H)
    """`swiglu(h, ...)`, and h for its other uses: by `swiglu_vjp` in a network's adjoint.

    Where h is used twice, autograd adds two gradients in a pass of its own. Those of the second result are
    added by the kernel that computes the gradient of the first (C++; elsewhere h itself is returned).
    Arguments and errors as for `swiglu`.
    """
    _check(h, dropout, seed)
    in_kernel = _backend.resolve("swiglu", h) == "cpp" and torch.is_grad_enabled() and h.requires_grad
    if not in_kernel or torch.compiler.is_compiling():  # inductor fuses the addition itself
        return swiglu(h, dropout=dropout, seed=seed), h
    return _WithInput.apply(h.contiguous(), _seed(dropout, seed), dropout)


def swiglu_vjp(
    g: Tensor,  # (B, N, H)
    h: Tensor,  # (B, N, 2 H)
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:  # (B, N, 2 H)
    """Gradient of `<g, swiglu(h, ...)>` with respect to h, differentiable once with respect to g and h.

    Raises TypeError or ValueError for arguments of the wrong dtype, shape, device or range.
    """
    _check(h, dropout, seed)
    shape = (*h.shape[:2], h.shape[2] // 2)
    checks.check_tensor("g", g, dtypes=(h.dtype,), shape=shape, device=h.device)
    backend = _backend.resolve("swiglu", h)
    if backend == "reference":
        return swiglu_vjp_reference(g, h, dropout=dropout, seed=seed)
    op = overload("swiglu_vjp", backend)
    return op(g.contiguous(), h.contiguous(), _seed(dropout, seed), dropout)


def _kept(value: Tensor, dropout: float, seed: Tensor | None) -> Tensor:
    return value * dropout_mask(value.mT, dropout, seed).mT if dropout > 0 else value


def _seed(dropout: float, seed: Tensor | None) -> Tensor | None:
    """The seed as the kernels read it; None where nothing is dropped."""
    return with_first_image(seed) if dropout > 0 else None


def _check(h: Tensor, dropout: float, seed: Tensor | None) -> None:
    checks.check_tensor("h", h, dtypes=checks.FLOATING, shape=(None, None, None))
    checks.check_batch("h", h)
    if h.shape[2] % 2:
        raise ValueError(f"h: expected an even number of channels, got {h.shape[2]}")
    check_dropout(dropout, seed, h.device)


def _empty_half(h: Tensor) -> Tensor:
    return h.new_empty(*h.shape[:2], h.shape[2] // 2)


def _triton_forward(h: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
    from cdm_fast.kernels import swiglu as kernels

    y = _empty_half(h)
    kernels.forward(h, seed, y, dropout)
    return y


def _triton_vjp(g: Tensor, h: Tensor, seed: Tensor | None, dropout: float) -> Tensor:
    from cdm_fast.kernels import swiglu as kernels

    grad_h = torch.empty_like(h)
    kernels.vjp(g, h, seed, grad_h, dropout)
    return grad_h


def _triton_vjp_backward(
    v: Tensor, g: Tensor, h: Tensor, seed: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    """Gradients of <v, VJP> with respect to g and h."""
    from cdm_fast.kernels import swiglu as kernels

    grad_g, grad_h = torch.empty_like(g), torch.empty_like(h)
    kernels.vjp_backward(v, g, h, seed, grad_g, grad_h, dropout)
    return grad_g, grad_h


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    h, seed, ctx.dropout = inputs
    ctx.save_for_backward(h, seed)


def _differentiate_forward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    grad_h = overload("swiglu_vjp", ctx.backend)(grad_y.contiguous(), *ctx.saved_tensors, ctx.dropout)
    return grad_h, None, None


def _save_vjp(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.dropout = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_vjp(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
    backward = overload("swiglu_vjp_backward", ctx.backend)
    return *backward(v.contiguous(), *ctx.saved_tensors, ctx.dropout), None, None


class _WithInput(torch.autograd.Function):
    """`swiglu_with_input` on the C++ kernels."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, seed: Tensor | None, dropout: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(h, seed)
        ctx.dropout = dropout
        ctx.set_materialize_grads(False)
        return overload("swiglu", "cpp")(h, seed, dropout), h.view_as(h)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, plus: Tensor | None) -> tuple[Tensor | None, None, None]:
        if grad_y is None:
            return plus, None, None
        h, seed = ctx.saved_tensors
        plus = None if plus is None else plus.contiguous()
        op = overload("swiglu_vjp_plus", "cpp")
        return op(grad_y.contiguous(), h, plus, seed, ctx.dropout), None, None


define(
    "swiglu",
    "(Tensor h, Tensor? seed, float dropout) -> Tensor",
    fake=lambda h, seed, dropout: _empty_half(h),
    triton=_triton_forward,
    save=_save_forward,
    backward=_differentiate_forward,
)
define(
    "swiglu_vjp",
    "(Tensor g, Tensor h, Tensor? seed, float dropout) -> Tensor",
    fake=lambda g, h, seed, dropout: torch.empty_like(h),
    triton=_triton_vjp,
    save=_save_vjp,
    backward=_differentiate_vjp,
)
define(
    "swiglu_vjp_plus",
    "(Tensor g, Tensor h, Tensor? plus, Tensor? seed, float dropout) -> Tensor",
    fake=lambda g, h, plus, seed, dropout: torch.empty_like(h),
)
define(
    "swiglu_vjp_backward",
    "(Tensor v, Tensor g, Tensor h, Tensor? seed, float dropout) -> (Tensor, Tensor)",
    fake=lambda v, g, h, seed, dropout: (torch.empty_like(g), torch.empty_like(h)),
    triton=_triton_vjp_backward,
)
