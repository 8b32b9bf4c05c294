"""`cdm-fast restore` and `denoise`: image files in, image files out.

# C channels, H W pixels
"""

import math
from pathlib import Path

import torch
from torch import Tensor

from cdm_fast.cli import arguments
from cdm_fast.cli.arguments import Restore
from cdm_fast.cli.outcome import Outcome, open_model
from cdm_fast.config import RunConfig
from cdm_fast.config.size import size_text
from cdm_fast.data import read_image, write_image
from cdm_fast.data.pixels import displayable, from_display
from cdm_fast.errors import UserError
from cdm_fast.host.device import pick_device
from cdm_fast.likelihood import denoise_blind
from cdm_fast.model.cdm import require_likelihood
from cdm_fast.plots.sheet import write_rows
from cdm_fast.runs.checkpoint import read_config
from cdm_fast.runs.load import load
from cdm_fast.sampling.corrected import MALA, MoveLog
from cdm_fast.sampling.restoration import Known, MeanPool, Measurement, Restored, restore

FLAGS = {"inpaint": ("mask", "box"), "denoise": (), "super-resolution": ("factor",)}
BRIGHT = 128  # mask pixels of at least this value, in 0..255, are filled in
NOTHING_TO_FILL_IN = "--task inpaint needs to know what to fill in: give either --mask FILE or --box X Y W H"


def read_measurement(command: Restore, config: RunConfig) -> tuple[Measurement, Tensor]:
    """The measurement that files and flags describe, and the input image for the sheet, (C,H,W) in [-1, 1].

    Raises UserError for flags of another task, a missing flag, and images or boxes that do not fit the run.
    """
    _check_flags(command)
    rounding = 1 / (config.image.num_grey_levels * math.sqrt(3))  # std of a uniform error of width 2/N
    if command.task == "inpaint":
        image = read_input(command.image, config)
        known = ~_to_fill_in(command, config).expand_as(image)
        return Known(image, _sigma(command, rounding), known), torch.where(known, image, 0.0)
    if command.task == "denoise":
        image = read_input(command.image, config)
        return Known(image, _sigma(command, None)), image
    factor, sides = command.factor, config.image.sides
    if factor is None or factor < 2 or any(side % factor for side in sides):
        raise UserError(
            f"--factor is {factor}: give a divisor of the run's {size_text(sides)} pixels that is 2 or more"
        )
    small = read_input(command.image, config, factor)
    shown = small.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    return MeanPool(small, factor, _sigma(command, rounding / factor)), shown


def _check_flags(command: Restore) -> None:
    for task, flags in FLAGS.items():
        for flag in flags:
            if task != command.task and getattr(command, flag) is not None:
                raise UserError(f"--{flag} goes with --task {task}, not {command.task}; leave it out")
    if command.task == "inpaint" and (command.mask is None) == (command.box is None):
        raise UserError(NOTHING_TO_FILL_IN)


def _sigma(command: Restore, default: float | None) -> float:
    if command.sigma is not None:
        if not (command.sigma > 0 and math.isfinite(command.sigma)):
            raise UserError(f"--sigma is {command.sigma}: give a positive number, in units of [-1, 1]")
        return command.sigma
    if default is None:
        raise UserError(
            "--task denoise needs --sigma, in units of [-1, 1]; cdm-fast denoise estimates an unknown sigma"
        )
    return default


def _to_fill_in(command: Restore, config: RunConfig) -> Tensor:
    """(1,H,W) bool, from `--mask` or `--box`; UserError if it is empty, everything, or of another size."""
    rows, columns = config.image.sides
    missing = torch.zeros(1, rows, columns, dtype=torch.bool)
    if command.box is not None:
        x, y, width, height = command.box
        inside = x >= 0 and y >= 0 and x + width <= columns and y + height <= rows
        if not inside or width < 1 or height < 1:
            raise UserError(
                f"--box {x} {y} {width} {height}: give left, top, width, height inside an image {rows} pixels"
                f" high and {columns} wide"
            )
        missing[:, y : y + height, x : x + width] = True
        name = f"--box {x} {y} {width} {height}"
    elif command.mask is not None:
        mask = read_image(command.mask, channels=1)
        if mask.shape != missing.shape:
            raise UserError(
                f"{command.mask} is {mask.shape[1]}x{mask.shape[2]} pixels and the run takes {rows}x{columns}"
            )
        missing, name = mask >= BRIGHT, f"the mask {command.mask}"
    else:
        raise UserError(NOTHING_TO_FILL_IN)
    if not bool(missing.any()):
        raise UserError(f"{name} is empty: there is nothing to fill in; paint the missing pixels white")
    if bool(missing.all()):
        raise UserError(f"{name} leaves no pixel known: use cdm-fast sample")
    return missing


