"""The commands behind the command line: each takes its parsed arguments and returns what to tell."""

import io
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from cdm_fast import arguments, doctor
from cdm_fast.build import pick_device
from cdm_fast.calibration import apply_calibration, calibrate, remove_calibration, write_calibration
from cdm_fast.checkpoint import load, read_config
from cdm_fast.class_scoring import score_classes
from cdm_fast.classify import describe_accuracy
from cdm_fast.config import RunConfig
from cdm_fast.corrected import CORRECTED, MoveLog
from cdm_fast.data import ImageData, quantize, write_image
from cdm_fast.discriminative import Classifier
from cdm_fast.distributed import from_main, joined
from cdm_fast.errors import UserError
from cdm_fast.files import write_atomically
from cdm_fast.interop import Foreign
from cdm_fast.interop.convert import PUBLIC_BETAS, convert
from cdm_fast.interop.source import is_foreign, open_foreign, output_folder, require_data
from cdm_fast.likelihood import LikelihoodReport, denoise_blind, describe_score, evaluate
from cdm_fast.likelihood.export import check_name, write_per_image
from cdm_fast.likelihood.images import require_likelihood
from cdm_fast.likelihood.single import PUBLIC_SCORING
from cdm_fast.model import CDM, DDM, Denoiser
from cdm_fast.outlier_scoring import score_images
from cdm_fast.plots import write_acceptance, write_rows
from cdm_fast.processes import is_main, launched
from cdm_fast.progress import to_stderr
from cdm_fast.replay import replay
from cdm_fast.report import (
    class_labels,
    displayable,
    read_input,
    run_data,
    write_level_pictures,
    write_loss_curves,
    write_sheet,
)
from cdm_fast.restoration import restore
from cdm_fast.restored_pictures import measure, write_candidates
from cdm_fast.sampling import Between, Guided, sample
from cdm_fast.scoring import Scored, score
from cdm_fast.train import begun, resume, train
from cdm_fast.tuning import compile_network

WAY = 9  # images on the way from one class to another


class Outcome(NamedTuple):
    """What a command tells: JSON values for `--json`, lines for a person."""

    result: dict[str, Any]
    lines: list[str]


def run(command: arguments.Command) -> Outcome:
    """Runs a parsed command; UserError for whatever the user can put right.

    Under torchrun the processes share the work, and each returns the outcome.
    """
    if isinstance(command, arguments.Shared):
        with joined(command.device):
            return _COMMANDS[type(command)](command)
    if launched() is not None:
        raise UserError(f"{type(command).__name__.lower()} is the work of one process; leave torchrun out")
    return _COMMANDS[type(command)](command)


def train_command(command: arguments.Train) -> Outcome:
    """`cdm-fast train`."""
    if command.max_time is not None and not command.max_time >= 0:
        raise UserError(f"--max-time is {command.max_time}; give seconds, 0 or more")
    options: dict[str, Any] = {
        "max_time": command.max_time,
        "device": command.device,
        "parallel": command.parallel,
    }
    run, config, begins = command.resume, command.config, command.resume is None
    if run is None:
        source = config.train.finetune
        name = command.preset if source is None else f"{Path(source).name}-finetuned"
        run = command.out or Path("runs") / name
        again = from_main(begun(config, run) if launched() and is_main() else None)
        if again is not None:
            to_stderr(f"{run} holds the beginning of this run: continuing it")
            config, begins = again, False
    summary = train(config, run, **options) if begins else resume(run, config, **options)
    lines = [f"{summary['run']}: {_stopped(summary)} after {summary['seconds']:.0f} s of training"]
    lines += describe_score(summary) if "bits_per_dim" in summary else []
    lines += [describe_accuracy(summary)] if "accuracy" in summary else []
    return Outcome(summary, lines)


def _stopped(summary: dict[str, Any]) -> str:
    progress = f"step {summary['step']} of {summary['steps']}"
    if summary["stopped"] == "finished":
        return f"finished, {progress},"
    cause = {"signal": "a signal", "max_time": "--max-time"}[summary["stopped"]]
    return f"stopped by {cause} at {progress} (cdm-fast train --resume {summary['run']} continues)"


