"""Tables of numbers for a CDM: checked, dequantised, standardised; and a short training loop on vectors.

# n rows, d columns, B batch, L = T+2 noise levels, K classes
"""

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdm_fast.errors import UserError
from cdm_fast.likelihood.images import like_network
from cdm_fast.losses import cdm_loss
from cdm_fast.model import CDM
from cdm_fast.nn import MLP, AdjointNetwork
from cdm_fast.nn.heads import JointHead
from cdm_fast.schedule import NoiseSchedule

Array = NDArray[np.float64]
Draw = Callable[[int, torch.Generator], tuple[Tensor, Tensor | None]]  # B -> x (B, d), label (B,) or None

# A column is not continuous where so many of its rows share one value, or so few values are distinct.
LARGEST_ATOM, FEWEST_DISTINCT = 0.1, 0.5
# Columns of more values than these are as good as continuous once their ties are broken.
FEW_VALUES = 20


# Rows that fit the constants of the logits at the end, those of them that are stored, rows at a time, and the
# fewest for each logit.
MOST_ROWS, STORED_ROWS, CHUNK, FEWEST_ROWS = 2_000_000, 100_000, 4096, 10
NEWTON_STEPS = 20


@dataclass(frozen=True)
class Columns:
    """An affine map that whitens: `z = (x - centre) whiten`, and the grids of discrete columns.

    Fields:
        centre (d,), whiten (d, d): mean and covariance of z are 0 and I, as far as n rows can tell.
        origin (d,), step (d,): a discrete column's values lie at `origin + step k`; step 0 for a continuous
            one. Training adds uniform noise of one step, centred, so that a density exists: at a grid point
            it is about the probability of the value over the step.
    """

    centre: Array
    whiten: Array
    origin: Array
    step: Array

    @property
    def log_det(self) -> float:
        """`log |det whiten|`: what turns densities of z into densities of x."""
        return float(np.linalg.slogdet(self.whiten)[1])

    def standardise(self, x: Array) -> Tensor:
        """x (n, d) -> z (n, d), fp64."""
        return torch.from_numpy((x - self.centre) @ self.whiten)

    def restore(self, z: Tensor) -> Array:
        """z (n, d) -> x (n, d), discrete columns at the nearest point of their grid."""
        x = self.centre + np.linalg.solve(self.whiten.T, z.double().numpy().T).T
        step = np.where(self.step > 0, self.step, 1.0)
        return np.where(self.step > 0, self.origin + step * np.round((x - self.origin) / step), x)

    def draw(self, z: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
        """Rows `index` of z, fp32, dequantised."""
        rows = z[index]
        if not self.step.any():
            return rows.float()
        noise = torch.rand(rows.shape, generator=generator, dtype=rows.dtype) - 0.5
        return (rows + (noise * torch.from_numpy(self.step)) @ torch.from_numpy(self.whiten)).float()


def measure(x: Array, name: str = "X") -> Columns:
    """The `Columns` of a table x (n, d) of finite numbers.

    Whitens by the whole covariance, or with a warning by each column's variance where there are not more
    rows than columns. Copies of whole rows count as often as they appear, with a warning.
    Raises UserError for a constant column, one that repeats values off any even grid, and columns that
    depend linearly on others: none of them has a density.
    """
    grids = [_grid(x, j, name) for j in range(x.shape[1])]
    origin, step = (np.array(values) for values in zip(*grids, strict=True))
    if not step.any():
        _warn_of_copies(x, name)
    centre = x.mean(0)
    covariance = np.atleast_2d(np.cov(x, rowvar=False, bias=True)) + np.diag(step**2 / 12)
    scale = np.sqrt(np.diag(covariance))
    if len(x) <= x.shape[1]:
        warnings.warn(
            f"{name} has {len(x)} rows of {x.shape[1]} columns, too few to tell how columns depend on each"
            " other: expect a poor fit",
            stacklevel=2,
        )
        return Columns(centre, np.diag(1 / scale), origin, step)
    variances, axes = np.linalg.eigh(covariance / np.outer(scale, scale))
    if variances[0] < 1e-10:
        column = int(np.abs(axes[:, 0]).argmax())
        raise UserError(
            f"column {column} of {name} depends linearly on the others, so there is no density; leave it out"
        )
    return Columns(centre, (axes / np.sqrt(variances)) / scale[:, None], origin, step)


def _grid(x: Array, column: int, name: str) -> tuple[float, float]:
    """(origin, step) of a column; step 0 where it is continuous. UserError where it has no density."""
    values, counts = np.unique(x[:, column], return_counts=True)
    if len(values) == 1:
        raise UserError(
            f"column {column} of {name} is constant ({values[0]:g}), so there is no density: drop it"
        )
    if len(values) == len(x):
        return 0.0, 0.0
    gaps = np.diff(values)
    steps = gaps / gaps.min()
    if (np.abs(steps - steps.round()) < 1e-3 + 1e-6 * steps).all():
        return float(values[0]), float(gaps.min())
    atom = counts.max() >= max(5, LARGEST_ATOM * len(x)) or len(values) <= FEWEST_DISTINCT * len(x)
    if atom and len(values) < len(np.unique(x, axis=0)):
        raise UserError(
            f"column {column} of {name} repeats values ({len(values)} distinct ones in {len(x)} rows) that"
            " lie on no even grid, so it has no density: add noise of its resolution, or drop it"
        )
    return 0.0, 0.0


def _warn_of_copies(x: Array, name: str) -> None:
    copies = len(x) - len(np.unique(x, axis=0)) if len(np.unique(x[:, 0])) < len(x) else 0
    if copies:
        warnings.warn(
            f"{copies} of the {len(x)} rows of {name} are copies of others; each counts in full",
            stacklevel=3,
        )


def normal_scores(x: Array, generator: np.random.Generator) -> Tensor:
    """Every column through its ranks to N(0, 1) quantiles, (n, d) fp64; ties in random order.

    An increasing map of a column keeps mutual information, and so does the noise that breaks ties, being
    independent of everything.
    """
    quantiles = torch.special.ndtri((torch.arange(len(x), dtype=torch.float64) + 0.5) / len(x)).numpy()
    scores = np.empty_like(x)
    for j, column in enumerate(x.T):
        order = np.argsort(column)
        if (np.diff(column[order]) == 0).any():
            order = np.lexsort((generator.random(len(x)), column))
        scores[order, j] = quantiles
    return torch.from_numpy(scores)


def separate_values(x: Array, scores: Tensor, generator: np.random.Generator) -> Tensor:
    """`scores` (n, d) with each value of a column of few values in a narrow bell of its own.

    In random order the ranks of neighbouring values touch, and what changes from one to the other changes at
    an edge, which is hard to learn. A bell stands at the mean score of its value, an eighth as wide as the
    gap to the nearest other: they hardly overlap, so no information is lost.
    """
    scores = scores.clone()
    for j in range(x.shape[1]):
        values, index, counts = np.unique(x[:, j], return_inverse=True, return_counts=True)
        if not 1 < len(values) <= min(FEW_VALUES, FEWEST_DISTINCT * len(x)):
            continue
        centres = np.bincount(index, weights=scores[:, j].numpy()) / counts
        gaps = np.diff(centres, prepend=-np.inf, append=np.inf)
        widths = np.minimum(gaps[:-1], gaps[1:]) / 8
        bells = centres[index] + widths[index] * generator.standard_normal(len(x))
        scores[:, j] = torch.from_numpy(bells)
    return scores


def even_in_log_noise(num_levels: int, smallest: float) -> NoiseSchedule:
    """s from `smallest` at level 1 to 1 by equal factors, `a = sqrt(1 - s^2)`."""
    T = num_levels - 2
    s = torch.cat([torch.zeros(1), torch.logspace(math.log10(smallest), 0, T + 1, dtype=torch.float64)])
    s[-1] = 1
    return NoiseSchedule("log-noise", ((1 - s) * (1 + s)).sqrt(), s)


@dataclass(frozen=True)
class Budget:
    """Network and training of an estimator; the fields are its constructor's arguments."""

    hidden: int
    depth: int
    num_levels: int
    max_steps: int
    batch_size: int
    learning_rate: float
    ce_weight: float
    verbose: int


def train_cdm(
    draw: Draw, schedule: NoiseSchedule, dim: int, budget: Budget, seed: int, num_classes: int | None = None
) -> CDM:
    """A CDM of vectors, with joint logits if there are classes (drawn in equal shares), in fp64.

    Adam with a short warm-up and a half cosine down to 0. A function of its arguments: torch's global
    generator is neither read nor changed.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = MLP(
            dim,
            schedule.num_levels,
            hidden=budget.hidden,
            depth=budget.depth,
            num_classes=num_classes,
            conditioning="embedding" if num_classes is None else "joint",
        )
    model = CDM(network, schedule)
    optimizer = torch.optim.Adam(network.parameters(), lr=budget.learning_rate, betas=(0.9, 0.99), fused=True)
    every = max(1, budget.max_steps // 10)
    for step in range(budget.max_steps):
        fade = (1 + math.cos(math.pi * step / budget.max_steps)) / 2
        optimizer.param_groups[0]["lr"] = budget.learning_rate * min(1, (step + 1) / 50) * fade
        x, label = draw(budget.batch_size, generator)
        optimizer.zero_grad()
        terms = cdm_loss(model, x, label=label, ce_weight=budget.ce_weight / dim, generator=generator)
        terms.loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if budget.verbose and (step + 1) % every == 0:
            print(
                f"step {step + 1}/{budget.max_steps}  CE {terms.ce:.4f}  MSE {terms.mse:.4f}", file=sys.stderr
            )
    fit_constants(model.eval(), draw, min(MOST_ROWS, budget.max_steps * budget.batch_size), generator)
    return model.double()


@torch.no_grad()
def fit_constants(model: CDM, draw: Draw, num: int, generator: torch.Generator) -> None:
    """Refits the head's biases alone, to `num` fresh rows: the maximum of their mean log posterior.

    The last batches leave their noise in the constant of every logit, and so in every density and ratio. With
    the weights held the problem is concave, and Newton's method solves it over many rows at once. Then the
    posteriors of a logit, summed over rows, are the number of rows that are its own: the equations of MBAR
    (doi 10.1063/1.2978177), the best that samples of all levels say of the levels' normalisation.

    Newton's method converges on up to `STORED_ROWS` rows; one more step looks at all of them, each once. From
    so near a start a single step is as good as the maximum itself. Densities far apart meet only through the
    levels between them, whose errors add up, so the rows must be many.

    Does nothing where a logit would have fewer than `FEWEST_ROWS` rows of its own on average.
    """
    assert isinstance(model.network, AdjointNetwork)
    head = model.network.linear_layer
    if num < FEWEST_ROWS * head.out_features:
        return
    first = min(num, STORED_ROWS)
    stored = list(_scored(model, draw, first, generator))
    constants = torch.zeros(head.out_features, dtype=torch.float64)
    for _ in range(NEWTON_STEPS):
        step = _newton_step(stored, constants)
        constants += step
        if bool(step.abs().max() < 1e-6):
            break
    if num > first:
        constants += _newton_step(chain(stored, _scored(model, draw, num - first, generator)), constants)
    head.shift_each(constants) if isinstance(head, JointHead) else head.shift(constants)


def _scored(model: CDM, draw: Draw, num: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """(logits, own entry) of `num` fresh rows, each level as often as any other, `CHUNK` at a time."""
    for first in range(0, num, CHUNK):
        x, label = draw(min(CHUNK, num - first), generator)
        level = torch.randperm(len(x), generator=generator) % model.schedule.num_levels
        a, s = model.amplitudes(level, x)
        noise = torch.randn(x.shape, generator=generator)
        logits = model.logits(like_network(model, a * x + s * noise))
        entry = level if label is None else level * model.joint_classes + label
        yield logits, entry.clamp(max=logits.shape[1] - 1)


def _newton_step(scored: Iterable[tuple[Tensor, Tensor]], constants: Tensor) -> Tensor:
    """The step of every constant, (outputs,), in [-1, 1]; pure noise keeps 0, for one constant is free."""
    gradient, curvature = torch.zeros_like(constants), constants.new_zeros(2 * [len(constants)])
    for logits, own in scored:
        posterior = (logits + constants.to(logits.dtype)).softmax(1)
        expected = posterior.sum(0).double()
        gradient += torch.bincount(own, minlength=len(constants)) - expected
        curvature += expected.diag() - (posterior.T @ posterior).double()
    step = torch.linalg.lstsq(curvature[:-1, :-1], gradient[:-1], driver="gelsd").solution
    return torch.cat([step.clamp(-1, 1), step.new_zeros(1)])
