"""Other programs' networks as denoisers of this library: converts what they predict to eps_hat.

    model = ScoreSDE(network, "vp")                # score_sde: VP, VE, sub-VP
    model = SigmaDenoiser(network)                 # EDM, EDM2: D(x; sigma), preconditioned
    model = FlowMatching(network)                  # velocities along straight lines
    model = PathDenoiser(f, path, "x0")            # any f(y, time) -> eps | x0 | v | score | velocity
    model = LevelDenoiser(f, schedule, "eps")      # any f(x, level), at discrete levels only

Each has a schedule, so it works with samplers, the variational bound, classification and noise-blind
denoising; all except the last have a path in continuous time, which the ODE likelihood follows.

# B batch, T levels of the grid, K classes
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from cdm_fast.errors import UserError
from cdm_fast.interop.paths import sigma_path, straight_path, sub_vp_path, ve_path, vp_path
from cdm_fast.likelihood.ode import ContinuousDenoiser
from cdm_fast.model import Denoiser
from cdm_fast.model.schedule import NoisePath, NoiseSchedule

Predicts = Literal["eps", "x0", "v", "score", "velocity"]
Call = Callable[[Any, Tensor, Tensor, Tensor | None], Tensor]  # (network, y, condition (B,), label)

LEVELS = 1000  # default number of levels in the grid of a continuous path


def call_plain(network: Any, y: Tensor, condition: Tensor, label: Tensor | None) -> Tensor:
    """`network(y, condition)`, or `network(y, condition, label)` if there is a label."""
    return network(y, condition) if label is None else network(y, condition, label)


class _Function(nn.Module):
    """A plain function as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: Any) -> Tensor:
        return self.function(*arguments)


class Foreign(Denoiser):
    """The base of all wrappers here; it calls the network, converts labels, and knows what it predicts.

    Subclasses define how levels are converted to the network's own amplitudes and condition.
    """

    def __init__(
        self,
        network: Callable[..., Any],
        schedule: NoiseSchedule,
        predicts: Predicts,
        *,
        call: Call = call_plain,
        input_shape: tuple[int, ...] | None = None,
        num_classes: int | None = None,
        null_label: int | None = None,
        description: str = "",
    ) -> None:
        if predicts not in get_args(Predicts):
            raise UserError(f"predicts is {predicts!r}: choose one of {', '.join(get_args(Predicts))}")
        module = network if isinstance(network, nn.Module) else _Function(network)
        super().__init__(module, schedule, input_shape)
        self.predicts, self.call = predicts, call
        self.num_classes, self.null_label = num_classes, null_label
        self.description = description or type(network).__name__

    def _output(self, y: Tensor, condition: Tensor, label: Tensor | None) -> Tensor:
        """The network's output in the dtype of y, without the channels of a learned variance."""
        label = self._label(label, y)
        exact = torch.promote_types(y.dtype, torch.float32)
        out = self.call(self.network, y, condition.to(y.device, exact), label)
        if out.shape != y.shape and out.dim() == y.dim() and out.shape[1] == 2 * y.shape[1]:
            out = out[:, : y.shape[1]]  # the rest is the log-variance of the reverse step
        if out.shape != y.shape:
            raise UserError(
                f"{self.description} returned {tuple(out.shape)} for an input of {tuple(y.shape)}: a denoiser"
                " returns its input's shape, or twice the channels"
            )
        return out.to(y.dtype)

    def _label(self, label: Tensor | None, y: Tensor) -> Tensor | None:
        """The label as the network takes it: its null class if there is no label."""
        if self.num_classes is None:
            if label is not None and bool((label >= 0).any()):
                raise UserError(f"label= was given, but {self.description} has no classes: leave it out")
            return None
        if label is None:
            label = torch.full((len(y),), -1, device=y.device)
        if self.null_label is None and bool((label < 0).any()):
            raise UserError(
                f"{self.description} denoises only given a class, and no label was given: pass one of 0 to"
                f" {self.num_classes - 1}, or null_label= if it has a null class"
            )
        if int(label.max()) >= self.num_classes:
            raise UserError(
                f"label {int(label.max())} does not exist: classes are 0 to {self.num_classes - 1}"
            )
        return label if self.null_label is None else torch.where(label < 0, self.null_label, label)

    def _ends(self, x: Tensor, level: Tensor, eps_hat: Tensor) -> Tensor:
        """`eps_hat`, exact at both ends, where no network is needed: 0 at data, x at pure noise."""
        shape = (-1,) + (1,) * (x.dim() - 1)
        eps_hat = torch.where((level == 0).view(shape), torch.zeros_like(x), eps_hat)
        return torch.where((level == self.schedule.T + 1).view(shape), x, eps_hat)


