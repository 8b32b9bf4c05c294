"""Images drawn from a model by any of the samplers, in batches and among processes.

# B batch
"""

from collections.abc import Callable
from functools import partial
from math import isfinite
from typing import Literal

import torch
from torch import Tensor

from cdm_fast.errors import UserError
from cdm_fast.host.device import upload
from cdm_fast.host.distributed import gather_rows, share
from cdm_fast.model import Denoiser, Energy, measures, prototype
from cdm_fast.model.conditioned import Guided, GuidedEnergy
from cdm_fast.model.schedule import Spacing
from cdm_fast.nn.working import cast_weights
from cdm_fast.sampling.corrected import CORRECTED, MoveLog, prepare
from cdm_fast.sampling.noise import ImageNoise
from cdm_fast.sampling.plain import ddim, ddpm, dpm_solver_pp_2m, euler_ot, heun

SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpm_solver_pp_2m": dpm_solver_pp_2m,
    "heun": heun,
    "euler_ot": euler_ot,
    **CORRECTED,
}


@measures
def sample(
    model: Denoiser,
    num: int,
    sampler: str = "ddim",
    steps: int = 50,
    seed: int = 0,
    *,
    label: int | Tensor | None = None,
    guidance: float = 0.0,
    eta: float = 0.0,
    batch_size: int = 256,
    shape: tuple[int, ...] | None = None,
    spacing: Spacing | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    moves: int = 2,
    leapfrog: int = 1,
    log: MoveLog | None = None,
    first: int = 0,
) -> Tensor:
    """`num` images drawn from the model, `(num, *shape)`, in the dtype and on the device of its parameters.

    Arguments: `sampler`, one of `SAMPLERS`; `steps`, 1..T, the number of levels it visits; `label`, one class
    for all or (num,) int64; `guidance`, w in `(1 + w) eps_hat(x, label) - w eps_hat(x)`; `eta`, 0..1, the
    noise of `ddim`; `shape` of one image, by default `model.input_shape`; `spacing` of the levels visited,
    the sampler's own by default; `precision` of the network ("bf16": under autocast, images stay fp32);
    `moves` of `mala` and `smc` at each level, each of `leapfrog` steps (Langevin moves with one, HMC with
    more), and `log`, to which they add the acceptance of each level, and whose step sizes they keep if it has
    any; `first`, the number of the first image: `num` images from there on.
    Image i depends on the seed, i and its label alone: any `batch_size` gives the same result up to rounding,
    and so does any number of processes (see `distributed.joined`), which share the images. Not so for `smc`,
    where a batch is one population. The step sizes of moves come from a pilot of a fixed seed.
    Global random generators are neither read nor changed; dropout is off while sampling.
    Raises UserError for an argument out of range.
    """
    run = _sampler(sampler, eta, spacing)
    shape = _image_shape(model, shape)
    _check_range("num", num, 0, bits=32)
    _check_range("first", first, 0, bits=32)
    _check_range("first + num", first + num, 0, bits=32)
    _check_range("batch_size", batch_size, 1, bits=32)
    _check_range("seed", seed, 0, bits=64)
    like = prototype(model)
    labels = _labels(label, num, like.device)
    if guidance:
        model = _guided(model, guidance, labels)
    if sampler in CORRECTED:
        _check_range("moves", moves, 1, bits=32)
        if precision == "bf16":
            raise UserError(
                f"sampler {sampler!r} compares log-densities, for which bf16 is too coarse: use fp32"
            )
        _check_range("leapfrog", leapfrog, 1, bits=32)
        log = MoveLog() if log is None else log
        log.leapfrog = leapfrog
        if not log.step_size:
            log.step_size = prepare(model, sampler, steps, shape, labels, spacing, leapfrog)
        run = partial(run, moves=moves, log=log)
    elif leapfrog != 1:
        raise UserError(
            f"leapfrog is {leapfrog}, but sampler {sampler!r} makes no moves: choose 'mala' or 'smc'"
        )
    images = [like.new_empty((0, *shape))]
    mine = share(num)
    with cast_weights(model, like.device, precision):
        for start in range(mine.start, mine.stop, batch_size):
            batch = slice(start, min(start + batch_size, mine.stop))
            noise = ImageNoise(seed, slice(first + batch.start, first + batch.stop), shape, like)
            label_b = None if labels is None else labels[batch]
            images.append(run(model, noise(), noise, steps, label_b))
    return gather_rows(torch.cat(images), num)


def _sampler(name: str, eta: float, spacing: Spacing | None) -> Callable[..., Tensor]:
    if name not in SAMPLERS:
        raise UserError(f"unknown sampler {name!r}: choose one of {', '.join(SAMPLERS)}")
    if not 0 <= eta <= 1:
        raise UserError(f"eta is {eta}: it must lie between 0 (deterministic) and 1 (as noisy as DDPM)")
    if eta and name != "ddim":
        raise UserError(f"eta is {eta}, but sampler {name!r} takes none: leave it out, or choose 'ddim'")
    options: dict[str, float | Spacing] = {"eta": eta} if name == "ddim" else {}
    if spacing is not None:
        options["spacing"] = spacing
    return partial(SAMPLERS[name], **options)


def _guided(model: Denoiser, guidance: float, labels: Tensor | None) -> Denoiser:
    if not isfinite(guidance):
        raise UserError(f"guidance is {guidance}: it must be a finite number")
    if labels is None:
        raise UserError(f"guidance is {guidance}, but towards no class: pass label= too")
    return (GuidedEnergy if isinstance(model, Energy) else Guided)(model, guidance)


def _check_range(name: str, value: int, lowest: int, bits: int) -> None:
    if not lowest <= value < 2**bits:
        raise UserError(f"{name} is {value}: it must be an integer from {lowest} to 2^{bits} - 1")


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
