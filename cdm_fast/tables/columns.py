"""Preparation of tables of numbers for a CDM: checks, dequantisation, standardisation.

# n rows, d columns
"""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdm_fast.errors import UserError

Array = NDArray[np.float64]

# A column is not continuous where so many of its rows share one value, or so few values are distinct.
LARGEST_ATOM, FEWEST_DISTINCT = 0.1, 0.5
# Columns of more values than these are as good as continuous once their ties are broken.
FEW_VALUES = 20
# Values lie on a grid where they are so near to its points, in steps or in shares of the column's range; a
# finer grid than so many steps is as good as none.
GRID_TOLERANCE, ROUNDING, MOST_GRID_STEPS = 1e-3, 1e-9, 100_000
# A row is far if a column lies more than this many interquartile ranges from its median.
FAR = 1000.0
# A column that spans less of this of its largest value cannot be told from a constant in fp64.
NARROWEST = 1e-12


@dataclass(frozen=True)
class Columns:
    """An affine whitening map, `z = ((x - centre) / unit) whiten`, and the grids of discrete columns.

    Fields:
        centre, unit (d,), whiten (d, d): z has the sample mean 0 and the sample covariance I. Dividing by
            `unit` keeps the squares of columns of any scale within the range of fp64.
        origin (d,), step (d,): the values of a discrete column lie at `origin + step k`; a continuous column
            has step 0. Training adds centred uniform noise one step wide, so that a density exists: at a grid
            point it is about the probability of the value divided by the step.
    """

    centre: Array
    unit: Array
    whiten: Array
    origin: Array
    step: Array

    @property
    def log_det(self) -> float:
        """`log |det dz/dx|`, which converts log densities of z into log densities of x."""
        return float(np.linalg.slogdet(self.whiten)[1] - np.log(self.unit).sum())

    def standardise(self, x: Array) -> Tensor:
        """x (n, d) -> z (n, d), fp64."""
        return torch.from_numpy((x / self.unit - self.centre / self.unit) @ self.whiten)

    def restore(self, z: Tensor) -> Array:
        """z (n, d) -> x (n, d), discrete columns at the nearest point of their grid."""
        x = self.centre + self.unit * np.linalg.solve(self.whiten.T, z.double().numpy().T).T
        step = np.where(self.step > 0, self.step, 1.0)
        return np.where(self.step > 0, self.origin + step * np.round((x - self.origin) / step), x)

    def draw(self, z: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
        """Rows `index` of z, fp32, dequantised."""
        rows = z[index]
        if not self.step.any():
            return rows.float()
        noise = torch.rand(rows.shape, generator=generator, dtype=rows.dtype) - 0.5
        widths = torch.from_numpy(self.step / self.unit)
        return (rows + (noise * widths) @ torch.from_numpy(self.whiten)).float()


def measure(
    x: Array, name: str = "X", labels: NDArray[np.int64] | None = None, weights: Array | None = None
) -> Columns:
    """The `Columns` of a table x (n, d) of finite numbers.

    Whitens with the full covariance, or, with a warning, with the variance of each column if there are not
    more rows than columns. labels (n,): two sets may share values, so repeated values are looked for within
    each set. weights (n,): row weights for mean and covariance. Raises UserError for columns without a
    density: a constant column, one that repeats values that lie on no even grid, or one that depends linearly
    on others.
    """
    labels = np.zeros(len(x), dtype=np.int64) if labels is None else labels
    grids = [_grid(x, j, name, labels) for j in range(x.shape[1])]
    origin, step = (np.array(values) for values in zip(*grids, strict=True))
    centre, unit = np.median(x, axis=0), _units(x)
    scaled = x / unit - centre / unit
    mean = np.average(scaled, axis=0, weights=weights)
    covariance = np.atleast_2d(np.cov(scaled, rowvar=False, bias=True, aweights=weights))
    covariance = covariance + np.diag((step / unit) ** 2 / 12)
    centre = centre + unit * mean
    scale = np.sqrt(np.diag(covariance))
    if len(x) <= x.shape[1]:
        warnings.warn(
            f"{name} has {len(x)} rows of {x.shape[1]} columns, too few to tell how columns depend on each"
            " other: expect a poor fit",
            stacklevel=2,
        )
        return Columns(centre, unit, np.diag(1 / scale), origin, step)
    variances, axes = np.linalg.eigh(covariance / np.outer(scale, scale))
    if variances[0] < 1e-10:
        column = int(np.abs(axes[:, 0]).argmax())
        raise UserError(
            f"column {column} of {name} depends linearly on the others, so there is no density; leave it out"
        )
    return Columns(centre, unit, (axes / np.sqrt(variances)) / scale[:, None], origin, step)


def without_far_rows(x: Array, name: str = "X") -> NDArray[np.bool_]:
    """(n,) bool: False for rows extremely far from all others, about which it warns.

    One entry that is wrong by orders of magnitude would determine the scale of a whole column.
    """
    unit = _units(x)
    median = np.median(x, axis=0)
    low, high = np.quantile(x / unit, [0.25, 0.75], axis=0)
    width = np.where(high > low, high - low, np.inf)  # a column whose quartiles are equal has no width
    far = (np.abs(x / unit - median / unit) > FAR * width).any(1)
    if far.any():
        row = int(np.flatnonzero(far)[0])
        warnings.warn(
            f"{int(far.sum())} of the {len(x)} rows of {name} (the first is row {row}) lie over {FAR:g}"
            " interquartile ranges from the median in some column: they are left out of the fit; check their"
            " units, or transform the column",
            stacklevel=3,
        )
    return np.asarray(~far)


def _units(x: Array) -> Array:
    """(d,) half the span of each column, rounded to a power of two so that dividing by it is exact."""
    half = np.max(x, axis=0) / 2 - np.min(x, axis=0) / 2
    return np.exp2(np.floor(np.log2(np.where(half > 0, half, 1.0))))


def _grid(x: Array, column: int, name: str, labels: NDArray[np.int64]) -> tuple[float, float]:
    """(origin, step) of a column; step 0 for a continuous one. UserError for a column without a density."""
    values, counts = np.unique(x[:, column], return_counts=True)
    span = values[-1] / 2 - values[0] / 2
    if span <= NARROWEST * np.abs(values).max():
        raise UserError(
            f"column {column} of {name} is constant ({values[0]:g}), so there is no density: drop it"
        )
    if len(values) == len(x):
        return 0.0, 0.0
    step = _even_step(values)
    if step:
        return float(values[0]), step
    for label in np.unique(labels):
        _refuse_atoms(x[labels == label], column, name)
    return 0.0, 0.0


def _even_step(values: Array) -> float:
    """The step of the coarsest even grid that contains all `values` (ascending); 0 if there is none.

    Euclid's algorithm on the gaps: 0.1, 0.25 and 0.6 lie on a grid of step 0.05, although no gap is that
    small.
    """
    gaps, span = np.unique(np.diff(values)), values[-1] - values[0]
    step = gaps[0]
    for gap in gaps[1:]:
        rest = abs(gap - step * round(gap / step))
        while rest > max(GRID_TOLERANCE * step, ROUNDING * span):
            if rest < span / MOST_GRID_STEPS:
                return 0.0
            step, rest = rest, abs(step - rest * round(step / rest))
    index = np.round((values - values[0]) / step)
    step = float(index @ (values - values[0]) / (index @ index))  # by least squares, for rounded values
    off = np.abs((values - values[0]) / step - index).max()
    return step if off < 10 * GRID_TOLERANCE else 0.0


def all_discrete(x: Array) -> bool:
    """True if every column has few values or lies on an even grid, so that equal rows need not be copies."""
    for column in x.T:
        values = np.unique(column)
        if len(values) > FEW_VALUES and (len(values) == len(x) or not _even_step(values)):
            return False
    return True


def _refuse_atoms(x: Array, column: int, name: str) -> None:
    values, counts = np.unique(x[:, column], return_counts=True)
    atom = counts.max() >= max(5, LARGEST_ATOM * len(x)) or len(values) <= FEWEST_DISTINCT * len(x)
    if atom and len(values) < len(np.unique(x, axis=0)):
        raise UserError(
            f"column {column} of {name} repeats values ({len(values)} distinct ones in {len(x)} rows) that"
            " lie on no even grid, so it has no density: add noise of its resolution, or drop it"
        )


def normal_scores(x: Array, generator: np.random.Generator) -> Tensor:
    """Normal scores: the ranks of each column mapped to N(0, 1) quantiles, (n, d) fp64; ties in random order.

    An increasing map of a column preserves mutual information, and so does breaking ties by independent
    noise.
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
    """`scores` (n, d) in which each value of a column with few distinct values becomes a narrow Gaussian.

    With ties in random order, the scores of neighbouring values touch, so the density of the other columns
    jumps at their border, which is hard to learn. The Gaussian is centred at the mean score of its value, and
    its width is an eighth of the distance to the nearest other: they hardly overlap, so no information is
    lost.
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
