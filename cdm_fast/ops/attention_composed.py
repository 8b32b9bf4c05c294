"""Attention composed of PyTorch's matrix products and one elementwise pass between them.

B batch, N tokens, C channels, h heads, D = C/h channels per head. The equations and names are those of
`cdm_fast/ops/attention.py`. At any time only some heads, or some rows of one head's score matrix, exist:
memory stays bounded however many tokens there are. Everything here runs below autograd.

`attention_cpu.py` and `attention_gpu.py` define the `Pieces` of each device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cdm_fast.ops.precision import compute_dtype


class Product(Protocol):
    """`a @ b` of a few heads, (heads, N, K) and (heads, K, M); plus `added`, which it may overwrite."""

    def __call__(self, a: Tensor, b: Tensor, added: Tensor | None = None) -> Tensor: ...


class Pieces(NamedTuple):
    """The pieces that a device provides: products, and in-place passes over score matrices (heads, rows, N).

    All tiles are contiguous; lse is (heads, rows) in the precision of the statistics.
    """

    product: Product
    softmax: Callable[[Tensor, Tensor, float], None]  # scores -> p; fills lse
    vjp: Callable[[Tensor, Tensor, Tensor, float], None]  # (scores, grad_p, lse) -> p, grad_scores
    # (scores, scores_dot, grad_p, grad_p_dot, lse) -> p, p_dot, grad_scores, grad_scores_dot
    vjp_backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], None]
    tile_elements: int  # of score matrices that exist at a time


def forward(
    pieces: Pieces, q: Tensor, k: Tensor, v: Tensor, scale: float, num_heads: int
) -> tuple[Tensor, Tensor]:
    """(out, lse) as `attention` returns them; any strides."""
    folded = [_fold(x, num_heads) for x in (q, k, v)]
    out, lse = _head_by_head(_forward, pieces, folded, scale)
    return _unfold(out, num_heads), lse.unflatten(0, (-1, num_heads))


def vjp(
    pieces: Pieces,
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    scale: float,
    num_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_q, grad_k, grad_v) as `attention_vjp` returns them."""
    folded = [*(_fold(x, num_heads) for x in (g, q, k, v)), lse.flatten(0, 1)]
    grad_q, grad_k, grad_v = _head_by_head(_vjp, pieces, folded, scale)
    return _unfold(grad_q, num_heads), _unfold(grad_k, num_heads), _unfold(grad_v, num_heads)


def vjp_backward(
    pieces: Pieces,
    u_q: Tensor,
    u_k: Tensor,
    u_v: Tensor,
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    scale: float,
    num_heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `<u_q, grad_q> + <u_k, grad_k> + <u_v, grad_v>` with respect to g, q, k and v."""
    folded = [*(_fold(x, num_heads) for x in (u_q, u_k, u_v, g, q, k, v)), lse.flatten(0, 1)]
    grad_g, *others = _head_by_head(_vjp_backward, pieces, folded, scale)
    grad_q, grad_k, grad_v = (_unfold(x, num_heads) for x in others)
    return _unfold(grad_g, num_heads), grad_q, grad_k, grad_v


def _forward(pieces: Pieces, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse) of a few heads: q, k, v (heads, N, D)."""
    outs, lses = [], []
    for (q_rows,) in _row_by_row(pieces, q):
        p = pieces.product(q_rows, k.mT)
        lse = q.new_empty(p.shape[:2], dtype=compute_dtype(q.dtype))
        pieces.softmax(p, lse, scale)
        outs.append(pieces.product(p, v))
        lses.append(lse)
    return _join(outs, 1), _join(lses, 1)


def _vjp(
    pieces: Pieces, g: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_q, grad_k, grad_v) of a few heads."""
    product = pieces.product
    grad_q, grad_k, grad_v = [], [], []
    for g_rows, q_rows, lse_rows in _row_by_row(pieces, g, q, lse):
        p, grad_scores = product(q_rows, k.mT), product(g_rows, v.mT)
        pieces.vjp(p, grad_scores, lse_rows.contiguous(), scale)
        grad_q.append(product(grad_scores, k))
        grad_k.append(product(grad_scores.mT, q_rows))
        grad_v.append(product(p.mT, g_rows))
    return _join(grad_q, 1), _sum(grad_k), _sum(grad_v)


def _vjp_backward(
    pieces: Pieces,
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
    product = pieces.product
    out_dot, grad_q, grad_k, grad_v = [], [], [], []
    for u_rows, g_rows, q_rows, lse_rows in _row_by_row(pieces, u_q, g, q, lse):
        p, p_dot = product(q_rows, k.mT), product(q_rows, u_k.mT, added=product(u_rows, k.mT))
        grad_scores, grad_scores_dot = product(g_rows, v.mT), product(g_rows, u_v.mT)
        pieces.vjp_backward(p, p_dot, grad_scores, grad_scores_dot, lse_rows.contiguous(), scale)
        out_dot.append(product(p, u_v, added=product(p_dot, v)))
        grad_q.append(product(grad_scores, u_k, added=product(grad_scores_dot, k)))
        grad_k.append(product(grad_scores.mT, u_rows, added=product(grad_scores_dot.mT, q_rows)))
        grad_v.append(product(p_dot.mT, g_rows))
    return _join(out_dot, 1), _join(grad_q, 1), _sum(grad_k), _sum(grad_v)


def _fold(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, C) -> (B h, N, D), without a copy for one head."""
    return x if num_heads == 1 else x.unflatten(-1, (num_heads, -1)).transpose(1, 2).flatten(0, 1)


def _unfold(x: Tensor, num_heads: int) -> Tensor:
    """(B h, N, D) -> (B, N, C)"""
    return x if num_heads == 1 else x.unflatten(0, (-1, num_heads)).transpose(1, 2).flatten(2)


def _head_by_head(
    function: Callable[..., tuple[Tensor, ...]], pieces: Pieces, tensors: Sequence[Tensor], scale: float
) -> list[Tensor]:
    """function(pieces, *tensors, scale), (B h, N, ...) each, on as many heads at a time as a tile holds."""
    heads = max(1, pieces.tile_elements // tensors[0].shape[1] ** 2)
    with torch.autocast(tensors[0].device.type, enabled=False):
        parts = zip(*(x.split(heads) for x in tensors), strict=True)
        results = [function(pieces, *part, scale) for part in parts]
    return [_join(list(parts), 0) for parts in zip(*results, strict=True)]


def _row_by_row(pieces: Pieces, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """As many rows at a time of (heads, N, ...) tensors as a tile holds."""
    rows = max(1, pieces.tile_elements // tensors[0].shape[1])
    return zip(*(x.split(rows, dim=1) for x in tensors), strict=True)


def _sum(parts: list[Tensor]) -> Tensor:
    """The sum of tensors of one dtype, rounded to it once."""
    total = parts[0].to(compute_dtype(parts[0].dtype))
    return parts[0] if len(parts) == 1 else sum(parts[1:], total).to(parts[0].dtype)


def _join(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
