"""`cdm-fast nll`, one function per method, and `cdm-fast calibrate`."""

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from cdm_fast.cli import arguments
from cdm_fast.cli.arguments import Nll
from cdm_fast.cli.describe import (
    describe_audit,
    describe_denoiser_audit,
    describe_elbo,
    describe_ode,
    describe_score,
)
from cdm_fast.cli.outcome import (
    UNTRAINED_NULL,
    Outcome,
    Scored,
    data_for,
    null_is_untrained,
    open_model,
    without_arrays,
)
from cdm_fast.cli.per_image import check_name, write_per_image
from cdm_fast.config import RunConfig
from cdm_fast.config.json import finite
from cdm_fast.data import ImageData
from cdm_fast.errors import UserError, require_at_least
from cdm_fast.host.device import pick_device
from cdm_fast.host.progress import to_stderr
from cdm_fast.interop import Foreign
from cdm_fast.interop.source import is_foreign, require_data
from cdm_fast.likelihood import (
    LikelihoodReport,
    audit,
    audit_denoiser,
    evaluate,
    evaluate_elbo,
    evaluate_ode,
)
from cdm_fast.likelihood.audits import LARGEST_ODE_BATCH, DenoiserAudit
from cdm_fast.likelihood.single_pass import PUBLIC_SCORING
from cdm_fast.likelihood.units import nats_per_bit_per_dim, require_denoiser
from cdm_fast.model import CDM, Denoiser
from cdm_fast.model.cdm import require_likelihood
from cdm_fast.plots.evaluation import write_audit
from cdm_fast.runs.calibrate import calibrate
from cdm_fast.runs.calibration import apply_calibration, remove_calibration, write_calibration
from cdm_fast.runs.checkpoint import read_config, write_json
from cdm_fast.runs.constants import put_constants, remove_constants, write_constants
from cdm_fast.runs.data import run_data
from cdm_fast.runs.load import load
from cdm_fast.runs.reports import write_report
from cdm_fast.training.constants import refit_constants
from cdm_fast.training.loop import describe_validation
from cdm_fast.training.tuning import compile_network
from cdm_fast.training.validation import validate


def score(command: Nll, model: Denoiser, data: ImageData) -> Scored:
    """The JSON values, the lines of text, and the columns of the per-image file.

    Raises UserError for a model without likelihood, for a method that the model does not support, and for an
    argument out of range.
    """
    require_denoiser(model)
    if command.method == "single" and not isinstance(model, CDM):
        raise UserError(
            "this is a plain denoising model, which has no single-pass likelihood: give --method ode, elbo or"
            " audit"
        )
    return _METHODS[command.method](command, model, data)


def _score_single(command: Nll, model: CDM, data: ImageData) -> Scored:
    report = evaluate(
        model,
        data,
        command.level,
        draws=command.draws,
        batch_size=command.batch_size,
        seed=command.seed,
        protocol=command.protocol,
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
        num_images=command.ode_images,
        tolerance=command.tolerance,
        probes=command.probes,
        batch_size=min(command.batch_size, LARGEST_ODE_BATCH),
        seed=command.seed,
        progress=to_stderr,
        given=command.given or "none",
    )
    fields = report.to_json()
    result = {"method": "ode", "data": data.name, "split": data.split, **_prefixed("ode", fields)}
    return result, describe_ode(fields), {"ode_bits_per_dim": (report.index, report.per_image)}


def _score_elbo(command: Nll, model: Denoiser, data: ImageData) -> Scored:
    report = evaluate_elbo(
        model,
        data,
        command.elbo_images,
        batch_size=command.batch_size,
        seed=command.seed,
        progress=to_stderr,
        given=command.given or "none",
        every=command.elbo_every,
    )
    fields = report.to_json()
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
            f"--given {command.given} works with --method single, ode or elbo: the audit measures log Z of"
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
        elbo_every=command.elbo_every,
        particles=command.particles,
        runs=command.runs,
        moves=command.moves,
        rungs=command.rungs,
        progress=to_stderr,
    )
    result = report.to_json()
    own = _describes_run(command)
    if own:
        write_report(command.run, "audit.json", result)
    picture = write_audit(result, command.run / ("audit.png" if own else "audit-other.png"))
    columns = {**_single_columns(report.single), **_denoiser_columns(report.denoiser)}
    return {**result, "picture": str(picture)}, [*describe_audit(result), str(picture)], columns


def _describes_run(command: Nll) -> bool:
    """Whether an audit is the run's own, which RUN/audit.json and RUN/audit.png hold: clean test images of
    its data."""
    return (command.data, command.pixels, command.level, command.split) == (None, None, 0, "test")


def _score_denoiser(command: Nll, model: Denoiser, data: ImageData) -> Scored:
    """`--method audit` for a model without a single pass: ODE and bound."""
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
        elbo_every=command.elbo_every,
        progress=to_stderr,
        given=command.given or "none",
    )
    result = {"data": data.name, "split": data.split, "level": command.level, **report.to_json()}
    return result, describe_denoiser_audit(result), _denoiser_columns(report)


def _denoiser_columns(report: DenoiserAudit) -> dict[str, tuple[Tensor, Tensor]]:
    columns = {"ode_bits_per_dim": (report.ode.index, report.ode.per_image)}
    if report.elbo is not None:
        columns["elbo_bits_per_dim"] = report.elbo.index, report.elbo.per_image
    return columns


def _single_columns(report: LikelihoodReport) -> dict[str, tuple[Tensor, Tensor]]:
    return {"bits_per_dim": (torch.arange(report.num_images), report.per_image)}