class LevelDenoiser(Foreign):
    """Any callable on levels: `f(x, condition, label)` at `x_t = a[t] x_0 + s[t] eps` of `schedule`.

    It has no path in continuous time, so the ODE likelihood interpolates eps_hat between levels.

    Args:
        network: a module or a function.
        schedule: the levels on which it was trained.
        predicts: "eps", "x0", "v" (`a eps - s x_0`, for variance-preserving schedules) or "score".
        conditions: (T,) the conditioning value of the network for levels 1..T; by default the level.
        call: `call(network, x, condition (B,), label (B,) or None) -> Tensor`, if the network needs its
            arguments in another form.
        input_shape: shape of one input.
        num_classes: K of a class-conditional network.
        null_label: the label that stands for no class, if there is one.

    Raises:
        UserError: an unknown `predicts`; "v" with another schedule; conditions of another length.
    """

    conditions: Tensor

    def __init__(
        self,
        network: Callable[..., Any],
        schedule: NoiseSchedule,
        predicts: Predicts = "eps",
        *,
        conditions: Tensor | None = None,
        **options: Any,
    ) -> None:
        super().__init__(network, schedule, predicts, **options)
        if predicts == "velocity":
            raise UserError("a velocity needs a path in continuous time: wrap the network in FlowMatching")
        if predicts == "v":
            _require_preserved(schedule.a, schedule.s)
        if conditions is None:
            conditions = torch.arange(1, schedule.T + 1)
        if conditions.shape != (schedule.T,):
            raise UserError(
                f"conditions have shape {tuple(conditions.shape)}: give one for each of {schedule.T} levels"
            )
        self.register_buffer("conditions", conditions.double(), persistent=False)

    def denoise(self, x: Tensor, level: int | Tensor, label: Tensor | None = None) -> Tensor:
        level = self.schedule.levels(level, x)
        inside = level.clamp(1, self.schedule.T)
        a, s = self.amplitudes(inside, x)
        out = self._output(x, self.conditions[inside - 1], label)
        return self._ends(x, level, to_eps(self.predicts, out, x, a, s))


class PathDenoiser(Foreign, ContinuousDenoiser):
    """Any callable in continuous time: `f(y, condition, label)` at `y = alpha x_0 + beta eps` of `path`.

    Args:
        network: a module or a function.
        path: see `cdm_fast.interop.paths`.
        predicts: "eps", "x0", "v" (`alpha eps - beta x_0`, for variance-preserving paths), "score"
            (of y) or "velocity" (`d alpha/dt x_0 + d beta/dt eps`).
        condition: a function from times (n,) to the conditioning value of the network; by default the time.
        levels: T, number of levels in the grid for samplers and the bound, at the times `path.times(T)`.
        call, input_shape, num_classes, null_label: as in `LevelDenoiser`.

    Raises:
        UserError: an unknown `predicts`; "v" with another path.
    """

    def __init__(
        self,
        network: Callable[..., Any],
        path: NoisePath,
        predicts: Predicts,
        *,
        condition: Callable[[Tensor], Tensor] | None = None,
        levels: int = LEVELS,
        **options: Any,
    ) -> None:
        super().__init__(network, path.schedule(levels), predicts, **options)
        self.path, self.condition = path, condition or (lambda time: time)
        if predicts == "v":
            _require_preserved(*path.amplitudes(path.times(levels)))

    def denoise(self, x: Tensor, level: int | Tensor, label: Tensor | None = None) -> Tensor:
        level = self.schedule.levels(level, x)
        inside = level.clamp(1, self.schedule.T).cpu()
        scale = _column(self.level_scales()[inside], x)
        return self._ends(x, level, self.eps_hat(scale * x, self.level_times()[inside], label))

    def eps_hat(self, y: Tensor, time: Tensor, label: Tensor | None = None) -> Tensor:
        """`E[eps | y]`, like y (B, ...) in the path's scale; time (B,) float64 on the CPU."""
        alpha, beta = (_column(amplitude, y) for amplitude in self.path.amplitudes(time))
        out = self._output(y, self.condition(time), label)
        if self.predicts == "velocity":
            d_alpha, d_beta = (_column(rate, y) for rate in self.path.rates(time))
            return (alpha * out - d_alpha * y) / (alpha * d_beta - d_alpha * beta)
        return to_eps(self.predicts, out, y, alpha, beta)

    def flow_rate(self, time: float, y: Tensor, label: Tensor | None = None) -> Tensor:
        """`dy/dtime`: `d log alpha/dt y + (d beta/dt - beta d log alpha/dt) eps_hat`."""
        times = torch.full((len(y),), time, dtype=torch.float64)
        if self.predicts == "velocity":
            return self._output(y, self.condition(times), label)
        alpha, beta = (float(amplitude) for amplitude in self.path.amplitudes(times[:1]))
        d_alpha, d_beta = (float(rate) for rate in self.path.rates(times[:1]))
        drift = d_alpha / alpha
        return drift * y + (d_beta - beta * drift) * self.eps_hat(y, times, label)


