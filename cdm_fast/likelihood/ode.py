"""Likelihood by the probability-flow ODE, which depends only on the score, not on the logits' constants.

The flow of arXiv 2011.13456, section 4.3, transports `x_t` to noise such that its marginal at every level is
the density of that level. It uses only eps_hat and its divergence: it shares the network with the single
pass, and is normalised by construction, since any velocity field maps a normalised density to a normalised
one.

In `u = x_t / r`, `r = sqrt(a^2 + s^2)`, every schedule is variance-preserving, and `alpha = a/r`,
`zeta = s/r` are functions of the log-SNR `l` alone. The path has three sections, derived in
docs/explanation/likelihood.md:

- levels t..T: `du/dl = (zeta/2) (zeta u - eps_hat)`, with eps_hat interpolated linearly in l between levels;
- from T to pure noise: x0_hat changes linearly in alpha to the mean of the data, its value at u = 0;
- from level 0 to level 1, where no score is trained: a bridge that uses the score function of `x_1 / a_1` at
  all times.

A model with a path in continuous time (`ContinuousDenoiser`) is evaluated at the solver's own times, without
levels: from its least noisy time, where no noise is added to an image, to its noisiest, where the density is
assumed to be N(0, beta^2 I), as in the model's own program.

# B batch, d values per image, P probes of the divergence, T+2 noise levels
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cdm_fast.errors import UserError
from cdm_fast.host.device import upload
from cdm_fast.model import Denoiser, evaluation_mode, log_normal
from cdm_fast.model.denoiser import like_network
from cdm_fast.model.schedule import NoisePath

Velocity = Callable[[float, Tensor], Tensor]  # (time, u (B, ...)) -> du/dtime, like u
Solver = Callable[..., tuple[Tensor, Tensor]]

# By default the divergence is exact up to this many dimensions, and estimated from this many probes above.
EXACT_DIMENSIONS = 16
DEFAULT_PROBES = 4


class ContinuousDenoiser(Denoiser):
    """A denoiser with a path in continuous time; its levels 1..T are times on this path."""

    path: NoisePath

    def flow_rate(self, time: float, y: Tensor, label: Tensor | None = None) -> Tensor:
        """`dy/dtime` of the probability-flow ODE, like y (B, ...), in the path's own scale."""
        raise NotImplementedError

    def level_times(self) -> Tensor:
        """(T+1,) float64: the time of each level 0..T; the time of level 0 is that of the least noise."""
        return torch.cat([torch.tensor([self.path.least]).double(), self.path.times(self.schedule.T)])

    def level_scales(self) -> Tensor:
        """(T+1,) float64: the ratio y / x at each level 0..T; 1 at level 0."""
        alpha, _ = self.path.amplitudes(self.level_times()[1:])
        return torch.cat([torch.ones(1).double(), alpha / self.schedule.a[1:-1]])


@dataclass(frozen=True)
class FlowLikelihood:
    """Log-likelihoods by the flow: at the level where it starts, and at the recorded levels.

    Fields:
        log_prob: (B,) nats.
        probe_stderr: (B,) nats, from the spread over probes; 0 if the divergence is exact.
        levels: the n recorded levels.
        x: (n, B, ...) `x_t` of each trajectory at these levels.
        log_prob_at: (n, B) their `log p_t` in nats.
        evaluations: number of evaluations of the velocity and its divergence.
        noise_norm: (B,) squared norm `|u|^2` of the noise where each trajectory ends: chi-squared with d
            degrees of freedom for draws from the model's density, far larger if a trajectory has diverged.
    """

    log_prob: Tensor
    probe_stderr: Tensor
    levels: list[int]
    x: Tensor
    log_prob_at: Tensor
    evaluations: int
    noise_norm: Tensor


