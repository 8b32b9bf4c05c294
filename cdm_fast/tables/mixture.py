"""The Gaussian mixture from which the networks of a density start.

# n rows, m held-out rows, d columns, K components
"""

import warnings
from typing import NamedTuple

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from torch import Tensor

from cdm_fast.tables.columns import Array

MOST_COMPONENTS = 10
# Most rows to which mixtures are fitted: each of those that are compared, and the chosen one, which may have
# more of few columns.
COMPARED_ROWS, MOST_ROWS, MOST_VALUES = 5000, 50_000, 800_000
# EM ends when a step improves the mean log-density by less than 1e-3 nats, scikit-learn's default. With more
# rows than are compared, the chosen mixture is fitted until a step brings less than RELATIVE_TOLERANCE / n,
# far below the sampling error of its parameters; with few rows the early end keeps it from overfitting.
RELATIVE_TOLERANCE, MOST_ITERATIONS = 0.1, 1000
# Added to the variances, in units of the standardised rows.
LEAST_VARIANCE = 1e-4


class Mixture(NamedTuple):
    """Gaussians with weights, in fp64: means (K, d), covariances (K, d, d) and log weights (K,)."""

    means: Tensor
    covariances: Tensor
    log_weights: Tensor

    def draw(self, num: int, generator: torch.Generator) -> Tensor:
        """(num, d) rows, fp64."""
        component = torch.multinomial(self.log_weights.exp(), num, replacement=True, generator=generator)
        normal = torch.randn(num, self.means.shape[1], generator=generator, dtype=torch.float64)
        factor = torch.linalg.cholesky(self.covariances)
        rows = self.means[component].clone()
        for c in range(len(factor)):
            rows[component == c] += normal[component == c] @ factor[c].T
        return rows


def standard_normal(d: int) -> Mixture:
    """N(0, I) as a mixture of one."""
    means, covariances = torch.zeros(1, d, dtype=torch.float64), torch.eye(d, dtype=torch.float64)[None]
    return Mixture(means, covariances, means[:, 0])


def fit_mixture(z: Tensor, num_components: int, seed: int) -> Mixture:
    """A mixture of `num_components` full covariances fitted to the standardised rows z (n, d).

    One component is N(0, I), since the rows are standardised.
    """
    if num_components == 1:
        return standard_normal(z.shape[1])
    z = z[: max(MOST_ROWS, MOST_VALUES // z.shape[1])]
    longer = {"tol": RELATIVE_TOLERANCE / len(z), "max_iter": MOST_ITERATIONS}
    fitted = _fitted(z, num_components, seed, **(longer if len(z) > COMPARED_ROWS else {}))
    weights, means, covariances = (
        torch.from_numpy(part).double() for part in (fitted.weights_, fitted.means_, fitted.covariances_)
    )
    return Mixture(means, covariances, weights.log())


def held_out_scores(z: Tensor, held_out: Tensor, seed: int) -> Array:
    """(most components, m) log-densities in nats of `held_out` (m, d) under mixtures of 1, 2, ... components.

    -inf where z (n, d), to which they are fitted, has fewer than two rows for each component.
    """
    z, scores = z[:COMPARED_ROWS], np.full((MOST_COMPONENTS, len(held_out)), -np.inf)
    for K in range(1, max(1, min(MOST_COMPONENTS, len(z) // 2)) + 1):
        scores[K - 1] = _fitted(z, K, seed).score_samples(held_out.numpy())
    return scores


def choose_components(z: Tensor, held_out: Array, seed: int) -> int:
    """The number of components with the least BIC on z (n, d) among those that held-out rows do not reject.

    held_out: `held_out_scores` of all folds, side by side. A number is rejected if its mean is lower than the
    best one's by more than a standard error. BIC alone overfits many columns. The fewest components that are
    not rejected are often too few, since the mean over the folds overfits less than one mixture.
    """
    best = held_out[held_out.mean(1).argmax()]
    z, possible = z[:COMPARED_ROWS], []
    for K, scores in enumerate(held_out, 1):
        if np.isfinite(scores).all() and (best - scores).mean() <= (best - scores).std() / np.sqrt(len(best)):
            possible.append(K)
    return min(possible, key=lambda K: _fitted(z, K, seed).bic(z.numpy()))


def _fitted(z: Tensor, num_components: int, seed: int, **options: float) -> GaussianMixture:
    mixture = GaussianMixture(num_components, reg_covar=LEAST_VARIANCE, random_state=seed, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return mixture.fit(z.numpy())
