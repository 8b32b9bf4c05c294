"""Mutual information of the columns of two tables, an interval for it, and when not to believe it.

# n rows, d columns (of X and Y together), K folds
"""

import math
import warnings
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.utils import Tags
from sklearn.utils.parallel import Parallel, delayed
from sklearn.utils.validation import validate_data
from torch import Tensor

from cdm_fast.errors import UserError
from cdm_fast.model.constants import Draw
from cdm_fast.model.schedule import even_in_log_noise
from cdm_fast.tables.calibration import Calibration, calibrate, offset
from cdm_fast.tables.columns import Array, normal_scores, separate_values
from cdm_fast.tables.crossfit import (
    RATIO_NOISE,
    RatioNetwork,
    canonical,
    ratio_levels,
    train_ratio,
)
from cdm_fast.tables.estimator import TableEstimator, fold_count, warn_of_few_rows
from cdm_fast.tables.fit import (
    Budget,
    class_validation,
    density_loss,
    level_validation,
    refit_constants,
    train,
)
from cdm_fast.tables.folds import Index, folds, groups_of_copies, hold_out
from cdm_fast.tables.network import new_model, start_at_gaussians

# Shuffles of rows that stand for independent ones: of those kept out, and of those trained on.
SHUFFLES, OFFSET_SHUFFLES = 8, 3
# Fewer different rows for each column than these, and the value is not to be trusted.
ENOUGH_ROWS = 50
# Training rows that are scored to see how much a network overfits.
TRAIN_ROWS = 5000
# A gap between training rows and others is large from these nats on, and from this share of the value.
LARGE_GAP, LARGE_GAP_SHARE = 0.1, 0.25
# The largest mean of the ratio over shuffled rows, which is 1 for the true ratio, that goes without a
# warning.
LARGEST_MEAN_RATIO = 2.0
# Weight of the cross-entropy over levels, where the density of joint rows is learned.
CE_WEIGHT = 1.0


class ConfidenceInterval(NamedTuple):
    """Bounds in nats."""

    low: float
    high: float


@dataclass(frozen=True)
class _FoldScores:
    """What one network says of the rows that it never saw, and of those it did."""

    network: RatioNetwork
    rows: Index  # (m,) the rows kept out
    joint: Array  # (m,) log ratios of them
    shuffled: Array  # (SHUFFLES, m) of their X with another's Y
    trained: Array  # log ratios of rows that the network was trained on


