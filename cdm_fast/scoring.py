"""`cdm-fast nll`, method by method: from parsed arguments to what is told."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cdm_fast.arguments import Nll
from cdm_fast.data import ImageData
from cdm_fast.likelihood import (
    LikelihoodReport,
    audit,
    describe_audit,
    describe_elbo,
    describe_ode,
    describe_score,
    evaluate,
    evaluate_elbo,
    evaluate_ode,
    without_images,
)
from cdm_fast.likelihood.images import require_likelihood
from cdm_fast.model import CDM, Denoiser
from cdm_fast.plots import write_audit
from cdm_fast.progress import to_stderr

Scored = tuple[dict[str, Any], list[str], dict[str, tuple[Tensor, Tensor]]]  # JSON, lines, columns per image


def score(command: Nll, model: Denoiser, data: ImageData) -> Scored:
    """The JSON values, the lines for a person, and the columns of the per-image file.

    Raises UserError for a model without likelihood and for every argument out of range.
    """
    require_likelihood(model)
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
    )
    result = report.to_json()
    speed = f"{report.images_per_second:.0f} images/s"
    return result, [*describe_score(result), speed], _single_columns(report)


def _score_ode(command: Nll, model: CDM, data: ImageData) -> Scored:
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
    )
    fields = without_images(report)
    result = {"method": "ode", "data": data.name, "split": data.split, **_prefixed("ode", fields)}
    return result, describe_ode(fields), {"ode_bits_per_dim": (report.index, report.per_image)}


def _score_elbo(command: Nll, model: CDM, data: ImageData) -> Scored:
    report = evaluate_elbo(model, data, command.elbo_images, command.batch_size, command.seed, to_stderr)
    fields = without_images(report)
    result = {"method": "elbo", "data": data.name, "split": data.split, **_prefixed("elbo", fields)}
    return result, describe_elbo(fields), {"elbo_bits_per_dim": (report.index, report.per_image)}


def _prefixed(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The figure and its standard error under `NAME_bits_per_dim...`, the rest under `NAME`."""
    keys = ("bits_per_dim", "bits_per_dim_stderr")
    return {**{f"{name}_{key}": fields[key] for key in keys}, name: fields}


def _score_audit(command: Nll, model: CDM, data: ImageData) -> Scored:
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


def _single_columns(report: LikelihoodReport) -> dict[str, tuple[Tensor, Tensor]]:
    return {"bits_per_dim": (torch.arange(report.num_images), report.per_image)}


_METHODS: dict[str, Callable[[Nll, Any, ImageData], Scored]] = {
    "single": _score_single,
    "ode": _score_ode,
    "elbo": _score_elbo,
    "audit": _score_audit,
}
