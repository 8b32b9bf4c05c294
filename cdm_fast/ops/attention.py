"""Softmax attention over tokens, its vector-Jacobian product, and the first derivative of both.

B batch, N tokens, C channels, h heads, D = C/h channels per head.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention_reference(
    q: Tensor,  # (B, N, C)
    k: Tensor,  # (B, N, C)
    v: Tensor,  # (B, N, C)
    scale: float,
    num_heads: int = 1,
) -> tuple[Tensor, Tensor]:
    """The specification of `attention` in plain PyTorch; see there."""
    with torch.autocast(q.device.type, enabled=False):
        q_h, k_h, v_h = (_heads(x, num_heads) for x in (q, k, v))
        scores = scale * (q_h @ k_h.mT)
        lse = scores.detach().logsumexp(-1)
        return _tokens(scores.softmax(-1) @ v_h, q.dtype), lse


def attention_vjp_reference(
    g: Tensor,  # (B, N, C)
    q: Tensor,  # (B, N, C)
    k: Tensor,  # (B, N, C)
    v: Tensor,  # (B, N, C)
    scale: float,
    num_heads: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """The specification of `attention_vjp` in plain PyTorch; see there.

    It computes the probabilities anew, so that autograd sees all that the result depends on.
    """
    with torch.autocast(q.device.type, enabled=False):
        g_h, q_h, k_h, v_h = (_heads(x, num_heads) for x in (g, q, k, v))
        p = (scale * (q_h @ k_h.mT)).softmax(-1)
        grad_p = g_h @ v_h.mT
        grad_scores = p * (grad_p - (p * grad_p).sum(-1, keepdim=True))
        grad_q, grad_k = scale * (grad_scores @ k_h), scale * (grad_scores.mT @ q_h)
        return _tokens(grad_q, q.dtype), _tokens(grad_k, k.dtype), _tokens(p.mT @ g_h, v.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, num_heads: int = 1) -> tuple[Tensor, Tensor]:
    """Attention of every token to all tokens: `softmax(scale q k^T) v`, head by head."""
    return attention_reference(q, k, v, scale, num_heads)


def attention_vjp(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, num_heads: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of `<g, attention(q, k, v)>` with respect to q, k and v."""
    return attention_vjp_reference(g, q, k, v, scale, num_heads)


def _heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, C) -> (B, h, N, D), in the precision of the softmax (fp32, or fp64 for fp64)."""
    accumulate = torch.promote_types(x.dtype, torch.float32)
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2).to(accumulate)


def _tokens(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, h, N, D) -> (B, N, C)."""
    return x.transpose(1, 2).flatten(2).to(dtype)
