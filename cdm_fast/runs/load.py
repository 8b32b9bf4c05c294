"""The trained model of a run directory: `cdm_fast.load`."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cdm_fast.errors import UserError
from cdm_fast.runs.build import build_model
from cdm_fast.runs.calibration import apply_calibration
from cdm_fast.runs.checkpoint import load_checkpoint, read_config
from cdm_fast.runs.weights import require_network, restore_weights

if TYPE_CHECKING:
    from cdm_fast.model import CDM, DDM
    from cdm_fast.model.classifier import Classifier


def load(
    run: str | Path, weights: Literal["ema", "raw"] = "ema", calibrated: bool = True
) -> "CDM | DDM | Classifier":
    """The trained model of a run directory, in evaluation mode, on the CPU.

    weights: "ema", the moving average that sampling and scoring should use, or "raw", the optimizer's own.
    calibrated: fold in the calibration of the average, if the run has one (`cdm-fast calibrate`).
    Raises UserError when `run` is no run directory, or holds no intact checkpoint of its architecture.
    """
    if weights not in ("ema", "raw"):
        raise UserError(f"weights is {weights!r}; give 'ema' or 'raw'")
    run = Path(run).expanduser()
    config = read_config(run)
    part = "ema" if weights == "ema" else "model"
    checkpoint = load_checkpoint(run, parts=(part,))
    require_network(config, checkpoint.tensors[part], str(run))
    model = build_model(config)
    restore_weights(model, checkpoint.tensors[part], str(run))
    if calibrated and weights == "ema":
        apply_calibration(model, run)
    return model.eval()