@evaluation_mode
def flow_log_prob(
    model: Denoiser,
    x: Tensor,
    level: int = 0,
    *,
    tolerance: float = 1e-5,
    probes: int | None = None,
    seed: int = 0,
    levels: Sequence[int] = (),
    label: Tensor | None = None,
) -> FlowLikelihood:
    """`log p_level(x)` in nats by the probability-flow ODE of the model's score, integrated in float64.

    Args:
        x: (B, ...), on the model's device.
        level: noise level of x, 0..T.
        tolerance: rtol and atol of the adaptive solver (Dormand-Prince 5(4)).
        probes: number of random +-1 vectors of Hutchinson's estimate of the divergence, fixed along a
            trajectory; 0 is the exact divergence, at d times the cost of a probe. By default exact up to
            `EXACT_DIMENSIONS`, `DEFAULT_PROBES` above.
        seed: seed of the probes. The probes of an image depend on the seed and its index in x.
        levels: levels between `level` and T at which to record the state.
        label: (B,) int64, for `log p(x|label)` of a class-conditional model.

    Raises:
        UserError: torchdiffeq is missing, an argument is out of range, or the solver gave up.

    For pixels from N(0, I) the flow is constant, and the density is known:

    >>> from cdm_fast import DDM, NoiseSchedule
    >>> class StandardNormal(DDM):
    ...     def denoise(self, x, level, label=None):
    ...         return self.amplitudes(self.schedule.levels(level, x), x)[1] * x
    >>> model = StandardNormal(torch.nn.Identity(), NoiseSchedule.cosine(T=200))
    >>> x = torch.tensor([[0.0, 0.0], [1.0, -1.0]])
    >>> flow = flow_log_prob(model, x, level=3)
    >>> bool(torch.allclose(flow.log_prob, log_normal(x).double(), atol=1e-3))
    True
    >>> flow.probe_stderr.tolist(), [round(value, 3) for value in flow.noise_norm.tolist()]
    ([0.0, 0.0], [0.0, 2.0])
    """
    solver = load_solver()
    T = model.schedule.T
    for t, lowest in ((level, 0), *((t, level + 1) for t in levels)):
        if not lowest <= t <= T:
            raise UserError(f"level {t}: the flow starts at 0 to T = {T}, and records levels above its start")
    if not 0 < tolerance < 1:
        raise UserError(f"tolerance is {tolerance}: it must lie between 0 and 1, such as 1e-5")
    if probes is None:
        probes = 0 if x[0].numel() <= EXACT_DIMENSIONS else DEFAULT_PROBES
    if probes < 0 or probes == 1:
        raise UserError(f"probes is {probes}: give 0 for the exact divergence, or 2 or more for an error bar")
    kind = _OwnFlow if isinstance(model, ContinuousDenoiser) else _Flow
    return kind(model, x, probes, seed, tolerance, solver, label).run(level, sorted(set(levels)))


def load_solver() -> Solver:
    """`odeint` of torchdiffeq; raises UserError where it is not installed."""
    try:
        from torchdiffeq import odeint
    except ImportError:
        raise UserError(
            'the ODE likelihood needs torchdiffeq, which is not installed: pip install "cdm_fast[audit]"'
        ) from None
    return odeint


