"""CDM and DDM: a denoiser, a score, and for a CDM the log-likelihood, on top of a network and a schedule.

# B batch, d = number of values of one input, L = T+2 noise levels
"""

import math
from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from cdm_fast.errors import UserError
from cdm_fast.nn import AdjointNetwork
from cdm_fast.ops import denoise_epilogue, denoise_x0, log_posterior, use_backend
from cdm_fast.ops._checks import may_read
from cdm_fast.schedule import NoiseSchedule

Model = TypeVar("Model", bound=nn.Module)
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def measures(
    function: Callable[Concatenate[Model, Arguments], Result],
) -> Callable[Concatenate[Model, Arguments], Result]:
    """For a function that only reads its model: no gradients, dropout off, every module's mode put back."""

    @wraps(function)
    def run(model: Model, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            with torch.no_grad():
                return function(model, *args, **kwargs)
        finally:
            for module, training in modes:
                module.training = training

    return run


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
            label: (B,) int64 for a class-conditional network.

        Raises:
            UserError: a level outside 0..T+1.
        """
        raise NotImplementedError

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


class DDM(Denoiser):
    """A plain denoising diffusion model: `network(x, level, label)` predicts the noise (arXiv 2006.11239)."""

    def draw_levels(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """(num,) int64 levels, evenly from 1..T (DDPM eq. 14)."""
        return torch.randint(1, self.schedule.T + 1, (num,), device=self.a.device, generator=generator)

    def denoise(self, x: Tensor, level: int | Tensor, label: Tensor | None = None) -> Tensor:
        return self.network(x, self.schedule.levels(level, x), label)


class CDM(Denoiser):
    """A Classification Diffusion Model (arXiv 2402.10095): one network of noise levels, read in two ways.

    Its logits `f(x)[t] = log p(t|x) + const` are density ratios between levels (Thm 3.2), and the input
    gradient of `F(x,t) = f(x)[T+1] - f(x)[t]` is the optimal denoiser (Thm 3.1).

    Args:
        network: any module from (B, ...) to logits (B, L). An `AdjointNetwork` such as `UNet` or `MLP` takes
            the fast path without autograd; any other goes through `torch.func.grad`.
        schedule: the noise levels.
        level_prior: (L,) effective prior p(t) of the training: sampling distribution times any per-level
            weight of the cross-entropy, up to a factor. Default uniform. A wrong prior shifts every
            likelihood by a constant, so it is saved with the weights.
        input_shape: shape of one input; taken from the network if it has one.

    Raises:
        UserError: a prior of the wrong length or with a value that is not positive and finite.
    """

    log_level_prior: Tensor

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        level_prior: Tensor | None = None,
        input_shape: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(network, schedule, input_shape)
        if level_prior is None:
            level_prior = torch.ones(schedule.num_levels)
        self.register_buffer("log_level_prior", _log_prior(level_prior, schedule.num_levels))

    def logits(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """`f(x)`, (B, L)."""
        return self.network(x) if label is None else self.network(x, label)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """The logits, (B, L)."""
        return self.logits(x, label)

    def log_posterior(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """`log p(t | x)` in nats under the training's p(t), (B, L)."""
        return log_posterior(self.logits(x, label))

    def draw_levels(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """(num,) int64 levels from p(t)."""
        return torch.multinomial(self.log_level_prior.exp(), num, replacement=True, generator=generator)

    def ratio_gradient(self, x: Tensor, level: Tensor, label: Tensor | None = None) -> Tensor:
        """`grad_x F(x, level)`, like `x`; `level` (B,) int64."""
        if isinstance(self.network, AdjointNetwork):
            return self.network.ratio_gradient(x, level, label)
        with use_backend("reference"):
            return torch.func.grad(self._log_ratio_of_noise, has_aux=True)(x, level, label)[0]

    def logits_and_ratio_gradient(
        self, x: Tensor, level: Tensor, label: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`(f(x) (B, L), grad_x F(x, level) like x)` from one evaluation; what training needs."""
        if isinstance(self.network, AdjointNetwork):
            return self.network.logits_and_ratio_gradient(x, level, label)
        with use_backend("reference"):
            grad_x, logits = torch.func.grad(self._log_ratio_of_noise, has_aux=True)(x, level, label)
        return logits, grad_x

    def denoise(self, x: Tensor, level: int | Tensor, label: Tensor | None = None) -> Tensor:
        level = self.schedule.levels(level, x)
        return denoise_epilogue(self.ratio_gradient(x, level, label), x, self.s[level].to(x.dtype))

    def predict_x0(self, x: Tensor, level: int | Tensor, label: Tensor | None = None) -> Tensor:
        level = self._levels_with_data(level, x)
        a, s = (table[level].to(x.dtype) for table in (self.a, self.s))
        return denoise_x0(self.ratio_gradient(x, level, label), x, a, s)

    def score(self, x: Tensor, level: int | Tensor, label: Tensor | None = None) -> Tensor:
        """`grad_x log p_t(x) = -(grad_x F + x)`, like `x`, at every level, 0 and T+1 included."""
        return -(self.ratio_gradient(x, self.schedule.levels(level, x), label) + x)

    def log_prob_levels(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """`log p_t(x)` in nats at every level, (B, L), in one forward pass (Thm 3.2).

        `log p_t(x) = f(x)[t] - f(x)[T+1] + log p(T+1)/p(t) + log N(x; 0, I)`
        """
        logits = self.logits(x, label)
        prior = self.log_level_prior.to(logits.dtype)
        return logits - logits[:, -1:] + (prior[-1] - prior) + log_normal(x)[:, None].to(logits.dtype)

    def log_prob(self, x: Tensor, level: int | Tensor = 0, label: Tensor | None = None) -> Tensor:
        """`log p_t(x)` in nats, (B,); `level` an int or (B,) int64."""
        index = self.schedule.levels(level, x)[:, None]
        return self.log_prob_levels(x, label).gather(1, index)[:, 0]

    def _log_ratio_of_noise(self, x: Tensor, level: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
        """`sum_b F(x_b, level_b)`, whose gradient is every sample's own, and the logits."""
        logits = self.logits(x, label)
        at_level = logits.gather(1, level[:, None])[:, 0]
        return (logits[:, -1] - at_level).sum(), logits


def log_normal(x: Tensor) -> Tensor:
    """`log N(x; 0, I)` in nats, (B,)."""
    x = x.flatten(1)
    return -0.5 * (x.square().sum(dim=1) + x.shape[1] * math.log(2 * math.pi))


def _log_prior(level_prior: Tensor, num_levels: int) -> Tensor:
    prior = torch.as_tensor(level_prior, dtype=torch.float64)
    if prior.shape != (num_levels,):
        raise UserError(f"level_prior has shape {tuple(prior.shape)}: the schedule has {num_levels} levels")
    if not bool((torch.isfinite(prior) & (prior > 0)).all()):
        raise UserError("level_prior must be positive and finite at every level")
    return (prior / prior.sum()).log()
