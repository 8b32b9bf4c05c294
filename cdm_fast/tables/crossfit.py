"""Networks that tell two sets of rows apart, and how each is started and trained.

# n rows, d columns, K = 2 classes: 0 the denominator's, 1 the numerator's
"""

import math
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from sklearn.covariance import ledoit_wolf
from torch import Tensor

from cdm_fast.model import CDM
from cdm_fast.model.constants import Draw
from cdm_fast.model.schedule import NoiseSchedule, even_in_log_noise
from cdm_fast.tables.columns import Array
from cdm_fast.tables.estimator import in_chunks
from cdm_fast.tables.fit import LEVEL_0_SHARE, Budget, History, Validate, ratio_loss, train
from cdm_fast.tables.network import new_model, start_at_gaussians

# Noise of level 1 of a ratio's networks.
RATIO_NOISE = 0.03
# How often training resumes at a lower learning rate: at the full rate the first steps can make the Gaussians
# worse.
RATE_CUTS = 1
# Units of the gates of squared features, and the number of columns above which a ratio's network has gates.
GATES, FEW_COLUMNS = 16, 20


@dataclass(frozen=True)
class RatioNetwork:
    """A trained network with the linear map in front of it (its input is `z mix`) and a constant.

    Log ratios are clipped at `ceiling`, because the network's output for a row unlike all others is
    arbitrary.
    """

    model: CDM
    mix: Tensor  # (d, d) fp64
    history: History
    offset: float = 0.0  # nats, added to every log ratio
    ceiling: float = math.inf  # nats

    def log_ratio(self, z: Tensor) -> Array:
        """`log p_1(z) - log p_0(z)` in nats of rows z (n, d), (n,)."""
        if self.model.num_classes is None:  # then the denominator is N(0, I), its own pure noise
            log_ratio = in_chunks(self._log_ratio_to_noise, z @ self.mix)
        else:
            log_ratio = in_chunks(
                lambda part: self.model.log_prob_classes(part).diff(dim=1)[:, 0], z @ self.mix
            )
        return np.minimum(log_ratio + self.offset, self.ceiling)

    def _log_ratio_to_noise(self, z: Tensor) -> Tensor:
        logits, prior = self.model.level_logits(z), self.model.log_level_prior
        return logits[:, 0] - logits[:, -1] + prior[-1] - prior[0]


