"""Attention on the CPU: the library's matrix products, and one pass in C++ over what lies between them.

B batch, N tokens, C channels, h heads, D = C/h channels per head. The equations and names are those of
`cdm_fast/ops/attention.py`. At any time only some heads, or some rows of one head's score matrix, exist:
memory stays bounded however many tokens there are. Everything here runs below autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from cdm_fast.ops.linear import onednn_linear, onednn_pays

# Elements of score matrices that exist at a time: fewer slow the matrix products, more leave the cache.
TILE_ELEMENTS = 1 << 21


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, num_heads: int) -> tuple[Tensor, Tensor]:
    """(out, lse) as `attention` returns them; fp64, fp32 or bf16, any strides."""
    folded = [_fold(x, num_heads) for x in (q, k, v)]
    out, lse = _head_by_head(_forward, folded, scale)
    return _unfold(out, num_heads), lse.unflatten(0, (-1, num_heads))


def vjp(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, num_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_q, grad_k, grad_v) as `attention_vjp` returns them; `out` is not read."""
    folded = [*(_fold(x, num_heads) for x in (g, q, k, v)), lse.flatten(0, 1)]
    grad_q, grad_k, grad_v = _head_by_head(_vjp, folded, scale)
    return _unfold(grad_q, num_heads), _unfold(grad_k, num_heads), _unfold(grad_v, num_heads)


def vjp_backward(
    u_q: Tensor,
    u_k: Tensor,
    u_v: Tensor,
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    num_heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `<u_q, grad_q> + <u_k, grad_k> + <u_v, grad_v>` with respect to g, q, k and v."""
    folded = [*(_fold(x, num_heads) for x in (u_q, u_k, u_v, g, q, k, v)), lse.flatten(0, 1)]
    grad_g, *others = _head_by_head(_vjp_backward, folded, scale)
    grad_q, grad_k, grad_v = (_unfold(x, num_heads) for x in others)
    return _unfold(grad_g, num_heads), grad_q, grad_k, grad_v


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse) of a few heads: q, k, v (heads, N, D)."""
    outs, lses = [], []
    for (q_rows,) in _row_by_row(q):
        p = _matmul(q_rows, k.mT)
        lse = q.new_empty(p.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
        torch.ops.cdm_fast_cpp.attention_softmax(p, lse, scale)
        outs.append(_matmul(p, v))
        lses.append(lse)
    return _join(outs, 1), _join(lses, 1)


def _vjp(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_q, grad_k, grad_v) of a few heads."""
    grad_q, grad_k, grad_v = [], [], []
    for g_rows, q_rows, lse_rows in _row_by_row(g, q, lse):
        p, grad_scores = _matmul(q_rows, k.mT), _matmul(g_rows, v.mT)
        torch.ops.cdm_fast_cpp.attention_vjp(p, grad_scores, lse_rows.contiguous(), scale)
        grad_q.append(_matmul(grad_scores, k))
        grad_k.append(_matmul(grad_scores.mT, q_rows))
        grad_v.append(_matmul(p.mT, g_rows))
    return _join(grad_q, 1), _sum(grad_k), _sum(grad_v)


def _vjp_backward(
    u_q: Tensor,
    u_k: Tensor,
    u_v: Tensor,
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(out_dot, grad_q_dot, grad_k_dot, grad_v_dot) of a few heads."""
    out_dot, grad_q, grad_k, grad_v = [], [], [], []
    for u_rows, g_rows, q_rows, lse_rows in _row_by_row(u_q, g, q, lse):
        p, p_dot = _matmul(q_rows, k.mT), _matmul(q_rows, u_k.mT, added=_matmul(u_rows, k.mT))
        grad_scores, grad_scores_dot = _matmul(g_rows, v.mT), _matmul(g_rows, u_v.mT)
        tiles = p, p_dot, grad_scores, grad_scores_dot
        torch.ops.cdm_fast_cpp.attention_vjp_backward(*tiles, lse_rows.contiguous(), scale)
        out_dot.append(_matmul(p, u_v, added=_matmul(p_dot, v)))
        grad_q.append(_matmul(grad_scores, u_k, added=_matmul(grad_scores_dot, k)))
        grad_k.append(_matmul(grad_scores.mT, u_rows, added=_matmul(grad_scores_dot.mT, q_rows)))
        grad_v.append(_matmul(p_dot.mT, g_rows))
    return _join(out_dot, 1), _join(grad_q, 1), _sum(grad_k), _sum(grad_v)


def _matmul(a: Tensor, b: Tensor, added: Tensor | None = None) -> Tensor:
    """`a @ b` of a few heads, (heads, N, K) and (heads, K, M); plus `added`, which it may overwrite.

    Large heads in fp32 go to oneDNN one by one, for the reason that `cdm_fast/ops/linear.py` gives: 15 ms
    instead of 20 for an attention over 1,024 tokens of 128 channels with its VJP. bf16 is oneDNN's already.
    """
    if not onednn_pays(a, b.mT):
        return a @ b if added is None else torch.baddbmm(added, a, b)
    heads = zip(a, b, strict=True)
    product = torch.stack([onednn_linear(x, y.mT) for x, y in heads])
    return product if added is None else product.add_(added)


def _fold(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, C) -> (B h, N, D), without a copy for one head."""
    return x if num_heads == 1 else x.unflatten(-1, (num_heads, -1)).transpose(1, 2).flatten(0, 1)


def _unfold(x: Tensor, num_heads: int) -> Tensor:
    """(B h, N, D) -> (B, N, C)"""
    return x if num_heads == 1 else x.unflatten(0, (-1, num_heads)).transpose(1, 2).flatten(2)


def _head_by_head(
    function: Callable[..., tuple[Tensor, ...]], tensors: Sequence[Tensor], scale: float
) -> list[Tensor]:
    """function(*tensors, scale), (B h, N, ...) each, on as many heads at a time as a tile holds."""
    heads = max(1, TILE_ELEMENTS // tensors[0].shape[1] ** 2)
    with torch.autocast("cpu", enabled=False):
        results = [function(*parts, scale) for parts in zip(*(x.split(heads) for x in tensors), strict=True)]
    return [_join(list(parts), 0) for parts in zip(*results, strict=True)]


def _row_by_row(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """As many rows at a time of (heads, N, ...) tensors as a tile holds."""
    rows = max(1, TILE_ELEMENTS // tensors[0].shape[1])
    return zip(*(x.split(rows, dim=1) for x in tensors), strict=True)


def _sum(parts: list[Tensor]) -> Tensor:
    """The sum of tensors of one dtype, rounded to it once."""
    total = parts[0].to(torch.promote_types(parts[0].dtype, torch.float32))
    return parts[0] if len(parts) == 1 else sum(parts[1:], total).to(parts[0].dtype)


def _join(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
