"""log Z of the single-pass density: does `exp log_prob` integrate to one?

Particles walk from exact draws of N(0, I) at level T+1 down to the data; their weights estimate `Z_t`, the
integral of `exp log p_t(x)`, at every level of the walk (`langevin.anneal`). Such an estimate of log Z is too
low on average. An estimate from a walk up, started at draws from the density itself, is too high on average
(arXiv 1511.02543), so the two bracket log Z. In practice the walks up start at noised real images that first
move at the lowest level for a while, so they bound log Z only if these have become draws from the model's
density. Walks up that end below the walks down show that they have not: the model has mass where there are no
data, which walks from data never reach.

The step from level 1 to 0 only reweights, without moves, because p_0 has bounded support and no trained
score.

# N particles, R runs, K rungs of the ladder of levels, d = C*H*W
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cdm_fast.config.choices import PARTICLES
from cdm_fast.data import ImageData
from cdm_fast.data.draws import draw_images
from cdm_fast.errors import require_at_least
from cdm_fast.host.progress import Progress, silent
from cdm_fast.likelihood.units import nats_per_bit_per_dim
from cdm_fast.model import CDM, evaluation_mode
from cdm_fast.model.cdm import require_likelihood
from cdm_fast.model.denoiser import like_network
from cdm_fast.sampling.langevin import DrawFrom, anneal, ladder, move, tune_step_sizes

MOST_RUNGS = 256
PILOTS = 32  # particles of the pilot run that finds the step sizes
EQUILIBRATION = 10  # moves at the lowest level before a walk up, in units of the moves at one rung


@dataclass(frozen=True)
class Normalisation:
    """log Z at every level of a ladder, in nats, by walks down from noise and up from data.

    Fields:
        levels: levels of the ladder, T+1 first, 0 last.
        log_z, log_z_stderr: by the walks down, at each level: mean over runs and its standard error.
        log_z_half, log_z_half_stderr: the same with half as many particles, a check of convergence.
        log_z_up, log_z_up_stderr: the same for the walks up.
        log_z_bits_per_dim, log_z_bits_per_dim_stderr: `log2 Z / d` at level 0, by the walks down; adding it
            to bits/dim normalises the density.
        smallest_ess: smallest effective sample size of the walks down over all reweightings, as a share of N.
        acceptance: mean acceptance rate of the moves.
        particles, runs, moves: N, R and the moves at each rung.
    """

    levels: list[int]
    log_z: list[float]
    log_z_stderr: list[float]
    log_z_half: list[float]
    log_z_half_stderr: list[float]
    log_z_up: list[float]
    log_z_up_stderr: list[float]
    log_z_bits_per_dim: float
    log_z_bits_per_dim_stderr: float
    smallest_ess: float
    acceptance: float
    particles: int
    runs: int
    moves: int

    def at(self, level: int) -> tuple[float, float]:
        """(log Z, its standard error) in nats of a level of the ladder; ValueError for another level."""
        position = self.levels.index(level)
        return self.log_z[position], self.log_z_stderr[position]


@evaluation_mode
def measure_log_z(
    model: CDM,
    data: ImageData,
    *,
    particles: int = PARTICLES,
    runs: int = 3,
    moves: int = 1,
    rungs: int | None = None,
    seed: int = 0,
    through: Sequence[int] = (),
    progress: Progress = silent,
) -> Normalisation:
    """log Z of the model's single-pass density at every level of a ladder; see `Normalisation`.

    Args:
        data: the images at which the walks up start.
        particles: N per walk; a second walk with N/2 particles checks convergence.
        runs: independent repetitions, whose spread gives the error bar.
        moves: Langevin moves at each level.
        rungs: levels of the ladder; fewer are faster and noisier. All by default, up to `MOST_RUNGS`.
        seed: seed of the walks; the result is a deterministic function of it.
        through: levels that the ladder must contain.
        progress: called with one-line messages.

    Raises:
        UserError: a model without likelihood, particles below 4, runs below 2, moves below 1, rungs below 2.
    """
    require_likelihood(model)
    for name, value, least in (("particles", particles, 4), ("runs", runs, 2), ("moves", moves, 1)):
        require_at_least(name, value, least)
    inside = {t for t in through if 1 <= t <= model.schedule.T}
    rungs = MOST_RUNGS if rungs is None else rungs
    descent = sorted({*ladder(model.schedule, rungs), *inside}, reverse=True)
    walker = _Walker(model, data, descent, moves, seed)
    half, down, up = [], [], []
    for run in range(runs):
        progress(f"log Z, run {run + 1} of {runs}: {particles} particles down and up {len(descent)} levels")
        half.append(walker.down(particles // 2))
        down.append(walker.down(particles))
        up.append(walker.up(particles))
    log_z, log_z_half, log_z_up = (_over_runs(walks) for walks in (down, half, up))
    unit = nats_per_bit_per_dim(data)
    return Normalisation(
        levels=[*descent, 0],
        log_z=log_z.mean,
        log_z_stderr=log_z.error,
        log_z_half=log_z_half.mean,
        log_z_half_stderr=log_z_half.error,
        log_z_up=log_z_up.mean,
        log_z_up_stderr=log_z_up.error,
        log_z_bits_per_dim=log_z.mean[-1] / unit,
        log_z_bits_per_dim_stderr=log_z.error[-1] / unit,
        smallest_ess=walker.smallest_ess,
        acceptance=sum(walker.acceptance) / len(walker.acceptance),
        particles=particles,
        runs=runs,
        moves=moves,
    )


class _Walker:
    """The walks along one ladder, listed from noise down, all with the same step sizes."""

    def __init__(self, model: CDM, data: ImageData, levels: list[int], moves: int, seed: int) -> None:
        self.model, self.data, self.levels, self.moves = model, data, levels, moves
        self.generator = torch.Generator().manual_seed(seed)
        self.smallest_ess = 1.0
        self.acceptance: list[float] = []
        self.step_sizes = tune_step_sizes(model, self._noise(PILOTS), levels, self.generator)

    def down(self, num: int) -> Tensor:
        """log Z (K+1,) in nats at every rung and at 0, from `num` particles that start at noise."""
        start = self._noise(num)
        walk = anneal(self.model, start, self.levels, self.step_sizes, self.generator, self.moves)
        self.smallest_ess = min(self.smallest_ess, float(walk.ess.min()))
        self.acceptance.append(float(walk.acceptance.nanmean()))
        last = walk.log_ratio[-1:] + self._to_data(walk.x, walk.log_weight)
        return torch.cat([walk.log_ratio, last])

    def up(self, num: int) -> Tensor:
        """log Z (K+1,), from `num` noised images that first move at the lowest level for a while."""
        lowest = self.levels[-1]
        images = draw_images(self.data, num, self.generator)
        x = like_network(self.model, self.model.schedule.noise(images, lowest, generator=self.generator))
        moves = EQUILIBRATION * self.moves
        draw = DrawFrom(self.generator)
        start = move(self.model, x, lowest, self.step_sizes[lowest], draw, moves)[0].x
        walk = anneal(self.model, start, self.levels[::-1], self.step_sizes, self.generator, self.moves)
        log_z = (walk.log_ratio - walk.log_ratio[-1]).flip(0)
        equal = torch.full((num,), -math.log(num), dtype=torch.float64, device=start.device)
        return torch.cat([log_z, log_z[-1:] + self._to_data(start, equal)])

    def _noise(self, num: int) -> Tensor:
        shape = (num, *self.data.images.shape[1:])
        return like_network(self.model, torch.randn(shape, generator=self.generator))

    def _to_data(self, x: Tensor, log_weight: Tensor) -> Tensor:
        """`log(Z_0 / Z_t)` (1,) in nats, from weighted draws x (N, ...) at the lowest level t."""
        log_prob = self.model.log_prob_levels(x).double()
        step = log_prob[:, 0] - log_prob[:, self.levels[-1]]
        return (log_weight + step).logsumexp(0, keepdim=True).cpu()


class _OverRuns(NamedTuple):
    mean: list[float]  # at every level, nats
    error: list[float]  # its standard error


def _over_runs(walks: list[Tensor]) -> _OverRuns:
    each = torch.stack(walks)  # (R, K+1)
    return _OverRuns(each.mean(0).tolist(), (each.std(0) / math.sqrt(len(each))).tolist())
