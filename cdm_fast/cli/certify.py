"""`cdm-fast classify --certify` and `--selective`."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from cdm_fast.cli.arguments import Classify
from cdm_fast.cli.outcome import Scored, load_on, require_fit
from cdm_fast.cli.score import reference_images
from cdm_fast.config import RunConfig
from cdm_fast.data import ImageData
from cdm_fast.errors import UserError
from cdm_fast.evaluation.attacks import ClassLogLikelihoods
from cdm_fast.evaluation.certification import (
    DenoisedPixelClassifier,
    NoisyPixelClassifier,
)
from cdm_fast.evaluation.certification_report import CertificationReport, evaluate_certificates
from cdm_fast.evaluation.class_scores import fitting_method, require_classes
from cdm_fast.evaluation.classification import ClassReport, labels_for
from cdm_fast.evaluation.outliers import evaluate_outliers
from cdm_fast.evaluation.selective import Rejection, SelectiveReport, evaluate_selection, reject_unusual
from cdm_fast.host.progress import to_stderr
from cdm_fast.model import CDM, Denoiser
from cdm_fast.model.classifier import Classifier
from cdm_fast.plots.certification import write_certified, write_selective
from cdm_fast.runs.checkpoint import read_config


def check_certify(command: Classify, model: Denoiser, data: ImageData) -> None:
    """Raises UserError, before any work, for settings that `--certify` does not support."""
    if command.denoiser is not None and not command.certify:
        raise UserError("--denoiser belongs to --certify: add that flag")
    if command.certify_precision != "fp32" and not command.certify:
        raise UserError("--certify-precision belongs to --certify: add that flag")
    if not command.certify:
        return
    if fitting_method(model, command.method) in ("denoising", "ode"):
        raise UserError(
            "--certify needs class logits under noise: a run and --method joint, embedding or discriminative"
        )
    if not command.sigma:
        raise UserError("--sigma is empty: give one or more standard deviations of noise, white being 1")
    if command.denoiser is not None:
        require_fit(data, read_config(command.denoiser), command.denoiser)


def certify_images(command: Classify, model: Denoiser, data: ImageData) -> Scored:
    """Certificates at every `--sigma`; draws RUN/certified.png.

    Raises UserError as in `evaluate_certificates`.
    """
    assert isinstance(model, CDM | Classifier)
    denoiser = None if command.denoiser is None else load_on(command.denoiser, command.device)
    reports = []
    for sigma in sorted(command.sigma):
        base: NoisyPixelClassifier | DenoisedPixelClassifier
        if denoiser is None:
            base = NoisyPixelClassifier(model, sigma, data.num_grey_levels, data.pixels)
        else:
            clean = ClassLogLikelihoods(model, data.num_grey_levels, data.pixels)
            base = DenoisedPixelClassifier(denoiser, clean, sigma, data.num_grey_levels, data.pixels)
        reports.append(
            evaluate_certificates(
                base,
                data,
                require_classes(model),
                sigma,
                num_images=command.certify_images,
                draws=command.certify_draws,
                failure_probability=command.failure_probability,
                precision=command.certify_precision,
                batch_size=command.batch_size,
                seed=command.seed,
                progress=to_stderr,
            )
        )
    values: list[dict[str, Any]] = [report.to_json() for report in reports]
    picture = write_certified(values, command.run / "certified.png")
    result: dict[str, Any] = {"certified": {"by_sigma": values, "picture": str(picture)}}
    if command.denoiser is not None:
        result["certified"]["denoiser"] = str(command.denoiser)
    columns = {name: value for report in reports for name, value in report.columns().items()}
    return result, [*describe_certificates(reports), str(picture)], columns


def describe_certificates(reports: list[CertificationReport]) -> list[str]:
    """A table of certified accuracy by sigma and radius, as lines of text."""
    first = reports[0]
    lines = [
        f"certified accuracy in % by L2 radius, white being 1 ({first.num_images} {first.split} images of"
        f" {first.data}, {first.draws} noise draws each, {first.precision}, failure probability"
        f" {first.failure_probability:g}; in brackets: by mean posterior)",
        "  sigma   " + " ".join(f"{radius:>13g}" for radius in first.radii) + "   abstained  images/s",
    ]
    for report in reports:
        cells = (
            f"{100 * votes:5.1f} ({100 * mean:5.1f})"
            for votes, mean in zip(report.certified_accuracy, report.certified_accuracy_of_mean, strict=True)
        )
        lines.append(
            f"  {report.sigma:<8g}"
            + " ".join(f"{cell:>13}" for cell in cells)
            + f" {100 * report.abstained:9.1f} % {report.images_per_second:9.3g}"
        )
    return lines


def select_images(
    command: Classify, config: RunConfig, model: Denoiser, data: ImageData, report: ClassReport
) -> Scored:
    """Risk against coverage, conformal sets and rejection of unusual images; draws RUN/selective.png.

    A model with a single-pass likelihood rejects the images that `cdm-fast score` flags.
    """
    label = labels_for(data, require_classes(model))[report.index]
    selective = evaluate_selection(
        report.log_joint,
        label,
        has_likelihood=report.bits_per_dim is not None,
        set_coverage=command.set_coverage,
        seed=command.seed,
    )
    curves = {"by posterior": selective.risk_by_posterior}
    if selective.risk_by_likelihood is not None:
        curves["by log p(x)"] = selective.risk_by_likelihood
    picture = write_selective(curves, command.run / "selective.png")
    rejection, columns = _reject(command, config, model, data, report, label)
    values = {
        **selective.to_json(),
        "rejection": None if rejection is None else asdict(rejection),
        "picture": str(picture),
    }
    return {"selective": values}, [*describe_selection(selective, rejection), str(picture)], columns


def _reject(
    command: Classify,
    config: RunConfig,
    model: Denoiser,
    data: ImageData,
    report: ClassReport,
    label: Tensor,  # (n,) of the classified images
) -> tuple[Rejection | None, dict[str, tuple[Tensor, Tensor]]]:
    """The rejection of unusual images, and its column; None and {} without a single-pass likelihood."""
    if not isinstance(model, CDM):
        return None, {}
    outliers = evaluate_outliers(
        model,
        data.take(report.index),
        reference_images(config, torch.Generator().manual_seed(command.seed)),
        level=command.level,
        false_alarms=command.false_alarms,
        batch_size=command.batch_size,
        seed=command.seed,
    )
    rejection = reject_unusual(outliers, report.posterior.argmax(1) == label)
    return rejection, {"p_value": (report.index, outliers.p_value)}


def describe_selection(report: SelectiveReport, rejection: Rejection | None) -> list[str]:
    """The reports as lines of text."""
    names = {"posterior": report.accuracy_by_posterior, "likelihood": report.accuracy_by_likelihood}
    areas = {"posterior": report.aurc_by_posterior, "likelihood": report.aurc_by_likelihood}
    lines = [
        f"accuracy in % on the most certain images (AURC of the best order: {report.aurc_oracle:.5f})",
        "  share       " + " ".join(f"{100 * share:6.0f}" for share in report.coverages) + "     AURC",
    ]
    for name, accuracy in names.items():
        if accuracy is not None:
            cells = " ".join(f"{100 * value:6.2f}" for value in accuracy)
            lines.append(f"  {name:12}{cells}  {areas[name]:.5f}")
    lines.append(
        f"conformal sets at {100 * report.set_coverage:g} %: hold the class of"
        f" {100 * report.set_coverage_found:.2f} +- {100 * report.set_coverage_stderr:.2f} %, mean size"
        f" {report.set_size:.2f}, empty {100 * report.empty_sets:.1f} % ({report.splits} random halves)"
    )
    if rejection is not None:
        lines.append(
            f"rejecting unusual images at {100 * rejection.false_alarms:g} % false alarms"
            f" ({rejection.reference_images} images of {rejection.reference}) rejects"
            f" {100 * rejection.rejected:.2f} +- {100 * rejection.rejected_stderr:.2f} %; accuracy on the"
            f" rest {100 * rejection.accuracy:.2f} +- {100 * rejection.accuracy_stderr:.2f} %"
        )
    return lines
