"""scikit-learn estimators on vectors: densities, density ratios and mutual information.

Each trains a small CDM on the CPU. All results are in nats and fixed by `random_state`; data are standardised
inside, and nothing is printed unless `verbose`.

# n rows, d columns, B batch
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.utils import ClassifierTags, Tags, check_random_state
from sklearn.utils.validation import check_array, check_is_fitted, validate_data
from torch import Tensor

from cdm_fast.errors import UserError
from cdm_fast.model import CDM, log_normal
from cdm_fast.sampling import sample
from cdm_fast.schedule import NoiseSchedule
from cdm_fast.tables.columns import (
    CHUNK,
    Array,
    Budget,
    Columns,
    even_in_log_noise,
    measure,
    normal_scores,
    separate_values,
    train_cdm,
)


class _Estimator(BaseEstimator):
    """The constructor that all estimators share.

    Args:
        max_steps: training steps; with `batch_size` and `hidden` they set the time that `fit` takes.
        batch_size: rows of a step.
        hidden, depth: width and number of residual blocks of the network.
        num_levels: noise levels, data and pure noise included. More dimensions need more of them.
        learning_rate: of Adam at its peak.
        ce_weight: weight of the cross-entropy over levels beside the denoising error summed over dimensions.
        random_state: seed; a fixed one gives a fixed result.
        verbose: 1 prints ten lines of progress to stderr.
    """

    def __init__(
        self,
        *,
        max_steps: int = 3000,
        batch_size: int = 256,
        hidden: int = 128,
        depth: int = 2,
        num_levels: int = 52,
        learning_rate: float = 3e-3,
        ce_weight: float = 1.0,
        random_state: int | np.random.RandomState | None = None,
        verbose: int = 0,
    ) -> None:
        self.max_steps = max_steps
        self.batch_size = batch_size
        self.hidden = hidden
        self.depth = depth
        self.num_levels = num_levels
        self.learning_rate = learning_rate
        self.ce_weight = ce_weight
        self.random_state = random_state
        self.verbose = verbose

    def _budget(self) -> Budget:
        for name, lowest in (
            ("max_steps", 1),
            ("batch_size", 2),
            ("hidden", 1),
            ("depth", 1),
            ("num_levels", 3),
        ):
            if getattr(self, name) < lowest:
                raise UserError(f"{name} is {getattr(self, name)}; give {lowest} or more")
        return Budget(
            self.hidden,
            self.depth,
            self.num_levels,
            self.max_steps,
            self.batch_size,
            self.learning_rate,
            self.ce_weight,
            self.verbose,
        )

    def _seed(self) -> int:
        return int(check_random_state(self.random_state).randint(2**31 - 1))

    def _new_rows(self, X: ArrayLike) -> Array:
        check_is_fitted(self)
        return validate_data(self, X, reset=False, dtype=np.float64)


class _Density(_Estimator):
    """Densities may be narrow: their noise levels go down to `smallest_noise` by equal factors.

    Args:
        smallest_noise: noise of level 1, in units of the standardised data.
        the others: see `_Estimator`.
    """

    def __init__(
        self,
        *,
        max_steps: int = 3000,
        batch_size: int = 256,
        hidden: int = 128,
        depth: int = 2,
        num_levels: int = 52,
        smallest_noise: float = 0.01,
        learning_rate: float = 3e-3,
        ce_weight: float = 1.0,
        random_state: int | np.random.RandomState | None = None,
        verbose: int = 0,
    ) -> None:
        super().__init__(
            max_steps=max_steps,
            batch_size=batch_size,
            hidden=hidden,
            depth=depth,
            num_levels=num_levels,
            learning_rate=learning_rate,
            ce_weight=ce_weight,
            random_state=random_state,
            verbose=verbose,
        )
        self.smallest_noise = smallest_noise

    def _schedule(self) -> NoiseSchedule:
        if not 0 < self.smallest_noise < 1:
            raise UserError(f"smallest_noise is {self.smallest_noise}; give a number between 0 and 1")
        return even_in_log_noise(self.num_levels, self.smallest_noise)


class CDMDensity(DensityMixin, _Density):
    """Density of the rows of a table, from one forward pass; `sample` draws new rows.

    Discrete columns on an even grid (whole numbers, say) are dequantised; what has no density is refused, see
    `cdm_fast.tables.columns.measure`. A single pass is as good as the normalisation that the network has
    learned: compare figures, or audit them.

    Args:
        max_steps, batch_size, hidden, depth, num_levels, smallest_noise, learning_rate, ce_weight,
        random_state, verbose: see `_Density` and `_Estimator`.

    Attributes:
        model_: the `CDM` of the standardised rows.
        columns_: the standardisation.

    >>> X = np.random.default_rng(0).normal(3.0, 2.0, size=(200, 2))
    >>> density = CDMDensity(max_steps=20, random_state=0).fit(X)
    >>> density.score_samples(X).shape, density.sample(5).shape
    ((200,), (5, 2))
    """

    def fit(self, X: ArrayLike, y: None = None) -> "CDMDensity":
        """X (n, d): finite numbers, two rows or more. y is ignored."""
        rows = validate_data(self, X, dtype=np.float64, ensure_min_samples=2)
        budget, schedule, seed = self._budget(), self._schedule(), self._seed()
        self.columns_: Columns = measure(rows)
        z = self.columns_.standardise(rows)

        def draw(num: int, generator: torch.Generator) -> tuple[Tensor, None]:
            return self.columns_.draw(z, torch.randint(len(z), (num,), generator=generator), generator), None

        self.model_ = train_cdm(draw, schedule, z.shape[1], budget, seed)
        return self

    def score_samples(self, X: ArrayLike) -> Array:
        """`log p(x)` in nats of each row, (n,)."""
        rows = self._new_rows(X)
        return _in_chunks(self.model_.log_prob, self.columns_.standardise(rows)) + self.columns_.log_det

    def score(self, X: ArrayLike, y: None = None) -> float:
        """Mean of `score_samples`."""
        return float(self.score_samples(X).mean())

    def sample(self, n_samples: int = 1, random_state: int | np.random.RandomState | None = None) -> Array:
        """New rows, (n_samples, d); `random_state` is the estimator's own by default."""
        check_is_fitted(self)
        if n_samples < 1:
            raise UserError(f"n_samples is {n_samples}; give 1 or more")
        state = check_random_state(self.random_state if random_state is None else random_state)
        seed, steps = int(state.randint(2**31 - 1)), min(50, self.model_.schedule.T)
        return self.columns_.restore(sample(self.model_, n_samples, "dpm_solver_pp_2m", steps, seed))


