"""Argument checks at the boundary of the ops: the same error from every backend.

Values are read only if this does not wait for a device: on the CPU, or anywhere if the environment variable
CDM_FAST_CHECKED is 1. Otherwise kernels return NaN for a level out of range.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(
    name: str,
    value: Tensor,
    *,
    dtypes: Sequence[torch.dtype],
    shape: tuple[int | None, ...] | None = None,
    device: torch.device | None = None,
) -> None:
    """Raises TypeError for another type or dtype, ValueError for another shape or device.

    shape: expected sizes, with None for an arbitrary size; None for any shape.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: expected dtype {allowed}, got {str(value.dtype).removeprefix('torch.')}")
    if shape is not None and not _matches(value.shape, shape):
        expected = "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"
        raise ValueError(f"{name}: expected shape {expected}, got {tuple(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected it on {device}, got {value.device}; move it with .to()")


def check_batch(name: str, value: Tensor) -> None:
    """Raises ValueError for a tensor without a batch dimension or without any element."""
    if value.dim() == 0 or value.numel() == 0:
        raise ValueError(f"{name}: expected at least one example (B, ...), got shape {tuple(value.shape)}")


def may_read(value: Tensor) -> bool:
    """True if a check may read values: they exist, no graph is traced, and no wait for a device is needed."""
    if torch.compiler.is_compiling() or value.is_meta or value.numel() == 0:
        return False
    return value.device.type == "cpu" or os.environ.get("CDM_FAST_CHECKED") == "1"


def check_index_range(name: str, index: Tensor, low: int, high: int) -> None:
    """Raises ValueError unless low <= index < high everywhere; reads only where `may_read` allows it."""
    if not may_read(index):
        return
    smallest, largest = (int(value) for value in index.aminmax())
    if smallest < low or largest >= high:
        wrong = smallest if smallest < low else largest
        raise ValueError(f"{name}: expected values in {low}..{high - 1}, got {wrong}")


def _matches(shape: Sequence[int], expected: tuple[int | None, ...]) -> bool:
    if len(shape) != len(expected):
        return False
    return all(want is None or size == want for size, want in zip(shape, expected, strict=True))
