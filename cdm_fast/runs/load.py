"""The trained model of a run directory: `cdm_fast.load`."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cdm_fast.errors import UserError
from cdm_fast.host.hub import on_hub
from cdm_fast.runs.build import build_model
from cdm_fast.runs.calibration import apply_calibration
from cdm_fast.runs.checkpoint import load_checkpoint, read_config
from cdm_fast.runs.constants import apply_constants
from cdm_fast.runs.hub import require_run
from cdm_fast.runs.weights import require_network, restore_weights

if TYPE_CHECKING:
    from cdm_fast.model import CDM, DDM
    from cdm_fast.model.classifier import Classifier


def load(
    run: str | Path,
    weights: Literal["ema", "raw"] = "ema",
    calibrated: bool = True,
    constants: bool = True,
) -> "CDM | DDM | Classifier":
    """The trained model of a run directory, in evaluation mode, on the CPU.

    Args:
        run: a directory that `train` or `interop.convert` wrote; or `hf:OWNER/NAME` or
            `hf:OWNER/NAME@REVISION`, a run that was pushed to the hub (extra: hub).
        weights: "ema", the moving average, for sampling and scoring; or "raw", the current weights.
        calibrated: apply the calibration, if the run has one (`cdm-fast calibrate`); ignored for "raw".
        constants: apply the refitted constants, if the run has them
            (`cdm-fast calibrate --method constants`); ignored for "raw".

    Raises:
        UserError: `run` is not a run directory, cannot be fetched, or has no intact checkpoint that fits
            its config.

    Example, with an untrained run:
        >>> import tempfile
        >>> from cdm_fast.config import NetworkConfig, OutputConfig, RunConfig, ScheduleConfig
        >>> from cdm_fast.runs.checkpoint import Checkpoint, create_run
        >>> from cdm_fast.runs.weights import snapshot
        >>> config = RunConfig(
        ...     schedule=ScheduleConfig(T=8),
        ...     network=NetworkConfig(multipliers=(1,), attention_resolutions=()),
        ...     output=OutputConfig(sampling_steps=4),
        ... )
        >>> weights = snapshot(build_model(config))
        >>> folder = tempfile.TemporaryDirectory()
        >>> run = f"{folder.name}/run"
        >>> parts = {"model": weights, "ema": weights, "optimizer": {}}
        >>> create_run(run, config, Checkpoint(parts, {"step": 0}))
        >>> load(run).schedule.num_levels
        10
        >>> folder.cleanup()
    """
    if weights not in ("ema", "raw"):
        raise UserError(f"weights is {weights!r}; give 'ema' or 'raw'")
    part = "ema" if weights == "ema" else "model"
    run = require_run(run, (part,)) if on_hub(run) else Path(run).expanduser()
    config = read_config(run)
    checkpoint = load_checkpoint(run, parts=(part,))
    require_network(config, checkpoint.tensors[part], str(run))
    model = build_model(config)
    restore_weights(model, checkpoint.tensors[part], str(run))
    if constants and weights == "ema":
        apply_constants(model, run)
    if calibrated and weights == "ema":
        apply_calibration(model, run)
    return model.eval()
