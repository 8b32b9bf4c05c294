"""Dropout masks that are functions of a seed, for the ops that drop elements of their result."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_fast.ops.philox import Stream, check_seed, drop_threshold, philox_words
from cdm_fast.ops.precision import compute_dtype


def dropout_mask(
    x: Tensor,  # (B, C, *spatial)
    dropout: float,
    seed: Tensor | None,  # (2,) or (3,) int64
) -> Tensor:
    """The factors of dropout, 0 or 1/(1 - dropout), of x's shape, in the precision of the statistics.

    Element i is kept if word i of the DROPOUT stream is at least `drop_threshold(dropout)`. Elements are
    counted in channels-last order; the images before the first, which `seed` may name, count too.
    """
    if seed is None:
        raise ValueError("seed: dropout > 0 needs a (2,) int64 tensor (seed, offset), got None")
    before = None if len(seed) == 2 else seed[2] * (x.numel() // len(x))
    words = philox_words(seed[:2], x.numel(), Stream.DROPOUT, before)
    kept = (words >= drop_threshold(dropout)).to(compute_dtype(x.dtype)) / (1 - dropout)
    return kept.reshape(x.movedim(1, -1).shape).movedim(-1, 1)


def with_first_image(seed: Tensor | None) -> Tensor | None:
    """(3,) int64, as the kernels read it, with 0 as the default number of the first image."""
    return seed if seed is None or len(seed) == 3 else F.pad(seed, (0, 1))


def check_dropout(dropout: float, seed: Tensor | None, device: torch.device) -> None:
    """Raises TypeError or ValueError for a rate outside of [0, 1), or a seed that is missing or wrong."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
    if dropout > 0 and seed is None:
        raise ValueError("seed: dropout > 0 needs a (2,) int64 tensor (seed, offset), got None")
    if seed is not None:
        check_seed(seed[:2] if isinstance(seed, Tensor) and seed.shape == (3,) else seed, device)
