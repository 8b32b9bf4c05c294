"""Paired rows: networks that distinguish them from shuffled rows, and the scores of each fold.

# n rows, d columns (X and Y together, the first `width` are those of X), E experts, the network first
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdm_fast.model.constants import Draw
from cdm_fast.model.schedule import even_in_log_noise
from cdm_fast.tables.calibration import offset
from cdm_fast.tables.columns import Array
from cdm_fast.tables.crossfit import RATIO_NOISE, RatioNetwork, canonical, train_ratio
from cdm_fast.tables.experts import experts
from cdm_fast.tables.fit import (
    Budget,
    ClassValidation,
    density_loss,
    level_validation,
    refit_constants,
    train,
)
from cdm_fast.tables.folds import Index, hold_out
from cdm_fast.tables.network import new_model, start_at_gaussians

# Number of shuffles that represent independent rows: of the held-out rows, and of the training rows.
SHUFFLES, OFFSET_SHUFFLES = 8, 3
# Most shuffled rows at a validation, unless they are fewer than two shuffles.
JUDGED = 2048
# Number of training rows that are scored to measure overfitting.
TRAIN_ROWS = 5000
# `input_scale` of networks by the number of columns. Sharp edges between two columns are learned in fewer
# steps from larger initial weights; with more columns these overfit.
INPUT_SCALE = {2: 4.0, 3: 2.0}
# Weight of the cross-entropy over levels when the density of joint rows is learned.
CE_WEIGHT = 1.0


@dataclass(frozen=True)
class FoldScores:
    """The scores by one network of its held-out rows and of its training rows."""

    network: RatioNetwork
    rows: Index  # (m,) the held-out rows
    joint: Array  # (E, m) their log ratios: by the network, then by the other experts
    shuffled: Array  # (E, SHUFFLES, m) log ratios of their X with the Y of another row
    trained: Array  # (E, l) log ratios of rows that the network was trained on


@torch.inference_mode(False)
def score_fold(
    scores: Tensor,
    width: int,
    groups: Index,
    kept_out: NDArray[np.bool_],
    budget: Budget,
    reference: str,
    validation_fraction: float,
    seed: int,
) -> FoldScores:
    """Trains a network on the rows that are not held out, and scores all rows."""
    rng = np.random.default_rng(seed)
    train_rows, kept = np.flatnonzero(~kept_out), np.flatnonzero(kept_out)
    validation = np.zeros(len(train_rows), dtype=bool)
    if validation_fraction:
        validation = hold_out(groups[train_rows], validation_fraction, rng)
    fit_rows = train_rows[~validation]
    fit, judge = scores[fit_rows], scores[train_rows[validation]]
    fit_network = _fit_normal if reference == "normal" else _fit_shuffled
    network = fit_network(fit, judge, width, budget, seed)
    different = fit_rows[
        np.unique(groups[fit_rows], return_index=True)[1]
    ]  # one of each group of copies, since copies are neighbours
    some = scores[rng.permutation(different)[:TRAIN_ROWS]]
    apart = torch.cat([shuffle(some, width, rng) for _ in range(OFFSET_SHUFFLES)])
    trained = network.log_ratio(some)
    shift = offset(trained, network.log_ratio(apart))
    network = replace(network, offset=shift, ceiling=float(trained.max()) + shift)
    others = experts(some.numpy(), width, len(scores))

    def log_ratios(z: Tensor, own: bool = False) -> Array:
        return np.stack([network.log_ratio(z), *(expert(z.numpy(), own) for expert in others)])

    shuffled = [log_ratios(shuffle(scores[kept], width, rng)) for _ in range(SHUFFLES)]
    return FoldScores(
        network, kept, log_ratios(scores[kept]), np.stack(shuffled, axis=1), log_ratios(some, own=True)
    )


def _fit_shuffled(fit: Tensor, judge: Tensor, width: int, budget: Budget, seed: int) -> RatioNetwork:
    """The ratio of joint rows to shuffled rows; training starts from Gaussians in canonical coordinates."""
    coordinates, rng = canonical(fit, width), np.random.default_rng(seed)
    z, judge = fit @ coordinates.mix, judge @ coordinates.mix
    dim = z.shape[1]
    validate = None
    if len(judge) > 1:
        shuffles = max(2, min(SHUFFLES, JUDGED // len(judge)))
        validate = ClassValidation(judge, torch.cat([shuffle(judge, width, rng) for _ in range(shuffles)]))
    covariances = torch.stack([torch.eye(dim, dtype=torch.float64), coordinates.covariance()])
    means = torch.zeros(2, dim, dtype=torch.float64)
    model, history = train_ratio(
        _joint_and_shuffled(z, width),
        validate,
        means,
        covariances,
        [width, dim - width],
        budget,
        len(z),
        seed,
        INPUT_SCALE.get(dim, 1.0),
    )
    return RatioNetwork(model, coordinates.mix, history)


def _fit_normal(fit: Tensor, judge: Tensor, width: int, budget: Budget, seed: int) -> RatioNetwork:
    """The ratio of the density of joint rows to N(0, I)."""
    coordinates, generator = canonical(fit, width, rotate_only=True), torch.Generator().manual_seed(seed)
    z, judge = fit @ coordinates.mix, judge @ coordinates.mix
    dim = z.shape[1]
    schedule = even_in_log_noise(budget.num_levels, RATIO_NOISE)
    model = new_model([width, dim - width], schedule, budget.hidden, budget.depth, dim, None, None, generator)
    start_at_gaussians(model, torch.zeros(1, dim, dtype=torch.float64), coordinates.covariance()[None])
    draw = _joint(z)
    validate = level_validation(judge, generator) if len(judge) > 1 else None
    loss = density_loss(draw, budget.batch_size, CE_WEIGHT, dim)
    history = train(model, loss, validate, budget, generator, len(z))
    refit_constants(model, draw, history, budget, len(z), generator)
    return RatioNetwork(model, coordinates.mix, history)


def _joint(z: Tensor) -> Draw:
    """A source of random joint rows."""

    def draw(num: int, generator: torch.Generator) -> tuple[Tensor, None]:
        return z[torch.randint(len(z), (num,), generator=generator)].float(), None

    return draw


def _joint_and_shuffled(z: Tensor, width: int) -> Draw:
    """Draws joint rows (label 1), and rows with the X of one row and the Y of another (label 0)."""

    def draw(num: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        row = torch.randint(len(z), (num,), generator=generator)
        other = (row + torch.randint(1, len(z), (num,), generator=generator)) % len(z)
        label = torch.arange(num) % 2
        partner = torch.where(label == 1, row, other)
        return torch.cat([z[row, :width], z[partner, width:]], dim=1).float(), label

    return draw


def shuffle(z: Tensor, width: int, rng: np.random.Generator) -> Tensor:
    """Rows of z in which the Y columns are permuted among rows, none keeping its own."""
    order = torch.from_numpy(rng.permutation(len(z)))
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)
    return torch.cat([z[:, :width], z[partner, width:]], dim=1)