def ratio_levels(columns: int) -> int:
    """Number of noise levels for a ratio: with more columns, neighbouring levels overlap less."""
    return min(102, 20 + columns // 2)


def ratio_schedule(num_levels: int) -> tuple[NoiseSchedule, Tensor]:
    """The noise levels and p(t): `LEVEL_0_SHARE` at level 0, uniform over the others."""
    prior = torch.full((num_levels,), (1 - LEVEL_0_SHARE) / (num_levels - 1), dtype=torch.float64)
    prior[0] = LEVEL_0_SHARE
    return even_in_log_noise(num_levels, RATIO_NOISE), prior


def train_ratio(
    draw: Draw,
    validate: Validate | None,
    means: Tensor,  # (2, d)
    covariances: Tensor,  # (2, d, d)
    column_groups: list[int],
    budget: Budget,
    rows: int,
    seed: int,
    input_scale: float = 1.0,
) -> tuple[CDM, History]:
    """A network for two classes that starts as Gaussians with these moments and learns the remainder.

    input_scale: see `new_model`.
    """
    generator = torch.Generator().manual_seed(seed)
    schedule, prior = ratio_schedule(budget.num_levels)
    dim = sum(column_groups)
    model = new_model(
        column_groups,
        schedule,
        budget.hidden,
        budget.depth,
        2 * dim,
        2,
        prior,
        generator,
        gates=GATES if dim > FEW_COLUMNS else 0,
        input_scale=input_scale,
    )
    start_at_gaussians(model, means, covariances)
    history = train(model, ratio_loss(draw, budget.batch_size), validate, budget, generator, rows, RATE_CUTS)
    return model, history


def shrunk_moments(z: Tensor, weights: Array | None = None) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d) of rows z, the latter shrunk (Ledoit and Wolf, 2004)."""
    share = np.ones((len(z), 1)) if weights is None else (weights / weights.mean())[:, None]
    mean = (torch.from_numpy(share) * z).mean(0)
    if len(z) < 2:
        return mean, torch.eye(z.shape[1], dtype=z.dtype)
    covariance, _ = ledoit_wolf((z - mean).numpy() * np.sqrt(share), assume_centered=True)
    floor = 1e-6 * torch.eye(z.shape[1], dtype=z.dtype)
    return mean, torch.from_numpy(np.atleast_2d(covariance)) + floor


@dataclass(frozen=True)
class Canonical:
    """Canonical coordinates: each coordinate of X is correlated with at most one coordinate of Y.

    Fields:
        mix (d, d): block-diagonal, the axes of X and those of Y; whitens each block unless `rotate_only`.
        rho (m,): canonical correlations of the pairs, without those explained by chance.
        width: number of columns of X.
    """

    mix: Tensor
    rho: Tensor
    width: int

    def covariance(self) -> Tensor:
        """(d, d) of the mixed rows."""
        d, m = len(self.mix), len(self.rho)
        covariance = torch.eye(d, dtype=torch.float64)
        first = torch.arange(m)
        second = self.width + first
        covariance[first, second] = covariance[second, first] = self.rho
        return covariance


def canonical(z: Tensor, width: int, rotate_only: bool = False) -> Canonical:
    """The `Canonical` coordinates of rows z (n, d), whose first `width` columns are those of X.

    rotate_only: the columns of each block are independent already, so only rotate them.

    With p and q columns and n rows, squared sample correlations of independent blocks reach up to `lambda_+`
    (Wachter, 1980), and a true `r = rho^2` above it appears as `(1 - p/n + p/(n r)) (1 - q/n + q/(n r)) r`
    (Bao, Hu, Pan, Zhou, 2019). Values below `lambda_+` are set to 0, values above it are corrected.
    """
    n, (p, q) = len(z), (width, z.shape[1] - width)
    blocks = [z[:, :width] - z[:, :width].mean(0), z[:, width:] - z[:, width:].mean(0)]
    enough = p + q < 0.9 * n
    whiten = [_whitening(block, rotate_only, enough) for block in blocks]
    first, second = (block @ w for block, w in zip(blocks, whiten, strict=True))
    left, sample, right = torch.linalg.svd(first.T @ second / n)
    sample = sample.clamp(max=1 - 1e-9)
    rho = torch.tensor([_true_correlation(float(r), p / n, q / n) for r in sample], dtype=torch.float64)
    if not enough:
        rho = torch.zeros_like(rho)
    rho = rho[rho > 0]  # the largest come first
    turn = [_with_axes(side[:, : len(rho)]) for side in (left, right.T)]
    mix = torch.block_diag(whiten[0] @ turn[0], whiten[1] @ turn[1])
    return Canonical(mix, rho, width)


def _with_axes(directions: Tensor) -> Tensor:
    """(d, d) orthonormal basis: `directions` (d, m) first, then the column axes, made orthogonal to them.

    Dependence on single columns, such as heavy tails, is hard to see in any other basis.
    """
    dim, m = directions.shape
    rest = torch.eye(dim, dtype=directions.dtype) - directions @ directions.T
    axes, _, _ = scipy.linalg.qr(rest.numpy(), pivoting=True)
    return torch.cat([directions, torch.from_numpy(axes[:, : dim - m])], dim=1)


def _whitening(block: Tensor, rotate_only: bool, enough: bool) -> Tensor:
    """(d, d) symmetric matrix that whitens a block; uses a shrunk covariance if there are too few rows."""
    dim = block.shape[1]
    if rotate_only:
        return torch.eye(dim, dtype=torch.float64)
    covariance = block.T @ block / len(block) if enough else shrunk_moments(block)[1]
    variances, axes = torch.linalg.eigh(covariance)
    return (axes / variances.clamp(min=1e-6 * float(variances.max())).sqrt()) @ axes.T


def _true_correlation(sample: float, x_share: float, y_share: float) -> float:
    """The true canonical correlation for a sample value; x_share = p/n, y_share = q/n."""
    if x_share + y_share >= 1:
        return 0.0
    squared = sample**2
    low = math.sqrt(x_share * y_share / ((1 - x_share) * (1 - y_share)))  # weaker ones leave no trace

    def seen(r: float) -> float:
        return r * (1 - x_share + x_share / r) * (1 - y_share + y_share / r)

    if low >= 1 or squared <= seen(low):
        return 0.0
    high = 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if seen(middle) < squared else (low, middle)
    return math.sqrt(low)
