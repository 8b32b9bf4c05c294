"""Mutual information of the columns of two tables, a confidence interval, and warnings of unreliable values.

# n rows, d columns (of X and Y together), K folds
"""

import math
import warnings
from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.utils import Tags
from sklearn.utils.parallel import Parallel, delayed
from sklearn.utils.validation import validate_data
from torch import Tensor

from cdm_fast.errors import UserError
from cdm_fast.tables.calibration import Calibration, calibrate
from cdm_fast.tables.columns import Array, normal_scores, separate_values
from cdm_fast.tables.crossfit import ratio_levels
from cdm_fast.tables.estimator import TableEstimator, fold_count, warn_of_few_rows
from cdm_fast.tables.folds import Index, folds, groups_of_copies, hold_out
from cdm_fast.tables.pairs import FoldScores, score_fold

# With fewer distinct rows per column than this, the value is not reliable.
ENOUGH_ROWS = 50
# The gap between training rows and held-out rows is large above this many nats and this share of the value.
LARGE_GAP, LARGE_GAP_SHARE = 0.1, 0.25
# Warn if the mean of the ratio over shuffled rows, which is 1 for the true ratio, exceeds this.
LARGEST_MEAN_RATIO = 2.0
# Noise levels for two columns: joint and shuffled rows have the same marginals, so a few levels are enough.
PAIR_LEVELS = 8


class ConfidenceInterval(NamedTuple):
    """Bounds in nats."""

    low: float
    high: float


