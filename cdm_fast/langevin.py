"""Metropolis-adjusted Langevin moves at one noise level, and particles carried from level to level by them.

An energy (a CDM, or what is composed of CDMs) knows both `log p_t` and its gradient, so a Langevin proposal
can be accepted or refused exactly: the moves leave the model's own density at the level unchanged, whatever
the step size (Roberts & Tweedie 1996).

# N particles, d values of one, L = T+2 noise levels, K rungs of a ladder of levels
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cdm_fast.errors import UserError
from cdm_fast.model import Energy, measures
from cdm_fast.schedule import NoiseSchedule

# Acceptance at which Langevin moves explore fastest in many dimensions (Roberts & Rosenthal 1998).
TARGET_ACCEPTANCE = 0.574

# For particles x: standard normal noise like x, and (N,) uniform float64 numbers, fresh at each call.
Draw = Callable[[Tensor], tuple[Tensor, Tensor]]


def draw_from(generator: torch.Generator) -> Draw:
    """The noise of moves from one generator on the CPU, whatever the particles' device."""

    def draw(x: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
        return z, torch.rand(len(x), generator=generator, dtype=torch.float64).to(x.device)

    return draw


@dataclass(frozen=True)
class Particles:
    """N particles at a level with all that moves and weights need.

    Fields:
        x: (N, ...).
        level: the level at which they move.
        log_prob: (N, L) `log p_t(x)` at every level, nats.
        score: like x, `grad_x log p_level(x)`.
        label: (N,) int64 classes, or None.
    """

    x: Tensor
    level: int
    log_prob: Tensor
    score: Tensor
    label: Tensor | None = None

    @classmethod
    def at(cls, model: Energy, x: Tensor, level: int, label: Tensor | None = None) -> "Particles":
        """One evaluation of the model at `x`."""
        log_prob, score = model.log_prob_levels_and_score(x, level, label)
        return cls(x, level, log_prob.double(), score, label)

    def pick(self, index: Tensor) -> "Particles":
        """Those of `index` (N,) int64, with repetitions."""
        label = None if self.label is None else self.label[index]
        return Particles(self.x[index], self.level, self.log_prob[index], self.score[index], label)


@measures
def mala(model: Energy, particles: Particles, step_size: float, draw: Draw) -> tuple[Particles, Tensor]:
    """One move of every particle at its level: `(particles, accepted (N,) bool)`.

    Proposal `x' = x + h score(x) + sqrt(2h) z`, accepted with probability
    `min(1, p(x') q(x|x') / (p(x) q(x'|x)))`; h is the step size, in units of x squared.
    """
    x, level = particles.x, particles.level
    z, uniform = draw(x)
    proposed = x + step_size * particles.score + math.sqrt(2 * step_size) * z
    proposal = Particles.at(model, proposed, level, particles.label)
    backwards = (x - proposal.x - step_size * proposal.score).double() / math.sqrt(2 * step_size)
    log_ratio = proposal.log_prob[:, level] - particles.log_prob[:, level]
    log_ratio += 0.5 * (z.double().square() - backwards.square()).flatten(1).sum(1)
    accepted = uniform.log() < log_ratio  # a NaN is refused
    return _choose(accepted, proposal, particles), accepted


def _choose(accepted: Tensor, proposal: Particles, particles: Particles) -> Particles:
    wide = accepted.view(-1, *[1] * (particles.x.dim() - 1))
    return Particles(
        torch.where(wide, proposal.x, particles.x),
        particles.level,
        torch.where(accepted[:, None], proposal.log_prob, particles.log_prob),
        torch.where(wide, proposal.score, particles.score),
        particles.label,
    )


def ladder(schedule: NoiseSchedule, rungs: int | None = None, lowest: int = 1) -> list[int]:
    """Levels from T+1 down to `lowest`: all of them, or `rungs` spread evenly over the level index.

    Raises UserError for fewer than 2 rungs, or a lowest level outside 1..T.
    """
    top = schedule.T + 1
    if not 1 <= lowest < top:
        raise UserError(f"level {lowest}: a ladder ends at a level from 1 to T = {top - 1}")
    if rungs is not None and rungs < 2:
        raise UserError(f"{rungs} rungs: a ladder of levels has at least 2")
    count = min(rungs or top, top - lowest + 1)
    even = torch.linspace(top, lowest, count, dtype=torch.float64).round().long()
    return even.tolist()


def stay(particles: Particles, level: int) -> Tensor:
    """The particles where they are: the plainest way from their level to the next."""
    return particles.x


@measures
def tune_step_sizes(
    model: Energy,
    x: Tensor,
    levels: Sequence[int],
    generator: torch.Generator,
    moves: int = 2,
    target: float = TARGET_ACCEPTANCE,
    label: Tensor | None = None,
    carry: Callable[[Particles, int], Tensor] = stay,
) -> dict[int, float]:
    """A step size for every level, by a walk of `x` (N, ...) ~ N(0, I) down `levels`, from T+1 or T.

    At each level the logarithm of the step size follows the acceptance (Robbins-Monro), from the one before.
    Fixed afterwards, so that moves with it are exact and the same in every run. `carry` takes the particles
    to the level that it is given.
    """
    size, draw = x[0].numel() ** (-1 / 3), draw_from(generator)
    sizes: dict[int, float] = {}
    particles = Particles.at(model, x, levels[0], label)
    for position, level in enumerate(levels):
        if position > 0:
            particles = Particles.at(model, carry(particles, level), level, label)
        warm_up = 20 if position == 0 else 0
        for _ in range(moves + warm_up):
            particles, accepted = mala(model, particles, size, draw)
            size *= math.exp(float(accepted.double().mean()) - target)
        sizes[level] = size
    return sizes


@dataclass(frozen=True)
class Annealed:
    """Particles after a walk along a ladder of levels, and what their weights say on the way.

    Fields:
        x: (N, ...) and log_weight: (N,), normalised: they stand for the model's density at the last level.
        log_ratio: (K,) estimate of `log Z[levels[k]] / Z[levels[0]]`; its exponential is unbiased if the
            particles began as draws of the first level's density.
        ess: (K,) effective sample size over N after each reweighting, before any resampling.
        acceptance: (K,) of the moves at each level; NaN at the first.
    """

    x: Tensor
    log_weight: Tensor
    log_ratio: Tensor
    ess: Tensor
    acceptance: Tensor


@measures
def anneal(
    model: Energy,
    x: Tensor,
    levels: Sequence[int],
    step_sizes: dict[int, float],
    generator: torch.Generator,
    moves: int = 1,
    resample_below: float = 0.5,
    label: Tensor | None = None,
) -> Annealed:
    """Carry `x` (N, ...), draws of `p[levels[0]]`, along `levels`: at each, reweight, resample and move.

    Annealed importance sampling (arXiv physics/9803008) with resampling (Del Moral et al. 2006).

    Args:
        step_sizes: of the moves at every level but the first, from `tune_step_sizes`.
        moves: at each level.
        resample_below: effective sample size over N under which particles are resampled; 0 never does.
        label: (N,) int64, one class for all: particles of two classes cannot stand for each other.
    """
    particles, draw = Particles.at(model, x, levels[0], label), draw_from(generator)
    log_weight = torch.full((len(x),), -math.log(len(x)), dtype=torch.float64, device=x.device)
    total, log_ratio, ess, acceptance = 0.0, [0.0], [1.0], [math.nan]
    for level in levels[1:]:
        log_weight = log_weight + particles.log_prob[:, level] - particles.log_prob[:, particles.level]
        norm = log_weight.logsumexp(0)
        total += float(norm)
        log_weight = log_weight - norm
        log_ratio.append(total)
        ess.append(float((-(2 * log_weight).logsumexp(0)).exp()) / len(x))
        if ess[-1] < resample_below:
            particles = particles.pick(resample(log_weight, generator))
            log_weight = torch.full_like(log_weight, -math.log(len(x)))
        particles, accepted = move(model, particles.x, level, step_sizes[level], draw, moves, label)
        acceptance.append(float(accepted.mean()))
    series = (torch.tensor(values, dtype=torch.float64) for values in (log_ratio, ess, acceptance))
    return Annealed(particles.x, log_weight, *series)


def move(
    model: Energy,
    x: Tensor,
    level: int,
    step_size: float,
    draw: Draw,
    moves: int,
    label: Tensor | None = None,
) -> tuple[Particles, Tensor]:
    """`moves` Langevin moves of `x` (N, ...) at `level`: (particles, accepted share (N,) float64)."""
    particles = Particles.at(model, x, level, label)
    count = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for _ in range(moves):
        particles, accepted = mala(model, particles, step_size, draw)
        count += accepted
    return particles, count / moves  # NaN for no moves


def resample(log_weight: Tensor, generator: torch.Generator) -> Tensor:
    """(N,) int64 indices by systematic resampling: copies of i differ from N w_i by less than one."""
    num = len(log_weight)
    points = (torch.rand(1, generator=generator, dtype=torch.float64) + torch.arange(num)) / num
    edges = log_weight.exp().cumsum(0)
    edges = edges / edges[-1]
    return torch.searchsorted(edges, points.to(edges)).clamp(max=num - 1)