_METHODS: dict[str, Callable[[Nll, Any, ImageData], Scored]] = {
    "single": _score_single,
    "ode": _score_ode,
    "elbo": _score_elbo,
    "audit": _score_audit,
}


def nll_command(command: arguments.Nll) -> Outcome:
    """`cdm-fast nll`."""
    _check_flags(command)
    require_data(command.run, command.data)
    foreign = open_model(command.run, command.device) if is_foreign(command.run) else None
    config = read_config(command.run) if foreign is None else foreign.config
    if command.pixels is not None:
        config = replace(config, data=replace(config.data, pixels=command.pixels))
    data = data_for(command.run, config, command.split, command.data)
    calibration = None
    if foreign is None:
        loaded = load(command.run, calibrated=False)
        calibration = apply_calibration(loaded, command.run)
        model: Denoiser = loaded.to(pick_device(command.device))
    else:
        model = foreign.model
    compile_network(model, command.compile)
    command, notes = _given(command, model, config, data)
    result, lines, columns = score(command, model, data)
    report = {"run": str(command.run), "pixels": data.pixels, "notes": notes, **result}
    lines = [*lines, *notes]
    if calibration is not None and "bits_per_dim" in result:
        before = result["bits_per_dim"] - calibration.log_z[command.level] / nats_per_bit_per_dim(data)
        report["uncalibrated_bits_per_dim"] = before
        undo = f"cdm-fast calibrate {command.run} --undo"
        lines.append(f"calibrated; without calibration {before:.4f} bits/dim ({undo} removes it)")
    if command.out is not None:
        report["out"] = str(write_per_image(command.out, data, columns))
        report["report"] = str(command.out.with_suffix(".json"))
        write_json(command.out.with_suffix(".json"), finite(report))
    return Outcome(without_arrays(report), lines)


def _check_flags(command: arguments.Nll) -> None:
    """UserError for incompatible flags, or values out of range, before anything is read."""
    require_at_least("--batch-size", command.batch_size, 1)
    if command.protocol == "paper" and command.method != "single":
        raise UserError(f"--protocol paper goes with --method single, not {command.method}; leave one out")
    if command.method == "elbo" and command.level != 0:
        raise UserError(f"--level {command.level}: the variational bound is for level 0 only; leave it out")
    if command.precision != "fp32" and command.method != "single":
        raise UserError(f"--precision {command.precision} goes with --method single; leave one out")
    if command.out is not None:
        check_name(command.out)


def _given(
    command: arguments.Nll, model: Denoiser, config: RunConfig, data: ImageData
) -> tuple[arguments.Nll, list[str]]:
    """The command with `given` resolved, and notes on the choice."""
    conditional = config.network.conditioning == "embedding"
    untrained = null_is_untrained(config)
    if isinstance(model, Foreign):
        untrained = conditional and model.null_label is None
    given = command.given
    if given is None:
        wanted = conditional and (untrained or command.protocol == "paper")
        if command.method == "audit" and isinstance(model, CDM):
            wanted = False  # its log Z belongs to the density without a label
        given = "label" if wanted and data.labels is not None else "none"
    notes = []
    if untrained and given == "none" and not is_foreign(command.run):
        notes.append(f"{UNTRAINED_NULL}: give --given label or all")
    if command.protocol == "paper":
        notes.append(PUBLIC_SCORING)
    return replace(command, given=given), notes


def calibrate_command(command: arguments.Calibrate) -> Outcome:
    """`cdm-fast calibrate`."""
    config = read_config(command.run)
    if command.method == "constants":
        return _refit(command, config)
    if command.undo:
        remove_calibration(command.run)
        return Outcome({"run": str(command.run), "undone": True}, [f"{command.run} is as it was trained"])
    require_at_least("--batch-size", command.batch_size, 1)
    data = data_for(command.run, config, command.split, command.data)
    model = require_likelihood(load(command.run, calibrated=False)).to(pick_device(command.device))

    def figure() -> LikelihoodReport:
        return evaluate(model, data, batch_size=command.batch_size, seed=command.seed)

    before = figure()
    calibration = calibrate(
        model,
        data,
        particles=command.particles,
        runs=command.runs,
        moves=command.moves,
        rungs=command.rungs,
        seed=command.seed,
        progress=to_stderr,
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
    log_z = f"log Z of level 0: {z:+.2f} +- {error:.2f} nats from noise to data, {up:+.2f} from data to noise"
    return Outcome(without_arrays(result), [*names, log_z, str(path)])


def _refit(command: arguments.Calibrate, config: RunConfig) -> Outcome:
    """`cdm-fast calibrate --method constants`."""
    if command.undo:
        remove_constants(command.run)
        return Outcome({"run": str(command.run), "undone": True}, [f"{command.run} is as it was trained"])
    data = data_for(command.run, config, command.split, command.data)
    loaded = load(command.run, calibrated=False, constants=False)
    model = require_likelihood(loaded).to(pick_device(command.device))
    before = validate(model, data)
    constants = refit_constants(
        model,
        run_data(config, "train", command.data),
        command.rows,
        flip=config.data.flip,
        null_class=config.train.label_dropout > 0,
        seed=command.seed,
        progress=to_stderr,
    )
    put_constants(model, constants)
    path, after = write_constants(command.run, constants), validate(model, data)
    result = {"run": str(command.run), "before": before, "after": after, "file": str(path)}
    lines = [
        f"{name}: {describe_validation(figures)}" for name, figures in (("before", before), ("after", after))
    ]
    return Outcome(result, [*lines, str(path)])
