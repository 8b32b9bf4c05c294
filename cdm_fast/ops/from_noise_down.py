"""The cumulated rows of a head over classes: those of pure noise minus all rows between it and a level.

N = n r + 1 rows: r of each of n levels, and at the end one of pure noise, w_N. Of a level's rows the first
`common` start at the row of noise:

    W_c[t r + j] = [j < common] w_N - sum_{u>=t} w[u r + j],   W_c[N] = w_N.

The transposed map, which is the derivative, adds up from the other end:

    g[t r + j] = -sum_{u<=t} G[u r + j],   g[N] = G[N] + sum_{j<common} sum_t G[t r + j].

Plain PyTorch flips, accumulates and flips, its derivative does so again and fills a tensor for each slice.
The kernel reads and writes every element once. Sums are accumulated in fp64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cdm_fast.ops import backend as _backend
from cdm_fast.ops import checks
from cdm_fast.ops.backend import Coverage
from cdm_fast.ops.registry import define, overload

_backend.declare("from_noise_down", cpp=Coverage("cpu", (torch.float64, torch.float32, torch.bfloat16)))


def from_noise_down_reference(rows: Tensor, rows_per_level: int, common: int) -> Tensor:
    """The specification of `from_noise_down` in plain PyTorch; see there."""
    noise = rows[-1:]
    steps = rows[:-1].unflatten(0, (-1, rows_per_level))
    down = steps.flip(0).cumsum(0).flip(0)
    cumulated = noise - down[:, :common]
    if common < rows_per_level:
        cumulated = torch.cat([cumulated, -down[:, common:]], dim=1)
    return torch.cat([cumulated.flatten(0, 1), noise])


def from_noise_down(
    rows: Tensor,  # (N, ...), N = n r + 1
    rows_per_level: int,  # r
    common: int,
) -> Tensor:  # (N, ...)
    """The cumulated rows of a head, from its own; the formula stands at the head of this file.

    Args:
        rows: float tensor: a weight (N, D) or a bias (N,).
        rows_per_level: at least 1; N - 1 is a multiple of it, and at least as large.
        common: number of rows of a level that start at the row of noise, 0..r.

    Raises:
        TypeError: rows of another dtype.
        ValueError: sizes that do not match the above.

    Example:
        >>> import torch
        >>> from cdm_fast.ops import from_noise_down
        >>> from_noise_down(torch.tensor([1.0, 2.0, 4.0, 10.0]), 1, 1)
        tensor([ 3.,  4.,  6., 10.])
    """
    checks.check_tensor("rows", rows, dtypes=checks.FLOATING)
    checks.check_batch("rows", rows)
    if rows_per_level < 1 or len(rows) <= rows_per_level or (len(rows) - 1) % rows_per_level:
        raise ValueError(
            f"rows_per_level: {len(rows)} rows are not one more than several times {rows_per_level}"
        )
    if not 0 <= common <= rows_per_level:
        raise ValueError(f"common: expected 0..{rows_per_level}, got {common}")
    backend = _backend.resolve("from_noise_down", rows)
    if backend == "reference":
        return from_noise_down_reference(rows, rows_per_level, common)
    return overload("from_noise_down", backend)(rows.contiguous(), rows_per_level, common, False)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.rows_per_level, ctx.common, ctx.transposed = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    op = overload("from_noise_down", ctx.backend)
    return op(grad.contiguous(), ctx.rows_per_level, ctx.common, not ctx.transposed), None, None, None


define(
    "from_noise_down",
    "(Tensor rows, int rows_per_level, int common, bool transposed) -> Tensor",
    fake=lambda rows, *_: torch.empty_like(rows),
    save=_save,
    backward=_backward,
)
