"""Noise schedules: the amplitudes of data and noise at every level.

Legend: B batch, T the number of noisy levels, L = T+2 levels in all.

One convention for every schedule: x_t = a[t] x_0 + s[t] eps with eps ~ N(0, I). Level 0 is clean data
(a = 1, s = 0), level T+1 is pure noise (a = 0, s = 1), and the signal-to-noise ratio falls at every level.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cdm_fast.errors import UserError
from cdm_fast.host.device import upload
from cdm_fast.ops.checks import may_read

# Largest beta of one level. Nichol & Dhariwal clip at this value so that no level erases all signal; the
# linear schedule needs the same below T = 21, where the factor 1000/T raises its last beta to 1 or above.
MAX_BETA = 0.999


Spacing = Literal["level", "log_snr"]


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """Signal and noise amplitudes of every level, `x_t = a[t] x_0 + s[t] eps`.

    Build one with `linear`, `uniform`, `ot`, `cosine` or `by_name`; the constructor takes any amplitudes.

    Args:
        name: used in error messages.
        a, s: (L,) amplitudes of signal and noise, L >= 3; kept as float64 on the CPU.

    Raises:
        UserError: unless a[0] = s[T+1] = 1, s[0] = a[T+1] = 0, all values lie in [0, 1], and a/s falls
            strictly.

    >>> schedule = NoiseSchedule.uniform(T=3)
    >>> schedule.num_levels, schedule.s.tolist()
    (5, [0.0, 0.25, 0.5, 0.75, 1.0])
    >>> schedule.grid(steps=2)
    [3, 2, 0]
    """

    name: str
    a: Tensor
    s: Tensor

    def __post_init__(self) -> None:
        a, s = (table.detach().to("cpu", torch.float64) for table in (self.a, self.s))
        object.__setattr__(self, "a", a)
        object.__setattr__(self, "s", s)
        _check_amplitudes(self.name, a, s)

    @property
    def num_levels(self) -> int:
        """L = T+2: clean data, T noisy levels, pure noise."""
        return len(self.a)

    @property
    def T(self) -> int:
        """The noisiest level that still holds signal; samplers start here."""
        return self.num_levels - 2

    @property
    def log_snr(self) -> Tensor:
        """(L,) `log(a^2 / s^2)`, from +inf at level 0 down to -inf at level T+1."""
        return 2 * (self.a.log() - self.s.log())

    @property
    def sigma(self) -> Tensor:
        """(L,) `s / a`, the noise of `x_t / a_t`, from 0 at level 0 up to +inf at level T+1."""
        return self.s / self.a

    @classmethod
    def by_name(cls, name: str, T: int) -> "NoiseSchedule":
        """The schedule called `name`, one of `SCHEDULES`, with T noisy levels; UserError for other names."""
        if name not in SCHEDULES:
            raise UserError(f"unknown noise schedule {name!r}: choose one of {', '.join(SCHEDULES)}")
        return SCHEDULES[name](T)

    @classmethod
    def linear(cls, T: int, betas: tuple[float, float] | None = None) -> "NoiseSchedule":
        """DDPM: beta rises linearly, 1e-4 to 0.02 at T = 1000; other T scale it by 1000/T, clipped at 0.999.

        Below T = 30 clipping leaves almost no signal at level T (a_T = 4e-9 at T = 10): sample with another
        schedule. `betas` replaces the first and the last beta for this T.
        Source: arXiv 2006.11239, section 4. Raises UserError unless T is an integer of at least 1, and
        0 < first <= last <= 0.999.
        """
        T = _check_T(T)
        if betas is not None:
            if not 0 < betas[0] <= betas[1] <= MAX_BETA:
                raise UserError(f"betas are {betas}: give 0 < first <= last <= {MAX_BETA}")
            return _variance_preserving("linear", torch.linspace(*betas, T, dtype=torch.float64))
        return _variance_preserving("linear", torch.linspace(1e-4, 0.02, T, dtype=torch.float64) * (1000 / T))

    @classmethod
    def cosine(cls, T: int) -> "NoiseSchedule":
        """Signal power follows a squared cosine, every beta clipped at 0.999.

        `a_t^2 = f(t)/f(0)`, `f(t) = cos^2((t/T + 0.008)/1.008 * pi/2)`: arXiv 2102.09672, eq. 17.
        Raises UserError unless T is an integer of at least 1.
        """
        T = _check_T(T)
        f = ((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * (math.pi / 2)).cos() ** 2
        return _variance_preserving("cosine", 1 - f[1:] / f[:-1])

    @classmethod
    def uniform(cls, T: int) -> "NoiseSchedule":
        """Noise amplitude linear in the level: `s = t/(T+1)`, `a = sqrt(1 - s^2)` (CDM, arXiv 2402.10095).

        Raises UserError unless T is an integer of at least 1.
        """
        s = torch.arange(_check_T(T) + 2, dtype=torch.float64) / (T + 1)
        return cls("uniform", ((1 - s) * (1 + s)).sqrt(), s)

    @classmethod
    def ot(cls, T: int, sigma_min: float = 0.0) -> "NoiseSchedule":
        """Straight lines from data to noise, `s = t/(T+1)`, `a = 1 - s`: flow matching, arXiv 2210.02747.

        `sigma_min` is the noise that remains at the data: `s = 1 - (1 - sigma_min) a` (their eq. 20) at every
        level but 0, which is clean data in every schedule here.
        Raises UserError unless T is an integer of at least 1 and sigma_min in [0, 1).
        """
        even = torch.arange(_check_T(T) + 2, dtype=torch.float64) / (T + 1)
        if not 0 <= sigma_min < 1:
            raise UserError(f"sigma_min is {sigma_min}: give a number from 0 to below 1")
        s = sigma_min + (1 - sigma_min) * even
        s[0] = 0.0
        return cls("ot", 1 - even, s)

    def levels(
        self,
        level: int | Tensor,  # (B,) int64, or one level for all
        like: Tensor,  # (B, ...)
    ) -> Tensor:
        """`level` as a (B,) int64 tensor on `like`'s device.

        Raises UserError for a wrong dtype or shape, and for a level outside 0..T+1. The values of a tensor on
        an accelerator or in a compiled graph are not checked, because reading them would wait for the device.
        """
        batch = like.shape[0]
        if isinstance(level, int):
            self._check_range(level, level)
            return torch.full((batch,), level, dtype=torch.int64, device=like.device)
        if level.dtype != torch.int64 or level.shape != (batch,):
            raise UserError(
                f"level is {level.dtype} of shape {tuple(level.shape)}: pass int64 ({batch},) or an int"
            )
        if may_read(level):
            self._check_range(int(level.min()), int(level.max()))
        return upload(level, like.device)

    def amplitudes(
        self,
        level: int | Tensor,  # (B,) int64, or one level for all
        like: Tensor,  # (B, ...)
    ) -> tuple[Tensor, Tensor]:
        """`a[level]` and `s[level]`, each (B, 1, ..., 1) in `like`'s dtype and on its device.

        Raises UserError as `levels` does.
        """
        index = self.levels(level, like)
        return at_levels(upload(self.a, like.device), upload(self.s, like.device), index, like)

    def noise(
        self,
        x0: Tensor,  # (B, ...)
        level: int | Tensor,  # (B,) int64, or one level for all
        eps: Tensor | None = None,  # like x0, or of a shape that broadcasts to it
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """`x_t = a[level] x_0 + s[level] eps`, like `x0`; for the int 0 as level, `x0` itself.

        By default `eps` is N(0, I), drawn on the CPU by `generator` if there is one.
        Raises UserError as `levels` does.

        >>> x0 = torch.ones(2, 3)
        >>> NoiseSchedule.ot(T=3).noise(x0, torch.tensor([0, 2]), eps=-x0)
        tensor([[1., 1., 1.],
                [0., 0., 0.]])
        """
        if isinstance(level, int) and level == 0:
            return x0
        a, s = self.amplitudes(level, x0)
        if eps is None:
            eps = upload(torch.randn(x0.shape, generator=generator, dtype=x0.dtype), x0.device)
        return a * x0 + s * eps

    def grid(self, steps: int, spacing: Spacing = "level") -> list[int]:
        """The steps + 1 levels that a sampler visits, from T down to 0.

        `spacing="level"` spaces them evenly in the level index; `"log_snr"` evenly in `log(a/s)` between
        levels T and 1, as closely as whole levels allow, with a last step from 1 to 0. Raises UserError
        unless 1 <= steps <= T, and for an unknown spacing.
        """
        if not isinstance(steps, int) or not 1 <= steps <= self.T:
            raise UserError(f"steps is {steps!r}: choose an integer from 1 to T = {self.T}")
        if spacing not in GRIDS:
            raise UserError(f"unknown spacing {spacing!r}: choose one of {', '.join(GRIDS)}")
        return [*GRIDS[spacing](self, steps), 0]

    def nearest_to_noise(self, sigma: float) -> int:
        """The level 1..T whose `s / a` is nearest to `sigma` on a logarithmic scale.

        Raises UserError unless `sigma` is positive and finite.
        """
        if not 0 < sigma < math.inf:
            raise UserError(f"noise of standard deviation {sigma}: give a positive finite number")
        return 1 + int((self.sigma[1:-1].log() - math.log(sigma)).abs().argmin())

    def _check_range(self, lowest: int, highest: int) -> None:
        if lowest < 0 or highest >= self.num_levels:
            wrong = lowest if lowest < 0 else highest
            raise UserError(f"level {wrong} does not exist: levels run from 0 (data) to {self.T + 1} (noise)")


SCHEDULES: dict[str, Callable[[int], NoiseSchedule]] = {
    "linear": NoiseSchedule.linear,
    "uniform": NoiseSchedule.uniform,
    "ot": NoiseSchedule.ot,
    "cosine": NoiseSchedule.cosine,
}


def _check_T(T: int) -> int:
    if isinstance(T, bool) or not isinstance(T, int) or T < 1:
        raise UserError(f"T is {T!r}: the number of noisy levels must be an integer of at least 1")
    return T


def _check_amplitudes(name: str, a: Tensor, s: Tensor) -> None:
    def require(holds: bool, rule: str) -> None:
        if not holds:
            raise UserError(f"noise schedule {name!r} is not valid: {rule}")

    require(
        a.dim() == 1 and a.shape == s.shape and len(a) >= 3,
        "a and s must be vectors of one length >= 3",
    )
    require(bool(a[0] == 1) and bool(s[0] == 0), "level 0 is clean data and needs a = 1, s = 0")
    require(bool(a[-1] == 0) and bool(s[-1] == 1), "level T+1 is pure noise and needs a = 0, s = 1")
    inside = ((a >= 0) & (a <= 1) & (s >= 0) & (s <= 1)).all()
    require(bool(inside), "a and s must lie in [0, 1]")
    log_ratio = a.log() - s.log()
    require(bool((log_ratio[1:] < log_ratio[:-1]).all()), "a/s must fall at every level")


def _variance_preserving(
    name: str,
    beta: Tensor,  # (T,) float64, variance added between levels t-1 and t
) -> NoiseSchedule:
    # Summing log(1 - beta) keeps s exact near data, where 1 - prod(1 - beta) would cancel.
    log_signal = torch.log1p(-beta.clamp(max=MAX_BETA)).cumsum(0)  # log a_t^2, t = 1..T
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    a = torch.cat([one, (0.5 * log_signal).exp(), zero])
    s = torch.cat([zero, (-torch.expm1(log_signal)).sqrt(), one])
    return NoiseSchedule(name, a, s)


def _grid_even_in_level(schedule: NoiseSchedule, steps: int) -> list[int]:
    T = schedule.T
    return [(2 * T * (steps - i) + steps) // (2 * steps) for i in range(steps)]  # T (1 - i/steps), rounded


def _grid_even_in_log_snr(schedule: NoiseSchedule, steps: int) -> list[int]:
    """`steps` strictly decreasing levels >= 1: nearest to an even grid in log-SNR, moved apart if equal."""
    T, log_snr = schedule.T, schedule.log_snr[1:-1]  # of levels 1..T
    wanted = torch.linspace(float(log_snr[-1]), float(log_snr[0]), steps, dtype=torch.float64)
    grid: list[int] = []
    for i, value in enumerate(wanted):
        nearest = 1 + int((log_snr - value).abs().argmin())
        below = grid[-1] - 1 if grid else T
        grid.append(max(min(nearest, below), steps - i))
    return grid


GRIDS: dict[str, Callable[[NoiseSchedule, int], list[int]]] = {
    "level": _grid_even_in_level,
    "log_snr": _grid_even_in_log_snr,
}


@dataclass(frozen=True)
class NoisePath:
    """A noise path in continuous time, as other programs define theirs: `y = alpha x_0 + beta eps`.

    Time runs from the time of the least noise to the time of the most noise, and may rise or fall. `y` has
    the scale of the path, which differs from that of a schedule for variance-exploding paths.

    Fields:
        name: used in messages.
        amplitudes: times (n,) float64 -> alpha, beta, each (n,), differentiable.
        least, most: the times of the least and the most noise at which the model is used; at `most`, `beta`
            is positive and y is assumed to be N(0, beta^2 I).
        times: T -> (T,) float64, the times of levels 1..T of a grid, for samplers and the variational bound.
    """

    name: str
    amplitudes: Callable[[Tensor], tuple[Tensor, Tensor]]
    least: float
    most: float
    times: Callable[[int], Tensor]

    def rates(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """`d alpha / d time` and `d beta / d time`, each (n,)."""
        return torch.func.jvp(self.amplitudes, (time,), (torch.ones_like(time),))[1]

    def schedule(self, T: int) -> NoiseSchedule:
        """The schedule with levels 1..T at `times(T)`.

        Its amplitudes are those of the path, rescaled to a^2 + s^2 = 1 if any of them exceeds 1.
        Raises UserError unless T is an integer of at least 1.
        """
        alpha, beta = self.amplitudes(self.times(_check_T(T)))
        if float(torch.maximum(alpha, beta).max()) > 1:
            r = torch.hypot(alpha, beta)
            alpha, beta = alpha / r, beta / r
        one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        return NoiseSchedule(self.name, torch.cat([one, alpha, zero]), torch.cat([zero, beta, one]))


def at_levels(
    a: Tensor,  # (L,)
    s: Tensor,  # (L,)
    level: Tensor,  # (B,) int64, on their device
    like: Tensor,  # (B, ...)
) -> tuple[Tensor, Tensor]:
    """`a[level]` and `s[level]`, each (B, 1, ..., 1) in `like`'s dtype."""
    shape = (-1,) + (1,) * (like.dim() - 1)
    a, s = (table.index_select(0, level).to(like.dtype).view(shape) for table in (a, s))
    return a, s


def evenly_spaced(first: int, last: int, most: int) -> list[int]:
    """All integers first..last, or `most` of them, evenly spaced."""
    count = min(most, last - first + 1)
    return sorted({round(float(t)) for t in torch.linspace(first, last, count, dtype=torch.float64)})


def even_in_log_noise(num_levels: int, smallest: float) -> NoiseSchedule:
    """`s` from `smallest` at level 1 to 1 at level T+1 in equal ratios, `a = sqrt(1 - s^2)`."""
    T = num_levels - 2
    s = torch.cat([torch.zeros(1), torch.logspace(math.log10(smallest), 0, T + 1, dtype=torch.float64)])
    s[-1] = 1
    return NoiseSchedule("log-noise", ((1 - s) * (1 + s)).sqrt(), s)