class Opened(NamedTuple):
    """What a command's `run` names: a model, its config, and the folder for pictures."""

    model: Denoiser
    config: RunConfig
    folder: Path


def _open(run: Path, device: str) -> Opened:
    """A run's model, or another program's, on the device."""
    if is_foreign(run):
        model, config = open_foreign(run)
        return Opened(model.to(pick_device(device)), config, output_folder(run))
    config = read_config(run)
    return Opened(load(run).to(pick_device(device)), config, run)


def _load(run: Path, device: str) -> CDM | DDM | Classifier:
    return load(run).to(pick_device(device))


def sample_command(command: arguments.Sample) -> Outcome:
    """`cdm-fast sample`."""
    if command.num < 1:
        raise UserError(f"--num is {command.num}; give 1 or more")
    name = f"samples-{command.sampler}-{command.steps}-{command.seed}.png"
    foreign = _open(command.run, command.device) if is_foreign(command.run) else None
    config = read_config(command.run) if foreign is None else foreign.config
    out = command.out or (command.run if foreign is None else foreign.folder) / name
    if out.suffix not in (".png", ".npz"):
        raise UserError(f"--out {out}: give a name that ends in .png or .npz")
    labels = _sample_labels(command, config)
    _check_between(command, config, out)
    model = _load(command.run, command.device) if foreign is None else foreign.model
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
    if command.guidance and foreign is None and _null_is_untrained(config):
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
        command.sampler,
        command.steps,
        command.seed,
        label=labels,
        guidance=guidance,
        eta=command.eta,
        precision=command.precision,
        moves=command.moves,
        leapfrog=command.leapfrog,
        log=log,
    )


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


def nll_command(command: arguments.Nll) -> Outcome:
    """`cdm-fast nll`."""
    require_data(command.run, command.data)
    foreign = _open(command.run, command.device) if is_foreign(command.run) else None
    config = read_config(command.run) if foreign is None else foreign.config
    if command.pixels is not None:
        config = replace(config, data=replace(config.data, pixels=command.pixels))
    if command.batch_size < 1:
        raise UserError(f"--batch-size is {command.batch_size}; give 1 or more")
    if command.protocol == "paper" and command.method != "single":
        raise UserError(f"--protocol paper goes with --method single, not {command.method}; leave one out")
    if command.method == "elbo" and command.level != 0:
        raise UserError(f"--level {command.level}: the variational bound is one of level 0; leave it out")
    if command.out is not None:
        check_name(command.out)
    data = run_data(config, command.split, command.data)
    _require_fit(data, config, command.run)
    if command.precision != "fp32" and command.method != "single":
        raise UserError(f"--precision {command.precision} goes with --method single; leave one out")
    calibration = None
    if foreign is None:
        loaded = load(command.run, calibrated=False)
        calibration = apply_calibration(loaded, command.run)
        model: Denoiser = loaded.to(pick_device(command.device))
    else:
        model = foreign.model
    compile_network(model, command.compile)
    command, told = _given(command, model, config, data)
    result, lines, columns = score(command, model, data)
    lines = [*lines, *told]
    found = {"run": str(command.run), "pixels": data.pixels, "notes": told, **result}
    if command.out is not None:
        found["out"] = str(write_per_image(command.out, data, columns))
    if calibration is not None and "bits_per_dim" in result:
        before = result["bits_per_dim"] - calibration.bits_per_dim(command.level, data)
        found["uncalibrated_bits_per_dim"] = before
        lines = [
            *lines,
            f"calibrated; {before:.4f} bits/dim before (cdm-fast calibrate {command.run} --undo)",
        ]
    return Outcome(found, lines)


UNTRAINED_NULL = (
    "this run was trained without label dropout, as the paper's public code trains, so its figures without a"
    " label, and guidance, are those of a class that it never saw"
)


def _null_is_untrained(config: RunConfig) -> bool:
    return config.network.conditioning == "embedding" and config.train.label_dropout == 0


