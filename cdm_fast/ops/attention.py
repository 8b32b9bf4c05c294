"""Softmax attention over tokens, its vector-Jacobian product (VJP), and the first derivative of both.

B batch, N tokens, C channels, h heads, D = C/h channels per head. Head by head, with * elementwise,

    p = softmax(scale q k^T),   out = p v.                                Vaswani et al. 2017, eq. 1
    grad_p = g v^T,   delta = rowsum(p * grad_p),   grad_scores = p * (grad_p - delta),
    grad_q = scale grad_scores k,   grad_k = scale grad_scores^T q,   grad_v = p^T g.       the VJP

The derivative of the VJP along cotangents (u_q, u_k, u_v) needs no reverse pass through these lines: grad_q,
grad_k, grad_v are the gradient of <g, out>, whose Hessian is symmetric, so it is their tangent along (u_q,
u_k, u_v), and for g it is the tangent of out:

    scores_dot = scale (u_q k^T + q u_k^T),   p_dot = p * (scores_dot - rowsum(p * scores_dot)),
    out_dot = p_dot v + p u_v,   grad_p_dot = g u_v^T,   delta_dot = rowsum(p_dot * grad_p + p * grad_p_dot),
    grad_scores_dot = p_dot * (grad_p - delta) + p * (grad_p_dot - delta_dot),
    grad_q_dot = scale (grad_scores_dot k + grad_scores u_k),   grad_v_dot = p_dot^T g,
    grad_k_dot = scale (grad_scores_dot^T q + grad_scores^T u_q).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from cdm_fast.ops import attention_composed, attention_cpu, attention_gpu, checks
from cdm_fast.ops import backend as _backend
from cdm_fast.ops.backend import Coverage
from cdm_fast.ops.precision import compute_dtype
from cdm_fast.ops.registry import define, overload

_backend.declare(
    "attention",
    cpp=Coverage("cpu", (torch.float32, torch.bfloat16, torch.float64)),
    triton=Coverage("cuda", (torch.float32, torch.bfloat16, torch.float16)),
)


def attention_reference(
    q: Tensor,  # (B, N, C)
    k: Tensor,  # (B, N, C)
    v: Tensor,  # (B, N, C)
    scale: float,
    num_heads: int = 1,
) -> tuple[Tensor, Tensor]:
    """The specification of `attention` in plain PyTorch; see there."""
    with torch.autocast(q.device.type, enabled=False):
        q_h, k_h, v_h = (_heads(x.to(compute_dtype(q.dtype)), num_heads) for x in (q, k, v))
        scores = scale * (q_h @ k_h.mT)
        lse = scores.detach().logsumexp(-1)
        return _tokens(scores.softmax(-1) @ v_h).to(q.dtype), lse


def attention_vjp_reference(
    g: Tensor,  # (B, N, C)
    q: Tensor,  # (B, N, C)
    k: Tensor,  # (B, N, C)
    v: Tensor,  # (B, N, C)
    scale: float,
    num_heads: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification of `attention_vjp` in plain PyTorch; see there.

    It recomputes the probabilities, so that autograd sees every dependence of the result.
    """
    with torch.autocast(q.device.type, enabled=False):
        g_h, q_h, k_h, v_h = (_heads(x.to(compute_dtype(q.dtype)), num_heads) for x in (g, q, k, v))
        p = (scale * (q_h @ k_h.mT)).softmax(-1)
        grad_p = g_h @ v_h.mT
        grad_scores = scale * p * (grad_p - (p * grad_p).sum(-1, keepdim=True))
        gradients = grad_scores @ k_h, grad_scores.mT @ q_h, p.mT @ g_h
        return _triple(_tokens(x).to(q.dtype) for x in gradients)


def attention(
    q: Tensor,  # (B, N, C)
    k: Tensor,  # (B, N, C)
    v: Tensor,  # (B, N, C)
    scale: float,
    num_heads: int = 1,
) -> tuple[Tensor, Tensor]:
    """Attention of every token to all tokens, `out = softmax(scale q k^T) v` head by head: (out, lse).

    q, k, v: fp32, bf16, fp16 or fp64, any strides; head i owns channels i C/h to (i+1) C/h - 1. scale:
    usually (C/h)^-0.5. num_heads: h, a divisor of C. out: like q, contiguous. lse: (B, h, N) fp32 (fp64 for
    fp64), the log-sum-exp of the scaled scores, a constant to autograd. Autocast changes nothing.

    Differentiable with respect to q, k and v: twice, and with use_backend("reference") to any order. Raises
    TypeError or ValueError, naming the argument, for arguments that do not match the above.
    """
    _check(num_heads, q=q, k=k, v=v)
    backend = _backend.resolve("attention", q)
    if backend == "reference":
        return attention_reference(q, k, v, scale, num_heads)
    return overload("attention", backend)(q, k, v, scale, num_heads)


