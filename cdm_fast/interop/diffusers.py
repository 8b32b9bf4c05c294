"""Models of this library with the schedulers of Hugging Face diffusers.

diffusers numbers the T noisy levels from 0: its timestep i is our level i + 1. Its schedulers support only
variance-preserving schedules (`a^2 + s^2 = 1`: all of ours except `ot`).

# B batch
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from cdm_fast.errors import UserError
from cdm_fast.model import Denoiser
from cdm_fast.model.schedule import NoiseSchedule


class Scheduler(Protocol):
    """The interface of diffusers' variance-preserving schedulers; most of them also have `sigmas`."""

    alphas_cumprod: Tensor
    timesteps: Tensor

    def set_timesteps(self, num_inference_steps: int) -> None: ...


SchedulerKind = TypeVar("SchedulerKind", bound=Scheduler)


class Prediction(NamedTuple):
    """The output that a diffusers pipeline expects of its network."""

    sample: Tensor  # eps_hat, like the network's input


class NoisePredictor(nn.Module):
    """A model with the call interface of diffusers' networks: `predictor(x, timestep).sample` is eps_hat.

    Use it with a scheduler from `build_scheduler(kind, model.schedule, steps)`, in a loop or in a pipeline.

    Args:
        model: a CDM, a DDM, a composition, or `sampling.Guided(model, w)`.
    """

    def __init__(self, model: Denoiser) -> None:
        super().__init__()
        _betas(model.schedule)  # refuses schedules that diffusers does not have
        self.model = model

    @torch.no_grad()
    def forward(
        self,
        sample: Tensor,  # (B, ...) x_t
        timestep: Tensor | int,  # one, or (B,): 0..T-1
        class_labels: Tensor | None = None,  # (B,) int64
    ) -> Prediction:
        """eps_hat at level `timestep + 1`, like `sample`."""
        level = torch.as_tensor(timestep, device=sample.device).long() + 1
        return Prediction(self.model.denoise(sample, level.expand(len(sample)).contiguous(), class_labels))


def build_scheduler(
    kind: Callable[..., SchedulerKind],  # a scheduler's class, such as diffusers.DDIMScheduler
    schedule: NoiseSchedule,
    steps: int,
    **options: object,
) -> SchedulerKind:
    """A diffusers scheduler whose timesteps are set on this schedule's levels, with tables in fp64.

    diffusers' own tables are fp32: at the noisiest level of `cosine`, `1 - beta` = 0.001 keeps 4 digits, and
    the first step divides an error of 3e-8 in s by a_T = 2e-4. They are therefore replaced by ours. (A
    pipeline sets the timesteps again, and with them fp32 sigmas.)

    Args:
        steps: number of steps; if it divides T, the grid is `schedule.grid(steps)`.
        options: options of the scheduler. `DDIMScheduler` needs `clip_sample=False`, since ours does not
            clip.

    Raises:
        UserError: a schedule that is not variance preserving.
    """
    ours: dict[str, object] = {
        "num_train_timesteps": schedule.T,
        "trained_betas": _betas(schedule).tolist(),
        "prediction_type": "epsilon",
        "timestep_spacing": "trailing",
    }
    scheduler = kind(**{**ours, **options})
    scheduler.alphas_cumprod = schedule.a[1:-1] ** 2
    scheduler.set_timesteps(steps)
    if isinstance(sigmas := getattr(scheduler, "sigmas", None), Tensor):
        exact = torch.cat([schedule.sigma[scheduler.timesteps.long() + 1], sigmas[-1:].double()])
        if exact.shape == sigmas.shape and torch.allclose(exact, sigmas.double(), rtol=1e-6):
            scheduler.sigmas = exact  # type: ignore[attr-defined]
    return scheduler


def _betas(schedule: NoiseSchedule) -> Tensor:
    """(T,) variance added between levels t-1 and t; UserError if variance is not preserved."""
    a, s = schedule.a, schedule.s
    if not torch.allclose(a**2 + s**2, torch.ones_like(a), rtol=0, atol=1e-9):
        raise UserError(
            f"schedule {schedule.name!r} does not preserve variance, and diffusers' schedulers need one that"
            " does: train with --schedule linear, uniform or cosine"
        )
    return 1 - (a[1:-1] / a[:-2]) ** 2
