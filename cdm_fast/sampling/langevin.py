"""Metropolis-adjusted Langevin and Hamiltonian moves at one noise level, and annealing along many levels.

An energy (a CDM, or a composition of CDMs) knows both `log p_t` and its gradient, so a proposal along the
gradient can be accepted or rejected exactly: the moves leave the model's density at the level invariant for
every step size (Roberts & Tweedie 1996; Duane et al. 1987).

# N particles, d values per particle, L = T+2 noise levels, K rungs of a ladder of levels
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cdm_fast.errors import UserError
from cdm_fast.host.device import upload
from cdm_fast.model import Energy, evaluation_mode
from cdm_fast.model.schedule import NoiseSchedule

# Relative spread of the step length in paths of several steps: paths of a fixed length may be periodic.
JITTER = 0.2


class Draw(Protocol):
    """A source of random numbers for particles x (N, ...); each call draws new numbers."""

    def normal(self, x: Tensor) -> Tensor:
        """N(0, I) like x."""

    def uniform(self, x: Tensor) -> Tensor:
        """(N,) float64 in (0, 1)."""


@dataclass(frozen=True)
class DrawFrom:
    """Draws from one generator on the CPU: the same numbers for particles on any device.

    >>> DrawFrom(torch.Generator().manual_seed(0)).uniform(torch.zeros(3, 2)).shape
    torch.Size([3])
    """

    generator: torch.Generator

    def normal(self, x: Tensor) -> Tensor:
        """N(0, I) like x."""
        return upload(torch.randn(x.shape, generator=self.generator, dtype=x.dtype), x.device)

    def uniform(self, x: Tensor) -> Tensor:
        """(N,) float64 in [0, 1)."""
        return upload(torch.rand(len(x), generator=self.generator, dtype=torch.float64), x.device)


def target_acceptance(leapfrog: int) -> float:
    """The acceptance rate at which moves explore fastest in high dimension.

    0.574 for Langevin moves (Roberts & Rosenthal 1998), 0.651 for longer paths (arXiv 1001.4460).
    """
    return 0.574 if leapfrog == 1 else 0.651


@dataclass(frozen=True)
class Particles:
    """N particles at a level, with the log-densities and scores that moves and weights need.

    Fields:
        x: (N, ...).
        level: the level whose density the moves leave invariant.
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
        """Particles at `x` (N, ...), by one evaluation of the model."""
        log_prob, score = model.log_prob_levels_and_score(x, level, label)
        return cls(x, level, log_prob.double(), score, label)

    def pick(self, index: Tensor) -> "Particles":
        """The particles at `index` (M,) int64, which may repeat."""
        label = None if self.label is None else self.label[index]
        return Particles(self.x[index], self.level, self.log_prob[index], self.score[index], label)