class ScoreSDE(PathDenoiser):
    """A network of the score_sde family in continuous time: "vp", "sub-vp" or "ve" (arXiv 2011.13456).

    VP and sub-VP networks take 999 time and return `-beta score`; VE networks take sigma and return the
    score. For a function of the time that returns the score itself use `PathDenoiser(f, path, "score")`.

    Args:
        network: `network(y, labels)`.
        kind: "vp", "sub-vp" or "ve".
        path_options: options of `vp_path`, `sub_vp_path` or `ve_path`, if they differ from the authors'.
        options: as in `PathDenoiser`.
    """

    def __init__(
        self,
        network: Callable[..., Any],
        kind: Literal["vp", "sub-vp", "ve"],
        path_options: dict[str, float] | None = None,
        **options: Any,
    ) -> None:
        paths = {"vp": vp_path, "sub-vp": sub_vp_path, "ve": ve_path}
        if kind not in paths:
            raise UserError(f"kind is {kind!r}: choose one of {', '.join(paths)}")
        path = paths[kind](**(path_options or {}))
        if kind == "ve":
            super().__init__(
                network, path, "score", condition=lambda time: path.amplitudes(time)[1], **options
            )
        else:  # minus beta times the score is eps
            super().__init__(network, path, "eps", condition=lambda time: 999 * time, **options)


class SigmaDenoiser(PathDenoiser):
    """A network that takes sigma and returns the denoised image: EDM, EDM2, and k-diffusion's denoisers.

    `D(y; sigma)` of arXiv 2206.00364, with the preconditioning inside. Each label becomes a one-hot row, and
    the null class a row of zeros, as these networks expect.

    Args:
        network: `network(y, sigma)` or, with classes, `network(y, sigma, one_hot)`.
        sigma_min, sigma_max: the range of noise in which it is used; the ODE begins at `sigma_min`.
        options: as in `PathDenoiser`; `num_classes` is the network's `label_dim` by default.
    """

    def __init__(
        self,
        network: Callable[..., Any],
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        **options: Any,
    ) -> None:
        classes = getattr(network, "label_dim", 0) or None
        size, channels = (getattr(network, name, None) for name in ("img_resolution", "img_channels"))
        shape = None if size is None or channels is None else (int(channels), int(size), int(size))
        options = {"num_classes": classes, "input_shape": shape, **options}
        classes = options["num_classes"]
        if classes is not None:  # the null class, K, becomes a row of zeros
            options = {"null_label": classes, "call": partial(call_one_hot, classes), **options}
        super().__init__(network, sigma_path(sigma_min, sigma_max), "x0", condition=torch.exp, **options)


def call_one_hot(num_classes: int, network: Any, y: Tensor, sigma: Tensor, label: Tensor | None) -> Tensor:
    """`network(y, sigma, rows)` with each label as a row of K numbers; K itself, the null class, as zeros."""
    assert label is not None, "a network with classes always has a label, its null class at least"
    return network(y, sigma, torch.nn.functional.one_hot(label, num_classes + 1)[:, :-1].to(y))


class FlowMatching(PathDenoiser):
    """A velocity along straight lines (arXiv 2210.02747): `network(y, t)` is `dy/dt`.

    Args:
        network: a module or a function of (y, t).
        sigma_min: noise at the data end.
        data_first: t is 0 at the data and 1 at noise; by default the opposite.
        options: as in `PathDenoiser`.
    """

    def __init__(
        self,
        network: Callable[..., Any],
        sigma_min: float = 0.0,
        data_first: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(network, straight_path(sigma_min, data_first), "velocity", **options)


def to_eps(predicts: str, out: Tensor, y: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """eps_hat from a network's prediction for `y = alpha x_0 + beta eps`; "v" is `alpha eps - beta x_0`."""
    if predicts == "eps":
        return out
    if predicts == "x0":
        return (y - alpha * out) / beta
    if predicts == "v":
        return beta * y + alpha * out
    return -beta * out  # the score


def _require_preserved(a: Tensor, s: Tensor) -> None:
    if not torch.allclose(a**2 + s**2, torch.ones_like(a), rtol=0, atol=1e-6):
        raise UserError("predicts is 'v', which is defined only for a^2 + s^2 = 1: give eps, x0 or score")


def _column(values: Tensor, like: Tensor) -> Tensor:
    """(B, 1, ..., 1) on the device and in the dtype of `like` (B, ...)."""
    return values.to(like).view(-1, *[1] * (like.dim() - 1))
