"""Corrected samplers: Metropolis-adjusted moves on the way from noise to data.

A predictor's step is never exact, and for a composition or a guided model no number of steps is: its density
at a level is not the noised density of the next. Moves that leave `p_t` unchanged pull the images back to it.

Legend: B batch, t a level, t_prev the next one towards data, a = a[t], s = s[t].
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from cdm_fast.errors import UserError
from cdm_fast.host.device import upload
from cdm_fast.model import Denoiser, Energy, measures, prototype
from cdm_fast.model.schedule import Spacing
from cdm_fast.sampling.langevin import (
    DrawFrom,
    Particles,
    anneal,
    move,
    resample,
    target_acceptance,
    tune_step_sizes,
)

PILOTS = 64  # particles that find the step sizes
PILOT_MOVES = 4  # of each of them at every level


class BatchNoise(Protocol):
    """Noise of a batch of images (`sampling.ImageNoise`): normals by a call, uniforms, and a generator."""

    def __call__(self) -> Tensor: ...

    def uniform(self) -> Tensor: ...

    def generator(self) -> torch.Generator: ...


@dataclass(frozen=True)
class _DrawOfImages:
    """The noise of a batch as moves ask for it."""

    noise: BatchNoise

    def normal(self, x: Tensor) -> Tensor:
        return self.noise()

    def uniform(self, x: Tensor) -> Tensor:
        return self.noise.uniform()


@dataclass
class MoveLog:
    """What the moves of a corrected sampler did, level by level, over all batches.

    Fields:
        leapfrog: steps of each move.
        step_size: level -> h of its moves.
        accepted, moved: level -> number of accepted (a scalar where the images are), and of all moves.
    """

    leapfrog: int = 1
    step_size: dict[int, float] = field(default_factory=dict)
    accepted: dict[int, Tensor] = field(default_factory=dict)
    moved: dict[int, int] = field(default_factory=dict)

    def add(self, level: int, share: Tensor, moves: int) -> None:
        """`share` (B,) of accepted moves, of `moves` each, at `level`."""
        accepted = share.sum() * moves
        self.accepted[level] = self.accepted[level] + accepted if level in self.accepted else accepted
        self.moved[level] = self.moved.get(level, 0) + len(share) * moves

    def to_json(self) -> dict[str, Any]:
        """Levels from noise to data, with the acceptance and the step size of each."""
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
    x: Tensor,  # (B, ...) at level T
    noise: BatchNoise,
    steps: int,
    label: Tensor | None = None,  # (B,) int64
    spacing: Spacing = "log_snr",
    *,
    moves: int,
    log: MoveLog,
) -> Tensor:
    """Annealed MALA, or HMC: at each level moves, then a `ddim` step to the next; x0_hat of level 1 last.

    The step takes its score from the last move, so a level costs 1 + moves x leapfrog evaluations.
    """
    draw = _DrawOfImages(noise)
    for t, t_prev in model.schedule.pairs(steps, spacing):
        particles, share = move(model, x, t, log.step_size[t], draw, moves, label, log.leapfrog)
        log.add(t, share, moves)
        x = ddim_step(model, particles, t_prev)
    return x


def ddim_step(model: Denoiser, particles: Particles, t_prev: int) -> Tensor:
    """DDIM eq. 12 with eta = 0 (arXiv 2010.02502) from the particles' level, by the score that they hold."""
    a, s, t = model.schedule.a.tolist(), model.schedule.s.tolist(), particles.level
    x0_hat = (particles.x + s[t] ** 2 * particles.score) / a[t]
    return a[t_prev] * x0_hat - s[t_prev] * s[t] * particles.score


def smc(
    model: Energy,
    x: Tensor,  # (B, ...) ~ N(0, I)
    noise: BatchNoise,
    steps: int,
    label: Tensor | None = None,  # (B,) int64
    spacing: Spacing = "log_snr",
    *,
    moves: int,
    log: MoveLog,
) -> Tensor:
    """Annealed particles, reweighted and resampled (`langevin.anneal`); x0_hat of level 1 at the end.

    Moves are local: they cannot shift mass between modes that have parted, weights can. The images of a batch
    and a class are one population and depend on each other: some are copies that have moved apart. Where that
    matters, draw more than are wanted and keep some.
    """
    levels = [t for t, _ in model.schedule.pairs(steps, spacing)]
    generator, result = noise.generator(), torch.empty_like(x)
    classes = torch.zeros(len(x)) if label is None else label.cpu()  # how many of each, the host must know
    for class_ in classes.unique():
        rows = upload((classes == class_).nonzero()[:, 0], x.device)
        of_rows = None if label is None else label[rows]
        walk = anneal(
            model,
            x[rows],
            [model.schedule.T + 1, *levels],
            log.step_size,
            generator,
            moves,
            label=of_rows,
            leapfrog=log.leapfrog,
        )
        for t, rate in zip(levels, walk.acceptance[1:], strict=True):
            log.add(t, rate.expand(len(rows)), moves)
        drawn, last = walk.x[resample(walk.log_weight, generator)], levels[-1]
        draw = DrawFrom(generator)
        copies, _ = move(model, drawn, last, log.step_size[last], draw, moves, of_rows, log.leapfrog)
        result[rows] = ddim_step(model, copies, 0)
    return result


CORRECTED: dict[str, Callable[..., Tensor]] = {"mala": mala, "smc": smc}


@measures
def prepare(
    model: Denoiser,
    sampler: str,
    steps: int,
    shape: tuple[int, ...],
    label: Tensor | None = None,  # of the images to come, (N,) int64
    spacing: Spacing | None = None,
    leapfrog: int = 1,
) -> dict[int, float]:
    """The step size of a sampler's moves at each level: tuned by a pilot walk of a fixed seed, then fixed.

    Raises UserError for a model that knows no log p_t(x).
    """
    if not isinstance(model, Energy):
        raise UserError(
            f"sampler {sampler!r} accepts or refuses moves by log p(x), which a plain denoiser (DDM) does not"
            " know: choose another sampler, such as 'ddim', or train with --objective cdm"
        )
    like, generator = prototype(model), torch.Generator().manual_seed(0)
    x = upload(torch.randn((PILOTS, *shape), generator=generator, dtype=like.dtype), like.device)
    pilots = None if label is None else label[torch.arange(PILOTS, device=label.device) % len(label)]
    levels = [t for t, _ in model.schedule.pairs(steps, spacing or "log_snr")]
    carry = partial(ddim_step, model)
    return tune_step_sizes(model, x, levels, generator, PILOT_MOVES, pilots, carry, leapfrog)
