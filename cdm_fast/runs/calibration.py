"""Calibration of a run: the log Z that particles measure at every level, folded into the head's bias.

It changes what likelihoods say by one constant per level, and neither the denoiser nor samples nor posteriors
of classes. The checkpoints stay as they were trained: the constants lie in RUN/calibration.json,
`cdm_fast.load` folds them in, and without the file the run is as before.

# L = T+2 noise levels
"""

import hashlib
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cdm_fast.config.choices import PARTICLES
from cdm_fast.config.json import from_json
from cdm_fast.data import ImageData
from cdm_fast.errors import UserError
from cdm_fast.host.files import write_atomically
from cdm_fast.host.progress import Progress, silent
from cdm_fast.likelihood.log_z import measure_log_z
from cdm_fast.likelihood.units import nats_per_bit_per_dim
from cdm_fast.model import CDM, Denoiser
from cdm_fast.nn import AdjointNetwork
from cdm_fast.nn.heads import CumulativeHead

FILE = "calibration.json"


@dataclass(frozen=True)
class Calibration:
    """log Z of every level, and how it was measured.

    Fields:
        log_z: (L,) nats, of the walks down; 0 at level T+1. Between rungs of a ladder it is interpolated.
        log_z_stderr: (L,) over runs.
        log_z_up: nats, at level 0 by walks from data, which should agree.
        weights: fingerprint of the weights that it belongs to.
        data, split: where the walks from data began.
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

    def bits_per_dim(self, level: int, data: ImageData) -> float:
        """By how much it raises the bits/dim of `data` at `level`."""
        return self.log_z[level] / nats_per_bit_per_dim(data)


def calibrate(
    model: CDM,
    data: ImageData,
    *,
    particles: int = PARTICLES,
    runs: int = 3,
    moves: int = 1,
    rungs: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Calibration:
    """Measures log Z of an uncalibrated model at every level and folds it in. Arguments: `measure_log_z`.

    Raises UserError as `measure_log_z` and `fold` do.
    """
    _head_of(model)
    weights = fingerprint(model.state_dict())
    found = measure_log_z(
        model,
        data,
        particles=particles,
        runs=runs,
        moves=moves,
        rungs=rungs,
        seed=seed,
        progress=progress,
    )
    ladder = found.levels[::-1]

    def at_every_level(values: list[float]) -> tuple[float, ...]:
        return tuple(np.interp(range(model.schedule.num_levels), ladder, values[::-1]).tolist())

    calibration = Calibration(
        log_z=at_every_level(found.log_z),
        log_z_stderr=at_every_level(found.log_z_stderr),
        log_z_up=found.log_z_up[-1],
        weights=weights,
        data=data.name,
        split=data.split,
        particles=particles,
        runs=runs,
        moves=moves,
        seed=seed,
    )
    fold(model, calibration.log_z)
    return calibration


@torch.no_grad()
def fold(model: CDM, log_z: tuple[float, ...]) -> None:
    """Takes `log_z` (L,) nats off the model's `log p_t`, whatever the class, by the bias of its head.

    Raises UserError for a network without a head of ours, or another number of levels.
    """
    if len(log_z) != model.schedule.num_levels:
        raise UserError(f"{len(log_z)} constants for the {model.schedule.num_levels} levels of this model")
    _head_of(model).shift(-torch.tensor(log_z, dtype=torch.float64))


def _head_of(model: CDM) -> CumulativeHead:
    if not isinstance(model.network, AdjointNetwork):
        raise UserError(
            "calibration changes the bias of the head over levels, and this network has none of ours:"
            " add log Z to its figures instead"
        )
    return model.network.linear_layer


def write_calibration(run: Path, calibration: Calibration) -> Path:
    """RUN/calibration.json, in place of an earlier one; returns its path."""
    return write_atomically(run / FILE, json.dumps(asdict(calibration), indent=2).encode())


def remove_calibration(run: Path) -> None:
    """The run as it was trained; UserError if it is not calibrated."""
    if not (run / FILE).exists():
        raise UserError(f"{run} is not calibrated: it has no {FILE}")
    (run / FILE).unlink()


def apply_calibration(model: Denoiser, run: str | Path) -> Calibration | None:
    """Folds the calibration of a run into its model as trained, and returns it; None if there is none.

    One of other weights is left out with a warning. Raises UserError for a file that `write_calibration` did
    not write.
    """
    path = Path(run) / FILE
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); calibrate the run again") from error
    calibration = from_json(Calibration, value, str(path))
    if not all(math.isfinite(value) for value in calibration.log_z):
        raise UserError(f"{path}: log_z is not finite; calibrate the run again")
    if not isinstance(model, CDM) or calibration.weights != fingerprint(model.state_dict()):
        warnings.warn(f"{path} is of other weights and left out; calibrate the run again", stacklevel=2)
        return None
    fold(model, calibration.log_z)
    return calibration


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of the names and numbers of a model's weights and buffers."""
    found = hashlib.sha256()
    for name in sorted(weights):
        found.update(name.encode())
        found.update(
            weights[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return found.hexdigest()
