"""Experts: log ratios of joint rows to independent rows without a trained network, for small tables.

A network is slow to learn sharp edges, which nearest neighbours show, and the common scale of heavy tails,
which a Student t copula describes. Stacking (`cdm_fast.tables.calibration`) weights them.

# n rows, N rows to which an expert is fitted, d columns, of which the first `width` are those of X
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import digamma, gammaln, ndtr, stdtrit
from sklearn.neighbors import KDTree

from cdm_fast.tables.columns import Array
from cdm_fast.tables.crossfit import canonical

# With more rows a network does as well, and counting neighbours is slow; with more columns no row is near.
MOST_ROWS, MOST_COLUMNS = 20_000, 20
# Number of neighbours k for the local ratio.
NEIGHBOURS = 5
# Degrees of freedom of a Student t copula, from about Gaussian to Cauchy.
DEGREES = (40.0, 20.0, 12.0, 8.0, 6.0, 4.0, 3.0, 2.0, 1.5, 1.0)
# Range and number of the normal scores at which quantiles of Student's t are tabulated.
LARGEST_SCORE, TABULATED = 9.0, 4001


class Neighbours:
    """The local log ratio by counting neighbours (Kraskov, Stögbauer, Grassberger, 2004, eq. 8).

    `psi(k) + psi(N) - psi(n_x + 1) - psi(n_y + 1)`, where n_x and n_y rows lie within the distance of the
    k-th nearest row (maximum norm) in the columns of X alone and of Y alone.
    """

    def __init__(self, rows: Array, width: int) -> None:
        self.width = width
        self.trees = [KDTree(part, metric="chebyshev") for part in (rows, rows[:, :width], rows[:, width:])]
        self.num = len(rows)

    def __call__(self, z: Array, own: bool = False) -> Array:
        """(n,) nats. own: the z are the expert's own rows, and each is left out of its own count."""
        k = min(NEIGHBOURS, self.num - own)
        distance, _ = self.trees[0].query(z, k + own)
        within = np.nextafter(distance[:, -1], 0)
        count_x, count_y = (
            tree.query_radius(part, within, count_only=True) - own
            for tree, part in zip(self.trees[1:], (z[:, : self.width], z[:, self.width :]), strict=True)
        )
        return digamma(k) + digamma(self.num - own) - digamma(count_x + 1) - digamma(count_y + 1)


@dataclass(frozen=True)
class _Student:
    """A multivariate Student t density, up to a constant that cancels in the copula."""

    precision: Array  # (m, m)
    constant: float
    degrees: float

    @classmethod
    def of(cls, correlation: Array, degrees: float) -> "_Student":
        m = len(correlation)
        constant = float(gammaln((degrees + m) / 2) - gammaln(degrees / 2))
        constant -= (m * math.log(degrees * math.pi) + float(np.linalg.slogdet(correlation)[1])) / 2
        return cls(np.linalg.inv(correlation).astype(np.float64), constant, degrees)

    def log_prob(self, t: Array) -> Array:
        distance = np.einsum("ni,ni->n", t @ self.precision, t)
        return self.constant - (self.degrees + t.shape[1]) / 2 * np.log1p(distance / self.degrees)


class StudentCopula:
    """The log ratio of a Student t copula of normal scores; degrees of freedom by maximum likelihood.

    The correlations are those of the scores, without canonical correlations explained by chance.
    """

    def __init__(self, scores: Array, width: int) -> None:
        coordinates = canonical(torch.from_numpy(scores), width)
        unmix = torch.linalg.inv(coordinates.mix)
        covariance = (unmix.T @ coordinates.covariance() @ unmix).numpy()
        scale = np.sqrt(np.diag(covariance))
        self.correlation, self.width = covariance / np.outer(scale, scale), width
        highest = -math.inf
        for degrees in DEGREES:
            log_likelihood = self._log_likelihood(scores, degrees)
            if log_likelihood < highest:
                break
            highest, self.degrees = log_likelihood, degrees
        blocks = (slice(None), slice(0, width), slice(width, None))
        self.parts = [(b, _Student.of(self.correlation[b, b], self.degrees)) for b in blocks]

    def _log_likelihood(self, scores: Array, degrees: float) -> float:
        t, one = student_quantiles(scores, degrees), _Student.of(np.eye(1), degrees)
        marginals = sum(float(one.log_prob(column[:, None]).mean()) for column in t.T)
        return float(_Student.of(self.correlation, degrees).log_prob(t).mean()) - marginals

    def __call__(self, z: Array, own: bool = False) -> Array:
        """(n,) nats; `own` has no effect, since a few parameters do not overfit."""
        t = student_quantiles(z, self.degrees)
        joint, x, y = (student.log_prob(t[:, block]) for block, student in self.parts)
        return joint - x - y


def student_quantiles(scores: Array, degrees: float) -> Array:
    """Student t quantiles at the same probabilities as the normal quantiles `scores`; by interpolation."""
    grid = np.linspace(0, LARGEST_SCORE, TABULATED)
    size = np.arcsinh(-stdtrit(degrees, ndtr(-grid)))
    return np.sign(scores) * np.sinh(np.interp(np.abs(scores), grid, size))


Expert = Callable[[Array, bool], Array]


def experts(rows: Array, width: int, all_rows: int) -> list[Expert]:
    """The experts fitted to `rows` (N, d) of normal scores; all_rows: number of rows of the whole table."""
    if all_rows > MOST_ROWS or len(rows) < 2 * NEIGHBOURS:
        return []
    fitted: list[Expert] = [StudentCopula(rows, width)]
    return [*fitted, Neighbours(rows, width)] if rows.shape[1] <= MOST_COLUMNS else fitted
