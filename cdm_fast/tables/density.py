"""The density of a table's rows, new rows from it, and how unusual a row is.

# n rows, d columns, K folds, L = T+2 noise levels
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.base import DensityMixin, OutlierMixin
from sklearn.utils import check_random_state
from sklearn.utils.parallel import Parallel, delayed
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from cdm_fast.errors import UserError
from cdm_fast.model import CDM
from cdm_fast.model.constants import Draw
from cdm_fast.model.denoiser import like_network
from cdm_fast.model.schedule import even_in_log_noise
from cdm_fast.sampling import sample
from cdm_fast.tables.columns import Array, Columns, measure, without_far_rows
from cdm_fast.tables.estimator import TableEstimator, fold_count, in_chunks, row_weights
from cdm_fast.tables.fit import (
    Budget,
    History,
    Validate,
    density_loss,
    level_validation,
    refit_constants,
    train,
    with_contrast,
)
from cdm_fast.tables.folds import Index, chooser, folds, groups_of_copies, hold_out
from cdm_fast.tables.mixture import (
    Mixture,
    choose_components,
    fit_mixture,
    held_out_scores,
)
from cdm_fast.tables.network import new_model, start_at_mixture, table_network

# Beyond this multiple of the norm of the longest training row, the density falls like a Gaussian.
REACH = 1.5
# The largest |log integral| of a density that counts as one.
LARGEST_LOG_INTEGRAL = 1.0
# The largest log integral of weights that are kept in training.
LARGEST_EXCESS = 0.3
# Number of rows for the checks of the integral: from the mixture, and of the table at each level.
MIXTURE_ROWS, ROWS_PER_LEVEL = 20_000, 512
# With fewer distinct rows than this, no rows are held out.
FEWEST_TO_SPLIT = 10
# Approximate number of noised copies of the held-out rows on which weights are validated.
VALIDATION_ROWS = 4096


@dataclass(frozen=True)
class _Fold:
    model: CDM
    history: History
    rows: Index  # the held-out rows
    log_prob: Array  # their log p(z), nats
    log_integral: float


class CDMDensity(OutlierMixin, DensityMixin, TableEstimator):
    """Density of the rows of a table, from one forward pass; also new rows (`sample`) and outlier detection.

    A network for each fold starts as a Gaussian or a mixture of Gaussians fitted to the table and learns a
    factor; the held-out rows of the folds decide how many components the mixture has and when to stop. The
    density is the mean over the folds. Discrete columns on an even
    grid (whole numbers, decimals) are dequantised, and so are, with a warning, other repeated values; a table
    without a density is refused, see `cdm_fast.tables.columns.measure`. The density is only as good as the
    normalisation that the networks have learned: see `log_integrals_`.

    Args:
        smallest_noise: noise of level 1, in units of the standardised data; by default chosen from the
            numbers of rows and columns.
        level_weight: weight of the cross-entropy over levels, relative to the denoising error summed over
            dimensions: d times the `ce_weight` of `cdm_loss`, where the error is a mean.
        num_components: components of the mixture of Gaussians at the start; 1 for a single Gaussian. By
            default chosen, up to 10, by BIC among the numbers that held-out rows do not reject.
        score_noise: standard deviation of noise, in units of the standardised data; `score_samples` and all
            that follows from it then score a row under the density of rows with this noise. 0 scores the
            density itself. For outliers 0.5 is better: narrow modes, such as a value that many rows share, do
            not decide.
        contamination: share of the training rows that `predict` calls outliers (-1).

    The other parameters are those of `TableEstimator`. With 5,000 distinct rows or more there is a single
    network, and a share `validation_fraction` of the rows decides when to stop.

    Attributes:
        models_: the `CDM` of each fold, for standardised rows; `model_` is the first. Its classes are the
            components of the mixture, if there are several.
        num_components_: components of the mixture at the start.
        columns_: the standardisation.
        log_prob_ (n,): `log p(x)` in nats of every row of `fit`, from the network that was not trained on it;
            a single network also scores its own training rows.
        log_integrals_: log of the integral of each network's density, 0 for a normalised one. Estimated by
            importance sampling from the mixture at the start, or from the ratios of neighbouring levels where
            the mixture misses the density.
        offset_: `decision_function` is `score_samples` minus this.
        n_iter_, loss_curve_, validation_scores_: training history of each network.

    >>> X = np.random.default_rng(0).normal(3.0, 2.0, size=(200, 2))
    >>> density = CDMDensity(max_iter=20, random_state=0).fit(X)
    >>> density.score_samples(X).shape, density.sample(5).shape
    ((200,), (5, 2))
    """

    def __init__(
        self,
        *,
        smallest_noise: float | None = None,
        level_weight: float = 1.0,
        num_components: int | None = None,
        score_noise: float = 0.0,
        contamination: float = 0.1,
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
        self.smallest_noise = smallest_noise
        self.level_weight = level_weight
        self.num_components = num_components
        self.score_noise = score_noise
        self.contamination = contamination

    def fit(self, X: ArrayLike, y: None = None, sample_weight: ArrayLike | None = None) -> "CDMDensity":
        """X (n, d): finite numbers, at least two rows. y is ignored. sample_weight (n,): non-negative; a row
        of weight 2 counts as two rows, a row of weight 0 is left out.

        Warns about copies, rows far from all others, and a density that does not integrate to about one.
        """
        rows = validate_data(self, X, dtype=np.float64, ensure_min_samples=2)
        self._check_arguments()
        weights = row_weights(sample_weight, rows)
        seed, near = self._seed(), without_far_rows(rows)
        if weights is not None:
            near &= weights > 0
        self.columns_: Columns = measure(rows[near], weights=None if weights is None else weights[near])
        z = self.columns_.standardise(rows)
        groups = np.full(len(rows), -1)
        groups[near] = groups_of_copies(rows[near])
        found = self._fit_folds(z, groups, weights, seed)
        self._reach = REACH * float(z[torch.from_numpy(near)].norm(dim=1).max())
        self._keep(found, z, weights)
        log_prob = self._log_prob(z) + self.columns_.log_det
        if weights is None:
            self.offset_ = float(np.percentile(log_prob, 100 * self.contamination))
        else:
            order = np.argsort(log_prob)
            below = np.cumsum(weights[order]) / weights.sum()
            self.offset_ = float(log_prob[order][np.searchsorted(below, self.contamination)])
        return self

    def _fit_folds(self, z: Tensor, groups: Index, weights: Array | None, seed: int) -> list[_Fold]:
        near = np.flatnonzero(groups >= 0)
        different, d = len(np.unique(groups[near])), z.shape[1]
        K = density_folds(different, self.cv)
        budget = self._budget(different, density_levels(d))
        fold = np.full(len(z), -1)
        fold[near] = folds(groups[near], K, np.random.default_rng(seed))
        if K == 1 and different >= FEWEST_TO_SPLIT:
            held = hold_out(groups[near], self.validation_fraction, np.random.default_rng(seed))
            fold[near] = np.where(held, 0, 1)
        parts = []
        for k in range(K):
            train_rows = near if different < FEWEST_TO_SPLIT else near[fold[near] != k]
            parts.append((z, self.columns_, weights, train_rows, np.flatnonzero(fold == k), seed + k))
        self.num_components_ = self._components(parts, near, different, seed)
        noise = self.smallest_noise or density_noise(different, d)
        options = (
            budget,
            self.level_weight,
            noise,
            self.early_stopping,
            self.num_components_,
            self.score_noise,
        )
        return Parallel(n_jobs=self.n_jobs)(delayed(_fit_fold)(*part, *options) for part in parts)

    def _components(self, parts: list[Any], near: Index, different: int, seed: int) -> int:
        """The number of components: the argument, or one chosen from the folds' `parts`."""
        most = max(1, different // 2)
        if self.num_components is not None:
            if self.num_components > most:
                raise UserError(
                    f"num_components is {self.num_components} for {different} different rows: give at most"
                    f" {most}, or None"
                )
            return self.num_components
        parallel = Parallel(n_jobs=self.n_jobs)
        scores = parallel(delayed(_held_out_scores)(*part) for part in parts if len(part[4]))
        if not scores:
            return 1
        z, columns, weights = parts[0][:3]
        rows = _each_once(z, columns, weights, near, torch.Generator().manual_seed(seed))
        return choose_components(rows, np.hstack(scores), seed)

    def _keep(self, found: list[_Fold], z: Tensor, weights: Array | None) -> None:
        """Stores the results of the folds, and the networks whose densities integrate to about one."""
        self.log_integrals_ = [fold.log_integral for fold in found]
        sound = [fold for fold in found if abs(fold.log_integral) <= LARGEST_LOG_INTEGRAL]
        if not sound:
            worst = max(self.log_integrals_, key=abs)
            warnings.warn(
                f"the log of the density's integral is {worst:.3g}, not about 0: training diverged or was too"
                " short, and score is NaN; give a smaller learning_rate, or early_stopping=True",
                stacklevel=3,
            )
        self._sound = bool(sound)
        self.models_ = [fold.model for fold in sound or found]
        self.model_ = self.models_[0]
        self.log_prob_ = self._log_prob(z) + self.columns_.log_det
        for fold in found:
            self.log_prob_[fold.rows] = fold.log_prob + self.columns_.log_det
        kept = np.concatenate([fold.rows for fold in found])
        kept = kept[np.argsort(self.log_prob_[kept])]
        self._kept_scores = self.log_prob_[kept]
        weight = np.ones(len(kept)) if weights is None else weights[kept] / weights[kept].mean()
        self._kept_below = np.r_[0.0, np.cumsum(weight)]
        histories = [fold.history for fold in found]
        self.n_iter_ = [history.n_iter for history in histories]
        self.loss_curve_ = [history.loss_curve for history in histories]
        self.validation_scores_ = [history.validation_scores for history in histories]

    def _log_prob(self, z: Tensor) -> Array:
        """`log p(z)` in nats of the mean of the networks' densities, (n,), with `score_noise`.

        Beyond `REACH` times the norm of the longest training row the networks were not trained; from there on
        the density falls like a Gaussian, so that distant rows never look likely.
        """
        length = z.norm(dim=1, keepdim=True).clamp(min=1e-300)
        beyond = length.clamp(max=1e150) > self._reach
        inside = torch.where(beyond, z * (self._reach / length), z).nan_to_num()
        log_prob = np.stack([_scores(model, inside, self.score_noise) for model in self.models_])
        fall = (length.clamp(max=1e150).square() - self._reach**2).clamp(min=0)[:, 0] / 2
        return np.logaddexp.reduce(log_prob, axis=0) - math.log(len(log_prob)) - fall.numpy()

    def score_samples(self, X: ArrayLike) -> Array:
        """`log p(x)` in nats of each row, (n,), or that of the density with `score_noise`."""
        rows = self._new_rows(X)
        return self._log_prob(self.columns_.standardise(rows)) + self.columns_.log_det

    def score(self, X: ArrayLike, y: None = None) -> float:
        """Mean of `score_samples`; NaN if the fitted density does not integrate to about one."""
        mean = float(self.score_samples(X).mean())
        return mean if self._sound else math.nan

    def decision_function(self, X: ArrayLike) -> Array:
        """`score_samples` minus `offset_`, (n,): negative for outliers."""
        return self.score_samples(X) - self.offset_

    def predict(self, X: ArrayLike) -> Index:
        """-1 for outliers, 1 for the others, (n,)."""
        return np.where(self.decision_function(X) < 0, -1, 1)

    def p_values(self, X: ArrayLike) -> Array:
        """Conformal p-values (n,): the share of held-out rows that are at least as unusual as this one.

        A row from the distribution of the training rows has a p-value below u with probability at most about
        u. The smallest p-value is 1/(m+1) for m held-out rows, so few rows of `fit` give coarse
        p-values.
        """
        score = self.score_samples(X)
        as_low = self._kept_below[np.searchsorted(self._kept_scores, score, side="right")]
        return (1 + as_low) / (1 + self._kept_below[-1])

    def sample(self, n_samples: int = 1, random_state: int | np.random.RandomState | None = None) -> Array:
        """New rows, (n_samples, d); `random_state` is the estimator's own by default."""
        check_is_fitted(self)
        if n_samples < 1:
            raise UserError(f"n_samples is {n_samples}; give 1 or more")
        state = check_random_state(self.random_state if random_state is None else random_state)
        seed, steps = int(state.randint(2**31 - 1)), min(50, self.model_.schedule.T)
        of_model = np.bincount(np.arange(n_samples) % len(self.models_), minlength=len(self.models_))
        drawn = [
            sample(model, int(many), "dpm_solver_pp_2m", steps, seed + k)
            for k, (model, many) in enumerate(zip(self.models_, of_model, strict=True))
            if many
        ]
        rows = self.columns_.restore(torch.cat(drawn))
        return rows[np.random.default_rng(seed).permutation(n_samples)]


def _scores(model: CDM, z: Tensor, noise: float) -> Array:
    """log of the density of z + `noise` eps in nats, (n,), from the level nearest to this noise."""
    if not noise:
        return in_chunks(model.log_prob, z)
    schedule, dim = model.schedule, z.shape[1]
    level = int((schedule.s[:-1] / schedule.a[:-1] - noise).abs().argmin())
    a = schedule.a[level].item()
    return dim * math.log(a) + in_chunks(lambda part: model.log_prob_levels(a * part)[:, level], z)


def density_folds(rows: int, cv: int | None) -> int:
    """Number of folds for a density of `rows` distinct rows; from a few thousand on, one network suffices."""
    if cv is None and rows >= 5000:
        return 1
    return fold_count(rows, cv or (5 if rows < 1000 else 3)) if rows >= FEWEST_TO_SPLIT else 1


def density_levels(columns: int) -> int:
    """Number of noise levels for a number of columns, such that neighbouring levels overlap."""
    return min(102, 32 + columns)


def density_noise(rows: int, columns: int) -> float:
    """Smallest noise: a tenth of the bandwidth of a kernel density estimate with this number of rows."""
    return float(np.clip(0.1 * rows ** (-1 / (columns + 4)), 0.01, 0.1))


@torch.inference_mode(False)
def _held_out_scores(
    z: Tensor, columns: Columns, weights: Array | None, train_rows: Index, kept: Index, seed: int
) -> Array:
    """Log-densities of the held-out rows `kept` under mixtures fitted to `train_rows`."""
    generator = torch.Generator().manual_seed(seed)
    fitted, judged = (_each_once(z, columns, weights, rows, generator) for rows in (train_rows, kept))
    return held_out_scores(fitted, judged, seed)


@torch.inference_mode(False)
def _fit_fold(
    z: Tensor,
    columns: Columns,
    weights: Array | None,
    train_rows: Index,
    kept: Index,
    seed: int,
    budget: Budget,
    level_weight: float,
    smallest_noise: float,
    early_stopping: bool,
    num_components: int,
    score_noise: float,
) -> _Fold:
    """A network trained on `train_rows`, and its log-densities of the held-out rows `kept`."""
    generator, d = torch.Generator().manual_seed(seed), z.shape[1]
    schedule = even_in_log_noise(budget.num_levels, smallest_noise)
    model = new_model(
        [d], schedule, budget.hidden, budget.depth, d, None, None, generator, components=num_components
    )
    mixture = fit_mixture(_each_once(z, columns, weights, train_rows, generator), num_components, seed)
    start_at_mixture(model, mixture)
    judged = kept if len(kept) else train_rows
    draw, noisy = (_rows(z, columns, weights, rows) for rows in (train_rows, judged))
    validate = None
    if early_stopping and len(train_rows) + len(kept) >= FEWEST_TO_SPLIT:
        repeats = max(1, VALIDATION_ROWS // len(judged))
        if weights is None:
            index = torch.arange(len(judged)).repeat(repeats)
            copies = columns.draw(z[judged], index, generator)
        else:
            copies, _ = noisy(repeats * len(judged), generator)
        validate = _unless_overflowing(level_validation(copies, generator), mixture, generator)
    loss = density_loss(draw, budget.batch_size, level_weight, d)
    loss = with_contrast(loss, draw, mixture, budget.batch_size)
    history = train(model, loss, validate, budget, generator, len(train_rows))
    _refit_constants(model, validate, draw, history, budget, len(train_rows), generator)
    log_integral = mixture_log_integral(model, mixture.draw(MIXTURE_ROWS, generator))
    if log_integral < -LARGEST_LOG_INTEGRAL:
        log_integral = level_log_integral(model, noisy, generator)
    scores = _scores(model, z[kept], score_noise) if len(kept) else np.empty(0)
    return _Fold(model, history, kept, scores, log_integral)


def _rows(z: Tensor, columns: Columns, weights: Array | None, rows: Index) -> Draw:
    """A source of dequantised random ones of these rows of z."""
    z, choose = z[rows], chooser(len(rows), None if weights is None else weights[rows])

    def draw(num: int, generator: torch.Generator) -> tuple[Tensor, None]:
        return columns.draw(z, choose(num, generator), generator), None

    return draw


def _each_once(
    z: Tensor, columns: Columns, weights: Array | None, rows: Index, generator: torch.Generator
) -> Tensor:
    """These rows of z in random order, dequantised; with weights, as many random ones of them. fp64."""
    if weights is None:
        index = torch.randperm(len(rows), generator=generator)
        return columns.draw(z[rows], index, generator).double()
    return _rows(z, columns, weights, rows)(len(rows), generator)[0].double()


def _refit_constants(
    model: CDM,
    validate: Validate | None,
    draw: Draw,
    history: History,
    budget: Budget,
    rows: int,
    generator: torch.Generator,
) -> None:
    """`refit_constants`, undone if that makes the validation loss worse."""
    bias = table_network(model).linear_layer.bias
    before, loss = bias.detach().clone(), validate(model) if validate else math.inf
    refit_constants(model, draw, history, budget, rows, generator)
    if validate and validate(model) > loss:
        with torch.no_grad():
            bias.copy_(before)


def _unless_overflowing(validate: Validate, mixture: Mixture, generator: torch.Generator) -> Validate:
    """`validate`, but infinite for a density whose integral exceeds 1 by more than `LARGEST_EXCESS` nats."""
    drawn = mixture.draw(MIXTURE_ROWS, generator).float()

    def checked(model: CDM) -> float:
        return math.inf if mixture_log_integral(model, drawn) > LARGEST_EXCESS else validate(model)

    return checked


def mixture_log_integral(model: CDM, drawn: Tensor) -> float:
    """log of the integral of `p_0`, in nats, by importance sampling from rows `drawn` of the mixture.

    An estimate far above 0 is evidence of mass where there are no rows, which `level_log_integral` does not
    see. One far below 0 is no evidence: the mixture may miss a density that is concentrated elsewhere.
    Infinite if the network's outputs are not finite.
    """
    network = table_network(model)
    correction = in_chunks(lambda part: network.correction(part)[:, 0], like_network(model, drawn))
    if not np.isfinite(correction).all():
        return math.inf
    return float(np.logaddexp.reduce(correction, dtype=np.float64)) - math.log(len(drawn))


@torch.no_grad()
def level_log_integral(model: CDM, draw: Draw, generator: torch.Generator) -> float:
    """log of the integral of `p_0`, in nats, from the ratios of neighbouring levels.

    `int p_t = E[p_t(x) / p_{t+1}(x)]` over x at level t+1, if `p_{t+1}` is correct and normalised, as it is
    for pure noise; the product over all levels is the integral at level 0. Infinite if the network's outputs
    are not finite.
    """
    total, levels = 0.0, model.schedule.num_levels
    for t in reversed(range(levels - 1)):
        x, _ = draw(ROWS_PER_LEVEL, generator)
        log_prob = model.log_prob_levels(model.schedule.noise(x.double(), t + 1, generator=generator))
        ratio = log_prob[:, t] - log_prob[:, t + 1]
        total += float(ratio.logsumexp(0)) - math.log(len(ratio))
    return total if math.isfinite(total) else math.inf
