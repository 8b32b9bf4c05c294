"""Triton kernels between the matrix products of a composed attention: row by row, in place.

`cdm_fast/ops/attention.py` has the equations, `cdm_fast/ops/attention_composed.py` the products. A tile is
(heads, rows, N) and contiguous; a program holds whole rows of it, so that every matrix is read once and
written once. lse is (heads, rows) fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from cdm_fast.kernels import on_its_device
from torch import Tensor

MAX_COLUMNS = 4096  # per program, of up to four matrices: 64 fp32 registers per thread
_ELEMENTS = 2048  # per tile of short rows
_LOG2_E = tl.constexpr(1.4426950408889634)


@on_its_device
def softmax(scores: Tensor, lse: Tensor, scale: float) -> None:
    """Turns scores into p = softmax(scale scores), and fills lse. N at most MAX_COLUMNS."""
    grid, sizes = _geometry(scores)
    _softmax_kernel[grid](scores, lse, scale, **sizes)


@on_its_device
def vjp(scores: Tensor, grad_p: Tensor, lse: Tensor, scale: float) -> None:
    """Turns scores into p, and grad_p into scale grad_scores."""
    grid, sizes = _geometry(scores)
    _vjp_kernel[grid](scores, grad_p, lse, scale, **sizes)


@on_its_device
def vjp_backward(
    scores: Tensor, scores_dot: Tensor, grad_p: Tensor, grad_p_dot: Tensor, lse: Tensor, scale: float
) -> None:
    """Turns these into p, p_dot, scale grad_scores and scale grad_scores_dot; scores_dot comes unscaled."""
    grid, sizes = _geometry(scores)
    _vjp_backward_kernel[grid](scores, scores_dot, grad_p, grad_p_dot, lse, scale, **sizes)


def _geometry(scores: Tensor) -> tuple[tuple[int], dict[str, int]]:
    num_columns = scores.shape[-1]
    num_rows = scores.numel() // num_columns
    columns = max(16, triton.next_power_of_2(num_columns))
    rows = max(1, _ELEMENTS // columns)
    sizes = {"num_rows": num_rows, "num_columns": num_columns, "ROWS": rows, "COLUMNS": columns}
    return (triton.cdiv(num_rows, rows),), {**sizes, "num_warps": 8 if columns > _ELEMENTS else 4}


@triton.jit
def _place(num_rows: int, num_columns: int, ROWS: tl.constexpr, COLUMNS: tl.constexpr) -> tuple:
    """(rows, elements (rows, columns), which rows exist, which elements do) of this program."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    exists = row < num_rows
    inside = exists[:, None] & (column < num_columns)[None, :]
    return row, row[:, None] * num_columns + column[None, :], exists, inside


@triton.jit
def _load(pointer: tl.tensor, inside: tl.tensor) -> tl.tensor:
    return tl.load(pointer, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(pointer: tl.tensor, value: tl.tensor, inside: tl.tensor) -> None:
    tl.store(pointer, value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _probabilities(
    scores: tl.tensor, lse_ptr: tl.tensor, exists: tl.tensor, inside: tl.tensor, scale: float
) -> tl.tensor:
    """p, divided by its sum once more: lse is rounded, and grad_scores would miss a sum of zero by that."""
    lse = tl.load(lse_ptr, mask=exists, other=0.0)
    p = tl.where(inside, tl.exp2((scores * scale - lse[:, None]) * _LOG2_E), 0.0)
    total = tl.where(exists, tl.sum(p, 1), 1.0)
    return p / total[:, None]


@triton.jit
def _softmax_kernel(
    scores_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    scale: float,
    num_rows: int,
    num_columns: int,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row, at, exists, inside = _place(num_rows, num_columns, ROWS, COLUMNS)
    scores = _load(scores_ptr + at, inside) * scale
    column = tl.arange(0, COLUMNS)[None, :]
    scores = tl.where(column < num_columns, scores, float("-inf"))
    top = tl.max(scores, 1)
    weight = tl.exp2((scores - top[:, None]) * _LOG2_E)
    total = tl.sum(weight, 1)
    _store(scores_ptr + at, weight / total[:, None], inside)
    tl.store(lse_ptr + row, top + tl.log2(total) / _LOG2_E, mask=exists)


@triton.jit
def _vjp_kernel(
    scores_ptr: tl.tensor,
    grad_p_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    scale: float,
    num_rows: int,
    num_columns: int,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row, at, exists, inside = _place(num_rows, num_columns, ROWS, COLUMNS)
    grad_p = _load(grad_p_ptr + at, inside)
    p = _probabilities(_load(scores_ptr + at, inside), lse_ptr + row, exists, inside, scale)
    delta = tl.sum(p * grad_p, 1)
    _store(scores_ptr + at, p, inside)
    _store(grad_p_ptr + at, scale * p * (grad_p - delta[:, None]), inside)


@triton.jit
def _vjp_backward_kernel(
    scores_ptr: tl.tensor,
    scores_dot_ptr: tl.tensor,
    grad_p_ptr: tl.tensor,
    grad_p_dot_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    scale: float,
    num_rows: int,
    num_columns: int,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row, at, exists, inside = _place(num_rows, num_columns, ROWS, COLUMNS)
    scores_dot = _load(scores_dot_ptr + at, inside) * scale
    grad_p, grad_p_dot = _load(grad_p_ptr + at, inside), _load(grad_p_dot_ptr + at, inside)
    p = _probabilities(_load(scores_ptr + at, inside), lse_ptr + row, exists, inside, scale)
    p_dot = p * (scores_dot - tl.sum(p * scores_dot, 1)[:, None])
    centred = grad_p - tl.sum(p * grad_p, 1)[:, None]
    # delta_dot. Its first sum has grad_p - delta for grad_p, which is the same, as p_dot sums to zero.
    delta_dot = tl.sum(p_dot * centred + p * grad_p_dot, 1)[:, None]
    _store(scores_ptr + at, p, inside)
    _store(scores_dot_ptr + at, p_dot, inside)
    _store(grad_p_ptr + at, scale * p * centred, inside)
    _store(grad_p_dot_ptr + at, scale * (p_dot * centred + p * (grad_p_dot - delta_dot)), inside)
