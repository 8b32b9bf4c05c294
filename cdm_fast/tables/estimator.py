"""The common base of the estimators: arguments, their bounds, and default sizes.

# n rows, d columns
"""

import math
import warnings
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sklearn.utils import check_random_state
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor

from cdm_fast.errors import UserError
from cdm_fast.model.constants import CHUNK
from cdm_fast.tables.fit import Budget

Array = NDArray[np.float64]

# Arguments that are whole numbers within these bounds, or None for a default chosen from the rows.
_WHOLE = {
    "max_iter": (1, 10**8),
    "batch_size": (2, 10**7),
    "hidden": (1, 8192),
    "depth": (1, 64),
    "num_levels": (3, 10_000),
    "num_components": (1, 1000),
    "n_iter_no_change": (1, 10**8),
    "cv": (2, 100),
    "n_jobs": (-(10**4), 10**4),
    "verbose": (0, 10**4),
}
# Numbers between these bounds, the lower one excluded where it is 0 and so named.
_REAL: dict[str, tuple[float, float, bool]] = {
    "learning_rate": (0.0, 1e3, True),
    "alpha": (0.0, 1e3, False),
    "tol": (0.0, math.inf, False),
    "level_weight": (0.0, 1e6, False),
    "validation_fraction": (0.0, 1.0, True),
    "test_size": (0.0, 1.0, True),
    "confidence": (0.0, 1.0, True),
    "smallest_noise": (0.0, 1.0, True),
    "score_noise": (0.0, 100.0, False),
    "contamination": (0.0, 0.5 + 1e-12, True),
}


class TableEstimator(BaseEstimator):
    """The arguments that all estimators share.

    Args:
        max_iter: maximum number of training steps per network; early stopping usually ends training sooner.
        early_stopping: keep the weights that score best on held-out rows, and stop when they no longer
            improve.
        validation_fraction: share of a network's training rows that is held out for that.
        n_iter_no_change: validations, about one per epoch, without improvement by `tol` before training
            ends. Training of a ratio resumes once, from the best weights at a fifth of the learning rate.
        tol: smallest improvement of the validation loss that counts, in nats.
        alpha: weight decay.
        cv: number of folds; every row is scored by a network that never saw it. By default chosen from the
            number of rows.
        batch_size: rows per step, at most the number of rows.
        hidden, depth: width and number of residual blocks of the network; by default chosen from the number
            of rows.
        num_levels: noise levels, data and pure noise included; by default chosen from the number of columns.
        learning_rate: peak learning rate of Adam.
        n_jobs: folds trained at once, as in joblib.
        random_state: seed; a fixed one gives a fixed result.
        verbose: 1 prints progress to stderr.
    """

    def __init__(
        self,
        *,
        max_iter: int = 3000,
        early_stopping: bool = True,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 10,
        tol: float = 1e-4,
        alpha: float = 1e-4,
        cv: int | None = None,
        batch_size: int = 256,
        hidden: int | None = None,
        depth: int | None = None,
        num_levels: int | None = None,
        learning_rate: float = 3e-3,
        n_jobs: int | None = None,
        random_state: int | np.random.RandomState | None = None,
        verbose: int = 0,
    ) -> None:
        self.max_iter = max_iter
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.tol = tol
        self.alpha = alpha
        self.cv = cv
        self.batch_size = batch_size
        self.hidden = hidden
        self.depth = depth
        self.num_levels = num_levels
        self.learning_rate = learning_rate
        self.n_jobs = n_jobs
        self.random_state = random_state
        self.verbose = verbose

    def _budget(self, rows: int, num_levels: int) -> Budget:
        """Network and training sizes for `rows` distinct rows; UserError for arguments out of bounds."""
        self._check_arguments()
        hidden, depth = capacity(rows)
        return Budget(
            self.hidden or hidden,
            self.depth or depth,
            self.num_levels or num_levels,
            self.max_iter,
            max(2, min(self.batch_size, rows)),
            self.learning_rate,
            self.alpha,
            self.tol,
            self.n_iter_no_change,
            self.verbose,
        )

    def _check_arguments(self) -> None:
        given = self.get_params(deep=False)
        for name, (fewest, most) in _WHOLE.items():
            value = given.get(name)
            if value is not None and not (_is_whole(value) and fewest <= value <= most):
                raise UserError(f"{name} is {value!r}: give a whole number from {fewest} to {most}")
        for name, (lowest, highest, open_below) in _REAL.items():
            value = given.get(name)
            if value is not None and not _inside(value, lowest, highest, open_below):
                least = "above" if open_below else "of at least"
                raise UserError(
                    f"{name} is {value!r}: give a number {least} {lowest:g} and below {highest:g}"
                )

    def _seed(self) -> int:
        return int(check_random_state(self.random_state).randint(2**31 - 1))

    def _new_rows(self, X: ArrayLike) -> Array:
        check_is_fitted(self)
        return validate_data(self, X, reset=False, dtype=np.float64)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool | np.bool_)


def _is_real(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool | np.bool_) and not math.isnan(value)


def _inside(value: Any, lowest: float, highest: float, open_below: bool) -> bool:
    return _is_real(value) and (lowest < value if open_below else lowest <= value) and value < highest


def row_weights(sample_weight: ArrayLike | None, rows: Array) -> Array | None:
    """(n,) validated weights of the rows; None if all are equal."""
    if sample_weight is None:
        return None
    weights = _check_sample_weight(sample_weight, rows, dtype=np.float64)
    if weights.min() < 0:
        raise UserError(f"the smallest sample_weight is {weights.min():g}: give none below 0")
    return None if (weights == weights[0]).all() else weights


def capacity(rows: int) -> tuple[int, int]:
    """(hidden, depth) for a number of distinct rows: a wider network overfits a few hundred rows."""
    if rows < 500:
        return 32, 1
    return (64, 1) if rows < 2000 else (128, 2)


def fold_count(rows: int, cv: int | None) -> int:
    """Number of folds for a number of distinct rows: many for small tables, few for large ones."""
    wanted = cv if cv is not None else 5 if rows < 5000 else 3 if rows < 50_000 else 2
    return max(1, min(wanted, rows // 2))


def warn_of_few_rows(rows: int, columns: int, enough: int, doing: str) -> None:
    """Warns if there are fewer than `enough` distinct rows per column."""
    if rows < enough * columns:
        warnings.warn(
            f"{rows} different rows for {columns} columns are few: {doing}; give more rows, or fewer columns"
            " (drop some, or project them)",
            stacklevel=3,
        )


@torch.no_grad()
def in_chunks(function: Callable[[Tensor], Tensor], z: Tensor) -> Array:
    """`function(z)` (n, ...) for z (n, d), computed a few thousand rows at a time."""
    return torch.cat([function(part) for part in z.split(CHUNK)]).numpy()
