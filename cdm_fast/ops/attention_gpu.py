"""Attention on a GPU by the "composed" method: cuBLAS's batched products, with Triton passes between them.

`cdm_fast/ops/attention_composed.py` is the composition, this file provides its pieces. The other method,
"fused", is `kernels/attention.py`; `backend.attention_method` chooses between them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cdm_fast.ops import attention_composed as composed

# Elements of score matrices that exist at a time: 128 MiB each in bf16, of up to four.
TILE_ELEMENTS = 1 << 26


def pieces() -> composed.Pieces:
    """For bf16 and fp32, and up to `kernels.attention_rows.MAX_COLUMNS` tokens."""
    from cdm_fast.kernels import attention_rows as rows

    return composed.Pieces(_product, rows.softmax, rows.vjp, rows.vjp_backward, TILE_ELEMENTS)


def _product(a: Tensor, b: Tensor, added: Tensor | None = None) -> Tensor:
    """See `composed.Product`; fp32 follows PyTorch's settings: no TF32 unless they allow it.

    In place, because cuBLAS would otherwise first copy `added`.
    """
    return torch.bmm(a, b) if added is None else added.baddbmm_(a, b)
