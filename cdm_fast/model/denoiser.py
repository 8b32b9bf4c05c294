"""What samplers need of a model: a noise schedule and `eps_hat`; and DDM, a network that predicts the noise.

# B batch, L = T+2 noise levels
"""

from collections.abc import Callable
from functools import wraps
from itertools import chain
from typing import Concatenate, Generic, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn

from cdm_fast.errors import UserError
from cdm_fast.model.schedule import NoiseSchedule
from cdm_fast.ops.checks import may_read
from cdm_fast.ops.precision import ieee_fp32


class Denoiser(nn.Module):
    """What samplers need: a schedule, and `eps_hat = E[eps | x_t = x]` with all that follows from it.

    Args:
        network: the trained module.
        schedule: the noise levels it was trained on.
        input_shape: shape of one input, such as (1, 8, 8); taken from `network.input_shape` if it has one.
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
        """`a[level]`, `s[level]` as (B, 1, ..., 1) in `like`'s dtype; `level` (B,) int64."""
        shape = (-1,) + (1,) * (like.dim() - 1)
        a, s = (table.index_select(0, level).to(like.dtype).view(shape) for table in (self.a, self.s))
        return a, s

    def denoise(self, x: Tensor, level: int | Tensor, label: Tensor | None = None) -> Tensor:
        """`eps_hat = E[eps | x_t = x]`, like `x` (B, ...).

        Args:
            level: int or (B,) int64, 0..T+1.
            label: (B,) int64 for a class-conditional network; -1 or None asks for the denoiser of all data.

        Raises:
            UserError: a level outside 0..T+1.
        """
        raise NotImplementedError

    def guided_denoise(self, x: Tensor, level: int | Tensor, label: Tensor, guidance: float) -> Tensor:
        """`(1 + w) eps_hat(x, label) - w eps_hat(x)` with w = `guidance` (arXiv 2207.12598), like `x`.

        The two denoisers are evaluated as one batch.
        """
        level = self.schedule.levels(level, x)
        labels = torch.cat([label, torch.full_like(label, -1)])
        conditional, marginal = self.denoise(torch.cat([x, x]), level.repeat(2), labels).chunk(2)
        return (1 + guidance) * conditional - guidance * marginal

    def predict_x0(self, x: Tensor, level: int | Tensor, label: Tensor | None = None) -> Tensor:
        """`x0_hat = (x - s eps_hat) / a`, like `x`.

        Raises:
            UserError: at level T+1, where nothing of the data is left.
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
        """`grad_x log p_t(x) = -eps_hat / s` (Tweedie), like `x`.

        Raises:
            UserError: at level 0 of a plain denoiser, where s = 0.
        """
        level = self.schedule.levels(level, x)
        if may_read(level) and bool((level == 0).any()):
            raise UserError(
                "level 0 holds no noise, and a plain denoiser has no score there: use level 1 or above"
            )
        return -self.denoise(x, level, label) / self.amplitudes(level, x)[1]


Wrapped = TypeVar("Wrapped", bound=Denoiser)


class Wrapper(Denoiser, Generic[Wrapped]):
    """A denoiser made of another one, `model`, on the same schedule and of the same input shape.

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
    """`x` in the dtype and on the device of the network's numbers."""
    return x.to(prototype(model))


Model = TypeVar("Model", bound=nn.Module)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def measures(
    function: Callable[Concatenate[Model, Arguments], Result],
) -> Callable[Concatenate[Model, Arguments], Result]:
    """For a function that only reads its model: no gradients, dropout off, every module's mode put back.

    fp32 is IEEE's there, on a GPU too (`ieee_fp32`).
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


def prototype(model: nn.Module) -> Tensor:
    """A tensor in the dtype and on the device of the model's numbers."""
    return next(p for p in chain(model.parameters(), model.buffers()) if p.is_floating_point())


class DDM(Denoiser):
    """A plain denoising diffusion model: `network(x, level, label)` predicts the noise (arXiv 2006.11239)."""

    def draw_levels(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """(num,) int64 levels, evenly from 1..T (DDPM eq. 14)."""
        return torch.randint(1, self.schedule.T + 1, (num,), device=self.a.device, generator=generator)

    def denoise(self, x: Tensor, level: int | Tensor, label: Tensor | None = None) -> Tensor:
        return self.network(x, self.schedule.levels(level, x), label)