def write_candidates(found: Restored, shown: Tensor, config: RunConfig, command: Restore, path: Path) -> Path:
    """The input, the mean and the candidates, best first with their log p, as a PNG."""
    grey = config.image.num_grey_levels
    rows = {
        "input": displayable(shown[None], grey, config.data.pixels),
        "mean": displayable(found.mean[None], grey, config.data.pixels),
        "log p": displayable(found.images, grey, config.data.pixels),
    }
    title = f"{command.task}: candidates by log p at level {command.level}"
    return write_rows(rows, path, title, [f"{value:.1f}" for value in found.log_prob.tolist()])


def denoise_command(command: arguments.Denoise) -> Outcome:
    """`cdm-fast denoise`."""
    if not command.images:
        raise UserError("no image to denoise; name one or more image files after the run directory")
    model, config, default_folder = open_model(command.run, command.device)
    folder = command.out or default_folder / "denoised"
    targets = [folder / f"{path.stem}.png" for path in command.images]
    if len(set(targets)) < len(targets):
        raise UserError(
            "two of the images have the same name; denoise them separately, each into its own --out"
        )
    noisy = torch.stack([read_input(path, config) for path in command.images])
    clean, sigma, level = denoise_blind(model, noisy.to(model.a.device))
    shown = displayable(clean, config.image.num_grey_levels, config.data.pixels)
    for image, target in zip(shown, targets, strict=True):
        write_image(image, target)
    rows = [
        {"image": str(path), "sigma": noise, "level": t, "out": str(target)}
        for path, noise, t, target in zip(
            command.images, sigma.tolist(), level.tolist(), targets, strict=True
        )
    ]
    lines = [
        f"{r['image']}: sigma {r['sigma']:.4f} of [-1, 1], level {r['level']} -> {r['out']}" for r in rows
    ]
    return Outcome({"run": str(command.run), "images": rows}, lines)


def restore_command(command: arguments.Restore) -> Outcome:
    """`cdm-fast restore`."""
    config = read_config(command.run)
    out = command.out or command.run / f"restored-{command.task}.png"
    if out.suffix != ".png":
        raise UserError(f"--out {out}: give a name that ends in .png")
    measurement, shown = read_measurement(command, config)
    model = require_likelihood(load(command.run))
    log = MoveLog()
    found = restore(
        model.to(pick_device(command.device)),
        measurement,
        command.candidates,
        command.steps,
        command.seed,
        level=command.level,
        sampler=MALA(command.moves),
        callback=log,
    )
    write_candidates(found, shown, config, command, out)
    log_prob, rates = found.log_prob.tolist(), log.to_json()["acceptance"]
    result = {
        "run": str(command.run),
        "image": str(command.image),
        "task": command.task,
        "sigma": measurement.sigma,
        "level": command.level,
        "log_prob": log_prob,
        "log_likelihood": found.log_likelihood.tolist(),
        "out": str(out),
        "moves": command.moves,
        **log.to_json(),
    }
    lines = [
        f"{command.candidates} candidates, log p {log_prob[0]:.1f} to {log_prob[-1]:.1f} nats at level"
        f" {command.level}, best first: {out}",
        f"acceptance {min(rates):.2f} to {max(rates):.2f} over {len(rates)} levels",
    ]
    return Outcome(result, lines)


def read_input(path: Path, config: RunConfig, factor: int = 1) -> Tensor:
    """An image file as model input, (C,H,W) in [-1, 1]; UserError unless it is `factor` times smaller."""
    rows, columns = (side // factor for side in config.image.sides)
    image = read_image(path, channels=config.image.channels)
    if image.shape[1:] != (rows, columns):
        height, width = image.shape[1:]
        who = "the run" if factor == 1 else f"--factor {factor}"
        raise UserError(
            f"{path} is {height}x{width} pixels and {who} takes {rows}x{columns}; crop or resample it"
        )
    return from_display(image, config.image.num_grey_levels, config.data.pixels)
