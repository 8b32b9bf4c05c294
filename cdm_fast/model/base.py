"""Fits the base of a network, a mixture of Gaussians, to training data.

# n rows, d values of each, K classes, M Gaussians of each, R directions
"""

import copy
import math
import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cdm_fast.errors import UserError, require_at_least
from cdm_fast.model.cdm import CDM
from cdm_fast.model.schedule import NoiseSchedule
from cdm_fast.nn import AdjointNetwork
from cdm_fast.nn.base import FADE, MixtureBase

# Principal components in which rows are grouped.
GROUPED = 30
# Each Gaussian's variances are shrunk towards the mean variance within groups, by as much as so many rows.
PRIOR_ROWS = 10
# The share of each class's rows that set the temper, at so many levels; and the values tried.
HELD_OUT, MOST_HELD_OUT, TEMPERED_LEVELS = 0.1, 1000, 12
TEMPERS = tuple(2.0 ** (step / 2) for step in range(-12, 17))


@torch.inference_mode(False)
def fit_base(
    model: CDM, x0: Tensor, label: Tensor | None = None, noise: float = 0.0, seed: int = 0, folds: int = 0
) -> None:
    """Fits `model.network.base` to data, and starts the head at zero: the model is its base.

    The groups of a class are those of k-means in its first principal components; each has the Gaussian of
    probabilistic PCA (Tipping and Bishop, 1999). A tenth of the rows, at most 1000, decide how certain the
    base is of the classes. Changes the model in place.

    Args:
        model: with a network that has a base, before training.
        x0: (n, ...) clean data, in random order.
        label: (n,) int64, for joint logits.
        noise: variance that is added to each value, such as that of dequantisation.
        seed: of k-means.
        folds: a number of further bases, see `fit_folds`; 0 for none.

    Raises:
        UserError: a network without a base, or fewer than two rows for each Gaussian.

    >>> from cdm_fast import MLP, NoiseSchedule
    >>> schedule = NoiseSchedule.uniform(T=10)
    >>> network = MLP(2, schedule.num_levels, hidden=8)
    >>> network.base = MixtureBase(schedule.a, schedule.s, dim=2, components=1, rank=1)
    >>> model = CDM(network, schedule)
    >>> fit_base(model, 3 + torch.randn(1000, 2, generator=torch.Generator().manual_seed(0)))
    >>> x = torch.full((1, 2), 3 * float(schedule.a[10]))  # the mean of the noised data
    >>> round(model.predict_x0(x, level=10).mean().item())
    3
    """
    base = base_of(model)
    base.set(**_fitted(model.schedule, base, _classes(base, x0.flatten(1).cpu(), label), noise, seed))
    base.folds = ()
    if folds:
        fit_folds(model, x0, label, noise, seed, folds)
    start_at_base(model)


@torch.inference_mode(False)
def fit_folds(model: CDM, x0: Tensor, label: Tensor | None, noise: float, seed: int, folds: int) -> None:
    """Fits `model.network.base.folds`: the one with number f without the rows f, f + folds, ... of x0.

    A base tells more about the rows that it was fitted to than about others, and a network that is trained
    beside it on the same rows learns to rely on it too much. So the network should learn from each row beside
    the base that was fitted without it (cross-fitting; stacked generalization: Wolpert, 1992)::

        for step, rows in enumerate(batches):  # of step s: rows f, f + folds, ..., with f = s % folds
            model.network.base.use_fold(step % folds)
            ...
        model.network.base.use_fold(None)

    Arguments and errors as for `fit_base`, whose temper the folds share; folds: at least 2. Warns of a class
    that has too few rows for its Gaussians outside a fold: all of its rows are then in every base.
    """
    require_at_least("folds", folds, 2)
    base, rows = base_of(model), x0.flatten(1).cpu()
    base.folds = ()
    number, other = torch.arange(len(rows)), copy.deepcopy(base)
    tables = []
    for fold in range(folds):
        kept = _classes(base, rows, label, number % folds != fold)
        other.set(**_mixture(kept, *_sizes(base), noise, seed))
        tables.append(other.tables())
    base.folds = tuple(tables)


def find_base(network: nn.Module) -> MixtureBase | None:
    """The base of a network, if it has one."""
    return network.base if isinstance(network, AdjointNetwork) else None


def base_of(model: CDM) -> MixtureBase:
    """The base of a model; UserError if its network has none."""
    base = find_base(model.network)
    if base is None:
        raise UserError("the network has no base: give it one, network.base = MixtureBase(...)")
    return base


@torch.no_grad()
def start_at_base(model: CDM) -> None:
    """Makes the logits of the head those of the model's p(t) alone, so that the model is its base."""
    assert isinstance(model.network, AdjointNetwork)
    model.network.linear_layer.start_at_zero()
    prior = model.log_level_prior.double()
    model.network.linear_layer.shift(prior - prior[-1])


def _sizes(base: MixtureBase) -> tuple[int, int]:
    """(M, R)."""
    return len(base.means) // base.num_classes, base.variances.shape[1]


