"""Preparation of tables of numbers for a CDM: checks, dequantisation, standardisation.

# n rows, d columns
"""

import warnings
from dataclasses import dataclass, field
from functools import cache

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
class Cells:
    """The repeated values of a column that lie on no even grid, each with the interval it stands for.

    Fields (m,): values, ascending; low and high, halfway to the neighbouring values of the column.
    """

    values: Array
    low: Array
    high: Array

    @property
    def shift(self) -> Array:
        """(m,) offset from each value to the middle of its interval."""
        return (self.low + self.high) / 2 - self.values

    def variance(self, x: Array) -> float:
        """Approximate increase of the variance of a column x (n,) when its values are spread."""
        index, inside = self.nearest(x)
        return float(np.mean(inside * ((self.high - self.low) ** 2 / 12 + self.shift**2)[index]))

    def nearest(self, x: Array) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The index of the value next to each x (n,), and whether x lies in its interval."""
        index = np.searchsorted((self.values[:-1] + self.values[1:]) / 2, x)
        return index, (self.low[index] <= x) & (x <= self.high[index])


@dataclass(frozen=True)
class Columns:
    """An affine whitening map, `z = ((x - centre) / unit) whiten`, and the discrete values of the columns.

    Fields:
        centre, unit (d,), whiten (d, d): z has the sample mean 0 and the sample covariance I. Dividing by
            `unit` keeps the squares of columns of any scale within the range of fp64.
        origin (d,), step (d,): the values of a discrete column lie at `origin + step k`; a continuous column
            has step 0. Training adds centred uniform noise one step wide, so that a density exists: at a grid
            point it is about the probability of the value divided by the step.
        cells {column: Cells}: values that a column repeats and that lie on no even grid. Training spreads
            each uniformly over its interval, so its density is about its probability divided by the width.
    """

    centre: Array
    unit: Array
    whiten: Array
    origin: Array
    step: Array
    cells: dict[int, Cells] = field(default_factory=dict)

    @property
    def log_det(self) -> float:
        """`log |det dz/dx|`, which converts log densities of z into log densities of x."""
        return float(np.linalg.slogdet(self.whiten)[1] - np.log(self.unit).sum())

    def standardise(self, x: Array) -> Tensor:
        """x (n, d) -> z (n, d), fp64."""
        return torch.from_numpy((x / self.unit - self.centre / self.unit) @ self.whiten)

    def restore(self, z: Tensor) -> Array:
        """z (n, d) -> x (n, d); discrete columns take the nearest value of their grid or cell."""
        x = self._as_given(z)
        step = np.where(self.step > 0, self.step, 1.0)
        x = np.where(self.step > 0, self.origin + step * np.round((x - self.origin) / step), x)
        for j, cells in self.cells.items():
            index, inside = cells.nearest(x[:, j])
            x[:, j] = np.where(inside, cells.values[index], x[:, j])
        return x

    def draw(self, z: Tensor, index: Tensor, generator: torch.Generator) -> Tensor:
        """Rows `index` of z, fp32, dequantised."""
        rows = z[index]
        if not self.step.any() and not self.cells:
            return rows.float()
        x = self._as_given(rows) if self.cells else np.empty(rows.shape)  # even grids need no values
        return (rows + self._noise(x, generator) @ torch.from_numpy(self.whiten)).float()

    def dequantise(self, x: Array, generator: torch.Generator) -> Array:
        """x (n, d) with the noise that training adds."""
        return x + self.unit * self._noise(x, generator).numpy()

    def _noise(self, x: Array, generator: torch.Generator) -> Tensor:
        """(n, d) what dequantises x, in units of `unit`."""
        uniform = torch.rand(x.shape, generator=generator, dtype=torch.float64) - 0.5
        noise = uniform * torch.from_numpy(self.step / self.unit)
        for j, cells in self.cells.items():
            index, inside = cells.nearest(x[:, j])
            shift = torch.from_numpy(cells.shift[index] / self.unit[j])
            width = torch.from_numpy((cells.high - cells.low)[index] / self.unit[j])
            noise[:, j] = torch.where(torch.from_numpy(inside), shift + uniform[:, j] * width, 0.0)
        return noise

    def _as_given(self, z: Tensor) -> Array:
        """z (n, d) -> x (n, d), not rounded."""
        return self.centre + self.unit * np.linalg.solve(self.whiten.T, z.double().numpy().T).T


def measure(
    x: Array, name: str = "X", labels: NDArray[np.int64] | None = None, weights: Array | None = None
) -> Columns:
    """The `Columns` of a table x (n, d) of finite numbers.

    Whitens with the full covariance, or, with a warning, with the variance of each column if there are not
    more rows than columns; also warns of columns with repeated values that lie on no even grid. labels (n,):
    two sets may share values, so repeated values are looked for within each set. weights (n,): row weights
    for mean and covariance. Raises UserError for columns without a density: a constant column, or one that
    depends linearly on others.
    """
    labels = np.zeros(len(x), dtype=np.int64) if labels is None else labels
    grids = [_grid(x, j, name) for j in range(x.shape[1])]
    origin, step = (np.array(values) for values in zip(*grids, strict=True))
    cells = _all_cells(x, np.flatnonzero(step == 0), labels)
    if cells:
        _warn_of_cells(x, cells, name)
    centre, unit = np.median(x, axis=0), _units(x)
    scaled = x / unit - centre / unit
    mean = np.average(scaled, axis=0, weights=weights)
    covariance = np.atleast_2d(np.cov(scaled, rowvar=False, bias=True, aweights=weights))
    added = (step / unit) ** 2 / 12
    for j, of_column in cells.items():
        added[j] = of_column.variance(x[:, j]) / unit[j] ** 2
    covariance = covariance + np.diag(added)
    centre = centre + unit * mean
    scale = np.sqrt(np.diag(covariance))
    if len(x) <= x.shape[1]:
        warnings.warn(
            f"{name} has {len(x)} rows of {x.shape[1]} columns, too few to tell how columns depend on each"
            " other: expect a poor fit",
            stacklevel=2,
        )
        return Columns(centre, unit, np.diag(1 / scale), origin, step, cells)
    variances, axes = np.linalg.eigh(covariance / np.outer(scale, scale))
    if variances[0] < 1e-10:
        column = int(np.abs(axes[:, 0]).argmax())
        raise UserError(
            f"column {column} of {name} depends linearly on the others, so there is no density; leave it out"
        )
    return Columns(centre, unit, (axes / np.sqrt(variances)) / scale[:, None], origin, step, cells)


def without_far_rows(x: Array, name: str = "X") -> NDArray[np.bool_]:
    """(n,) bool: False for rows extremely far from all others; warns if there are any.

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


