"""Sample quality: do two sets of samples come from the same distribution?

The Frechet distance and the kernel distance compare features of images, and depend on the network that
computes the features: with Inception features they are FID and KID; with another network they need another
name.

# N, M samples, D features, P permutations
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cdm_fast.errors import UserError


class TwoSampleTest(NamedTuple):
    """Result of `two_sample_test`."""

    distance: float  # energy distance, 0 for equal distributions; in the samples' own units
    p_value: float  # share of permutations, including the identity, with at least this distance


def two_sample_test(
    x: Tensor,  # (N, ...)
    y: Tensor,  # (M, ...)
    permutations: int = 999,
    seed: int = 0,
) -> TwoSampleTest:
    """Permutation test of equal distributions by the energy distance `2 E|x-y| - E|x-x'| - E|y-y'|`.

    The test is consistent against every alternative with finite means (Szekely & Rizzo 2013), and exact at
    any sample size: under equal distributions the p-value is at most alpha with probability at most alpha.
    Memory is of order (N+M)^2 + P (N+M).

    Args:
        permutations: P.
        seed: seed of the permutations.

    Raises:
        UserError: fewer than two samples of either, or samples of different sizes.

    >>> x = torch.arange(20.0)[:, None]
    >>> two_sample_test(x, x + 100).p_value  # no permutation is as distant
    0.001
    """
    both = torch.cat(_rows(x, y))
    distances = torch.cdist(both, both, compute_mode="donot_use_mm_for_euclid_dist")
    sign = torch.cat([torch.full((len(x),), 1 / len(x)), torch.full((len(y),), -1 / len(y))]).to(both)
    generator = torch.Generator().manual_seed(seed)
    orders = torch.stack([torch.randperm(len(both), generator=generator) for _ in range(permutations)])
    signs = torch.cat([sign[None], sign[orders.to(sign.device)]])  # (P+1, N+M)
    statistic = -((signs @ distances) * signs).sum(1)
    at_least = (statistic[1:] >= statistic[0] * (1 - 1e-12)).sum()
    return TwoSampleTest(float(statistic[0]), (1 + int(at_least)) / (1 + permutations))


def frechet_distance(
    x: Tensor,  # (N, D) features
    y: Tensor,  # (M, D)
) -> float:
    """`|mu_x - mu_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2))` of the features' means and covariances.

    For Inception features this is FID (arXiv 1706.08500). The trace of the root is computed as the sum of the
    singular values of `C_x^(1/2) C_y^(1/2)`, which needs no root of a nonsymmetric matrix. The estimate is
    biased upwards for few samples: compare only figures from equal numbers of samples.

    Raises:
        UserError: fewer than two samples of either, or samples of different sizes.

    >>> x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    >>> round(frechet_distance(x, x + 2.0), 3)  # 3 features, each 2 apart
    12.0
    """
    x, y = _rows(x, y)
    roots = [_root(samples.T.cov().reshape(samples.shape[1], -1)) for samples in (x, y)]
    spread = sum((root**2).sum() for root in roots) - 2 * torch.linalg.matrix_norm(roots[0] @ roots[1], "nuc")
    return float((x.mean(0) - y.mean(0)).square().sum() + spread)


def kernel_distance(
    x: Tensor,  # (N, D) features
    y: Tensor,  # (M, D)
) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel `(<x, y>/D + 1)^3`; may be negative.

    For Inception features this is KID (arXiv 1801.01401), except that KID averages over subsets of the
    samples.

    Raises:
        UserError: fewer than two samples of either, or samples of different sizes.
    """
    x, y = _rows(x, y)
    within = [_off_diagonal_mean(_cubic(samples, samples)) for samples in (x, y)]
    return float(sum(within) - 2 * _cubic(x, y).mean())


def _cubic(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _off_diagonal_mean(kernel: Tensor) -> Tensor:
    return (kernel.sum() - kernel.diagonal().sum()) / (len(kernel) * (len(kernel) - 1))


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root (D, D); eigenvalues that are negative by rounding count as 0."""
    values, axes = torch.linalg.eigh(covariance)
    return (axes * values.clamp(min=0).sqrt()) @ axes.T


def _rows(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets of samples as rows (N, D) and (M, D), float64; UserError where they cannot be compared."""
    for name, samples in (("x", x), ("y", y)):
        if samples.dim() < 2 or len(samples) < 2:
            raise UserError(f"{name} has shape {tuple(samples.shape)}: give two or more samples, one per row")
    x, y = x.flatten(1), y.flatten(1)
    if x.shape[1] != y.shape[1]:
        raise UserError(f"samples of {x.shape[1]} and {y.shape[1]} values: give samples of equal size")
    return x.double(), y.double()