def _classes(
    base: MixtureBase, rows: Tensor, label: Tensor | None, kept: Tensor | None = None
) -> list[Tensor]:
    """The rows of each class of the base, only those that are `kept` if enough are; UserError for too few."""
    fewest = 2 * _sizes(base)[0]
    members = [torch.ones(len(rows), dtype=torch.bool)]
    if base.num_classes > 1:
        if label is None:
            raise UserError("a base of classes is fitted to labelled data: give labels")
        members = [label.cpu() == c for c in range(base.num_classes)]
    for number, own in enumerate(members):
        if own.sum() < fewest:
            of = f" of each class, and class {number} has" if len(members) > 1 else ", not"
            raise UserError(
                f"a base of {fewest // 2} Gaussians needs at least {fewest} training images{of}"
                f" {own.sum()}; give fewer --base-components, or 0"
            )
    if kept is None:
        return [rows[own] for own in members]
    enough = [bool((own & kept).sum() >= fewest) for own in members]
    if not all(enough):
        few = ", ".join(str(number) for number, each in enumerate(enough) if not each)
        warnings.warn(
            f"too few training images outside a fold, in class {few}: the network is trained beside a base"
            " that has seen all of them",
            stacklevel=3,
        )
    return [rows[own & kept if each else own] for own, each in zip(members, enough, strict=True)]


def _fitted(
    schedule: NoiseSchedule, base: MixtureBase, classes: list[Tensor], noise: float, seed: int
) -> dict[str, Tensor]:
    """The tensors of `MixtureBase.set`; changes the base."""
    components, rank = _sizes(base)
    share = min(HELD_OUT, MOST_HELD_OUT / sum(map(len, classes)))
    held_out = [rows[: int(share * len(rows))] for rows in classes]
    fitted = _mixture(classes, components, rank, noise, seed)
    if len(classes) == 1 or not any(map(len, held_out)):
        return fitted
    others = [rows[len(held) :] for rows, held in zip(classes, held_out, strict=True)]
    base.set(**_mixture(others, components, rank, noise, seed))
    return {**fitted, "temper": torch.tensor(_temper(schedule, base, held_out, seed))}


def _mixture(classes: list[Tensor], components: int, rank: int, noise: float, seed: int) -> dict[str, Tensor]:
    """M Gaussians for each class of rows (n_c, d), by k-means and probabilistic PCA."""
    seed %= 2**32  # scikit-learn has no larger ones
    groups = [group for rows in classes for group in _grouped(rows, components, seed)]
    within = sum(float((rows - rows.mean(0)).square().sum()) for rows in groups)
    total = sum(map(len, groups))
    prior = within / (total * classes[0].shape[1]) + noise
    parts = [_gaussian(rows, rank, prior, noise, seed) for rows in groups]
    weights = torch.tensor([math.log(len(rows) / total) for rows in groups])
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]} | {"log_weights": weights}


def _grouped(rows: Tensor, components: int, seed: int) -> list[Tensor]:
    """The rows in `components` groups, by k-means in their first principal components."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.exceptions import ConvergenceWarning

    if components == 1 or bool((rows == rows[0]).all()):
        return [rows] * components
    coordinates = PCA(min(GROUPED, *rows.shape), svd_solver="randomized", random_state=seed).fit_transform(
        rows.numpy()
    )
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):  # of equal rows
        group = KMeans(components, n_init=3, random_state=seed).fit_predict(coordinates)
    groups = [rows[torch.from_numpy(group == g)] for g in range(components)]
    return [own if len(own) else rows for own in groups]


def _gaussian(rows: Tensor, rank: int, prior: float, noise: float, seed: int) -> dict[str, Tensor]:
    """Mean, principal directions and variances of rows (n, d), with `noise` added to each variance."""
    from sklearn.decomposition import PCA

    n, d = rows.shape
    mean, kept = rows.mean(0), min(rank, n // 4, d - 1)
    directions, variances = rows.new_zeros(rank, d), rows.new_zeros(rank)
    centred = rows - mean
    total = float(centred.square().sum()) / n
    if kept and total:
        fitted = PCA(kept, svd_solver="randomized", random_state=seed).fit(centred.numpy())
        directions[:kept] = torch.from_numpy(fitted.components_)
        variances[:kept] = torch.from_numpy(fitted.explained_variance_) * ((n - 1) / n)
    rest = (total - float(variances.sum())) / max(d - kept, 1)
    measured = torch.cat([variances, variances.new_tensor([max(rest, 0.0)])]) + noise
    shrunk = (n * measured + PRIOR_ROWS * prior) / (n + PRIOR_ROWS)
    shrunk[kept:] = shrunk[-1]
    return {"means": mean, "directions": directions, "variances": shrunk[:-1], "rest": shrunk[-1]}


@torch.no_grad()
def _temper(schedule: NoiseSchedule, base: MixtureBase, held_out: list[Tensor], seed: int) -> float:
    """The temper with the least cross-entropy over the classes of held-out rows, one tensor for each.

    Summed over levels at which the base follows the mixture.
    """
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.cat(held_out).to(base.means)
    label = torch.repeat_interleave(
        torch.arange(len(held_out)), torch.tensor([len(rows) for rows in held_out])
    )
    losses = torch.zeros(len(TEMPERS), dtype=torch.float64)
    followed = range(int((schedule.sigma < FADE).sum()), schedule.T + 1)
    for level in followed[:: -(-len(followed) // TEMPERED_LEVELS)]:
        noised = schedule.noise(x0, level, generator=generator)
        of_class = base.of_class(base.read(noised), schedule.levels(level, noised)).double().cpu()
        variance = float(schedule.sigma[level]) ** 2
        for number, temper in enumerate(TEMPERS):
            losses[number] += F.cross_entropy(variance / (variance + temper) * of_class, label)
    return TEMPERS[int(losses.argmin())]