class MutualInformation(TableEstimator):
    """Mutual information of X and Y: the mean of `log(p(x, y) / (p(x) p(y)))`, estimated by cross-fitting.

    Columns are first transformed to normal scores by their ranks, which preserves mutual information and
    makes heavy tails harmless. Discrete columns are dequantised: ties are ordered at random; in columns
    with few distinct values each value becomes a narrow Gaussian.

    A network for each fold starts as the Gaussian given by the fold's canonical correlations and learns the
    remainder. Up to 20,000 rows, it is combined with two experts that need no training: a Student t copula
    and nearest neighbours (`cdm_fast.tables.experts`). Logistic regression on the other folds' rows weights
    them and calibrates the log ratios of the fold's own rows (`cdm_fast.tables.calibration`).

    The mean over held-out rows is biased low, by what was not learned; the mean over training rows is biased
    high, by overfitting. For a regular model the two biases have equal size, and `estimate_` is the midpoint.

    Args:
        reference: "shuffled": nothing is assumed about the marginals; the network learns the ratio of joint
            rows to rows with shuffled Y. "normal": assumes that the columns of X are mutually independent,
            and those of Y too, so that after the rank transform the product of the marginals is N(0, I),
            which is the network's own pure noise; only the joint density is learned.
        test_size: share of rows held out once, for a single network; None (the default) for `cv` folds.
        confidence: level of the interval.

    The other parameters are those of `TableEstimator`.

    Attributes:
        mutual_information_: nats, `max(estimate_, 0)`: a negative estimate means that no dependence was
            learned.
        estimate_: nats, unclipped.
        confidence_interval_: (low, high) in nats: from the mean over held-out rows to the mean over training
            rows, both ends widened by the sampling error, the upper end also by `missed_` (added in
            quadrature).
        held_out_, trained_: the two means, nats.
        missed_: nats by which the networks alone fall short of `held_out_`: the model-selection uncertainty
            (Buckland, Burnham, Augustin, 1997).
        mean_ratio_: mean of the ratio over shuffled rows, each clipped at the largest ratio of a training
            row; 1 for the true ratio.
        networks_: the `RatioNetwork` of each fold; `calibrations_`: one for each fold of rows, whose alpha
            are the weights of the network, the Student t copula and the neighbours.
        n_iter_, loss_curve_, validation_scores_: training history of each network.

    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(1000, 1))
    >>> Y = X[:, 0] + 0.5 * rng.normal(size=1000)  # I = log(5) / 2 = 0.80 nats
    >>> found = MutualInformation(max_iter=300, random_state=0).fit(X, Y)
    >>> bool(0.6 < found.mutual_information_ < 1.0)
    True
    """

    def __init__(
        self,
        *,
        reference: Literal["shuffled", "normal"] = "shuffled",
        test_size: float | None = None,
        confidence: float = 0.95,
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
        super().__init__(
            max_iter=max_iter,
            early_stopping=early_stopping,
            validation_fraction=validation_fraction,
            n_iter_no_change=n_iter_no_change,
            tol=tol,
            alpha=alpha,
            cv=cv,
            batch_size=batch_size,
            hidden=hidden,
            depth=depth,
            num_levels=num_levels,
            learning_rate=learning_rate,
            n_jobs=n_jobs,
            random_state=random_state,
            verbose=verbose,
        )
        self.reference = reference
        self.test_size = test_size
        self.confidence = confidence

    def fit(self, X: ArrayLike, y: ArrayLike) -> "MutualInformation":
        """X (n, d_x), y (n, d_y) or (n,): paired rows of finite numbers, at least five.

        Warns about copies, about too few rows for the columns, and about networks that overfit.
        """
        rows, other = validate_data(
            self, X, y, dtype=np.float64, multi_output=True, y_numeric=True, ensure_min_samples=5
        )
        other = np.asarray(other, dtype=np.float64).reshape(len(rows), -1)
        for name, table in (("X", rows), ("y", other)):
            constant = np.flatnonzero(np.max(table, axis=0) == np.min(table, axis=0))
            if len(constant):
                raise UserError(f"column {constant[0]} of {name} is constant and has no information: drop it")
        if self.reference not in ("shuffled", "normal"):
            raise UserError(f"unknown reference {self.reference!r}: choose 'shuffled' or 'normal'")
        self._check_arguments()
        seed, table, width = self._seed(), np.concatenate([rows, other], axis=1), rows.shape[1]
        groups = groups_of_copies(table, "X and y together")
        different = int(groups.max()) + 1
        if different < 5:
            raise UserError(f"X and y have {different} distinct rows: give at least five")
        warn_of_few_rows(different, table.shape[1], ENOUGH_ROWS, "expect a value that is too low")
        scored = self._score(self._scores(table, seed), width, groups, seed)
        self._summarise(scored, groups, width, seed)
        self._warn()
        return self

    def _scores(self, table: Array, seed: int) -> Tensor:
        rng = np.random.default_rng(seed)
        scores = normal_scores(table, rng)
        # "normal" wants normal columns, so few values keep their random order there.
        return separate_values(table, scores, rng) if self.reference == "shuffled" else scores

    def _score(self, scores: Tensor, width: int, groups: Index, seed: int) -> list[FoldScores]:
        """The scores of each fold of rows, by a network trained on the others."""
        rng, different = np.random.default_rng(seed), int(groups.max()) + 1
        if self.test_size is None:
            K = fold_count(different, self.cv)
            fold = folds(groups, K, rng)
            kept = [fold == k for k in range(K)]
        else:
            kept = [hold_out(groups, self.test_size, rng)]
        columns = scores.shape[1]
        num_levels = PAIR_LEVELS if columns == 2 else ratio_levels(columns)
        budget = self._budget(int(different * (1 - 1 / max(len(kept), 2))), num_levels)
        share = self.validation_fraction if self.early_stopping else 0.0
        return Parallel(n_jobs=self.n_jobs)(
            delayed(score_fold)(scores, width, groups, out, budget, self.reference, share, seed + k)
            for k, out in enumerate(kept)
        )

    def _summarise(self, scored: list[FoldScores], groups: Index, width: int, seed: int) -> None:
        columns = len(scored[0].network.mix)
        parts = _parts(scored, groups, seed)
        self.calibrations_ = [
            _calibrate([other for k, other in enumerate(parts) if k != part]) for part in range(len(parts))
        ]
        each = list(zip(self.calibrations_, parts, strict=True))
        row = np.concatenate([part.rows for part in parts])
        value = np.concatenate([c(*part.joint) for c, part in each])
        trained = np.concatenate([c(*part.trained) for c, part in each])
        shuffled = np.concatenate(
            [np.minimum(c(*part.shuffled).ravel(), c(*part.trained).max()) for c, part in each]
        )
        self.held_out_, self.trained_ = float(value.mean()), float(trained.mean())
        self.missed_ = max(0.0, self.held_out_ - _networks_alone(parts))
        gap = max(0.0, self.trained_ - self.held_out_)
        self.estimate_ = self.held_out_ + gap / 2
        self.mutual_information_ = max(self.estimate_, 0.0)
        self.mean_ratio_ = float(np.exp(min(np.logaddexp.reduce(shuffled) - math.log(len(shuffled)), 700.0)))
        chance = _standard_error(value, groups[row], width * (columns - width))
        quantile = torch.special.ndtri(torch.tensor((1 + self.confidence) / 2, dtype=torch.float64))
        below, above = float(quantile) * chance, math.hypot(float(quantile) * chance, self.missed_)
        self.confidence_interval_ = ConfidenceInterval(
            self.estimate_ - below - gap / 2, max(self.estimate_ + above + gap / 2, 0.0)
        )
        self.networks_ = [fold.network for fold in scored]
        histories = [network.history for network in self.networks_]
        self.n_iter_ = [history.n_iter for history in histories]
        self.loss_curve_ = [history.loss_curve for history in histories]
        self.validation_scores_ = [history.validation_scores for history in histories]

    def _warn(self) -> None:
        gap = self.trained_ - self.held_out_
        if gap > max(LARGE_GAP, LARGE_GAP_SHARE * abs(self.estimate_)):
            warnings.warn(
                f"the log ratio is {gap:.2f} nats larger on training rows than on others: the networks"
                " overfit, and the value is uncertain by as much; give more rows or fewer columns",
                stacklevel=3,
            )
        if self.mean_ratio_ > LARGEST_MEAN_RATIO and self.estimate_ < 3:
            warnings.warn(
                f"the ratio is {self.mean_ratio_:.2g} on average over shuffled rows, where the true one is 1:"
                " do not trust the value; give more rows, or a larger max_iter",
                stacklevel=3,
            )

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        return tags


def _parts(scored: list[FoldScores], groups: Index, seed: int) -> list[FoldScores]:
    """The folds; a single fold is split into halves, so that each is calibrated on the other.

    With few rows one fold may lack an expert that another has: only experts common to all are used.
    """
    if len(scored) > 1:
        E = min(len(part.joint) for part in scored)
        return [
            replace(part, joint=part.joint[:E], shuffled=part.shuffled[:E], trained=part.trained[:E])
            for part in scored
        ]
    (only,) = scored
    half = folds(groups[only.rows], 2, np.random.default_rng(seed))
    if len(np.unique(half)) == 1:
        half[: len(half) // 2] = 1 - half[0]
    return [
        replace(only, rows=only.rows[m], joint=only.joint[:, m], shuffled=only.shuffled[:, :, m])
        for m in (half == 0, half == 1)
    ]


def _networks_alone(parts: list[FoldScores]) -> float:
    """The mean over held-out rows, in nats, of the networks without the other experts."""
    alone = [replace(part, joint=part.joint[:1], shuffled=part.shuffled[:1]) for part in parts]
    value = [_calibrate(alone[:k] + alone[k + 1 :])(*part.joint) for k, part in enumerate(alone)]
    return float(np.concatenate(value).mean())


def _calibrate(parts: list[FoldScores]) -> Calibration:
    joint = np.concatenate([part.joint for part in parts], axis=1)
    shuffled = [part.shuffled.reshape(len(joint), -1) for part in parts]
    return calibrate(joint, np.concatenate(shuffled, axis=1))


def _standard_error(value: Array, groups: Index, pairs: int) -> float:
    """Standard error of the mean of `value` (n,), counting copies once, plus that of a likelihood ratio.

    If nothing was learned the values hardly vary, but a dependence between `pairs` pairs of columns as large
    as chance alone produces cannot be excluded: 2 n times the mutual information of a fitted Gaussian follows
    a chi-squared distribution with this number of degrees of freedom.
    """
    residual = np.bincount(np.unique(groups, return_inverse=True)[1], weights=value - value.mean())
    different = len(residual)
    chance = float((residual**2).sum()) / len(value) ** 2 * different / max(different - 1, 1)
    return math.sqrt(chance + 2 * pairs / (2 * different) ** 2)
