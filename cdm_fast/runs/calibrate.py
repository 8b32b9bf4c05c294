"""Measures the calibration of a model: log Z at every level, with particles.

# L = T+2 noise levels
"""

import numpy as np

from cdm_fast.config.choices import PARTICLES
from cdm_fast.data import ImageData
from cdm_fast.host.progress import Progress, silent
from cdm_fast.likelihood.log_z import measure_log_z
from cdm_fast.model import CDM
from cdm_fast.runs.calibration import Calibration, fingerprint, fold, require_head


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
    """Measures log Z of an uncalibrated model at every level, and subtracts it from the logits (`fold`).

    Args:
        model: changed in place.
        data: the images at which the walks from data start.
        particles, runs, moves, rungs, seed: as in `measure_log_z`.
        progress: called with one-line messages.

    Raises:
        UserError: as in `measure_log_z` and `fold`.
    """
    require_head(model)
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
