"""The ratio of two densities from a sample of each: weights for covariate shift, and a two-sample test.

# n rows, d columns, K folds
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata
from sklearn.base import ClassifierMixin
from sklearn.utils import Tags
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.parallel import Parallel, delayed
from sklearn.utils.validation import check_array, check_is_fitted, validate_data
from torch import Tensor

from cdm_fast.errors import UserError
from cdm_fast.model.constants import Draw
from cdm_fast.statistics import auroc
from cdm_fast.tables.calibration import Calibration, calibrate
from cdm_fast.tables.columns import Array, Columns, measure, without_far_rows
from cdm_fast.tables.crossfit import RatioNetwork, ratio_levels, shrunk_moments, train_ratio
from cdm_fast.tables.estimator import TableEstimator, fold_count, row_weights
from cdm_fast.tables.fit import Budget, ClassValidation
from cdm_fast.tables.folds import Index, chooser, folds, groups_of_copies, hold_out

# A class with fewer distinct rows than this is not split.
FEWEST_TO_SPLIT = 4


class TwoSampleTest(NamedTuple):
    """AUROC of the two sets, and how often a random assignment of rows reaches it."""

    statistic: float  # AUROC: probability that a row of the numerator scores above one of the denominator
    p_value: float


@dataclass(frozen=True)
class _Fold:
    network: RatioNetwork
    rows: Index
    log_ratio: Array


class DensityRatio(ClassifierMixin, TableEstimator):
    """`log(p_1(x) / p_0(x))` of two sets of rows, by networks with joint (level, class) logits.

    A network for each fold starts as Gaussians fitted to the two sets and learns the remainder; logistic
    regression on its held-out rows calibrates its log ratios (`cdm_fast.tables.calibration`). New rows are
    scored by the mean of the networks.

    The parameters are those of `TableEstimator`.

    Attributes:
        columns_: the standardisation of all rows together.
        classes_ (2,): the two values of y, denominator first.
        networks_: the `RatioNetwork` of each fold.
        calibration_: `alpha` and `c` (nats) of the calibrated log ratio, `alpha log_ratio + c`.
        log_ratio_ (n,): nats, of every row of `fit` by the network that was not trained on it; if there are
            too few rows for two networks, by the only one.
        n_iter_, loss_curve_, validation_scores_: training history of each network.

    >>> X = np.random.default_rng(0).normal(size=(400, 1))
    >>> y = np.arange(400) % 2
    >>> X[y == 1] += 1.0
    >>> ratio = DensityRatio(max_iter=300, random_state=0).fit(X, y).log_ratio([[-2.0], [3.0]])
    >>> bool(ratio[0] < 0 < ratio[1])
    True
    """

    def fit(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> "DensityRatio":
        """X (n, d); y (n,) takes two values: rows of the smaller one (0) belong to the denominator, of the
        larger one (1) to the numerator. The ratio does not depend on the number of rows of each.
        sample_weight (n,): non-negative; weights are relative within each set, and rows of weight 0 are
        ignored."""
        rows, labels = validate_data(self, X, y, dtype=np.float64, ensure_min_samples=2)
        check_classification_targets(labels)
        weights = row_weights(sample_weight, rows)
        self.classes_, index = np.unique(labels, return_inverse=True)
        if len(self.classes_) != 2:
            raise UserError(
                f"y holds {len(self.classes_)} class{'es' * (len(self.classes_) != 1)}. Only binary"
                " classification is supported. Give 0 for the denominator's rows, 1 for the numerator's"
            )
        self._check_arguments()
        seed, near = self._seed(), without_far_rows(rows)
        if weights is not None:
            near &= weights > 0
        if len(np.unique(index[near])) < 2:
            raise UserError(
                "one class of y lies extremely far from the other, or all its weights are 0: rescale the"
                " columns, or give positive weights"
            )
        near_weights = None if weights is None else weights[near]
        self.columns_: Columns = measure(rows[near], labels=index[near], weights=near_weights)
        self._index, self._weighted = index, weights is not None
        z = self.columns_.standardise(rows)
        groups = np.full(len(rows), -1)
        groups[near] = groups_of_copies(np.column_stack([rows[near], index[near]]))
        found = self._fit_folds(z, index, groups, weights, seed)
        self.networks_ = [fold.network for fold in found]
        self._calibrate(found, z, index, weights)
        histories = [network.history for network in self.networks_]
        self.n_iter_ = [history.n_iter for history in histories]
        self.loss_curve_ = [history.loss_curve for history in histories]
        self.validation_scores_ = [history.validation_scores for history in histories]
        return self

    def _fit_folds(
        self, z: Tensor, index: Index, groups: Index, weights: Array | None, seed: int
    ) -> list[_Fold]:
        near = np.flatnonzero(groups >= 0)
        fewest = min(len(np.unique(groups[(groups >= 0) & (index == c)])) for c in (0, 1))
        different = len(np.unique(groups[near]))
        K = fold_count(different, self.cv) if fewest >= FEWEST_TO_SPLIT else 1
        K = min(K, max(1, fewest // 2))
        rng = np.random.default_rng(seed)
        fold = np.full(len(z), -1)
        fold[near] = folds(groups[near], K, rng, index[near]) if K > 1 else 0
        budget = self._budget(int(different * (1 - 1 / max(K, 2))), ratio_levels(z.shape[1]))
        share = self.validation_fraction if self.early_stopping and fewest >= FEWEST_TO_SPLIT else 0.0
        jobs = []
        for k in range(K):
            train = near[fold[near] != k] if K > 1 else near
            kept = np.flatnonzero(fold == k)
            jobs.append(
                delayed(_fit_fold)(
                    z, index, groups, weights, self.columns_, train, kept, budget, share, seed + k
                )
            )
        return Parallel(n_jobs=self.n_jobs)(jobs)

    def _calibrate(self, found: list[_Fold], z: Tensor, index: Index, weights: Array | None) -> None:
        raw = np.mean([fold.network.log_ratio(z) for fold in found], axis=0)  # far rows: by all networks
        for fold in found:
            raw[fold.rows] = fold.log_ratio
        crossed = len(found) > 1
        scored = np.concatenate([fold.rows for fold in found])
        sets = [scored[index[scored] == c] for c in (1, 0)]
        of_set = (None, None) if weights is None else tuple(weights[rows] for rows in sets)
        self.calibration_ = calibrate(*(raw[rows] for rows in sets), *of_set) if crossed else Calibration()
        self.log_ratio_ = self.calibration_(raw)

    def log_ratio(self, X: ArrayLike) -> Array:
        """`log p_1(x) - log p_0(x)` in nats of each row, (n,)."""
        rows = self._new_rows(X)
        z = self.columns_.standardise(rows)
        return self.calibration_(np.mean([network.log_ratio(z) for network in self.networks_], axis=0))

    def decision_function(self, X: ArrayLike) -> Array:
        """`log_ratio`, under scikit-learn's name."""
        return self.log_ratio(X)

    def predict_proba(self, X: ArrayLike) -> Array:
        """(n, 2): probabilities of denominator and numerator for each row, if both are equally frequent."""
        half = np.tanh(self.log_ratio(X) / 2) / 2
        return np.stack([0.5 - half, 0.5 + half], axis=1)

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """(n,) values of `classes_`: the set with the larger density at each row."""
        denser = (self.log_ratio(X) > 0).astype(int)
        return self.classes_[denser]

    def score(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
        """`log 2` minus the logistic loss of `log_ratio`, in nats, with equal total weight for both sets.

        It is 0 for a ratio of 1 everywhere. On new rows its expectation is at most the Jensen-Shannon
        divergence of the two sets, which the true ratio reaches, so it can be compared between settings.
        """
        log_ratio, labels = self.log_ratio(X), np.asarray(y)
        unknown = np.setdiff1d(labels, self.classes_)
        if len(unknown) or len(np.unique(labels)) < 2:
            raise UserError(f"y holds {np.unique(labels)}: score needs rows of both {self.classes_}")
        weights = None if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
        loss = np.logaddexp(0, np.where(labels == self.classes_[1], -log_ratio, log_ratio))
        of_set = [
            np.average(loss[labels == c], weights=None if weights is None else weights[labels == c])
            for c in self.classes_
        ]
        return math.log(2) - float(np.mean(of_set))

    def weights(self, X: ArrayLike, clip: float | None = None) -> Array:
        """Importance weights (n,) that make rows of the denominator represent the numerator; their mean is 1.

        clip: the largest weight, in units of the mean. A few rows with large weights make every weighted mean
        noisy; `effective_sample_size` measures this.
        """
        if clip is not None and not clip >= 1:
            raise UserError(f"clip is {clip!r}: give a number of at least 1, in units of the mean weight")
        log_ratio = self.log_ratio(X)
        weights = np.exp(log_ratio - log_ratio.max())
        weights = weights / weights.mean()
        return weights if clip is None else _clipped(weights, clip)

    def two_sample_test(
        self, n_permutations: int = 999, random_state: int | np.random.RandomState | None = None
    ) -> TwoSampleTest:
        """Permutation test of whether the two sets of `fit` come from one distribution, on `log_ratio_`.

        Every row was scored by a network that was not trained on it, so under one distribution the scores are
        independent of the labels. Raises UserError if there were too few rows for folds.
        """
        check_is_fitted(self)
        if len(self.networks_) < 2:
            raise UserError("a two-sample test needs rows for two folds: give more rows, or a larger cv")
        if self._weighted:
            raise UserError("a two-sample test takes no sample_weight: fit without")
        if n_permutations < 1:
            raise UserError(f"n_permutations is {n_permutations}: give 1 or more")
        state = np.random.default_rng(self._seed() if random_state is None else random_state)
        rank = rankdata(self.log_ratio_)  # mid-ranks, whose sum over a set rises with its AUROC
        numerator = self._index == 1
        found = rank[numerator].sum()
        as_high = sum(rank[state.permutation(numerator)].sum() >= found for _ in range(n_permutations))
        scores = torch.from_numpy(self.log_ratio_)
        statistic = auroc(scores[numerator], scores[~numerator])
        return TwoSampleTest(statistic, (1 + as_high) / (1 + n_permutations))

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        assert tags.classifier_tags is not None
        tags.classifier_tags.multi_class = False
        return tags


@torch.inference_mode(False)
def _fit_fold(
    z: Tensor,
    index: Index,
    groups: Index,
    weights: Array | None,
    columns: Columns,
    train_rows: Index,
    kept: Index,
    budget: Budget,
    validation_fraction: float,
    seed: int,
) -> _Fold:
    """A network trained on `train_rows`, and its log ratios of the held-out rows `kept`."""
    rng = np.random.default_rng(seed)
    validation = np.zeros(len(train_rows), dtype=bool)
    if validation_fraction:
        validation = hold_out(groups[train_rows], validation_fraction, rng, index[train_rows])
        if len(np.unique(index[train_rows[~validation]])) < 2:
            validation[:] = False
    fit, judged = train_rows[~validation], train_rows[validation]

    def of_class(rows: Index) -> tuple[list[Tensor], list[Array | None]]:
        members = [rows[index[rows] == c] for c in (0, 1)]
        return [z[m] for m in members], [None if weights is None else weights[m] for m in members]

    tables, table_weights = of_class(fit)
    moments = [shrunk_moments(*part) for part in zip(tables, table_weights, strict=True)]
    means, covariances = (torch.stack(part) for part in zip(*moments, strict=True))
    validate = None
    if validation.any():
        (denominator, numerator), judges = of_class(judged)
        validate = ClassValidation(numerator, denominator, judges[1], judges[0])
    draw = _balanced(tables, table_weights, columns)
    model, history = train_ratio(draw, validate, means, covariances, [z.shape[1]], budget, len(fit), seed)
    network = RatioNetwork(model, torch.eye(z.shape[1], dtype=torch.float64), history)
    return _Fold(network, kept, network.log_ratio(z[kept]))


def _balanced(of_class: list[Tensor], weights: list[Array | None], columns: Columns) -> Draw:
    """A source of dequantised random rows, alternating between the two sets (n_c, d)."""
    z = torch.cat(of_class)
    first = [0, len(of_class[0])]
    choose = [chooser(len(rows), w) for rows, w in zip(of_class, weights, strict=True)]

    def draw(num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        label = torch.arange(num) % 2
        row = torch.empty(num, dtype=torch.int64)
        for c in (0, 1):
            row[c::2] = first[c] + choose[c](len(row[c::2]), generator)
        return columns.draw(z, row, generator), label

    return draw


def effective_sample_size(weights: ArrayLike) -> float:
    """`(sum w)^2 / sum w^2`: as many rows of equal weight give a mean of the same variance (Kish, 1965)."""
    w = np.asarray(weights, dtype=np.float64)
    return float(w.sum() ** 2 / (w**2).sum())


def _clipped(weights: Array, clip: float) -> Array:
    """Weights of mean 1, none above `clip`; what is cut off is distributed over the other rows."""
    for _ in range(100):
        high = weights >= clip
        rest = weights[~high].sum()
        if not high.any() or rest == 0:
            break
        scaled = np.where(high, clip, weights * (len(weights) - clip * high.sum()) / rest)
        if (scaled <= clip * (1 + 1e-12)).all():
            return scaled
        weights = scaled
    return np.minimum(weights, clip)


def log_density_ratio(
    X_numerator: ArrayLike,
    X_denominator: ArrayLike,
    **parameters: Any,
) -> Callable[[ArrayLike], Array]:
    """The function x -> `log(p_numerator(x) / p_denominator(x))`, learned from a sample of each.

    If both tables have column names, columns are matched by name.

    parameters: those of `DensityRatio`.

    >>> rng = np.random.default_rng(0)
    >>> shifted, standard = rng.normal(1, 1, (300, 1)), rng.normal(0, 1, (300, 1))
    >>> log_ratio = log_density_ratio(shifted, standard, cv=2, max_iter=200, random_state=0)
    >>> low, high = log_ratio([[-1.0], [2.0]])  # the truth is x - 1/2
    >>> bool(low < 0 < high)
    True
    """
    names = [_column_names(X) for X in (X_denominator, X_numerator)]
    if names[0] is not None and names[1] is not None and names[0] != names[1]:
        if sorted(names[0]) != sorted(names[1]):
            unmatched = sorted(set(names[0]) ^ set(names[1]))
            raise UserError(f"X_numerator and X_denominator name different columns: {', '.join(unmatched)}")
        X_denominator = X_denominator[names[1]]  # type: ignore[index, call-overload]
    sets = [check_array(rows, dtype=np.float64) for rows in (X_denominator, X_numerator)]
    if sets[0].shape[1] != sets[1].shape[1]:
        raise UserError(
            f"X_numerator has {sets[1].shape[1]} columns and X_denominator {sets[0].shape[1]}: give the same"
        )
    y = np.repeat([0, 1], [len(rows) for rows in sets])
    ratio = DensityRatio(**parameters).fit(np.concatenate(sets), y)
    known = names[1] if names[1] is not None else names[0]
    if known is None:
        return ratio.log_ratio

    def log_ratio(X: ArrayLike) -> Array:
        given = _column_names(X)
        if given is not None and given != known:
            if sorted(given) != sorted(known):
                raise UserError(f"the columns are {', '.join(given)}: give {', '.join(known)}")
            X = X[known]  # type: ignore[index, call-overload]
        return ratio.log_ratio(check_array(X, dtype=np.float64))

    return log_ratio


def _column_names(X: Any) -> list[str] | None:
    """The names of a data frame's columns, if they are all text."""
    names = getattr(X, "columns", None)
    if names is None:
        return None
    names = list(names)
    return names if all(isinstance(name, str) for name in names) else None