class DensityRatio(_Density):
    """`log p_1(x) / p_0(x)` of two sets of rows, told apart by one network with joint (level, class) logits.

    Args:
        max_steps, batch_size, hidden, depth, num_levels, smallest_noise, learning_rate, ce_weight,
        random_state, verbose: see `_Density` and `_Estimator`.

    Attributes:
        model_, columns_: as in `CDMDensity`; the standardisation is that of all rows together.
        classes_ (2,): the two values of y, denominator first.

    >>> X = np.random.default_rng(0).normal(size=(400, 1))
    >>> y = np.arange(400) % 2
    >>> X[y == 1] += 1.0
    >>> ratio = DensityRatio(max_steps=300, random_state=0).fit(X, y).log_ratio([[-2.0], [3.0]])
    >>> bool(ratio[0] < 0 < ratio[1])
    True
    """

    def fit(self, X: ArrayLike, y: ArrayLike) -> "DensityRatio":
        """X (n, d), y (n,) of two values: the rows of the smaller (0) are from the denominator, of the larger
        (1) from the numerator. The ratio does not depend on how many rows each has."""
        rows, labels = validate_data(self, X, y, dtype=np.float64, ensure_min_samples=2)
        self.classes_, index = np.unique(labels, return_inverse=True)
        if len(self.classes_) != 2:
            raise UserError(
                f"y holds {len(self.classes_)} class{'es' * (len(self.classes_) != 1)}; a ratio needs two:"
                " 0 for the denominator's rows, 1 for the numerator's"
            )
        budget, schedule, seed = self._budget(), self._schedule(), self._seed()
        self.columns_ = measure(rows)
        z = self.columns_.standardise(rows)
        of_class = [torch.from_numpy(np.flatnonzero(index == c)) for c in (0, 1)]

        def draw(num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            label = torch.arange(num) % 2
            row = torch.empty(num, dtype=torch.int64)
            for c, members in enumerate(of_class):
                count = len(row[c::2])
                row[c::2] = members[torch.randint(len(members), (count,), generator=generator)]
            return self.columns_.draw(z, row, generator), label

        self.model_ = train_cdm(draw, schedule, z.shape[1], budget, seed, num_classes=2)
        return self

    def log_ratio(self, X: ArrayLike) -> Array:
        """`log p_1(x) - log p_0(x)` in nats of each row, (n,)."""
        rows = self._new_rows(X)
        return _log_ratio(self.model_, self.columns_.standardise(rows))

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        tags.classifier_tags = ClassifierTags(multi_class=False)
        return tags


def log_density_ratio(
    X_numerator: ArrayLike,
    X_denominator: ArrayLike,
    **parameters: Any,
) -> Callable[[ArrayLike], Array]:
    """The function x -> `log p_numerator(x) / p_denominator(x)`, learned from a sample of each.

    parameters: of `DensityRatio`.
    """
    sets = [check_array(rows, dtype=np.float64) for rows in (X_denominator, X_numerator)]
    if sets[0].shape[1] != sets[1].shape[1]:
        raise UserError(
            f"X_numerator has {sets[1].shape[1]} columns and X_denominator {sets[0].shape[1]}: give the same"
        )
    y = np.repeat([0, 1], [len(rows) for rows in sets])
    return DensityRatio(**parameters).fit(np.concatenate(sets), y).log_ratio


class ConfidenceInterval(NamedTuple):
    """Bounds in nats."""

    low: float
    high: float


class MutualInformation(_Estimator):
    """Mutual information of X and Y: the mean of `log p(x, y) / p(x) p(y)` over rows kept out of training.

    Columns go through their ranks to normal scores first, which keeps mutual information: heavy tails do no
    harm. Discrete columns are dequantised: ties in random order, or with few values a narrow bell for each.

    Args:
        reference: "shuffled": nothing is known about the marginals; the network learns the ratio of joint
            rows to rows whose Y was shuffled. "normal": after the ranks the product of the marginals is
            N(0, I), as where the columns of X are independent of each other and so are those of Y; then that
            is the network's own pure noise, and only the joint density is learned.
        test_share: share of the rows kept out.
        confidence: of the interval.
        max_steps, batch_size, hidden, depth, num_levels, learning_rate, ce_weight, random_state, verbose:
            see `_Estimator`.

    Attributes:
        mutual_information_: nats. May be slightly negative, or biased where the network is.
        confidence_interval_: (low, high) in nats: of the mean over the kept rows given this network, not of
            what another training would give.
        model_: the `CDM`.

    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(1000, 1))
    >>> Y = X[:, 0] + 0.5 * rng.normal(size=1000)  # I = log(5) / 2 = 0.80 nats
    >>> found = MutualInformation(max_steps=300, random_state=0).fit(X, Y)
    >>> bool(0.6 < found.mutual_information_ < 1.0)
    True
    """

    def __init__(
        self,
        *,
        reference: Literal["shuffled", "normal"] = "shuffled",
        test_share: float = 0.2,
        confidence: float = 0.95,
        max_steps: int = 3000,
        batch_size: int = 256,
        hidden: int = 128,
        depth: int = 2,
        num_levels: int = 102,
        learning_rate: float = 3e-3,
        ce_weight: float = 1.0,
        random_state: int | np.random.RandomState | None = None,
        verbose: int = 0,
    ) -> None:
        super().__init__(
            max_steps=max_steps,
            batch_size=batch_size,
            hidden=hidden,
            depth=depth,
            num_levels=num_levels,
            learning_rate=learning_rate,
            ce_weight=ce_weight,
            random_state=random_state,
            verbose=verbose,
        )
        self.reference = reference
        self.test_share = test_share
        self.confidence = confidence

    def fit(self, X: ArrayLike, y: ArrayLike) -> "MutualInformation":
        """X (n, d_x), y (n, d_y) or (n,): paired rows of finite numbers, five or more."""
        rows, other = validate_data(
            self, X, y, dtype=np.float64, multi_output=True, y_numeric=True, ensure_min_samples=5
        )
        other = np.asarray(other, dtype=np.float64).reshape(len(rows), -1)
        for name, table in (("X", rows), ("y", other)):
            constant = np.flatnonzero(np.ptp(table, axis=0) == 0)
            if len(constant):
                raise UserError(f"column {constant[0]} of {name} is constant, so it tells nothing: drop it")
        for name in ("test_share", "confidence"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give a number between 0 and 1")
        if self.reference not in ("shuffled", "normal"):
            raise UserError(f"unknown reference {self.reference!r}: choose 'shuffled' or 'normal'")
        budget, seed = self._budget(), self._seed()
        table, rng = np.concatenate([rows, other], axis=1), np.random.default_rng(seed)
        scores = normal_scores(table, rng)
        if self.reference == "shuffled":  # the other one wants normal columns
            scores = separate_values(table, scores, rng)
        kept, train = _split(len(rows), self.test_share, seed)
        schedule = NoiseSchedule.uniform(self.num_levels - 2)
        dim, width = scores.shape[1], rows.shape[1]
        if self.reference == "normal":
            self.model_ = train_cdm(_joint(scores[train]), schedule, dim, budget, seed)
            log_ratio = _in_chunks(lambda z: self.model_.log_prob(z) - log_normal(z), scores[kept])
        else:
            draw = _joint_and_shuffled(scores[train], width)
            self.model_ = train_cdm(draw, schedule, dim, budget, seed, num_classes=2)
            log_ratio = _log_ratio(self.model_, scores[kept])
        self.mutual_information_ = float(log_ratio.mean())
        quantile = float(torch.special.ndtri(torch.tensor((1 + self.confidence) / 2, dtype=torch.float64)))
        half = quantile * float(log_ratio.std(ddof=1)) / math.sqrt(len(log_ratio))
        self.confidence_interval_ = ConfidenceInterval(
            self.mutual_information_ - half, self.mutual_information_ + half
        )
        return self

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.required = True
        return tags


def _split(count: int, test_share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Row numbers (kept out, trained on), two or more of the first."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    kept = min(max(2, round(count * test_share)), count - 2)
    return order[:kept], order[kept:]


def _joint(scores: Tensor) -> Callable[[int, torch.Generator], tuple[Tensor, None]]:
    """Draws rows as they are."""

    def draw(num: int, generator: torch.Generator) -> tuple[Tensor, None]:
        return scores[torch.randint(len(scores), (num,), generator=generator)].float(), None

    return draw


def _joint_and_shuffled(
    scores: Tensor, width: int
) -> Callable[[int, torch.Generator], tuple[Tensor, Tensor]]:
    """Draws label 1: rows as they are; label 0: `width` columns of one row, the others of another."""

    def draw(num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        row = torch.randint(len(scores), (num,), generator=generator)
        partner = torch.randint(len(scores), (num,), generator=generator)
        label = torch.arange(num) % 2
        partner = torch.where(label == 1, row, partner)
        return torch.cat([scores[row, :width], scores[partner, width:]], dim=1).float(), label

    return draw


def _log_ratio(model: CDM, z: Tensor) -> Array:
    """`log p_1(z) - log p_0(z)` in nats of a model of two classes, (n,)."""
    return _in_chunks(lambda part: model.log_prob_classes(part).diff(dim=1)[:, 0], z)


@torch.no_grad()
def _in_chunks(function: Callable[[Tensor], Tensor], z: Tensor) -> NDArray[np.float64]:
    """`function` of z (n, d), a few thousand rows at a time, (n,)."""
    return torch.cat([function(part) for part in z.split(CHUNK)]).numpy()
