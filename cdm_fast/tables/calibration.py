"""Calibrated log ratios: `sum_e alpha_e log_ratio_e + c`, by logistic regression on rows unseen in training.

An overconfident network gets alpha < 1, a network that learned nothing alpha = 0. Several experts are
weighted against each other (stacking: Wolpert, 1992). The logistic loss is smallest where the sum is the best
approximation of the log ratio of the two densities.

# n, m rows of the numerator and of the denominator, E experts
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

NEWTON_STEPS = 50
# With fewer misjudged rows for each parameter than this, the regression counts only in part.
ENOUGH_MISJUDGED = 25
# Largest absolute value of the constant, in nats.
LARGEST_OFFSET = 50.0


@dataclass(frozen=True)
class Calibration:
    """`alpha`, one non-negative number per expert, and `c` in nats."""

    alpha: tuple[float, ...] = (1.0,)
    c: float = 0.0

    def __call__(self, *log_ratios: Array) -> Array:
        """The calibrated log ratio, of the shape that all experts share."""
        return np.tensordot(self.alpha, np.stack(log_ratios), axes=1) + self.c


def calibrate(
    numerator: Array,  # (n,) or (E, n) log ratios of rows of the numerator
    denominator: Array,  # (m,) or (E, m) of the denominator
    numerator_weights: Array | None = None,  # (n,)
    denominator_weights: Array | None = None,  # (m,)
) -> Calibration:
    """Minimises the logistic loss, with equal total weight for both sets and a weak regulariser.

    The regulariser has the weight of one row and pulls towards the first expert unchanged and the others left
    out. It decides if the sets are perfectly separable and the loss has no minimum. An expert whose alpha
    would be negative is left out: it carries no information, or has the wrong sign.

    Only rows near the border between the sets tell about the parameters (a logistic regression wants at least
    ten of the rarer outcome for each: Peduzzi et al., 1996), and the values are extrapolated from there to
    rows far from it. Where the first expert misjudges fewer than `ENOUGH_MISJUDGED` rows per parameter, the
    result is a weighted mean of the regression and of the first expert unchanged.
    """
    sets = [np.atleast_2d(numerator), np.atleast_2d(denominator)]
    x = np.concatenate(sets, axis=1)
    design = np.concatenate([x, np.ones((1, x.shape[1]))]).T
    label = np.repeat([1.0, 0.0], [part.shape[1] for part in sets])
    weight = np.concatenate(
        [
            _halved(part.shape[1], w)
            for part, w in zip(sets, (numerator_weights, denominator_weights), strict=True)
        ]
    )
    pull = np.maximum(weight @ design**2, 1e-12) / (4 * min(part.shape[1] for part in sets))
    start = np.zeros(len(x) + 1)
    start[0] = 1.0
    active = np.ones(len(start), dtype=bool)
    while True:
        theta = _minimise(design, label, weight, start, pull, active)
        negative = active & (theta < 0)
        negative[-1] = False
        if not negative.any():
            break
        active &= ~negative
    if not theta[:-1].any():  # nothing was learned
        return Calibration((0.0,) * len(x), 0.0)
    rows = 2 * min(part.shape[1] for part in sets)
    misjudged = rows * float(weight @ np.abs(label - _probability(x[0])))
    theta = start + min(1.0, misjudged / (ENOUGH_MISJUDGED * len(theta))) * (theta - start)
    return Calibration(tuple(float(a) for a in theta[:-1]), float(theta[-1]))


def offset(numerator: Array, denominator: Array) -> float:
    """The constant c, in nats, that minimises the logistic loss of `log_ratio + c`.

    Training determines the constant of a network's log ratio only poorly. A regulariser with the weight of
    one row pulls c towards 0. It decides if the sets are perfectly separable: then the loss is almost flat,
    and its minimum depends on the two most extreme rows.
    """
    low, high = -LARGEST_OFFSET, LARGEST_OFFSET
    fewest = min(len(numerator), len(denominator))
    for _ in range(60):  # the slope of the loss rises with c
        middle = (low + high) / 2
        missed = np.mean(1 - np.tanh((numerator + middle) / 2))
        mistaken = np.mean(1 + np.tanh((denominator + middle) / 2))
        low, high = (middle, high) if missed - mistaken > middle / fewest else (low, middle)
    return (low + high) / 2


def _probability(logit: Array) -> Array:
    """The logistic function."""
    return 0.5 * (1 + np.tanh(logit / 2))


def _halved(rows: int, weights: Array | None) -> Array:
    """(rows,) weights that sum to 1/2."""
    return np.full(rows, 0.5 / rows) if weights is None else 0.5 * weights / weights.sum()


def _minimise(
    design: Array, label: Array, weight: Array, start: Array, pull: Array, active: NDArray[np.bool_]
) -> Array:
    """Newton's method with step halving over the `active` parameters; the others are 0."""
    start = np.where(active, start, 0.0)
    design = design * active

    def loss(theta: Array) -> float:
        logit = design @ theta
        return float(weight @ (np.logaddexp(0, logit) - label * logit) + pull @ (theta - start) ** 2 / 2)

    theta = start
    lowest = loss(theta)
    for _ in range(NEWTON_STEPS):
        probability = _probability(design @ theta)
        gradient = design.T @ (weight * (label - probability)) - pull * (theta - start)
        curvature = (design * (weight * probability * (1 - probability))[:, None]).T @ design + np.diag(pull)
        step = np.linalg.solve(curvature, gradient)
        while loss(theta + step) > lowest + 1e-12 and np.abs(step).max() > 1e-9:
            step = step / 2
        theta = theta + step
        lowest = loss(theta)
        if np.abs(step).max() < 1e-9:
            break
    return theta
