"""Corrected samplers (`mala`, `smc`): Metropolis-adjusted moves at each level on the path from noise to data.

A predictor's step is never exact. For a composition or a guided model not even infinitely many steps are
exact, because its density at one level is not the noised density of the level below. Moves that leave `p_t`
invariant bring the distribution of the images back to it.

Legend: B batch, t a level, t_prev the next one towards data, a = a[t], s = s[t].
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from cdm_fast.errors import UserError
from cdm_fast.host.device import upload
from cdm_fast.model import Denoiser, Energy, any_parameter, evaluation_mode
from cdm_fast.sampling.langevin import (
    DrawFrom,
    Particles,
    anneal,
    move,
    resample,
    target_acceptance,
    tune_step_sizes,
)
from cdm_fast.sampling.sampler import BatchNoise, Callback, Moves, Run, Sampler, Step, check_range

PILOTS = 64  # particles of the pilot run that finds the step sizes
PILOT_MOVES = 4  # of each particle at each level


@dataclass(frozen=True)
class _DrawOfImages:
    """The noise of a batch of images as a `langevin.Draw`."""

    noise: BatchNoise

    def normal(self, x: Tensor) -> Tensor:
        return self.noise()

    def uniform(self, x: Tensor) -> Tensor:
        return self.noise.uniform()


@dataclass
class MoveLog:
    """A callback that counts the moves of a corrected sampler at each level, over all batches.

    Fields:
        leapfrog: leapfrog steps per move.
        step_size: level -> step size h of its moves.
        accepted, moved: level -> number of accepted moves (a scalar on the images' device), and of all moves.

    >>> from cdm_fast.sampling.sampler import Moves, Step
    >>> log = MoveLog()
    >>> log(Step(7, torch.zeros(2, 3), Moves(torch.tensor([0.5, 1.0]), count=2, leapfrog=1, step_size=0.1)))
    >>> log.to_json()["levels"], log.to_json()["acceptance"]
    ([7], [0.75])
    """

    leapfrog: int = 1
    step_size: dict[int, float] = field(default_factory=dict)
    accepted: dict[int, Tensor] = field(default_factory=dict)
    moved: dict[int, int] = field(default_factory=dict)

    def __call__(self, step: Step) -> None:
        """Adds the moves of a step; a step without moves adds nothing."""
        moves, level = step.moves, step.level
        if moves is None:
            return
        self.leapfrog, self.step_size[level] = moves.leapfrog, moves.step_size
        accepted = moves.accepted.sum() * moves.count
        self.accepted[level] = self.accepted[level] + accepted if level in self.accepted else accepted
        self.moved[level] = self.moved.get(level, 0) + len(moves.accepted) * moves.count

    def to_json(self) -> dict[str, Any]:
        """The levels from noise to data, with the acceptance rate and the step size of each."""
        levels = sorted(self.moved, reverse=True)
        return {
            "leapfrog": self.leapfrog,
            "target_acceptance": target_acceptance(self.leapfrog),
            "levels": levels,
            "acceptance": [float(self.accepted[t]) / self.moved[t] for t in levels],
            "step_size": [self.step_size[t] for t in levels],
        }


def mala(
    model: Energy,
    x: Tensor,  # (B, ...) at level grid[0]
    noise: BatchNoise,
    grid: Sequence[int],
    label: Tensor | None = None,  # (B,) int64
    *,
    step_size: Mapping[int, float],
    moves: int = 2,
    leapfrog: int = 1,
    callback: Callback | None = None,
) -> Tensor:
    """Annealed MALA, or HMC: moves at each level, then a DDIM step to the next; returns x0_hat.

    The DDIM step uses the score of the last move, so a level costs 1 + moves x leapfrog evaluations.
    `step_size` maps each level except 0 to h, as returned by `find_step_sizes`.
    """
    draw = _DrawOfImages(noise)
    for t, t_prev in pairwise(grid):
        particles, accepted = move(model, x, t, step_size[t], draw, moves, label, leapfrog)
        if callback is not None:
            callback(Step(t, particles.x, Moves(accepted, moves, leapfrog, step_size[t])))
        x = ddim_step(model, particles, t_prev)
    if callback is not None:
        callback(Step(0, x))
    return x


def ddim_step(model: Denoiser, particles: Particles, t_prev: int) -> Tensor:
    """DDIM eq. 12 with eta = 0 (arXiv 2010.02502) from the particles' level to t_prev, using their scores."""
    a, s, t = model.schedule.a.tolist(), model.schedule.s.tolist(), particles.level
    x0_hat = (particles.x + s[t] ** 2 * particles.score) / a[t]
    return a[t_prev] * x0_hat - s[t_prev] * s[t] * particles.score


def smc(
    model: Energy,
    x: Tensor,  # (B, ...) ~ N(0, I)
    noise: BatchNoise,
    grid: Sequence[int],
    label: Tensor | None = None,  # (B,) int64
    *,
    step_size: Mapping[int, float],
    moves: int = 2,
    leapfrog: int = 1,
    callback: Callback | None = None,
) -> Tensor:
    """Sequential Monte Carlo: particles that are reweighted, resampled and moved (`langevin.anneal`).

    Returns x0_hat at the last level above 0. Moves are local and cannot carry mass between separated modes;
    weights can. The images of a batch and class form one population and depend on each other: some start as
    copies of the same particle. Where that matters, draw more images than needed and keep some of them.
    `step_size` maps each level except 0 to h, as returned by `find_step_sizes`.
    """
    generator, result = noise.generator(), torch.empty_like(x)

    def report(particles: Particles, accepted: Tensor) -> None:
        if callback is not None:
            done = Moves(accepted, moves, leapfrog, step_size[particles.level])
            callback(Step(particles.level, particles.x, done))

    classes = torch.zeros(len(x)) if label is None else label.cpu()  # the host must know the class counts
    for class_ in classes.unique():
        rows = upload((classes == class_).nonzero()[:, 0], x.device)
        label_rows = None if label is None else label[rows]
        walk = anneal(
            model,
            x[rows],
            [model.schedule.T + 1, *grid[:-1]],
            step_size,
            generator,
            moves,
            label=label_rows,
            leapfrog=leapfrog,
            on_level=report,
        )
        drawn, last = walk.x[resample(walk.log_weight, generator)], grid[-2]
        draw = DrawFrom(generator)
        copies, _ = move(model, drawn, last, step_size[last], draw, moves, label_rows, leapfrog)
        result[rows] = ddim_step(model, copies, 0)
    if callback is not None:
        callback(Step(0, result))
    return result


@dataclass(frozen=True)
class Corrected(Sampler):
    """The base of `MALA` and `SMC`, which correct the images at each level by Metropolis-adjusted moves.

    Args:
        moves: moves of each image at each level, at least 1.
        leapfrog: leapfrog steps per move, at least 1: one step is a Langevin move, several a Hamiltonian move
            (HMC).
        step_size: level -> step size h, such as `MoveLog.step_size` of an earlier run; by default found by a
            pilot run.

    Raises:
        UserError: a number below 1, or a level of the grid without a step size.
    """

    moves: int = 2
    leapfrog: int = 1
    step_size: Mapping[int, float] | None = None
    spacing = "log_snr"
    compares_densities = True

    def __post_init__(self) -> None:
        check_range("moves", self.moves, 1, bits=32)
        check_range("leapfrog", self.leapfrog, 1, bits=32)

    def prepare(
        self, model: Denoiser, grid: Sequence[int], shape: tuple[int, ...], label: Tensor | None
    ) -> Run:
        """The loop with its step sizes, by default found by a pilot run with a fixed seed.

        Raises UserError for a model without log p_t(x), and for a level without a step size.
        """
        if not isinstance(model, Energy):
            raise UserError(
                f"sampler {self.name!r} accepts or refuses moves by log p(x), which a plain denoiser (DDM)"
                " does not know: choose another sampler, such as 'ddim', or train with --objective cdm"
            )
        sizes = self.step_size
        if sizes is None:
            sizes = find_step_sizes(model, grid, shape, label, self.leapfrog)
        missing = [t for t in grid[:-1] if t not in sizes]
        if missing:
            raise UserError(f"step_size has no value for level {missing[0]}: give one for each level but 0")
        return partial(self._run(), step_size=sizes, moves=self.moves, leapfrog=self.leapfrog)

    def _run(self) -> Callable[..., Tensor]:
        raise NotImplementedError


@dataclass(frozen=True)
class MALA(Corrected):
    """Annealed MALA: Metropolis-adjusted Langevin moves at each level, or HMC if `leapfrog` > 1 (`mala`).

    See also `SMC`, which carries mass between separated modes too, and `MoveLog`, for the acceptance rates.

    Args:
        moves: moves of each image at each level, at least 1.
        leapfrog: leapfrog steps per move, at least 1: one step is a Langevin move, several a Hamiltonian move
            (HMC).
        step_size: level -> step size h, such as `MoveLog.step_size` of an earlier run; by default found by a
            pilot run.

    Raises:
        UserError: a number below 1, or a level of the grid without a step size.

    >>> from cdm_fast import CDM, MLP, NoiseSchedule, sample
    >>> schedule = NoiseSchedule.uniform(T=20)
    >>> model = CDM(MLP(2, schedule.num_levels, hidden=8), schedule)
    >>> log = MoveLog()
    >>> sample(model, 3, sampler=MALA(moves=4), steps=2, callback=log).shape
    torch.Size([3, 2])
    >>> log.moved
    {20: 12, 1: 12}
    """

    name = "mala"

    def _run(self) -> Callable[..., Tensor]:
        return mala


@dataclass(frozen=True)
class SMC(Corrected):
    """Sequential Monte Carlo: the images of a batch and class form one population of particles (`smc`).

    At each level they are reweighted, resampled if the weights are too uneven, and moved.
    Arguments and errors are those of `MALA`.

    >>> from cdm_fast import CDM, MLP, NoiseSchedule, sample
    >>> schedule = NoiseSchedule.uniform(T=20)
    >>> model = CDM(MLP(2, schedule.num_levels, hidden=8), schedule)
    >>> sample(model, 5, sampler=SMC(moves=1), steps=3).shape
    torch.Size([5, 2])
    """

    name = "smc"

    def _run(self) -> Callable[..., Tensor]:
        return smc


CORRECTED: dict[str, type[Corrected]] = {"mala": MALA, "smc": SMC}


@evaluation_mode
def find_step_sizes(
    model: Energy,
    grid: Sequence[int],
    shape: tuple[int, ...],  # of one image
    label: Tensor | None = None,  # of the images to come, (N,) int64
    leapfrog: int = 1,
) -> dict[int, float]:
    """Step sizes at each level of the grid except 0, level -> h, found by a pilot run with a fixed seed.

    See `langevin.tune_step_sizes`.
    """
    like, generator = any_parameter(model), torch.Generator().manual_seed(0)
    x = upload(torch.randn((PILOTS, *shape), generator=generator, dtype=like.dtype), like.device)
    pilots = None if label is None else label[torch.arange(PILOTS, device=label.device) % len(label)]
    step = partial(ddim_step, model)
    return tune_step_sizes(model, x, grid[:-1], generator, PILOT_MOVES, pilots, step, leapfrog)