class MutualInformation(TableEstimator):
    """Mutual information of X and Y: the mean of `log p(x, y) / p(x) p(y)` over rows that no training saw.

    Columns go through their ranks to normal scores first, which keeps mutual information: heavy tails do no
    harm. Discrete columns are dequantised: ties in random order, or with few values a narrow bell for each.
    A network for each fold starts as the Gaussian that the fold's canonical correlations describe and learns
    what that misses; the log ratios of the fold's own rows are put right by logistic regression on the other
    folds' (`cdm_fast.tables.calibration`).

    Their mean over rows kept out is biased low, by what the networks have not learned, and over training rows
    high, by what they learned by heart: alike for a regular model. `estimate_` lies halfway.

    Args:
        reference: "shuffled": nothing is known about the marginals; the network learns the ratio of joint
            rows to rows whose Y was shuffled. "normal": after the ranks the product of the marginals is
            N(0, I), as where the columns of X are independent of each other and so are those of Y; then that
            is the network's own pure noise, and only the joint density is learned.
        test_size: share of the rows kept out once, with a single network; None (the default) for `cv` folds.
        confidence: of the interval.

    The other parameters are those of `TableEstimator`.

    Attributes:
        mutual_information_: nats, `max(estimate_, 0)`: below 0 nothing was learned, and nothing is known but
            that it is not negative.
        estimate_: nats, unclipped.
        confidence_interval_: (low, high) in nats, from the mean over rows kept out to that over training
            rows, each widened by the chance of the sample, the upper one also by what the last half of the
            training still gained.
        held_out_, trained_: the two means, nats.
        mean_ratio_: mean of the ratio over shuffled rows; 1 for the true ratio.
        networks_: the `RatioNetwork` of each fold; `calibrations_`: one for each fold of rows.
        n_iter_, loss_curve_, validation_scores_: of each network.

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
        """X (n, d_x), y (n, d_y) or (n,): paired rows of finite numbers, five or more.

        Warns where rows are copies, too few for the columns, or learned by heart.
        """
        rows, other = validate_data(
            self, X, y, dtype=np.float64, multi_output=True, y_numeric=True, ensure_min_samples=5
        )
        other = np.asarray(other, dtype=np.float64).reshape(len(rows), -1)
        for name, table in (("X", rows), ("y", other)):
            constant = np.flatnonzero(np.max(table, axis=0) == np.min(table, axis=0))
            if len(constant):
                raise UserError(f"column {constant[0]} of {name} is constant, so it tells nothing: drop it")
        if self.reference not in ("shuffled", "normal"):
            raise UserError(f"unknown reference {self.reference!r}: choose 'shuffled' or 'normal'")
        self._check_arguments()
        seed, table, width = self._seed(), np.concatenate([rows, other], axis=1), rows.shape[1]
        groups = groups_of_copies(table, "X and y together")
        different = int(groups.max()) + 1
        if different < 5:
            raise UserError(f"X and y have {different} different rows: five are the fewest")
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

    def _score(self, scores: Tensor, width: int, groups: Index, seed: int) -> list[_FoldScores]:
        """A network for each fold of rows and what it says of them."""
        rng, different = np.random.default_rng(seed), int(groups.max()) + 1
        if self.test_size is None:
            K = fold_count(different, self.cv)
            fold = folds(groups, K, rng)
            kept = [fold == k for k in range(K)]
        else:
            kept = [hold_out(groups, self.test_size, rng)]
        budget = self._budget(int(different * (1 - 1 / max(len(kept), 2))), ratio_levels(scores.shape[1]))
        share = self.validation_fraction if self.early_stopping else 0.0
        return Parallel(n_jobs=self.n_jobs)(
            delayed(_score_fold)(scores, width, groups, out, budget, self.reference, share, seed + k)
            for k, out in enumerate(kept)
        )

    def _summarise(self, scored: list[_FoldScores], groups: Index, width: int, seed: int) -> None:
        columns = len(scored[0].network.mix)
        parts = _parts(scored, groups, seed)
        self.calibrations_ = [
            _calibrate([other for k, other in enumerate(parts) if k != part]) for part in range(len(parts))
        ]
        each = list(zip(self.calibrations_, parts, strict=True))
        row = np.concatenate([part.rows for part in parts])
        value = np.concatenate([c(part.joint) for c, part in each])
        trained = np.concatenate([c(part.trained) for c, part in each])
        shuffled = np.concatenate([c(part.shuffled).ravel() for c, part in each])
        self.held_out_, self.trained_ = float(value.mean()), float(trained.mean())
        gap = max(0.0, self.trained_ - self.held_out_)
        self.estimate_ = self.held_out_ + gap / 2
        self.mutual_information_ = max(self.estimate_, 0.0)
        self.mean_ratio_ = float(np.exp(min(np.logaddexp.reduce(shuffled) - math.log(len(shuffled)), 700.0)))
        chance = _standard_error(value, groups[row], width * (columns - width))
        quantile = torch.special.ndtri(torch.tensor((1 + self.confidence) / 2, dtype=torch.float64))
        half = float(quantile) * chance + gap / 2
        self.confidence_interval_ = ConfidenceInterval(self.estimate_ - half, max(self.estimate_ + half, 0.0))
        self.networks_ = [fold.network for fold in scored]
        histories = [network.history for network in self.networks_]
        self.n_iter_ = [history.n_iter for history in histories]
        self.loss_curve_ = [history.loss_curve for history in histories]
        self.validation_scores_ = [history.validation_scores for history in histories]

    def _warn(self) -> None:
        gap = self.trained_ - self.held_out_
        if gap > max(LARGE_GAP, LARGE_GAP_SHARE * abs(self.estimate_)):
            warnings.warn(
                f"the log ratio is {gap:.2f} nats larger on training rows than on others: the networks learn"
                " rows by heart, and the value is uncertain by as much; give more rows or fewer columns",
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


@torch.inference_mode(False)
def _score_fold(
    scores: Tensor,
    width: int,
    groups: Index,
    kept_out: NDArray[np.bool_],
    budget: Budget,
    reference: str,
    validation_fraction: float,
    seed: int,
) -> _FoldScores:
    """Trains a network on the rows that are not kept out, and scores all."""
    rng = np.random.default_rng(seed)
    train_rows, kept = np.flatnonzero(~kept_out), np.flatnonzero(kept_out)
    validation = np.zeros(len(train_rows), dtype=bool)
    if validation_fraction:
        validation = hold_out(groups[train_rows], validation_fraction, rng)
    fit, judge = scores[train_rows[~validation]], scores[train_rows[validation]]
    fit_network = _fit_normal if reference == "normal" else _fit_shuffled
    network = fit_network(fit, judge, width, budget, seed)
    some = fit[torch.from_numpy(rng.permutation(len(fit))[:TRAIN_ROWS])]
    apart = torch.cat([_shuffle(some, width, rng) for _ in range(OFFSET_SHUFFLES)])
    trained = network.log_ratio(some)
    shift = offset(trained, network.log_ratio(apart))
    network = replace(network, offset=shift, ceiling=float(trained.max()) + shift)
    shuffled = [network.log_ratio(_shuffle(scores[kept], width, rng)) for _ in range(SHUFFLES)]
    return _FoldScores(
        network, kept, network.log_ratio(scores[kept]), np.stack(shuffled), network.log_ratio(some)
    )


def _fit_shuffled(fit: Tensor, judge: Tensor, width: int, budget: Budget, seed: int) -> RatioNetwork:
    """The ratio of joint rows to shuffled ones, from Gaussians in canonical coordinates on."""
    coordinates, rng = canonical(fit, width), np.random.default_rng(seed)
    z, judge = fit @ coordinates.mix, judge @ coordinates.mix
    dim = z.shape[1]
    validate = None
    if len(judge) > 1:
        validate = class_validation(judge, torch.cat([_shuffle(judge, width, rng) for _ in range(SHUFFLES)]))
    covariances = torch.stack([torch.eye(dim, dtype=torch.float64), coordinates.covariance()])
    means = torch.zeros(2, dim, dtype=torch.float64)
    model, history = train_ratio(
        _joint_and_shuffled(z, width),
        validate,
        means,
        covariances,
        [width, dim - width],
        budget,
        len(z),
        seed,
    )
    return RatioNetwork(model, coordinates.mix, history)


def _fit_normal(fit: Tensor, judge: Tensor, width: int, budget: Budget, seed: int) -> RatioNetwork:
    """The density of joint rows, whose ratio to N(0, I) it is."""
    coordinates, generator = canonical(fit, width, rotate_only=True), torch.Generator().manual_seed(seed)
    z, judge = fit @ coordinates.mix, judge @ coordinates.mix
    dim = z.shape[1]
    schedule = even_in_log_noise(budget.num_levels, RATIO_NOISE)
    model = new_model([width, dim - width], schedule, budget.hidden, budget.depth, dim, None, None, generator)
    start_at_gaussians(model, torch.zeros(1, dim, dtype=torch.float64), coordinates.covariance()[None])
    draw = _joint(z)
    validate = level_validation(judge, generator) if len(judge) > 1 else None
    loss = density_loss(draw, budget.batch_size, CE_WEIGHT, dim)
    history = train(model, loss, validate, budget, generator, len(z))
    refit_constants(model, draw, history, budget, len(z), generator)
    return RatioNetwork(model, coordinates.mix, history)


def _joint(z: Tensor) -> Draw:
    """Draws rows as they are."""

    def draw(num: int, generator: torch.Generator) -> tuple[Tensor, None]:
        return z[torch.randint(len(z), (num,), generator=generator)].float(), None

    return draw


def _joint_and_shuffled(z: Tensor, width: int) -> Draw:
    """Draws label 1: rows as they are; label 0: `width` columns of one row, the others of another."""

    def draw(num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        row = torch.randint(len(z), (num,), generator=generator)
        other = (row + torch.randint(1, len(z), (num,), generator=generator)) % len(z)
        label = torch.arange(num) % 2
        partner = torch.where(label == 1, row, other)
        return torch.cat([z[row, :width], z[partner, width:]], dim=1).float(), label

    return draw


def _shuffle(z: Tensor, width: int, rng: np.random.Generator) -> Tensor:
    """Rows of z with the last columns of another row, every row giving its own to one other."""
    order = torch.from_numpy(rng.permutation(len(z)))
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)
    return torch.cat([z[:, :width], z[partner, width:]], dim=1)


def _parts(scored: list[_FoldScores], groups: Index, seed: int) -> list[_FoldScores]:
    """The folds; a single one in two halves, so that each is calibrated on the other."""
    if len(scored) > 1:
        return scored
    (only,) = scored
    half = folds(groups[only.rows], 2, np.random.default_rng(seed))
    if len(np.unique(half)) == 1:
        half[: len(half) // 2] = 1 - half[0]
    return [
        replace(only, rows=only.rows[m], joint=only.joint[m], shuffled=only.shuffled[:, m])
        for m in (half == 0, half == 1)
    ]


def _calibrate(parts: list[_FoldScores]) -> Calibration:
    joint = np.concatenate([part.joint for part in parts])
    return calibrate(joint, np.concatenate([part.shuffled.ravel() for part in parts]))


def _standard_error(value: Array, groups: Index, pairs: int) -> float:
    """Of the mean of `value` (n,), copies counting as one, with the noise of a likelihood ratio added.

    Where nothing was learned the values hardly vary, and yet dependence between `pairs` pairs of columns
    could
    be as large as what chance makes of none: n times twice the Gaussian's mutual information varies like a
    chi-squared variable of so many degrees of freedom.
    """
    residual = np.bincount(np.unique(groups, return_inverse=True)[1], weights=value - value.mean())
    different = len(residual)
    chance = float((residual**2).sum()) / len(value) ** 2 * different / max(different - 1, 1)
    return math.sqrt(chance + 2 * pairs / (2 * different) ** 2)
