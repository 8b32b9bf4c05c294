"""`cdm-fast sample`: images from a model into a sheet, an .npz or a folder, batch by batch.

# C channels, H W pixels
"""

import time
from dataclasses import replace
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor

from cdm_fast.cli import arguments
from cdm_fast.cli.interrupt import deferred_interrupt
from cdm_fast.cli.outcome import UNTRAINED_NULL, Outcome, load_on, null_is_untrained, open_model
from cdm_fast.cli.sample_files import MOST_ON_A_SHEET, ImageSink, open_sink
from cdm_fast.config import RunConfig
from cdm_fast.data.pixels import displayable
from cdm_fast.errors import UserError, require_at_least
from cdm_fast.host.processes import this_process
from cdm_fast.host.progress import ProgressBar
from cdm_fast.interop.source import is_foreign
from cdm_fast.model import Denoiser
from cdm_fast.model.conditioned import Between, Guided
from cdm_fast.plots.sheet import write_rows
from cdm_fast.plots.training import write_acceptance
from cdm_fast.runs.build import class_labels
from cdm_fast.runs.checkpoint import read_config
from cdm_fast.sampling import DDIM, SAMPLERS, Blind, MoveLog, Sampler, sample
from cdm_fast.sampling.corrected import CORRECTED
from cdm_fast.training.tuning import compile_network

COLUMNS = 9  # images in an interpolation from one class to another


def sample_command(command: arguments.Sample) -> Outcome:
    """`cdm-fast sample`."""
    require_at_least("--num", command.num, 1)
    require_at_least("--batch-size", command.batch_size, 1)
    foreign = open_model(command.run, command.device) if is_foreign(command.run) else None
    config = read_config(command.run) if foreign is None else foreign.config
    if command.sampler == "auto":
        knows_levels = foreign is None and config.train.objective == "cdm" and command.between is None
        command = replace(command, sampler="blind" if knows_levels else "ddim")
    name = f"samples-{command.sampler}-{command.steps}-{command.seed}.png"
    out = command.out or (command.run if foreign is None else foreign.folder) / name
    _check_classes(command, config)
    _check_between(command, config, out)
    sink = open_sink(out, command.num, config, _title(command))
    model = load_on(command.run, command.device) if foreign is None else foreign.model
    compile_network(model, command.compile)
    log, start = MoveLog(), time.perf_counter()
    if command.between is None:
        drawn = draw_into(sink, command, model, config, log)
    else:
        drawn = _draw_between(command, command.between, model, config, out)
    notes = [UNTRAINED_NULL] if command.guidance and foreign is None and null_is_untrained(config) else []
    return _outcome(command, out, drawn, time.perf_counter() - start, log, notes)


def draw_into(
    sink: ImageSink, command: arguments.Sample, model: Denoiser, config: RunConfig, log: MoveLog
) -> int:
    """Draws `--num` images batch by batch into the sink and returns the number drawn.

    After Ctrl-C the complete batches are kept; KeyboardInterrupt if there is none, or if several processes
    draw.
    """
    drawn, together = 0, command.batch_size * this_process().count
    with ProgressBar("drawing images", command.num) as bar:
        try:
            while drawn < command.num:
                count = min(together, command.num - drawn)
                labels = _labels(command, config, count, drawn)
                images = _draw(command, model, labels, count, drawn, log)
                with deferred_interrupt():
                    sink.add(images, labels)
                    drawn += count
                bar.advance(count)
        except KeyboardInterrupt:
            if drawn == 0 or this_process().count > 1:
                raise
    sink.close()
    return drawn


def _draw(
    command: arguments.Sample, model: Denoiser, labels: Tensor | None, count: int, first: int, log: MoveLog
) -> Tensor:
    """`count` images, starting at index `first`, (count,C,H,W)."""
    return sample(
        model,
        count,
        _sampler(command, log),
        command.steps,
        command.seed,
        label=labels,
        guidance=0.0 if isinstance(model, Between) else command.guidance,
        batch_size=command.batch_size,
        precision=command.precision,
        callback=log,
        first=first,
    )


def _draw_between(
    command: arguments.Sample, target: int, model: Denoiser, config: RunConfig, out: Path
) -> int:
    """Draws rows from --label to the class `target`, and returns the number of images.

    The images of a row share their noise.
    """
    labels = _labels(command, config, command.num)
    fractions = [column / (COLUMNS - 1) for column in range(COLUMNS)]
    columns = []
    with ProgressBar("drawing images", command.num * COLUMNS) as bar:
        for fraction in fractions:
            way = Between(Guided(model, command.guidance), target, fraction)
            columns.append(_draw(command, way, labels, command.num, 0, MoveLog()))
            bar.advance(command.num)
    rows = torch.stack(columns, 1)  # (num, COLUMNS, C, H, W)
    shown = displayable(rows.flatten(0, 1), config.image.num_grey_levels, config.data.pixels)
    named = {f"{i}": row for i, row in enumerate(shown.unflatten(0, rows.shape[:2]))}
    write_rows(named, out, _title(command), [f"{fraction:.3g}" for fraction in fractions])
    return command.num * COLUMNS