def _given(
    command: arguments.Nll, model: Denoiser, config: RunConfig, data: ImageData
) -> tuple[arguments.Nll, list[str]]:
    """The command with `given` resolved, and what has to be told of the choice."""
    conditional = config.network.conditioning == "embedding"
    untrained = _null_is_untrained(config)
    if isinstance(model, Foreign):
        untrained = conditional and model.null_label is None
    given = command.given
    if given is None:
        wanted = conditional and (untrained or command.protocol == "paper")
        if command.method == "audit" and isinstance(model, CDM):
            wanted = False  # its log Z is that of the density without a label
        given = "label" if wanted and data.labels is not None else "none"
    told = []
    if untrained and given == "none" and not is_foreign(command.run):
        told.append(f"{UNTRAINED_NULL}: give --given label or all")
    if command.protocol == "paper":
        told.append(PUBLIC_SCORING)
    return replace(command, given=given), told


def calibrate_command(command: arguments.Calibrate) -> Outcome:
    """`cdm-fast calibrate`."""
    config = read_config(command.run)
    if command.undo:
        remove_calibration(command.run)
        return Outcome({"run": str(command.run), "undone": True}, [f"{command.run} is as it was trained"])
    if command.batch_size < 1:
        raise UserError(f"--batch-size is {command.batch_size}; give 1 or more")
    data = run_data(config, command.split, command.data)
    _require_fit(data, config, command.run)
    loaded = load(command.run, calibrated=False)
    require_likelihood(loaded)
    model = cast(CDM, loaded.to(pick_device(command.device)))

    def figure() -> LikelihoodReport:
        return evaluate(model, data, batch_size=command.batch_size, seed=command.seed)

    before = figure()
    calibration = calibrate(
        model,
        data,
        command.particles,
        command.runs,
        command.moves,
        command.rungs,
        command.seed,
        to_stderr,
    )
    path, after = write_calibration(command.run, calibration), figure()
    result = {
        "run": str(command.run),
        "before": before.to_json(),
        "after": after.to_json(),
        "calibration": asdict(calibration),
        "file": str(path),
    }
    described = (describe_score(report.to_json()) for report in (before, after))
    names = (f"{name}: {line}" for name, (line, *_) in zip(("before", "after"), described, strict=True))
    z, error, up = calibration.log_z[0], calibration.log_z_stderr[0], calibration.log_z_up
    told = f"log Z of level 0: {z:+.2f} +- {error:.2f} nats by walks from noise, {up:+.2f} from data"
    return Outcome(result, [*names, told, str(path)])


def classify_command(command: arguments.Classify) -> Outcome:
    """`cdm-fast classify`."""
    return _scored_by(score_classes, command)


def score_command(command: arguments.Score) -> Outcome:
    """`cdm-fast score`."""
    return _scored_by(score_images, command)


ImageScoring = TypeVar("ImageScoring", arguments.Classify, arguments.Score)


def _scored_by(
    scoring: Callable[[ImageScoring, RunConfig, Denoiser, ImageData], Scored], command: ImageScoring
) -> Outcome:
    """Reads what a command names, has it scored, and writes the values of every image if asked to."""
    foreign = None
    if is_foreign(command.run):
        if not isinstance(command, arguments.Classify):
            raise UserError(f"{command.run} only denoises, and score reads one-pass likelihoods; give a run")
        require_data(command.run, command.data)
        foreign = _open(command.run, command.device)
    config = read_config(command.run) if foreign is None else foreign.config
    if command.batch_size < 1:
        raise UserError(f"--batch-size is {command.batch_size}; give 1 or more")
    if command.out is not None:
        check_name(command.out)
    data = run_data(config, command.split, command.data)
    _require_fit(data, config, command.run)
    model = _load(command.run, command.device) if foreign is None else foreign.model
    into = command if foreign is None else replace(command, run=foreign.folder)
    result, lines, columns = scoring(into, config, model, data)
    found = {"run": str(command.run), **result}
    if command.out is not None:
        found["out"] = str(write_per_image(command.out, data, columns))
    return Outcome(found, lines)


