"""Attention on the CPU: PyTorch's matrix products with a C++ pass between them.

`cdm_fast/ops/attention_composed.py` is the composition, this file provides its pieces.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cdm_fast.ops import attention_composed as composed
from cdm_fast.ops.linear import onednn_linear, onednn_pays

# Elements of score matrices that exist at a time: fewer slow the matrix products, more leave the cache.
TILE_ELEMENTS = 1 << 21


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, num_heads: int) -> tuple[Tensor, Tensor]:
    """(out, lse) as `attention` returns them; fp64, fp32 or bf16, any strides."""
    return composed.forward(_pieces(), q, k, v, scale, num_heads)


def vjp(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, num_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(grad_q, grad_k, grad_v) as `attention_vjp` returns them; `out` is not read."""
    return composed.vjp(_pieces(), g, q, k, v, lse, scale, num_heads)


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
    return composed.vjp_backward(_pieces(), u_q, u_k, u_v, g, q, k, v, lse, scale, num_heads)


def _pieces() -> composed.Pieces:
    ops = torch.ops.cdm_fast_cpp
    passes = ops.attention_softmax, ops.attention_vjp, ops.attention_vjp_backward
    return composed.Pieces(_product, *passes, tile_elements=TILE_ELEMENTS)


def _product(a: Tensor, b: Tensor, added: Tensor | None = None) -> Tensor:
    """See `composed.Product`.

    On processors with AVX-512 other than Intel's, large heads in fp32 use oneDNN one by one, for the reason
    given in `cdm_fast/ops/linear.py`: 15 ms instead of 20 for attention over 1,024 tokens of 128 channels
    with its VJP. PyTorch uses oneDNN for bf16 already.
    """
    if not onednn_pays(a, b.mT):
        return a @ b if added is None else torch.baddbmm(added, a, b)
    heads = zip(a, b, strict=True)
    product = torch.stack([onednn_linear(x, y.mT) for x, y in heads])
    return product if added is None else product.add_(added)