@evaluation_mode
def hmc(
    model: Energy, particles: Particles, step_size: float, draw: Draw, leapfrog: int = 1
) -> tuple[Particles, Tensor]:
    """One Hamiltonian move of each particle: (particles, accepted (N,) bool).

    A path starts with a momentum p ~ N(0, I), takes leapfrog steps of length e = sqrt(2h),

        p <- p + e/2 score(x),   x <- x + e p,   p <- p + e/2 score(x),

    and its end is accepted with probability `min(1, exp(log p(x') - log p(x) + |p|^2/2 - |p'|^2/2))` (Duane
    et al. 1987). One step is the Langevin move of MALA, `x' = x + h score(x) + sqrt(2h) p`. Several steps go
    further in one direction than the same number of moves would; e is then drawn for each particle within
    20 % of sqrt(2h). A move costs `leapfrog` evaluations of the model.

    Args:
        model: the energy.
        particles: N particles, at the level of the density.
        step_size: h, in units of x squared.
        draw: source of random numbers.
        leapfrog: leapfrog steps of the path, at least 1.

    >>> from cdm_fast import CDM, MLP, NoiseSchedule
    >>> schedule = NoiseSchedule.uniform(T=10)
    >>> model = CDM(MLP(2, schedule.num_levels, hidden=8), schedule)
    >>> particles = Particles.at(model, torch.randn(5, 2), level=11)
    >>> moved, accepted = hmc(model, particles, 0.1, DrawFrom(torch.Generator().manual_seed(0)))
    >>> moved.x.shape, accepted.shape
    (torch.Size([5, 2]), torch.Size([5]))
    """
    x, level = particles.x, particles.level
    wide = (-1, *[1] * (x.dim() - 1))
    momentum = draw.normal(x)
    log_joint = particles.log_prob[:, level] - _kinetic(momentum)
    length = torch.full_like(particles.log_prob[:, 0], math.sqrt(2 * step_size))
    if leapfrog > 1:
        length = length * (1 - JITTER + 2 * JITTER * draw.uniform(x))
    length = length.to(x.dtype).view(wide)
    proposal = particles
    momentum = momentum + length / 2 * particles.score
    for step in range(leapfrog):
        proposal = Particles.at(model, proposal.x + length * momentum, level, particles.label)
        momentum = momentum + (length if step + 1 < leapfrog else length / 2) * proposal.score
    log_ratio = proposal.log_prob[:, level] - _kinetic(momentum) - log_joint
    accepted = draw.uniform(x).log() < log_ratio  # a NaN is rejected
    return _choose(accepted, proposal, particles), accepted


def _kinetic(momentum: Tensor) -> Tensor:
    """(N,) float64 `|p|^2 / 2`."""
    return 0.5 * momentum.double().square().flatten(1).sum(1)


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
    """Levels from T+1 down to `lowest`: all of them, or `rungs` evenly spaced ones.

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
    """The particles' x unchanged: the default transition of `tune_step_sizes` to the next level."""
    return particles.x


@evaluation_mode
def tune_step_sizes(
    model: Energy,
    x: Tensor,
    levels: Sequence[int],
    generator: torch.Generator,
    moves: int = 2,
    label: Tensor | None = None,
    carry: Callable[[Particles, int], Tensor] = stay,
    leapfrog: int = 1,
) -> dict[int, float]:
    """A step size for each level, found by moving particles down the levels.

    At each level the logarithm of the step size starts at the value of the previous level and is adapted
    towards `target_acceptance` (Robbins & Monro 1951). The sizes are fixed afterwards, so later moves leave
    the density exactly invariant.

    Args:
        model: the energy.
        x: (N, ...) ~ N(0, I), the particles at the first level.
        levels: falling levels, starting at T+1 or T.
        generator: random numbers of the moves.
        moves: moves at each level; 20 more at the first.
        label: (N,) int64, for a class-conditional model.
        carry: (particles, next level) -> x (N, ...) at that level; by default x unchanged.
        leapfrog: leapfrog steps per move.

    Returns:
        level -> h, in units of x squared.
    """
    size, draw, target = x[0].numel() ** (-1 / 3), DrawFrom(generator), target_acceptance(leapfrog)
    sizes: dict[int, float] = {}
    particles = Particles.at(model, x, levels[0], label)
    for position, level in enumerate(levels):
        if position > 0:
            particles = Particles.at(model, carry(particles, level), level, label)
        warm_up = 20 if position == 0 else 0
        for _ in range(moves + warm_up):
            particles, accepted = hmc(model, particles, size, draw, leapfrog)
            size *= math.exp(float(accepted.double().mean()) - target)
        sizes[level] = size
    return sizes


@dataclass(frozen=True)
class Annealed:
    """Weighted particles after annealing along a ladder of levels, with estimates from their weights.

    Fields:
        x: (N, ...) particles; with their weights they represent the model's density at the last level.
        log_weight: (N,) float64, normalised.
        log_ratio: (K,) estimates of `log(Z[levels[k]] / Z[levels[0]])`; their exponentials are unbiased if
            the particles start as draws from the density of the first level.
        ess: (K,) effective sample size over N after each reweighting, before resampling.
        acceptance: (K,) acceptance rate of the moves at each level; NaN at the first, where there are none.
    """

    x: Tensor
    log_weight: Tensor
    log_ratio: Tensor
    ess: Tensor
    acceptance: Tensor


