"""log Z of the single-pass density: does `exp log_prob` integrate to one?

Particles walk from the exact N(0, I) of level T+1 down to the data; their weights estimate `Z_t`, the
integral of `exp log p_t(x)`, at every level on the way (`langevin.anneal`). On average such an estimate of
log Z is too low, and one made on the way back up, from draws of the density itself, too high (arXiv
1511.02543): the two bracket it. The way back starts from noised real images after some moves at the level, so
it is a bound only as far as those have become draws of the model's density. Where it ends below the way down,
they have not: the model holds mass where there are no data, which walks from data never meet.

From level 1 to 0 there are weights only, no moves: p_0 has bounded support, and no trained score.

# N particles, R runs, K rungs
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cdm_fast.data import ImageData
from cdm_fast.data.draws import draw_images
from cdm_fast.errors import UserError
from cdm_fast.likelihood.units import nats_per_bit_per_dim
from cdm_fast.model import CDM, evaluation_mode
from cdm_fast.model.cdm import require_likelihood
from cdm_fast.model.denoiser import like_network
from cdm_fast.sampling.langevin import DrawFrom, anneal, ladder, move, tune_step_sizes

MOST_RUNGS = 256
PILOTS = 32  # particles that find the step sizes

# Moves at the lowest level before the data-started walk, in units of the moves at one rung.
EQUILIBRATION = 10


@dataclass(frozen=True)
class Normalisation:
    """log Z at every level of a ladder, in nats, by walks down from noise and up from data.

    Fields:
        levels: T+1 first, 0 last.
        log_z: mean over runs of the walks down, at each level; stderr: over independent runs.
        log_z_half: the same with half as many particles; what fewer particles miss shows here.
        log_z_up: mean over runs of the walks up, read at each level; stderr likewise.
        log_z_bits_per_dim: of level 0, `log2 Z / d`: add it to bits/dim to normalise the density.
        log_z_bits_per_dim_stderr: over runs.
        smallest_ess: of any reweighting of any run down, over N.
        acceptance: mean share of accepted moves.
        particles, runs, moves: N, R and moves a rung.
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
        """(log Z, its standard error) of a level of the ladder, nats."""
        position = self.levels.index(level)
        return self.log_z[position], self.log_z_stderr[position]


@evaluation_mode
def measure_log_z(
    model: CDM,
    data: ImageData,
    particles: int = 256,
    runs: int = 3,
    moves: int = 1,
    rungs: int | None = None,
    seed: int = 0,
    through: tuple[int, ...] = (),
    progress: Callable[[str], None] = lambda _: None,
) -> Normalisation:
    """log Z of the model's single-pass density at every level of a ladder; see `Normalisation`.

    Args:
        data: starts the walks up.
        particles: N of each walk; half as many walk a second time, as a check.
        runs: independent repetitions, whose spread is the error bar.
        moves: Langevin moves at each level.
        rungs: levels on the ladder; fewer are quicker and noisier. All by default, up to `MOST_RUNGS`.
        through: levels that the ladder must not leave out.
        progress: is told what is going on.

    Raises:
        UserError: a model without likelihood, particles below 4, runs below 2, moves below 1, rungs below 2.
    """
    require_likelihood(model)
    for name, value, least in (("particles", particles, 4), ("runs", runs, 2), ("moves", moves, 1)):
        if value < least:
            raise UserError(f"{name} is {value}: at least {least} are needed")
    T = model.schedule.T
    inside = {t for t in through if 1 <= t <= T}
    rungs = MOST_RUNGS if rungs is None else rungs
    down = sorted({*ladder(model.schedule, rungs), *inside}, reverse=True)
    walker = _Walker(model, data, down, moves, seed)
    halves, wholes, ups = [], [], []
    for run in range(runs):
        progress(f"log Z, run {run + 1} of {runs}: {particles} particles down and up {len(down)} levels")
        halves.append(walker.down(particles // 2))
        wholes.append(walker.down(particles))
        ups.append(walker.up(particles))
    log_z, log_z_stderr = _over_runs(wholes)
    half, half_stderr = _over_runs(halves)
    up, up_stderr = _over_runs(ups)
    unit = nats_per_bit_per_dim(data)
    return Normalisation(
        levels=[*down, 0],
        log_z=log_z,
        log_z_stderr=log_z_stderr,
        log_z_half=half,
        log_z_half_stderr=half_stderr,
        log_z_up=up,
        log_z_up_stderr=up_stderr,
        log_z_bits_per_dim=log_z[-1] / unit,
        log_z_bits_per_dim_stderr=log_z_stderr[-1] / unit,
        smallest_ess=walker.smallest_ess,
        acceptance=sum(walker.acceptance) / len(walker.acceptance),
        particles=particles,
        runs=runs,
        moves=moves,
    )


class _Walker:
    """The walks along one ladder, all with the same step sizes."""

    def __init__(self, model: CDM, data: ImageData, down: list[int], moves: int, seed: int) -> None:
        self.model, self.data, self.levels, self.moves = model, data, down, moves
        self.generator = torch.Generator().manual_seed(seed)
        self.smallest_ess = 1.0
        self.acceptance: list[float] = []
        self.step_sizes = tune_step_sizes(model, self._noise(PILOTS), down, self.generator)

    def down(self, num: int) -> Tensor:
        """(K+1,) log Z at every level and at 0, from noise."""
        start = self._noise(num)
        walk = anneal(self.model, start, self.levels, self.step_sizes, self.generator, self.moves)
        self.smallest_ess = min(self.smallest_ess, float(walk.ess.min()))
        self.acceptance.append(float(walk.acceptance.nanmean()))
        last = walk.log_ratio[-1:] + self._to_data(walk.x, walk.log_weight)
        return torch.cat([walk.log_ratio, last])

    def up(self, num: int) -> Tensor:
        """(K+1,) the same, from noised images that have moved a while at the lowest level."""
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
        """(1,) `log Z_0 / Z` of the lowest level from weighted draws there."""
        log_prob = self.model.log_prob_levels(x).double()
        step = log_prob[:, 0] - log_prob[:, self.levels[-1]]
        return (log_weight + step).logsumexp(0, keepdim=True).cpu()


def _over_runs(walks: list[Tensor]) -> tuple[list[float], list[float]]:
    """Mean over runs and its standard error, at every level."""
    each = torch.stack(walks)
    return each.mean(0).tolist(), (each.std(0) / math.sqrt(len(each))).tolist()