def _title(command: arguments.Sample) -> str:
    if command.between is not None:
        return f"from class {command.label} to {command.between}, guidance {command.guidance:g}"
    title = f"{command.sampler}, {command.steps} steps, guidance {command.guidance:g}"
    if command.sampler in CORRECTED:
        title += f", {command.moves} moves of {command.leapfrog}"
    return title


def _outcome(
    command: arguments.Sample, out: Path, drawn: int, seconds: float, log: MoveLog, notes: list[str]
) -> Outcome:
    """The outcome of the command; writes a picture of the acceptance rates, if there were moves."""
    wanted = command.num * (1 if command.between is None else COLUMNS)
    result = {
        "run": str(command.run),
        "out": str(out),
        "num_images": drawn if command.between is None else command.num,
        "stopped": "finished" if drawn == wanted else "signal",
        "sampler": command.sampler,
        "steps": command.steps,
        "seed": command.seed,
        "guidance": command.guidance,
        "between": command.between,
        "precision": command.precision,
        "seconds": seconds,
        "images_per_second": drawn / seconds,
    }
    number = f"{drawn}" if drawn == wanted else f"stopped by a signal after {drawn} of {wanted}"
    lines = [f"{number} images in {out}, drawn in {seconds:.1f} s", *notes]
    if log.moved:
        moves = {"moves": command.moves, **log.to_json()}
        picture = write_acceptance(moves, out.with_name(f"{out.stem}-acceptance.png"))
        result |= {**moves, "acceptance_picture": str(picture)}
        rates = moves["acceptance"]
        lines.append(f"acceptance {min(rates):.2f} to {max(rates):.2f} over {len(rates)} levels: {picture}")
    return Outcome(result, lines)


def _sampler(command: arguments.Sample, log: MoveLog) -> Sampler:
    """The sampler with its options; step sizes found by the first batch are used for the next ones.

    Raises UserError for an option of another sampler.
    """
    name, eta, leapfrog = command.sampler, command.eta, command.leapfrog
    if eta is not None and name not in ("ddim", "blind"):
        raise UserError(f"eta is {eta}, but sampler {name!r} takes none: leave it out, or choose 'ddim'")
    if leapfrog != 1 and name not in CORRECTED:
        raise UserError(
            f"leapfrog is {leapfrog}, but sampler {name!r} makes no moves: choose 'mala' or 'smc'"
        )
    if name in CORRECTED:
        return CORRECTED[name](command.moves, leapfrog, step_size=log.step_size or None)
    if eta is None:
        return SAMPLERS[name]
    return DDIM(eta) if name == "ddim" else Blind(eta)


def _check_between(command: arguments.Sample, config: RunConfig, out: Path) -> None:
    """UserError for an interpolation between classes that do not exist, or an output other than a sheet."""
    if command.between is None:
        return
    classes = config.image.num_classes
    if command.label is None or classes is None or not 0 <= command.between < classes:
        raise UserError(
            f"--between {command.between} needs --label, and both must be classes of {command.run}: 0 to"
            f" {(classes or 1) - 1}"
        )
    if out.suffix != ".png":
        raise UserError(f"--out {out}: --between draws a sheet, give a name that ends in .png")
    if command.num * COLUMNS > MOST_ON_A_SHEET:
        raise UserError(f"--num {command.num} rows are more than a sheet holds; give a smaller number")
    if command.sampler in CORRECTED:
        raise UserError(f"--between goes with a plain sampler such as ddim, not {command.sampler}")
    if not isfinite(command.guidance):
        raise UserError(f"guidance is {command.guidance}: it must be a finite number")


def _check_classes(command: arguments.Sample, config: RunConfig) -> None:
    """UserError for a class that the run does not have, or for guidance of a run without classes."""
    labels, classes = class_labels(config, 1), config.image.num_classes
    if command.guidance and labels is None:
        raise UserError(
            f"--guidance {command.guidance}: {command.run} was trained without classes; leave it out"
        )
    if command.label is None:
        return
    if labels is None or classes is None:
        raise UserError(f"--label {command.label}: {command.run} was trained without classes; leave it out")
    if not 0 <= command.label < classes:
        raise UserError(f"--label {command.label}: {command.run} knows the classes 0 to {classes - 1}")


def _labels(command: arguments.Sample, config: RunConfig, count: int, first: int = 0) -> Tensor | None:
    """(count,) int64: the classes of the images, starting at index `first`; None without classes."""
    labels = class_labels(config, count, first)
    return labels if labels is None or command.label is None else torch.full_like(labels, command.label)
