"""`Denoiser`, the interface that samplers use, and DDM, a network that predicts the noise.

# B batch, L = T+2 noise levels
"""

from collections.abc import Callable
from functools import wraps
from itertools import chain
from typing import Concatenate, Generic, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn

from cdm_fast.errors import UserError
from cdm_fast.model.schedule import NoiseSchedule, at_levels
from cdm_fast.ops.checks import may_read
from cdm_fast.ops.precision import ieee_fp32


class Denoiser(nn.Module):
    """The base of all models: a noise schedule and the denoiser `eps_hat = E[eps | x_t = x]`.

    A subclass provides `denoise`; `predict_x0`, `score` and `guided_denoise` follow from it.
    See also `Energy`, a denoiser that knows `log p_t(x)` too.

    Args:
        network: the trained module.
        schedule: the noise levels on which it was trained.
        input_shape: shape of one input, such as (1, 8, 8); by default `network.input_shape`, if there is one.
    """

    a: Tensor
    s: Tensor

    def __init__(
        self, network: nn.Module, schedule: NoiseSchedule, input_shape: tuple[int, ...] | None = None
    ) -> None:
        super().__init__()
        self.network = network
        self.schedule = schedule
        self.input_shape: tuple[int, ...] | None = input_shape or getattr(network, "input_shape", None)
        self.register_buffer("a", schedule.a, persistent=False)
        self.register_buffer("s", schedule.s, persistent=False)

    def amplitudes(self, level: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """`schedule.amplitudes`, read from tables on the model's device without a copy from the host.

        `level` is (B,) int64 on that device. Its range is not checked.
        """
        return at_levels(self.a, self.s, level, like)

    def denoise(self, x: Tensor, level: int | Tensor, label: Tensor | None = None) -> Tensor:
        """`eps_hat = E[eps | x_t = x]`, like `x` (B, ...).

        Args:
            level: int or (B,) int64, 0..T+1.
            label: (B,) int64 for a class-conditional network; -1 or None stands for no class.

        Raises:
            UserError: a level outside 0..T+1.
        """
        raise NotImplementedError

    def guided_denoise(self, x: Tensor, level: int | Tensor, label: Tensor, guidance: float) -> Tensor:
        """Classifier-free guidance (arXiv 2207.12598): `(1 + w) eps_hat(x, label) - w eps_hat(x)`, like `x`.

        w is `guidance`. The two denoisers are evaluated as one batch. Arguments as in `denoise`.
        """
        level = self.schedule.levels(level, x)
        labels = torch.cat([label, torch.full_like(label, -1)])
        conditional, marginal = self.denoise(torch.cat([x, x]), level.repeat(2), labels).chunk(2)
        return (1 + guidance) * conditional - guidance * marginal

    def predict_x0(self, x: Tensor, level: int | Tensor, label: Tensor | None = None) -> Tensor:
        """`x0_hat = E[x_0 | x_t = x] = (x - s eps_hat) / a`, like `x`; arguments as in `denoise`.

        Raises:
            UserError: level T+1, which holds no signal.
        """
        level = self._levels_with_data(level, x)
        a, s = self.amplitudes(level, x)
        return (x - s * self.denoise(x, level, label)) / a

    def _levels_with_data(self, level: int | Tensor, x: Tensor) -> Tensor:
        """`level` as (B,) int64; UserError where it is T+1."""
        level = self.schedule.levels(level, x)
        if may_read(level) and bool((level == self.schedule.T + 1).any()):
            raise UserError(f"level {self.schedule.T + 1} is pure noise: x0 cannot be predicted from it")
        return level

    def score(self, x: Tensor, level: int | Tensor, label: Tensor | None = None) -> Tensor:
        """`grad_x log p_t(x) = -eps_hat / s` (Tweedie's formula), like `x`; arguments as in `denoise`.

        Raises:
            UserError: level 0, where s = 0; an `Energy` has a score there too.
        """
        level = self.schedule.levels(level, x)
        if may_read(level) and bool((level == 0).any()):
            raise UserError(
                "level 0 holds no noise, and a plain denoiser has no score there: use level 1 or above"
            )
        return -self.denoise(x, level, label) / self.amplitudes(level, x)[1]


Wrapped = TypeVar("Wrapped", bound=Denoiser)


class Wrapper(Denoiser, Generic[Wrapped]):
    """A denoiser built from another one, `model`, with the same schedule and input shape.

    The model is registered once, as `network`: parameters, buffers and `state_dict` hold each tensor once.

    Args:
        model: the model to wrap.
    """

    def __init__(self, model: Wrapped) -> None:
        super().__init__(model, model.schedule, model.input_shape)

    @property
    def model(self) -> Wrapped:
        """The wrapped model."""
        return cast(Wrapped, self.network)


def like_network(model: Denoiser, x: Tensor) -> Tensor:
    """`x` in the dtype and on the device of the model's parameters."""
    return x.to(any_parameter(model))


Model = TypeVar("Model", bound=nn.Module)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def evaluation_mode(
    function: Callable[Concatenate[Model, Arguments], Result],
) -> Callable[Concatenate[Model, Arguments], Result]:
    """Decorator for a function that evaluates a model, its first argument, without training it.

    Inside, gradients are off, the model is in eval mode, and fp32 is IEEE single precision on a GPU too
    (`ieee_fp32`). Afterwards each module is back in its previous mode.
    """

    @wraps(function)
    def run(model: Model, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            with torch.no_grad(), ieee_fp32():
                return function(model, *args, **kwargs)
        finally:
            for module, training in modes:
                module.training = training

    return run


def any_parameter(model: nn.Module) -> Tensor:
    """A floating-point parameter of the model, or a buffer if there is none: tells its dtype and device."""
    return next(p for p in chain(model.parameters(), model.buffers()) if p.is_floating_point())


class DDM(Denoiser):
    """A plain denoising diffusion model: `network(x, level, label)` predicts the noise (arXiv 2006.11239).

    The baseline for CDM. It draws samples but has no `log p(x)`. See also `ddm_loss`, `CDM`.

    Args:
        network: a module that maps x (B, ...), levels (B,) int64 and labels (B,) int64 or None to `eps_hat`,
            like x; such as `UNetDenoiser` or `MLPDenoiser`.
        schedule, input_shape: as in `Denoiser`.

    >>> from cdm_fast import DDM, MLPDenoiser, NoiseSchedule
    >>> model = DDM(MLPDenoiser(3, hidden=8), NoiseSchedule.linear(T=10))
    >>> model.denoise(torch.zeros(2, 3), 5).shape
    torch.Size([2, 3])
    """

    def draw_levels(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """(num,) int64 levels, drawn uniformly from 1..T (DDPM eq. 14)."""
        return torch.randint(1, self.schedule.T + 1, (num,), device=self.a.device, generator=generator)

    def denoise(self, x: Tensor, level: int | Tensor, label: Tensor | None = None) -> Tensor:
        """The network's output, like `x`; arguments and errors as in `Denoiser.denoise`."""
        return self.network(x, self.schedule.levels(level, x), label)