def _grid(x: Array, column: int, name: str) -> tuple[float, float]:
    """(origin, step) of a column; step 0 where its values lie on no even grid. UserError for a constant."""
    values = np.unique(x[:, column])
    span = values[-1] / 2 - values[0] / 2
    if span <= NARROWEST * np.abs(values).max():
        raise UserError(
            f"column {column} of {name} is constant ({values[0]:g}), so there is no density: drop it"
        )
    step = 0.0 if len(values) == len(x) else _even_step(values)
    return (float(values[0]), step) if step else (0.0, 0.0)


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


def copies(x: Array) -> NDArray[np.int64]:
    """(n,) index of a group for each row, 0, 1, ...; the same for rows that are copies of each other.

    Equal rows are no copies if all columns are discrete, or if a large share of the table is equal to them,
    such as days without rain.
    """
    if all_discrete(x):
        return np.arange(len(x))
    order = np.lexsort(x.T[::-1])
    new = np.r_[True, (np.diff(x[order], axis=0) != 0).any(1)]
    first = np.flatnonzero(new)
    counts = np.diff(first, append=len(x))
    new |= np.repeat(counts >= _least_atom(len(x)), counts)
    groups = np.empty(len(x), dtype=np.int64)
    groups[order] = np.cumsum(new) - 1
    return groups


def _all_cells(x: Array, columns: NDArray[np.int64], labels: NDArray[np.int64]) -> dict[int, Cells]:
    """The `Cells` of those columns that repeat values within a set of rows, not because rows are copies."""
    sets = [x[labels == label] for label in np.unique(labels)]
    different = cache(lambda k: 1 + copies(sets[k]).max())  # sorts the whole table
    cells = {}
    for j in map(int, columns):
        counted = [np.unique(rows[:, j], return_counts=True) for rows in sets]
        if any(_has_atom(counts) and len(counts) < different(k) for k, (_, counts) in enumerate(counted)):
            repeated = np.concatenate([values[counts > 1] for values, counts in counted])
            cells[j] = _between_neighbours(np.unique(x[:, j]), repeated)
    return cells


def _least_atom(rows: int) -> float:
    """So many rows with one value are too many for a continuous column."""
    return max(5, LARGEST_ATOM * rows)


def _has_atom(counts: NDArray[np.int64]) -> bool:
    """Whether values that occur so often are too frequent, or too few, for a continuous column."""
    rows = counts.sum()
    return bool(counts.max() >= _least_atom(rows) or len(counts) <= FEWEST_DISTINCT * rows)


def _between_neighbours(values: Array, chosen: Array) -> Cells:
    """The intervals of the chosen ones of the values (ascending), halfway to their neighbours."""
    middles = (values[:-1] + values[1:]) / 2
    edges = np.r_[2 * values[0] - middles[0], middles, 2 * values[-1] - middles[-1]]
    index = np.flatnonzero(np.isin(values, chosen))
    return Cells(values[index], edges[index], edges[index + 1])


def _warn_of_cells(x: Array, cells: dict[int, Cells], name: str) -> None:
    column = min(cells)
    more = f" and {len(cells) - 1} more" if len(cells) > 1 else ""
    warnings.warn(
        f"column {column}{more} of {name} repeats values ({len(np.unique(x[:, column]))} distinct ones in"
        f" {len(x)} rows) that lie on no even grid: each repeated value counts as the interval halfway to its"
        " neighbours, and its density as its probability over the interval's width; add noise of the"
        " column's resolution if you know it",
        stacklevel=4,
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
