"""Our models in other programs: Hugging Face diffusers' schedulers, torch.export, ONNX.

diffusers numbers the T noisy levels from 0: its timestep i is our level i + 1. Its schedulers know
variance-preserving schedules only (`a^2 + s^2 = 1`: all of ours but `ot`).

# B batch, L = T+2 noise levels, K classes
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from cdm_fast.errors import UserError
from cdm_fast.model import CDM, Denoiser, prototype
from cdm_fast.ops import use_backend
from cdm_fast.schedule import NoiseSchedule


class Scheduler(Protocol):
    """What diffusers' variance-preserving schedulers share; most of them also have `sigmas`."""

    alphas_cumprod: Tensor
    timesteps: Tensor

    def set_timesteps(self, num_inference_steps: int) -> None: ...


SchedulerKind = TypeVar("SchedulerKind", bound=Scheduler)


class Prediction(NamedTuple):
    """What a diffusers pipeline reads off its network."""

    sample: Tensor  # eps_hat, like the network's input


class NoisePredictor(nn.Module):
    """A model as diffusers calls its networks: `predictor(x, timestep).sample` is eps_hat.

    For schedulers of `build_scheduler(kind, model.schedule, steps)`, in a loop of one's own or in a pipeline.

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

    Their own tables are fp32: of the noisiest level of `cosine`, `1 - beta` = 0.001 keeps 4 digits, and the
    first step divides an error of 3e-8 in s by a_T = 2e-4. So ours take their place. (A pipeline sets the
    timesteps anew, and with them fp32 sigmas.)

    Args:
        steps: where they divide T, the grid is `schedule.pairs(steps)`.
        options: of the scheduler. `DDIMScheduler` wants `clip_sample=False`: ours does not clip.

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
    """(T,) variance added between levels t-1 and t; UserError where variance is not preserved."""
    a, s = schedule.a, schedule.s
    if not torch.allclose(a**2 + s**2, torch.ones_like(a), rtol=0, atol=1e-9):
        raise UserError(
            f"schedule {schedule.name!r} does not preserve variance, and diffusers' schedulers need one that"
            " does: train with --schedule linear, uniform or cosine"
        )
    return 1 - (a[1:-1] / a[:-2]) ** 2


class Likelihood(nn.Module):
    """`log p_t(x)` in nats at every level, (B, L), as a plain module of one tensor."""

    def __init__(self, model: CDM) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """`x` (B, ...) in [-1, 1] -> (B, L)."""
        return self.model.log_prob_levels(x)


class ClassPosterior(nn.Module):
    """`log p(c | x)` in nats at a level, (B, K), as a plain module of one tensor.

    Raises UserError for a model without classes.
    """

    def __init__(self, model: CDM, level: int = 0) -> None:
        super().__init__()
        if model.num_classes is None:
            raise UserError("this model was trained without classes: train with --conditioning joint")
        self.model, self.level = model, level

    def forward(self, x: Tensor) -> Tensor:
        """`x` (B, ...) in [-1, 1] -> (B, K)."""
        return self.model.log_class_posterior(x, self.level)


def export(module: Likelihood | ClassPosterior) -> torch.export.ExportedProgram:
    """The module as one graph of PyTorch's own operations, for any batch size: `torch.export.save` keeps it.

    It runs where cdm_fast is not installed; dropout is off.
    """
    module = module.eval()
    model = module.model
    if model.input_shape is None:
        raise UserError("the model does not know the shape of one image: build it with input_shape=")
    x = prototype(model).new_zeros((2, *model.input_shape))
    with use_backend("reference"), torch.no_grad():
        return torch.export.export(module, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})


def export_onnx(
    module: Likelihood | ClassPosterior,
    path: str | Path,  # ends in .onnx
) -> Path:
    """The module as an ONNX file, input `x`, output `log_prob`, any batch size.

    Raises UserError without the packages of the extra `onnx`.
    """
    try:
        import onnxscript  # noqa: F401  (what torch.onnx needs)
    except ImportError as error:
        raise UserError("ONNX needs onnx and onnxscript: pip install 'cdm_fast[onnx]'") from error
    program = torch.onnx.export(export(module), input_names=["x"], output_names=["log_prob"], dynamo=True)
    assert program is not None
    program.save(str(path))
    return Path(path)
