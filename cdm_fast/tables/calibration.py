"""A log ratio made honest: `alpha log_ratio + c`, by logistic regression on rows that training never saw.

An overconfident network has alpha < 1, one that learned nothing alpha = 0. The logistic loss is smallest
where `exp(alpha log_ratio + c)` is the ratio of the two densities as well as two numbers can make it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

NEWTON_STEPS = 50
# No constant is larger, in nats; where one would be, the sets are told apart perfectly and any will do.
LARGEST_OFFSET = 50.0


@dataclass(frozen=True)
class Calibration:
    """`alpha`, at least 0, and `c` in nats."""

    alpha: float = 1.0
    c: float = 0.0

    def __call__(self, log_ratio: Array) -> Array:
        """The calibrated log ratio, of any shape."""
        return self.alpha * log_ratio + self.c


def calibrate(
    numerator: Array,  # (n,) log ratios of rows of the numerator
    denominator: Array,  # (m,) of the denominator
) -> Calibration:
    """Minimises the logistic loss, both sets weighing the same, with a pull towards (1, 0) worth one row.

    The pull decides where the sets are told apart perfectly, and the loss has no minimum.
    """
    x = np.concatenate([numerator, denominator])
    label = np.repeat([1.0, 0.0], [len(numerator), len(denominator)])
    weight = np.repeat([0.5 / len(numerator), 0.5 / len(denominator)], [len(numerator), len(denominator)])
    ridge = np.diag([max(float(weight @ x**2), 1e-12), 1.0]) / (4 * min(len(numerator), len(denominator)))
    theta, start = np.array([1.0, 0.0]), np.array([1.0, 0.0])
    design = np.stack([x, np.ones_like(x)], axis=1)
    loss = _loss(design, label, weight, theta, ridge, start)
    for _ in range(NEWTON_STEPS):
        probability = 0.5 * (1 + np.tanh(design @ theta / 2))
        gradient = design.T @ (weight * (label - probability)) - ridge @ (theta - start)
        curvature = (design * (weight * probability * (1 - probability))[:, None]).T @ design + ridge
        step = np.linalg.solve(curvature, gradient)
        while (
            _loss(design, label, weight, theta + step, ridge, start) > loss + 1e-12
            and np.abs(step).max() > 1e-9
        ):
            step = step / 2
        theta = theta + step
        loss = _loss(design, label, weight, theta, ridge, start)
        if np.abs(step).max() < 1e-9:
            break
    if theta[0] < 0:  # the wrong way round: nothing was learned
        return Calibration(0.0, 0.0)
    return Calibration(float(theta[0]), float(theta[1]))


def offset(numerator: Array, denominator: Array) -> float:
    """The constant c alone, in nats, that minimises the logistic loss of `log_ratio + c`.

    Networks leave the constant of their log ratio to chance, each to its own.
    """
    low, high = -LARGEST_OFFSET, LARGEST_OFFSET
    for _ in range(60):  # the slope of the loss rises with c
        middle = (low + high) / 2
        missed = np.mean(1 - np.tanh((numerator + middle) / 2))
        mistaken = np.mean(1 + np.tanh((denominator + middle) / 2))
        low, high = (middle, high) if missed > mistaken else (low, middle)
    return (low + high) / 2 if abs(low) < LARGEST_OFFSET - 1 else 0.0


def _loss(design: Array, label: Array, weight: Array, theta: Array, ridge: Array, start: Array) -> float:
    logit = design @ theta
    pull = (theta - start) @ ridge @ (theta - start) / 2
    return float(weight @ (np.logaddexp(0, logit) - label * logit) + pull)
