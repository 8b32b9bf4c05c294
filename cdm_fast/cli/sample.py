"""`cdm-fast sample`."""

import io
import time
from math import isfinite
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cdm_fast.cli import arguments
from cdm_fast.cli.outcome import UNTRAINED_NULL, Outcome, load_on, null_is_untrained, open_model
from cdm_fast.config import RunConfig
from cdm_fast.data import quantize
from cdm_fast.data.pixels import displayable
from cdm_fast.errors import UserError
from cdm_fast.host.files import write_atomically
from cdm_fast.interop.source import is_foreign
from cdm_fast.model import Denoiser
from cdm_fast.model.conditioned import Between, Guided
from cdm_fast.plots.sheet import write_rows
from cdm_fast.plots.training import write_acceptance
from cdm_fast.runs.build import class_labels
from cdm_fast.runs.checkpoint import read_config
from cdm_fast.sampling import DDIM, SAMPLERS, MoveLog, Sampler, sample
from cdm_fast.sampling.corrected import CORRECTED
from cdm_fast.training.report import write_sheet
from cdm_fast.training.tuning import compile_network

WAY = 9  # images on the way from one class to another


def sample_command(command: arguments.Sample) -> Outcome:
    """`cdm-fast sample`."""
    if command.num < 1:
        raise UserError(f"--num is {command.num}; give 1 or more")
    name = f"samples-{command.sampler}-{command.steps}-{command.seed}.png"
    foreign = open_model(command.run, command.device) if is_foreign(command.run) else None
    config = read_config(command.run) if foreign is None else foreign.config
    out = command.out or (command.run if foreign is None else foreign.folder) / name
    if out.suffix not in (".png", ".npz"):
        raise UserError(f"--out {out}: give a name that ends in .png or .npz")
    labels = _sample_labels(command, config)
    _check_between(command, config, out)
    model = load_on(command.run, command.device) if foreign is None else foreign.model
    compile_network(model, command.compile)
    shares = [0.0] if command.between is None else [column / (WAY - 1) for column in range(WAY)]
    log = MoveLog()
    began = time.perf_counter()
    columns = [_draw(command, model, labels, share, log) for share in shares]
    seconds = time.perf_counter() - began
    images, grey, pixels = columns[0], config.image.num_grey_levels, config.data.pixels
    if command.between is not None:
        rows = displayable(torch.stack(columns, 1).flatten(0, 1), grey, pixels).unflatten(
            0, (command.num, WAY)
        )
        title = f"from class {command.label} to {command.between}, guidance {command.guidance:g}"
        write_rows({f"{i}": row for i, row in enumerate(rows)}, out, title, [f"{s:.3g}" for s in shares])
    elif out.suffix == ".png":
        title = f"{command.sampler}, {command.steps} steps, guidance {command.guidance:g}"
        if command.sampler in CORRECTED:
            title += f", {command.moves} moves of {command.leapfrog}"
        write_sheet(displayable(images, grey, pixels), labels, out, title)
    else:
        _write_npz(out, quantize(images, grey, pixels), labels, grey)
    result = {
        "run": str(command.run),
        "out": str(out),
        "num_images": command.num,
        "sampler": command.sampler,
        "steps": command.steps,
        "seed": command.seed,
        "guidance": command.guidance,
        "between": command.between,
        "precision": command.precision,
        "seconds": seconds,
        "images_per_second": len(shares) * command.num / seconds,
    }
    lines = [f"{len(shares) * command.num} images in {out}, drawn in {seconds:.1f} s"]
    if command.guidance and foreign is None and null_is_untrained(config):
        lines.append(UNTRAINED_NULL)
    if log.moved:
        found = {"moves": command.moves, **log.to_json()}
        picture = write_acceptance(found, out.with_name(f"{out.stem}-acceptance.png"))
        result |= {**found, "acceptance_picture": str(picture)}
        rates = found["acceptance"]
        lines.append(f"acceptance {min(rates):.2f} to {max(rates):.2f} over {len(rates)} levels: {picture}")
    return Outcome(result, lines)


def _draw(
    command: arguments.Sample, model: Denoiser, labels: Tensor | None, share: float, log: MoveLog
) -> Tensor:
    """`--num` images, a share of the way to the class of `--between`, always from the same noise."""
    guidance = command.guidance
    if command.between is not None:
        model, guidance = Between(Guided(model, guidance), command.between, share), 0.0
    return sample(
        model,
        command.num,
        _sampler(command),
        command.steps,
        command.seed,
        label=labels,
        guidance=guidance,
        precision=command.precision,
        callback=log,
    )


def _sampler(command: arguments.Sample) -> Sampler:
    """The sampler with its options; UserError for an option of another one."""
    name, eta, leapfrog = command.sampler, command.eta, command.leapfrog
    if eta and name != "ddim":
        raise UserError(f"eta is {eta}, but sampler {name!r} takes none: leave it out, or choose 'ddim'")
    if leapfrog != 1 and name not in CORRECTED:
        raise UserError(
            f"leapfrog is {leapfrog}, but sampler {name!r} makes no moves: choose 'mala' or 'smc'"
        )
    if name in CORRECTED:
        return CORRECTED[name](command.moves, leapfrog)
    return DDIM(eta) if name == "ddim" else SAMPLERS[name]


def _check_between(command: arguments.Sample, config: RunConfig, out: Path) -> None:
    """UserError for a way between classes that does not exist, or that is no picture."""
    if command.between is None:
        return
    classes = config.image.num_classes
    if command.label is None or classes is None or not 0 <= command.between < classes:
        raise UserError(
            f"--between {command.between} goes with --label, both classes of {command.run}: 0 to"
            f" {(classes or 1) - 1}"
        )
    if out.suffix != ".png":
        raise UserError(f"--out {out}: --between draws a sheet, give a name that ends in .png")
    if command.sampler in CORRECTED:
        raise UserError(f"--between goes with a plain sampler such as ddim, not {command.sampler}")
    if not isfinite(command.guidance):
        raise UserError(f"guidance is {command.guidance}: it must be a finite number")


def _sample_labels(command: arguments.Sample, config: RunConfig) -> Tensor | None:
    labels = class_labels(config, command.num)
    if command.guidance and labels is None:
        raise UserError(
            f"--guidance {command.guidance}: {command.run} was trained without classes; leave it out"
        )
    if command.label is None:
        return labels
    classes = config.image.num_classes
    if labels is None or classes is None:
        raise UserError(f"--label {command.label}: {command.run} was trained without classes; leave it out")
    if not 0 <= command.label < classes:
        raise UserError(f"--label {command.label}: {command.run} knows the classes 0 to {classes - 1}")
    return torch.full_like(labels, command.label)


def _write_npz(path: Path, images: Tensor, labels: Tensor | None, num_grey_levels: int) -> None:
    """`images` (N,C,H,W) uint8 as an .npz that `--data` reads: images (N,H,W,C), labels, num_grey_levels."""
    arrays = {
        "images": images.permute(0, 2, 3, 1).cpu().numpy(),
        "num_grey_levels": np.array(num_grey_levels),
    }
    if labels is not None:
        arrays["labels"] = labels.numpy()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_atomically(path, buffer.getvalue())
