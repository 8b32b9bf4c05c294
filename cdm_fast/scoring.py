"""`cdm-fast nll`, method by method: from parsed arguments to what is told."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cdm_fast.arguments import Nll
from cdm_fast.data import ImageData
from cdm_fast.errors import UserError
from cdm_fast.host.progress import to_stderr
from cdm_fast.likelihood import (
    LikelihoodReport,
    audit,
    audit_denoiser,
    describe_denoiser_audit,
    evaluate,
    evaluate_elbo,
    evaluate_ode,
    without_images,
)
from cdm_fast.likelihood.describe import describe_audit, describe_elbo, describe_ode, describe_score
from cdm_fast.likelihood.units import require_denoiser
from cdm_fast.model import CDM, Denoiser
from cdm_fast.plots.evaluation import write_audit

Scored = tuple[dict[str, Any], list[str], dict[str, tuple[Tensor, Tensor]]]  # JSON, lines, columns per image


def score(command: Nll, model: Denoiser, data: ImageData) -> Scored:
    """The JSON values, the lines for a person, and the columns of the per-image file.

    Raises UserError for a model without likelihood, for a way of scoring that it does not have, and for every
    argument out of range.
    """
    require_denoiser(model)
    if command.method == "single" and not isinstance(model, CDM):
        raise UserError(
            "this is a plain denoising model, which has no likelihood in one pass: give --method ode, elbo or"
            " audit"
        )
    return _METHODS[command.method](command, model, data)


def _score_single(command: Nll, model: CDM, data: ImageData) -> Scored:
    report = evaluate(
        model,
        data,
        command.level,
        command.draws,
        command.batch_size,
        command.seed,
        command.protocol,
        precision=command.precision,
        given=command.given or "none",
    )
    result = report.to_json()
    speed = f"{report.images_per_second:.0f} images/s"
    return result, [*describe_score(result), speed], _single_columns(report)


def _score_ode(command: Nll, model: Denoiser, data: ImageData) -> Scored:
    report = evaluate_ode(
        model,
        data,
        command.level,
        command.ode_images,
        command.tolerance,
        command.probes,
        min(command.batch_size, 64),
        command.seed,
        to_stderr,
        command.given or "none",
    )
    fields = without_images(report)
    result = {"method": "ode", "data": data.name, "split": data.split, **_prefixed("ode", fields)}
    return result, describe_ode(fields), {"ode_bits_per_dim": (report.index, report.per_image)}


def _score_elbo(command: Nll, model: Denoiser, data: ImageData) -> Scored:
    report = evaluate_elbo(
        model, data, command.elbo_images, command.batch_size, command.seed, to_stderr, command.given or "none"
    )
    fields = without_images(report)
    result = {"method": "elbo", "data": data.name, "split": data.split, **_prefixed("elbo", fields)}
    return result, describe_elbo(fields), {"elbo_bits_per_dim": (report.index, report.per_image)}


def _prefixed(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The figure and its standard error under `NAME_bits_per_dim...`, the rest under `NAME`."""
    keys = ("bits_per_dim", "bits_per_dim_stderr")
    return {**{f"{name}_{key}": fields[key] for key in keys}, name: fields}


def _score_audit(command: Nll, model: Denoiser, data: ImageData) -> Scored:
    if not isinstance(model, CDM):
        return _score_denoiser(command, model, data)
    if command.given not in (None, "none"):
        raise UserError(
            f"--given {command.given} goes with --method single, ode or elbo: the audit's log Z is that of"
            " the density without a label; leave one out"
        )
    report = audit(
        model,
        data,
        command.level,
        draws=command.draws,
        batch_size=command.batch_size,
        seed=command.seed,
        ode_images=command.ode_images,
        tolerance=command.tolerance,
        probes=command.probes,
        elbo_images=command.elbo_images,
        particles=command.particles,
        runs=command.runs,
        moves=command.moves,
        rungs=command.rungs,
        progress=to_stderr,
    )
    result = report.to_json()
    picture = write_audit(result, command.run / "audit.png")
    columns = _single_columns(report.single)
    columns["ode_bits_per_dim"] = report.ode.index, report.ode.per_image
    if report.elbo is not None:
        columns["elbo_bits_per_dim"] = report.elbo.index, report.elbo.per_image
    return {**result, "picture": str(picture)}, [*describe_audit(result), str(picture)], columns


def _score_denoiser(command: Nll, model: Denoiser, data: ImageData) -> Scored:
    """`--method audit` of a model without single pass: ODE and bound beside each other."""
    report = audit_denoiser(
        model,
        data,
        command.level,
        batch_size=command.batch_size,
        seed=command.seed,
        ode_images=command.ode_images,
        tolerance=command.tolerance,
        probes=command.probes,
        elbo_images=command.elbo_images,
        progress=to_stderr,
        given=command.given or "none",
    )
    result = {"data": data.name, "split": data.split, "level": command.level, **report.to_json()}
    columns = {"ode_bits_per_dim": (report.ode.index, report.ode.per_image)}
    if report.elbo is not None:
        columns["elbo_bits_per_dim"] = report.elbo.index, report.elbo.per_image
    return result, describe_denoiser_audit(result), columns


def _single_columns(report: LikelihoodReport) -> dict[str, tuple[Tensor, Tensor]]:
    return {"bits_per_dim": (torch.arange(report.num_images), report.per_image)}


_METHODS: dict[str, Callable[[Nll, Any, ImageData], Scored]] = {
    "single": _score_single,
    "ode": _score_ode,
    "elbo": _score_elbo,
    "audit": _score_audit,
}