def _require_fit(data: ImageData, config: RunConfig, run: Path) -> None:
    """UserError unless the images are of the run's kind."""
    image = config.image
    found = (*data.images.shape[1:], data.num_grey_levels)
    wanted = (image.channels, image.size, image.size, image.num_grey_levels)
    if found != wanted:
        raise UserError(
            f"{data.name} holds {_kind(found)}, and {run} was trained on {_kind(wanted)};"
            " give data of that kind"
        )


def _kind(shape: tuple[int, ...]) -> str:
    channels, height, width, grey = shape
    return f"{height}x{width} images of {channels} channel{'s' * (channels > 1)} and {grey} grey levels"


def denoise_command(command: arguments.Denoise) -> Outcome:
    """`cdm-fast denoise`."""
    if not command.images:
        raise UserError("no image to denoise; name one or more image files after the run directory")
    model, config, place = _open(command.run, command.device)
    folder = command.out or place / "denoised"
    targets = [folder / f"{path.stem}.png" for path in command.images]
    if len(set(targets)) < len(targets):
        raise UserError("two of the images have the same name; denoise them apart, each into its own --out")
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
    measurement, shown = measure(command, config)
    model = load(command.run)
    require_likelihood(model)
    log = MoveLog()
    found = restore(
        cast(CDM, model.to(pick_device(command.device))),
        measurement,
        command.candidates,
        command.steps,
        command.seed,
        level=command.level,
        moves=command.moves,
        log=log,
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


def plot_command(command: arguments.Plot) -> Outcome:
    """`cdm-fast plot`."""
    config = read_config(command.run)
    data = run_data(config, command.split)
    _require_fit(data, config, command.run)
    model = _load(command.run, command.device)
    paths = [] if isinstance(model, Classifier) else write_level_pictures(model, data, command.run)
    if (command.run / "log.jsonl").exists():  # a converted run has none
        paths += write_loss_curves(command.run)
    return Outcome({"run": str(command.run), "pictures": [str(path) for path in paths]}, [*map(str, paths)])


def replay_command(command: arguments.Replay) -> Outcome:
    """`cdm-fast replay`."""
    found = replay(command.run, command.step, device=command.device, out=command.out)
    verdict = "finite" if found["finite"] else "not finite: training skips it"
    lines = [
        f"step {found['step']} (seed {found['seed']}), from the checkpoint of step {found['from_step']}: loss"
        f" {found['loss']:.6g}, CE {found['ce']:.6g}, MSE {found['mse']:.6g}, gradient norm"
        f" {found['grad_norm']:.6g}, {verdict}",
        *(f"gradient norm {row['grad_norm']:.6g} of {row['name']}" for row in found["parameters"]),
        *(
            f"loss {row['loss']:.6g} of training image {row['index']} at level {row['level']}"
            + ("" if row["label"] is None else f", label {row['label']}")
            for row in found["images"]
        ),
    ]
    return Outcome(found, lines)


def convert_command(command: arguments.Convert) -> Outcome:
    """`cdm-fast convert`."""
    out = command.out or Path("runs") / command.file.stem
    betas = None
    if (command.beta_start, command.beta_end) != (None, None):
        start, end = command.beta_start, command.beta_end
        betas = (PUBLIC_BETAS[0] if start is None else start, PUBLIC_BETAS[1] if end is None else end)
    converted = convert(
        command.file, out, schedule=command.schedule, betas=betas, image_size=command.image_size
    )
    assumed = f"assumed: {', '.join(converted.assumed)}"
    return Outcome(converted.to_json(), [f"{out}: {converted.num_parameters:,} parameters", assumed])


def doctor_command(command: arguments.Doctor) -> Outcome:
    """`cdm-fast doctor`."""
    found = doctor.report()
    return Outcome(found, doctor.render(found).splitlines())


_COMMANDS: dict[type, Callable[[Any], Outcome]] = {
    arguments.Train: train_command,
    arguments.Sample: sample_command,
    arguments.Nll: nll_command,
    arguments.Calibrate: calibrate_command,
    arguments.Classify: classify_command,
    arguments.Score: score_command,
    arguments.Denoise: denoise_command,
    arguments.Restore: restore_command,
    arguments.Plot: plot_command,
    arguments.Replay: replay_command,
    arguments.Convert: convert_command,
    arguments.Doctor: doctor_command,
}