def attention_vjp(
    g: Tensor,  # (B, N, C)
    q: Tensor,  # (B, N, C)
    k: Tensor,  # (B, N, C)
    v: Tensor,  # (B, N, C)
    out: Tensor,  # (B, N, C)
    lse: Tensor,  # (B, h, N)
    scale: float,
    num_heads: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of `<g, attention(q, k, v)[0]>` with respect to q, k and v: (grad_q, grad_k, grad_v), like q.

    out, lse: the results of `attention` for these arguments; each backend reads what saves it work. The
    result is differentiable once with respect to g, q, k and v (use_backend("reference"): to any order),
    where out and lse count as functions of q, k and v and get no gradient of their own.

    Raises TypeError or ValueError, naming the argument, for arguments that do not match the above.
    """
    _check(num_heads, q=q, k=k, v=v, g=g, out=out)
    checks.check_tensor(
        "lse",
        lse,
        dtypes=(compute_dtype(q.dtype),),
        shape=(q.shape[0], num_heads, q.shape[1]),
        device=q.device,
    )
    backend = _backend.resolve("attention", q)
    if backend == "reference":
        return attention_vjp_reference(g, q, k, v, scale, num_heads)
    return overload("attention_vjp", backend)(g, q, k, v, out, lse, scale, num_heads)


def _check(num_heads: int, *, q: Tensor, **others: Tensor) -> None:
    """Raises the errors of `attention`."""
    checks.check_tensor("q", q, dtypes=checks.FLOATING, shape=(None, None, None))
    checks.check_batch("q", q)
    if num_heads < 1 or q.shape[2] % num_heads != 0:
        raise ValueError(f"num_heads: expected a divisor of q's {q.shape[2]} channels, got {num_heads}")
    for name, value in others.items():
        checks.check_tensor(name, value, dtypes=(q.dtype,), shape=tuple(q.shape), device=q.device)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, C) -> (B, h, N, D)"""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def _tokens(x: Tensor) -> Tensor:
    """(B, h, N, D) -> (B, N, C)"""
    return x.transpose(1, 2).flatten(2)


def _triple(tensors: Iterable[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = tensors
    return first, second, third


def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float, num_heads: int) -> tuple[Tensor, Tensor]:
    lse = q.new_empty((q.shape[0], num_heads, q.shape[1]), dtype=compute_dtype(q.dtype))
    return q.new_empty(q.shape), lse


def _composes(q: Tensor, num_heads: int) -> bool:
    return _backend.attention_method(q.shape[1], q.shape[2] // num_heads, q.dtype) == "composed"


def _triton(q: Tensor, k: Tensor, v: Tensor, scale: float, num_heads: int) -> tuple[Tensor, Tensor]:
    from cdm_fast.kernels import attention as kernels

    if _composes(q, num_heads):
        return attention_composed.forward(attention_gpu.pieces(), q, k, v, scale, num_heads)
    q, k, v = (x.contiguous() for x in (q, k, v))
    out, lse = _fake(q, k, v, scale, num_heads)
    kernels.attention(q, k, v, scale, num_heads, out, lse)
    return out, lse


def _triton_vjp(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from cdm_fast.kernels import attention as kernels

    *tensors, scale, num_heads = arguments
    if _composes(tensors[0], num_heads):
        g, q, k, v, _, lse = tensors
        return attention_composed.vjp(attention_gpu.pieces(), g, q, k, v, lse, scale, num_heads)
    gradients = _triple(tensors[0].new_empty(tensors[0].shape) for _ in range(3))
    kernels.attention_vjp(*(x.contiguous() for x in tensors), scale, num_heads, *gradients)
    return gradients


def _triton_vjp_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from cdm_fast.kernels import attention as kernels

    *tensors, scale, num_heads = arguments
    if _composes(tensors[0], num_heads):
        u_q, u_k, u_v, g, q, k, v, _, lse = tensors
        inputs = u_q, u_k, u_v, g, q, k, v, lse
        return attention_composed.vjp_backward(attention_gpu.pieces(), *inputs, scale, num_heads)
    grad_g = tensors[0].new_empty(tensors[0].shape)
    gradients = _triple(torch.empty_like(grad_g) for _ in range(3))
    kernels.attention_vjp_backward(*(x.contiguous() for x in tensors), scale, num_heads, grad_g, *gradients)
    return grad_g, *gradients


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale, ctx.num_heads = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse)
    ctx.mark_non_differentiable(lse)


def _backward(ctx: Any, g: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    gradients = overload("attention_vjp", ctx.backend)(g, *ctx.saved_tensors, ctx.scale, ctx.num_heads)
    return *gradients, None, None


def _save_vjp(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, ctx.num_heads = inputs
    ctx.save_for_backward(*tensors)


def _backward_of_vjp(ctx: Any, u_q: Tensor, u_k: Tensor, u_v: Tensor) -> tuple[Tensor | None, ...]:
    op = overload("attention_vjp_backward", ctx.backend)
    gradients = op(u_q, u_k, u_v, *ctx.saved_tensors, ctx.scale, ctx.num_heads)
    return *gradients, None, None, None, None


define(
    "attention",
    "(Tensor q, Tensor k, Tensor v, float scale, int num_heads) -> (Tensor, Tensor)",
    fake=_fake,
    triton=_triton,
    cpu=attention_cpu.forward,
    save=_save,
    backward=_backward,
)
define(
    "attention_vjp",
    "(Tensor g, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale, int num_heads)"
    " -> (Tensor, Tensor, Tensor)",
    fake=lambda g, *_: _triple(g.new_empty(g.shape) for _ in range(3)),
    triton=_triton_vjp,
    cpu=attention_cpu.vjp,
    save=_save_vjp,
    backward=_backward_of_vjp,
)
define(
    "attention_vjp_backward",
    "(Tensor u_q, Tensor u_k, Tensor u_v, Tensor g, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,"
    " float scale, int num_heads) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=lambda g, *_: tuple(g.new_empty(g.shape) for _ in range(4)),
    triton=_triton_vjp_backward,
    cpu=attention_cpu.vjp_backward,
)