@evaluation_mode
def anneal(
    model: Energy,
    x: Tensor,
    levels: Sequence[int],
    step_sizes: Mapping[int, float],
    generator: torch.Generator,
    moves: int = 1,
    resample_below: float = 0.5,
    label: Tensor | None = None,
    leapfrog: int = 1,
    on_level: Callable[[Particles, Tensor], None] | None = None,
) -> Annealed:
    """Annealed importance sampling (arXiv physics/9803008) with resampling (Del Moral et al. 2006).

    At each level after the first the particles are reweighted, resampled if the weights are too uneven, and
    moved.

    Args:
        model: the energy.
        x: (N, ...) draws from the density of `levels[0]`.
        levels: K levels in order, falling or rising.
        step_sizes: level -> h for each level except the first, from `tune_step_sizes`.
        generator: random numbers of moves and resampling.
        moves: moves at each level.
        resample_below: effective sample size over N below which particles are resampled; 0 never resamples.
        label: (N,) int64, the same class for all, because resampling must not mix classes.
        leapfrog: leapfrog steps per move.
        on_level: called after the moves of each level with the particles and their accepted fractions (N,).
    """
    particles, draw = Particles.at(model, x, levels[0], label), DrawFrom(generator)
    log_weight = torch.full((len(x),), -math.log(len(x)), dtype=torch.float64, device=x.device)
    total, log_ratio, ess = 0.0, [0.0], [1.0]
    acceptance = [torch.full((), math.nan, dtype=torch.float64, device=x.device)]
    for level in levels[1:]:
        log_weight = log_weight + particles.log_prob[:, level] - particles.log_prob[:, particles.level]
        norm = log_weight.logsumexp(0)
        log_weight = log_weight - norm
        size = (-(2 * log_weight).logsumexp(0)).exp()
        found = torch.stack([norm, size]).tolist()  # the only synchronisation per level
        total += found[0]
        log_ratio.append(total)
        ess.append(found[1] / len(x))
        if ess[-1] < resample_below:
            particles = particles.pick(resample(log_weight, generator))
            log_weight = torch.full_like(log_weight, -math.log(len(x)))
        particles, accepted = move(model, particles.x, level, step_sizes[level], draw, moves, label, leapfrog)
        acceptance.append(accepted.mean())
        if on_level is not None:
            on_level(particles, accepted)
    ratios, sizes = (torch.tensor(values, dtype=torch.float64) for values in (log_ratio, ess))
    return Annealed(particles.x, log_weight, ratios, sizes, torch.stack(acceptance).cpu())


def move(
    model: Energy,
    x: Tensor,
    level: int,
    step_size: float,
    draw: Draw,
    moves: int,
    label: Tensor | None = None,
    leapfrog: int = 1,
) -> tuple[Particles, Tensor]:
    """`moves` moves (`hmc`) of `x` (N, ...) at `level`: (particles, accepted fraction (N,) float64).

    Arguments as in `hmc`; without moves the fraction is NaN.
    """
    particles = Particles.at(model, x, level, label)
    count = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for _ in range(moves):
        particles, accepted = hmc(model, particles, step_size, draw, leapfrog)
        count += accepted
    return particles, count / moves


def resample(log_weight: Tensor, generator: torch.Generator) -> Tensor:
    """(N,) int64 indices by systematic resampling; index i occurs N w_i times, rounded up or down.

    `log_weight` (N,) are the log-weights, up to a constant.

    >>> resample(torch.tensor([0.5, 0.25, 0.25, 0.0]).log(), torch.Generator().manual_seed(0))
    tensor([0, 0, 1, 2])
    """
    num = len(log_weight)
    points = (torch.rand(1, generator=generator, dtype=torch.float64) + torch.arange(num)) / num
    edges = log_weight.exp().cumsum(0)
    edges = edges / edges[-1]
    return torch.searchsorted(edges, upload(points, edges.device).to(edges.dtype)).clamp(max=num - 1)