class _Flow:
    """The flow of one batch from its level to noise; the state is u and the integral of its divergence."""

    def __init__(
        self,
        model: Denoiser,
        x: Tensor,
        probes: int,
        seed: int,
        tolerance: float,
        solver: Solver,
        label: Tensor | None,
    ) -> None:
        self.label = label
        self.model, self.schedule, self.solver = model, model.schedule, solver
        self.tolerance, self.evaluations = tolerance, 0
        a, s = self.schedule.a, self.schedule.s
        self.r = (a.square() + s.square()).sqrt()
        self.dim = x[0].numel()
        self.exact = probes == 0
        if self.exact:
            self.directions = torch.eye(self.dim, dtype=torch.float64, device=x.device).view(
                -1, 1, *x.shape[1:]
            )
        else:
            generator = torch.Generator().manual_seed(seed)
            signs = torch.randint(2, (len(x), probes, *x.shape[1:]), generator=generator) * 2 - 1
            self.directions = signs.transpose(0, 1).to(x.device, torch.float64)
        self.u = x.double()
        self.divergence = self.u.new_zeros(len(x), max(1, probes))  # (B, P), its integral so far

    def run(self, level: int, levels: list[int]) -> FlowLikelihood:
        """Integrates from `level` to pure noise, recording the state at the ascending `levels`."""
        T, log_snr = self.schedule.T, self.schedule.log_snr
        log_volume = 0.0  # log p_level(x) - log p(u), the change of coordinates at the start
        if level == 0:
            self._integrate(self._bridge_from_data, [0.0, 1.0])
            start, scale = 1, float(self.schedule.a[1] / self.r[1])
            self.u = self.u * scale
            log_volume += self.dim * math.log(scale)
        else:
            start, scale = level, float(self.r[level])
            self.u = self.u / scale
            log_volume -= self.dim * math.log(scale)
        stops = sorted({start, *levels, T})
        times = [float(log_snr[t]) for t in stops]
        if start == T:
            states, divergences = self.u[None], self.divergence[None]
        else:
            states, divergences = self._integrate(self._between_levels, times)
        self._integrate(self._to_noise, [0.0, 1.0])
        kept = [stops.index(t) for t in levels]
        return self._found(1.0, log_volume, levels, states[kept], divergences[kept], self.r[levels])

    def _found(
        self,
        noise_scale: float,  # the state at the end is a draw of N(0, noise_scale^2 I)
        log_volume: float,
        levels: list[int],
        states: Tensor,  # (n, B, ...) at those levels
        divergences: Tensor,  # (n, B, P)
        radius: Tensor,  # (n,) x over state
    ) -> FlowLikelihood:
        noise = self.u / noise_scale
        base = log_normal(noise) - self.dim * math.log(noise_scale)  # (B,)
        each = base[:, None] + self.divergence + log_volume  # (B, P)
        radius = radius.to(self.u)
        rest = (self.divergence - divergences).mean(2)  # (n, B), from each level to noise
        return FlowLikelihood(
            log_prob=each.mean(1),
            probe_stderr=each.std(1) / math.sqrt(each.shape[1]) if not self.exact else torch.zeros_like(base),
            levels=levels,
            x=states * radius.view(-1, *[1] * self.u.dim()),
            log_prob_at=base + rest - self.dim * radius.log()[:, None],
            evaluations=self.evaluations,
            noise_norm=noise.square().flatten(1).sum(1),
        )

    def _integrate(self, velocity: Velocity, times: list[float]) -> tuple[Tensor, Tensor]:
        """States (n, B, ...) and divergences (n, B, P) at `times`; the last become the flow's own state."""

        def rate(time: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            self.evaluations += 1
            return self._with_divergence(velocity, float(time), state[0])

        try:
            states, divergences = self.solver(
                rate,
                (self.u, self.divergence),
                torch.tensor(times, dtype=torch.float64, device=self.u.device),
                rtol=self.tolerance,
                atol=self.tolerance,
                method="dopri5",
            )
        except AssertionError as error:  # torchdiffeq raises it for a step of length zero, or NaN
            raise UserError(
                f"the ODE solver gave up at tolerance {self.tolerance} ({error}): the network is too rough"
                " or not finite there; give a larger tolerance"
            ) from None
        self.u, self.divergence = states[-1], divergences[-1]
        return states, divergences

    def _with_divergence(self, velocity: Velocity, time: float, u: Tensor) -> tuple[Tensor, Tensor]:
        """The velocity like u, and its divergence: `v^T J v` for every probe (B, P), or exact (B, 1)."""
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            rate = velocity(time, u)
        columns = [
            (torch.autograd.grad(rate, u, v.expand_as(u), retain_graph=True)[0] * v).flatten(1).sum(1)
            for v in self.directions
        ]
        divergence = torch.stack(columns, dim=1)
        return rate.detach(), divergence.sum(1, keepdim=True) if self.exact else divergence

    def _eps_hat(self, u: Tensor, levels: list[int]) -> Tensor:
        """eps_hat (len(levels), B, ...) for every level at `x_t = r_t u`, evaluated as one batch."""
        x = like_network(self.model, torch.cat([float(self.r[t]) * u for t in levels]))
        index = upload(torch.tensor(levels).repeat_interleave(len(u)), u.device)
        label = None if self.label is None else self.label.repeat(len(x) // len(self.label))
        return self.model.denoise(x, index, label).to(u.dtype).unflatten(0, (len(levels), -1))

    def _between_levels(self, log_snr: float, u: Tensor) -> Tensor:
        """`du/dl` at log-SNR l, with eps_hat interpolated linearly in l between the levels on either side."""
        table = self.schedule.log_snr
        t = int((table[1:-1] >= log_snr).sum().clamp(1, self.schedule.T - 1))  # between levels t and t+1
        low, high = self._eps_hat(u, [t, t + 1])
        share = (log_snr - float(table[t + 1])) / float(table[t] - table[t + 1])
        zeta = math.sqrt(1 / (1 + math.exp(log_snr)))
        return zeta / 2 * (zeta * u - (share * low + (1 - share) * high))

    def _to_noise(self, time: float, u: Tensor) -> Tensor:
        """`du/dtime` from level T (time 0) to pure noise (time 1), linear in the angle arcsin(alpha)."""
        T = self.schedule.T
        last = float(self.schedule.a[T] / self.r[T])  # alpha of level T
        angle = (1 - time) * math.asin(last)
        at_zero = u[:1] if self.label is None else u  # one mean of the data, or one for each label
        both = self._x0_hat_at_T(torch.cat([torch.zeros_like(at_zero), u]))
        mean, of_u = both.split([len(at_zero), len(u)])
        x0_hat = mean + math.sin(angle) / last * (of_u - mean)
        return -math.asin(last) / math.cos(angle) * (x0_hat - math.sin(angle) * u)

    def _x0_hat_at_T(self, u: Tensor) -> Tensor:
        """`x0_hat = (u - zeta eps_hat) / alpha` at level T, like u."""
        T = self.schedule.T
        alpha, zeta = float(self.schedule.a[T] / self.r[T]), float(self.schedule.s[T] / self.r[T])
        return (u - zeta * self._eps_hat(u, [T])[0]) / alpha

    def _bridge_from_data(self, time: float, y: Tensor) -> Tensor:
        """`dy/dtime` from level 0 (time 0) to `y = x_1 / a_1` (time 1), linear in the noise variance."""
        ratio = float(self.schedule.a[1] / self.r[1])
        return float(self.schedule.sigma[1]) / 2 * self._eps_hat(ratio * y, [1])[0]


class _OwnFlow(_Flow):
    """The flow in a model's own continuous time and scale; the state is y in place of u."""

    model: ContinuousDenoiser

    def run(self, level: int, levels: list[int]) -> FlowLikelihood:
        path = self.model.path
        times, scales = self.model.level_times(), self.model.level_scales()  # (T+1,) each
        self.u = self.u * float(scales[level])
        stops = times[[level, *levels]].tolist()
        distinct = list(dict.fromkeys([*stops, path.most]))
        states, divergences = self.u[None], self.divergence[None]
        if len(distinct) > 1:
            states, divergences = self._integrate(self._rate, distinct)
        _, beta = path.amplitudes(torch.tensor([path.most]).double())
        kept = [distinct.index(time) for time in stops[1:]]
        log_volume = self.dim * math.log(float(scales[level]))
        return self._found(
            float(beta), log_volume, levels, states[kept], divergences[kept], 1 / scales[levels]
        )

    def _rate(self, time: float, y: Tensor) -> Tensor:
        return self.model.flow_rate(time, like_network(self.model, y), self.label).to(y.dtype)
