"""Groups of equal rows, splits that keep groups together, and weighted random rows.

# n rows, K folds
"""

import warnings
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdm_fast.tables.columns import Array, copies

Index = NDArray[np.int64]
Choose = Callable[[int, torch.Generator], Tensor]


def groups_of_copies(x: Array, name: str = "X") -> Index:
    """`columns.copies`, (n,) index of a group for each row, with a warning if there are any."""
    groups = copies(x)
    num = len(x) - 1 - int(groups.max())
    if num:
        warnings.warn(
            f"{num} of the {len(x)} rows of {name} are copies of others: each counts in full, and copies"
            " stay on one side of every split",
            stacklevel=3,
        )
    return groups


def folds(groups: Index, K: int, rng: np.random.Generator, strata: Index | None = None) -> Index:
    """(n,) the fold of each row, 0..K-1: groups are not split, strata are spread evenly over the folds."""
    _, first, groups = np.unique(groups, return_index=True, return_inverse=True)
    stratum = np.zeros(len(first), dtype=np.int64) if strata is None else strata[first]
    fold_of_group = np.empty(len(first), dtype=np.int64)
    begun = 0
    for s in np.unique(stratum):
        members = rng.permutation(np.flatnonzero(stratum == s))
        fold_of_group[members] = (begun + np.arange(len(members))) % K
        begun += len(members)
    return fold_of_group[groups]


def hold_out(
    groups: Index, share: float, rng: np.random.Generator, strata: Index | None = None
) -> NDArray[np.bool_]:
    """(n,) bool: True for about `share` of the rows, in whole groups, at least one group per stratum."""
    _, first, groups = np.unique(groups, return_index=True, return_inverse=True)
    stratum = np.zeros(len(first), dtype=np.int64) if strata is None else strata[first]
    held = np.zeros(len(first), dtype=bool)
    for s in np.unique(stratum):
        members = rng.permutation(np.flatnonzero(stratum == s))
        held[members[: max(1, round(share * len(members)))]] = True
    return held[groups]


def chooser(rows: int, weights: Array | None = None) -> Choose:
    """`choose(num, generator)`: (num,) random indices below `rows`, with probabilities from the weights."""
    if weights is None:
        return lambda num, generator: torch.randint(rows, (num,), generator=generator)
    below = torch.from_numpy(np.cumsum(weights) / np.sum(weights))

    def choose(num: int, generator: torch.Generator) -> Tensor:
        uniform = torch.rand(num, generator=generator, dtype=torch.float64)
        return torch.searchsorted(below, uniform, right=True).clamp(max=rows - 1)

    return choose
