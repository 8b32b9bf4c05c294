"""Repeats one step of a run to show its batch, loss and gradient, to explain a skipped step or a loss spike.

Every draw of step n is a function of (seed, n), so any checkpoint of that step or an earlier one suffices.

# B batch
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cdm_fast.config import RunConfig
from cdm_fast.data import ImageData
from cdm_fast.errors import UserError
from cdm_fast.host.device import pick_device
from cdm_fast.host.files import write_atomically
from cdm_fast.model.losses import Noised
from cdm_fast.runs.checkpoint import load_checkpoint, read_config
from cdm_fast.runs.data import evaluation_data
from cdm_fast.training.base import restore_folds
from cdm_fast.training.feed import on_device
from cdm_fast.training.folds import step_indices
from cdm_fast.training.loop import take_step
from cdm_fast.training.prepare import preserved_rng
from cdm_fast.training.state import TrainingState, from_checkpoint
from cdm_fast.training.step import (
    LossFunction,
    accumulate_gradient,
    begin_step,
    draw_batch,
    make_loss,
    parts_of,
)

_WORST = 5  # number of parameters and images that are listed


def replay(run: str | Path, step: int, *, device: str = "auto", out: Path | None = None) -> dict[str, Any]:
    """The batch, loss and gradient of step `step` (from 0) of a run; the run directory is not changed.

    Training is repeated from the newest checkpoint at or before the step (on a CPU bitwise, given the same
    number of threads), and the gradient of the step is computed without taking it.

    Args:
        run: the run directory.
        step: the step, counted from 0.
        device: as in `train`.
        out: an .npz to write the batch to: x_t and eps (B, ...) float32, level, label, index and other (the
            class that a class embedding compares with the label) (B,) int64, loss (B,) float32.

    Returns JSON values: run, seed, step; from_step: step of the checkpoint; loss, ce (nats; 0 for a DDM), mse
    and grad_norm of the whole batch, as in training; finite: true if training takes the step; parameters:
    those with the largest gradient norms, non-finite ones first; images: those with the largest losses, each
    with its index in the training split, level, label and loss, evaluated alone and without dropout.

    Raises:
        UserError: there is no intact checkpoint at or before the step; `step` is negative; `out` is no .npz.
    """
    if step < 0:
        raise UserError(f"--step is {step}; give 0 or more")
    if out is not None and out.suffix != ".npz":
        raise UserError(f"--out {out}: give a name that ends in .npz")
    config = read_config(run)
    chosen = pick_device(device)
    with preserved_rng(chosen):
        data = on_device(evaluation_data(Path(run), config, "train"), chosen)
        state = from_checkpoint(load_checkpoint(run, at_most=step), config, chosen, str(run))
        restore_folds(config, state, data)
        from_step, loss_function = state.step, make_loss(config.train)
        while state.step < step:
            take_step(state, data, config, loss_function)
        found, batch = _gradient(state, data, config, loss_function)
        losses = _losses_alone(state, batch, config, loss_function)
    index = step_indices(len(data.images), config, step)
    if out is not None:
        _write_batch(out, batch, index, losses)
    facts = {"run": str(run), "seed": config.train.seed, "step": step, "from_step": from_step}
    return {**facts, **found, "images": _worst_images(batch, index, losses), "out": out and str(out)}


def _gradient(
    state: TrainingState, data: ImageData, config: RunConfig, loss_function: LossFunction
) -> tuple[dict[str, Any], Noised]:
    """Loss and gradient of the state's next step, without taking it, and its batch."""
    train = config.train
    begin_step(state.model, config, state.step)
    batch = draw_batch(data, state.model, config, state.step)
    state.optimizer.zero_grad()
    loss, ce, mse = accumulate_gradient(
        state.model, batch, loss_function, parts=train.accumulate, precision=train.precision
    ).tolist()
    norms = {
        name: float(parameter.grad.double().norm())
        for name, parameter in state.model.named_parameters()
        if parameter.grad is not None
    }
    norm = math.hypot(*norms.values())
    worst = sorted(norms, key=lambda name: _badness(norms[name]), reverse=True)[:_WORST]
    return {
        "loss": loss,
        "ce": ce,
        "mse": mse,
        "grad_norm": norm,
        "finite": math.isfinite(loss) and math.isfinite(norm),
        "parameters": [{"name": name, "grad_norm": norms[name]} for name in worst],
    }, batch


@torch.no_grad()
def _losses_alone(
    state: TrainingState, batch: Noised, config: RunConfig, loss_function: LossFunction
) -> Tensor:
    """The loss of each image of the batch, without dropout; (B,) float32 on the CPU."""
    state.model.eval()
    half = torch.autocast(batch.x_t.device.type, torch.bfloat16, enabled=config.train.precision == "bf16")
    with half:
        losses = [loss_function(state.model, one).loss for one in parts_of(batch, len(batch.level))]
    return torch.stack(losses).float().cpu()


def _badness(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _worst_images(batch: Noised, index: Tensor, losses: Tensor) -> list[dict[str, Any]]:
    order = sorted(range(len(losses)), key=lambda i: _badness(float(losses[i])), reverse=True)[:_WORST]
    labels: Sequence[int | None] = [None] * len(losses) if batch.label is None else batch.label.tolist()
    return [
        {
            "index": int(index[i]),
            "level": int(batch.level[i]),
            "label": labels[i],
            "loss": float(losses[i]),
        }
        for i in order
    ]


def _write_batch(out: Path, batch: Noised, index: Tensor, losses: Tensor) -> None:
    arrays = {
        "x_t": batch.x_t.cpu().numpy(),
        "eps": batch.eps.cpu().numpy(),
        "level": batch.level.cpu().numpy(),
        "index": index.numpy(),
        "loss": losses.numpy(),
    }
    for name in ("label", "other"):
        if (classes := getattr(batch, name)) is not None:
            arrays[name] = classes.cpu().numpy()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_atomically(out, buffer.getvalue())
