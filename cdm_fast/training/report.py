"""Pictures and scores of a run: samples, loss curves, level confusion, denoising error, likelihood, accuracy.

Legend: B images, C channels, H W pixels, N grey levels, K classes.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from cdm_fast.config import RunConfig
from cdm_fast.data import ImageData, write_grid
from cdm_fast.data.pixels import displayable
from cdm_fast.evaluation.classification import evaluate_classes
from cdm_fast.host.processes import is_main
from cdm_fast.host.progress import to_stderr
from cdm_fast.likelihood import evaluate, level_confusion, mse_per_level
from cdm_fast.model import CDM, DDM
from cdm_fast.model.classifier import Classifier
from cdm_fast.plots.evaluation import write_classes
from cdm_fast.plots.sheet import write_rows
from cdm_fast.plots.training import write_calibration, write_confusion, write_level_mse, write_losses
from cdm_fast.runs.build import class_labels
from cdm_fast.runs.data import run_data
from cdm_fast.runs.reports import write_report
from cdm_fast.sampling import sample, sampler_name
from cdm_fast.training.log import read_log
from cdm_fast.training.validation import check_levels, num_rows

MAX_ROWS = 20  # rows of a sheet with one class per row; more would be too small to read


def write_samples(model: CDM | DDM, config: RunConfig, run: Path) -> None:
    """RUN/samples.png: a sheet of samples, always from the same noise, so that steps can be compared."""
    output = config.output
    labels = class_labels(config, output.num_samples)
    guidance = 0.0 if labels is None else output.guidance
    sampler = sampler_name(output.sampler, model)
    images = sample(
        model,
        output.num_samples,
        sampler,
        output.sampling_steps,
        seed=0,
        label=labels,
        guidance=guidance,
    )
    title = f"{sampler}, {output.sampling_steps} steps, guidance {guidance:g}"
    shown = displayable(images, config.image.num_grey_levels, config.data.pixels)
    write_sheet(shown, labels, run / "samples.png", title)


def write_sheet(
    pixels: Tensor,  # (B,C,H,W) uint8
    labels: Tensor | None,  # (B,) int64
    path: Path,
    title: str,
) -> None:
    """A PNG of samples: a row for each class if there are 2 to `MAX_ROWS` classes, else a plain sheet."""
    classes = [] if labels is None else labels.unique().tolist()
    if labels is None or not 2 <= len(classes) <= MAX_ROWS:
        write_grid(pixels, path)
    else:
        rows = {f"class {c}": pixels[labels == c] for c in classes}
        write_rows(rows, path, title)


def write_loss_curves(run: Path) -> list[Path]:
    """RUN/loss.png, if the log is not empty; returns its path in a list, or an empty list."""
    records = read_log(run / "log.jsonl")
    return [write_losses(records, run / "loss.png")] if records else []


def write_level_pictures(model: CDM | DDM, data: ImageData, run: Path) -> list[Path]:
    """RUN/mse.png, and for a CDM RUN/confusion.png and RUN/calibration.png; returns their paths."""
    levels, mse = mse_per_level(model, data)
    paths = [write_level_mse(levels, mse, run / "mse.png")]
    if isinstance(model, CDM):
        _, confusion = level_confusion(model, data)
        paths.append(write_confusion(confusion, run / "confusion.png", model.schedule.num_levels))
    return [*paths, *write_level_checks(model, data, run)]


def write_level_checks(model: CDM | DDM | Classifier, data: ImageData, run: Path) -> list[Path]:
    """RUN/calibration.png for a CDM: level posteriors against the prior, and ratios; its path in a list."""
    if not isinstance(model, CDM):
        return []
    checks = check_levels(model, data, num_rows(data))
    return [write_calibration(asdict(checks), run / "calibration.png")]


def write_final(
    model: CDM | DDM | Classifier, config: RunConfig, validation: ImageData, run: Path
) -> dict[str, Any]:
    """Writes all pictures of a finished run, scores its test split (not for a DDM), and returns the scores.

    A CDM also writes RUN/nll.json, a model with classes RUN/classes.json, whose accuracy and ECE are
    returned.
    """
    if isinstance(model, Classifier):
        to_stderr("scoring the test images")
        return {"run": str(run), **_write_accuracy(model, run_data(config, "test"), config.output.draws, run)}
    to_stderr("drawing samples and scoring the test images" if isinstance(model, CDM) else "drawing samples")
    write_samples(model, config, run)
    write_level_pictures(model, validation, run)
    if not isinstance(model, CDM):
        return {}
    test = run_data(config, "test")
    score = {"run": str(run), **evaluate(model, test, draws=config.output.draws).to_json()}
    write_report(run, "nll.json", score)
    return {**score, **_write_accuracy(model, test, config.output.draws, run)}


def _write_accuracy(model: CDM | Classifier, test: ImageData, draws: int, run: Path) -> dict[str, Any]:
    """RUN/classes.json and RUN/classes.png of a class-conditional model; returns the figures, if any."""
    if model.num_classes is None:
        return {}
    report = evaluate_classes(model, test, draws=draws).to_json()
    write_report(run, "classes.json", report)
    write_classes(report, run / "classes.png")
    return {key: report[key] for key in ("accuracy", "accuracy_stderr", "ece")}


def update_loss_curves(run: Path) -> None:
    """`write_loss_curves` on rank 0, which has the log."""
    if is_main():
        write_loss_curves(run)
