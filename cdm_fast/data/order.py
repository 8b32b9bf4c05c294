"""The order of images: permutations, splits and batches as deterministic functions of a seed.

The random numbers are raw Philox words from numpy, whose streams are guaranteed not to change between
releases; global generators are neither read nor changed.
"""

from fractions import Fraction
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdm_fast.errors import UserError

Indices = NDArray[np.int64]

_EPOCHS, _SPLITS, _ORDER = 0, 1, 2  # purposes of a permutation; the same seed gives independent ones
_TEST, _VALIDATION = 0, 1


def permutation(count: int, seed: int, purpose: int, number: int) -> Indices:
    """The `number`-th permutation of 0..count-1 for a purpose, (count,) int64."""
    if not 0 <= seed < 2**64:
        raise UserError(f"seed {seed} is out of range; give a whole number from 0 to 2**64 - 1")
    key = np.array([seed, number], np.uint64)  # a list would pass through float64 and merge large seeds
    words = np.random.Philox(key=key, counter=[0, 0, 0, purpose]).random_raw(count)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


@lru_cache(maxsize=1)
def random_order(count: int, seed: int) -> Indices:
    """0..count-1 in a random order that is not that of any epoch or split, (count,) int64, read-only."""
    order = permutation(count, seed, _ORDER, 0)
    order.setflags(write=False)
    return order


@lru_cache(maxsize=4)
def _epoch_order(num_examples: int, seed: int, epoch: int) -> Indices:
    order = permutation(num_examples, seed, _EPOCHS, epoch)
    order.setflags(write=False)
    return order


def batch_indices(num_examples: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Indices of the examples of training step `step` (0, 1, ...); a function of its arguments.

    The steps divide one endless sequence of epochs, each a new permutation of all examples; a batch may
    therefore extend over two epochs (or more, if `batch_size > num_examples`).

    Returns (batch_size,) int64. Raises UserError for an empty data set, batch size below 1, or negative step.
    """
    if num_examples < 1 or batch_size < 1 or step < 0:
        raise UserError(
            f"no batch of {batch_size} at step {step} out of {num_examples} examples; "
            "batch size and examples must be at least 1 and the step at least 0"
        )
    pieces, position, end = [], step * batch_size, (step + 1) * batch_size
    while position < end:
        epoch, offset = divmod(position, num_examples)
        pieces.append(_epoch_order(num_examples, seed, epoch)[offset : offset + end - position])
        position += len(pieces[-1])
    return torch.from_numpy(np.concatenate(pieces))


def split_indices(
    count: int, labels: Indices | None, shipped: frozenset[str], seed: int
) -> dict[str, Indices]:
    """Takes the splits that a source does not have from its `count` training examples.

    A missing test split is 20 % of them, a missing validation split 10 %. Both are stratified by label (each
    class within one example of its share) and depend only on the arguments. Returns ascending int64 indices
    for "train" and for each split that was missing; they are disjoint and together cover 0..count-1.
    """
    rest = np.arange(count, dtype=np.int64)
    strata = np.zeros(count, np.int64) if labels is None else labels
    splits, share = {}, Fraction(1, 10)
    if "test" not in shipped:
        splits["test"], rest = _cut(rest, strata, Fraction(1, 5), seed, _TEST)
        share = Fraction(1, 8)  # of the remaining 80 %
    if "validation" not in shipped:
        splits["validation"], rest = _cut(rest, strata, share, seed, _VALIDATION)
    return {"train": rest, **splits}


def _cut(
    indices: Indices, strata: Indices, share: Fraction, seed: int, number: int
) -> tuple[Indices, Indices]:
    """Divides indices into (taken, left): takes every 1/share-th after shuffling and sorting by stratum."""
    shuffled = indices[permutation(len(indices), seed, _SPLITS, number)]
    in_strata = shuffled[np.argsort(strata[shuffled], kind="stable")]
    marks = np.arange(len(indices) + 1) * share.numerator // share.denominator
    taken = marks[1:] > marks[:-1]
    return np.sort(in_strata[taken]), np.sort(in_strata[~taken])
