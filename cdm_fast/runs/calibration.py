"""The calibration of a run: log Z of every level, kept in RUN/calibration.json.

`cdm_fast.load` subtracts it from the logits through the bias of the head. Likelihoods change by one constant
per level; the denoiser, samples and class posteriors do not change. The checkpoints stay as they were
trained, and without the file the run is uncalibrated. `calibrate` measures the constants.

# L = T+2 noise levels
"""

import hashlib
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from cdm_fast.config.json import from_json
from cdm_fast.errors import UserError
from cdm_fast.host.files import write_atomically
from cdm_fast.model import CDM, Denoiser
from cdm_fast.nn import AdjointNetwork
from cdm_fast.nn.heads import CumulativeHead

FILE = "calibration.json"
Kept = TypeVar("Kept")  # a dataclass that a run stores as JSON


@dataclass(frozen=True)
class Calibration:
    """log Z of every level, and how it was measured.

    Fields:
        log_z: (L,) nats, by the walks down; 0 at level T+1. It is interpolated between the rungs of a ladder.
        log_z_stderr: (L,) nats, standard error over runs.
        log_z_up: nats, at level 0, by the walks from data; it should agree with `log_z[0]`.
        weights: `fingerprint` of the weights that were measured.
        data, split: the images at which the walks from data start.
        particles, runs, moves, seed: as in `measure_log_z`.
    """

    log_z: tuple[float, ...]
    log_z_stderr: tuple[float, ...]
    log_z_up: float
    weights: str
    data: str
    split: str
    particles: int
    runs: int
    moves: int
    seed: int


@torch.no_grad()
def fold(model: CDM, log_z: tuple[float, ...]) -> None:
    """Subtracts `log_z` (L,) nats from the model's `log p_t`, for all classes, through the bias of its head.

    Raises UserError for a network without a head of this library, or for another number of levels.
    """
    if len(log_z) != model.schedule.num_levels:
        raise UserError(
            f"{len(log_z)} constants do not fit the {model.schedule.num_levels} levels of this model:"
            " calibrate the run again"
        )
    require_head(model).shift(-torch.tensor(log_z, dtype=torch.float64))


def require_head(model: CDM) -> CumulativeHead:
    """The head whose bias takes the constants; UserError for a network without a head of this library."""
    if not isinstance(model.network, AdjointNetwork):
        raise UserError(
            "calibration changes the bias of the head over levels, and this network has no such head;"
            " add log Z to its figures instead"
        )
    return model.network.linear_layer


def write_calibration(run: Path, calibration: Calibration) -> Path:
    """Writes RUN/calibration.json, or replaces it, and returns its path; DiskError if the disk refuses."""
    return write_atomically(run / FILE, json.dumps(asdict(calibration), indent=2).encode())


def remove_calibration(run: Path) -> None:
    """Removes the calibration of a run; UserError if it has none."""
    if not (run / FILE).exists():
        raise UserError(f"{run} is not calibrated: it has no {FILE}")
    (run / FILE).unlink()


def apply_calibration(model: Denoiser, run: str | Path) -> Calibration | None:
    """Applies the calibration of a run to its uncalibrated model, and returns it; None if there is none.

    A calibration of other weights is skipped with a warning. Raises UserError for a file that
    `write_calibration` did not write.
    """
    path, remedy = Path(run) / FILE, "calibrate the run again"
    calibration = read_kept(Calibration, path, remedy)
    if calibration is None:
        return None
    if not all(math.isfinite(value) for value in calibration.log_z):
        raise UserError(f"{path}: log_z is not finite; calibrate the run again")
    if not is_of(model, calibration.weights, path, remedy) or not isinstance(model, CDM):
        return None
    fold(model, calibration.log_z)
    return calibration


def read_kept(kind: type[Kept], path: Path, remedy: str) -> Kept | None:
    """The dataclass that `path` holds as JSON; None without the file; UserError for a damaged one."""
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); {remedy}") from error
    return from_json(kind, value, str(path))


def is_of(model: Denoiser, weights: str, path: Path, remedy: str) -> bool:
    """True if the fingerprint `weights` in `path` is that of the model; warns if not."""
    if isinstance(model, CDM) and weights == fingerprint(model.state_dict()):
        return True
    warnings.warn(f"{path} belongs to other weights and is ignored; {remedy}", stacklevel=3)
    return False


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of the names and values of a model's weights and buffers."""
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(name.encode())
        found.update(
            weights[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return found.hexdigest()
