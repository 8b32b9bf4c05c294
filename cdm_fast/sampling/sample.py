"""`sample`: draws images from a model with any sampler, in batches and on several processes.

# B batch
"""

from collections.abc import Sequence
from itertools import pairwise
from math import isfinite
from typing import Literal

import torch
from torch import Tensor

from cdm_fast.errors import UserError
from cdm_fast.host.device import upload
from cdm_fast.host.distributed import gather_rows, rank_range
from cdm_fast.model import Denoiser, Energy, any_parameter, evaluation_mode
from cdm_fast.model.conditioned import Guided, GuidedEnergy
from cdm_fast.model.schedule import NoiseSchedule, Spacing
from cdm_fast.nn.working import cast_weights
from cdm_fast.sampling.blind import Blind, knows_levels
from cdm_fast.sampling.corrected import MALA, SMC
from cdm_fast.sampling.noise import ImageNoise
from cdm_fast.sampling.plain import DDIM, Plain, ddpm, dpm_solver_pp_2m, euler_ot, heun
from cdm_fast.sampling.sampler import Callback, Sampler, check_range

SAMPLERS: dict[str, Sampler] = {
    "ddpm": Plain("ddpm", ddpm),
    "ddim": DDIM(),
    "dpm_solver_pp_2m": Plain("dpm_solver_pp_2m", dpm_solver_pp_2m, "log_snr"),
    "heun": Plain("heun", heun, "log_snr"),
    "euler_ot": Plain("euler_ot", euler_ot),
    "blind": Blind(),
    "mala": MALA(),
    "smc": SMC(),
}


@evaluation_mode
def sample(
    model: Denoiser,
    num: int,
    sampler: str | Sampler = "ddim",
    steps: int | Sequence[int] = 50,
    seed: int = 0,
    *,
    label: int | Tensor | None = None,
    guidance: float = 0.0,
    batch_size: int = 256,
    shape: tuple[int, ...] | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    callback: Callback | None = None,
    first: int = 0,
) -> Tensor:
    """Draws `num` images from the model: `(num, *shape)`, in the dtype and on the device of its parameters.

    Image i depends only on the seed, i and its label, so the result does not depend on `batch_size` or on the
    number of processes, up to rounding. `SMC` is an exception: its batches are populations. Global random
    generators are neither read nor changed, and dropout is off.

    Args:
        model: a `CDM`, a `DDM`, or anything built from them: compositions, `Guided`, `Posterior`, ...
        num: number of images, 0 or more.
        sampler: a name of `SAMPLERS`, a sampler with options, such as `DDIM(eta=1.0)` or `MALA(moves=4)`, or
            "auto", for which see `sampler_name`.
        steps: the number of steps, 1..T, with the spacing that suits the sampler; or the levels to visit,
            falling from T to 0, such as `model.schedule.grid(20, "log_snr")`.
        seed: 0..2^64 - 1.
        label: one class for all, or (num,) int64.
        guidance: w in `(1 + w) eps_hat(x, label) - w eps_hat(x)` (arXiv 2207.12598).
        batch_size: number of images to draw at once.
        shape: shape of one image; `model.input_shape` by default.
        precision: precision of the network; "bf16" runs it under autocast, and images stay fp32.
        callback: called with a `Step` after each step of each batch of this process; see also `MoveLog`.
        first: index of the first image: draws images `first` to `first + num - 1` of this seed.

    Raises:
        UserError: an argument out of range, or a sampler that does not suit the model.

    >>> from cdm_fast import CDM, MLP, NoiseSchedule
    >>> schedule = NoiseSchedule.uniform(T=20)
    >>> model = CDM(MLP(2, schedule.num_levels, hidden=8), schedule)
    >>> sample(model, 5, sampler="dpm_solver_pp_2m", steps=4).shape
    torch.Size([5, 2])
    >>> x = sample(model, 5, DDIM(eta=0.5), steps=[20, 9, 0], callback=lambda step: print(step.level))
    9
    0
    """
    sampler = _sampler(sampler_name(sampler, model) if isinstance(sampler, str) else sampler, precision)
    shape = _image_shape(model, shape)
    check_range("num", num, 0, bits=32)
    check_range("first", first, 0, bits=32)
    check_range("first + num", first + num, 0, bits=32)
    check_range("batch_size", batch_size, 1, bits=32)
    check_range("seed", seed, 0, bits=64)
    like = any_parameter(model)
    labels = _labels(label, num, like.device)
    if guidance:
        model = _guided(model, guidance, labels)
    grid = _grid(model.schedule, steps, sampler.spacing)
    run = sampler.prepare(model, grid, shape, labels)
    images = [like.new_empty((0, *shape))]
    mine = rank_range(num)
    with cast_weights(model, like.device, precision):
        for start in range(mine.start, mine.stop, batch_size):
            batch = slice(start, min(start + batch_size, mine.stop))
            noise = ImageNoise(seed, slice(first + batch.start, first + batch.stop), shape, like)
            label_b = None if labels is None else labels[batch]
            images.append(run(model, noise(), noise, grid, label_b, callback=callback))
    return gather_rows(torch.cat(images), num)


def sampler_name(name: str, model: Denoiser) -> str:
    """The name itself; for "auto" "blind" if the model knows the noise of an image, else "ddim"."""
    if name != "auto":
        return name
    return "blind" if knows_levels(model) else "ddim"


def _sampler(sampler: str | Sampler, precision: str) -> Sampler:
    if isinstance(sampler, str):
        if sampler not in SAMPLERS:
            raise UserError(f"unknown sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
        sampler = SAMPLERS[sampler]
    if sampler.compares_densities and precision == "bf16":
        raise UserError(
            f"sampler {sampler.name!r} compares log-densities, for which bf16 is too coarse: use fp32"
        )
    return sampler


def _grid(schedule: NoiseSchedule, steps: int | Sequence[int], spacing: Spacing) -> list[int]:
    if not isinstance(steps, Sequence):
        return schedule.grid(steps, spacing)
    grid = list(steps)
    falls = all(isinstance(t, int) for t in grid) and all(t > t_prev for t, t_prev in pairwise(grid))
    if not falls or not grid or (grid[0], grid[-1]) != (schedule.T, 0):
        raise UserError(
            f"steps is {steps!r}: give levels that fall from T = {schedule.T} to 0, or how many to visit"
        )
    return grid


def _guided(model: Denoiser, guidance: float, labels: Tensor | None) -> Denoiser:
    if not isfinite(guidance):
        raise UserError(f"guidance is {guidance}: it must be a finite number")
    if labels is None:
        raise UserError(f"guidance is {guidance}, but there is no class to guide towards: pass label= too")
    return GuidedEnergy(model, guidance) if isinstance(model, Energy) else Guided(model, guidance)


def _image_shape(model: Denoiser, shape: tuple[int, ...] | None) -> tuple[int, ...]:
    shape = model.input_shape if shape is None else shape
    if shape is None:
        raise UserError("the model does not know the shape of one image: pass shape=, such as (1, 8, 8)")
    return tuple(shape)


def _labels(label: int | Tensor | None, num: int, device: torch.device) -> Tensor | None:
    if isinstance(label, int):
        return torch.full((num,), label, device=device)
    if label is not None and (label.dtype != torch.int64 or label.shape != (num,)):
        raise UserError(
            f"label is {label.dtype} of shape {tuple(label.shape)}: pass int64 ({num},) or one int"
        )
    return label if label is None else upload(label, device)
