"""Plots of a training run: loss curves, level confusion and calibration, denoising error, acceptance rates.

# L = T+2 noise levels, N bins of neighbouring levels
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cdm_fast.errors import UserError
from cdm_fast.plots.canvas import draw_by_level, label_axes, new_figure, square_root_colours, write_figure

# Panels of the loss picture: key in log.jsonl -> (title, logarithmic axis).
LOSS_PANELS = {
    "loss": ("training loss", True),
    "ce": ("cross-entropy [nats]", False),
    "mse": ("denoising error, mean (eps_hat - eps)^2", True),
    "bits_per_dim": ("validation, bits/dim (unaudited)", False),
    "ratio_bits_per_dim": ("validation, ratio check [bits/dim]", False),
    "class_ce": ("validation, class cross-entropy [nats]", False),
}


def series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    """(steps, values) of the records that hold a finite number under `key`."""
    points = [
        (float(record["step"]), float(record[key]))
        for record in records
        if "step" in record and isinstance(record.get(key), int | float) and math.isfinite(record[key])
    ]
    return [step for step, _ in points], [value for _, value in points]


def write_losses(records: Sequence[Mapping[str, Any]], path: str | Path) -> Path:
    """Loss curves of a log's records, one panel per quantity that was logged, as a PNG under `path`.

    Raises UserError when no record holds any of `LOSS_PANELS`.
    """
    curves = {key: series(records, key) for key in LOSS_PANELS}
    curves = {key: curve for key, curve in curves.items() if curve[0]}
    if not curves:
        raise UserError(f"nothing to draw in {path}: the log holds no {', '.join(LOSS_PANELS)}; train first")
    figure, panels = new_figure(len(curves))
    for axes, (key, (steps, values)) in zip(panels, curves.items(), strict=True):
        title, logarithmic = LOSS_PANELS[key]
        axes.plot(steps, values, linewidth=1.2, marker="." if len(steps) < 20 else "")
        if logarithmic and min(values) > 0:
            axes.set_yscale("log")
        label_axes(axes, title, "step")
    return write_figure(figure, path)


def write_confusion(
    confusion: ArrayLike,  # (N, N): row = true level, column = posterior mass over predicted levels
    path: str | Path,
    num_levels: int | None = None,  # L, for the axes; default N
) -> Path:
    """The mean level posterior by true level (rows sum to 1), as a PNG under `path`.

    A good classifier of noise levels shows a narrow band on the diagonal: it confuses neighbouring levels but
    not distant ones. Colours show the square root, so that small values are visible. Raises ValueError for
    anything but a square matrix.
    """
    matrix = np.asarray(confusion, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"confusion has shape {matrix.shape}: expected a square matrix (true, predicted)")
    last = (num_levels or len(matrix)) - 1
    figure, (axes,) = new_figure(1, height=4.6)
    image = axes.imshow(
        matrix,
        origin="lower",
        extent=(-0.5, last + 0.5, -0.5, last + 0.5),
        norm=square_root_colours(),
        cmap="viridis",
        interpolation="nearest",
    )
    figure.colorbar(image, ax=axes, label="posterior mass", shrink=0.7)
    label_axes(axes, "mean level posterior", "predicted level", "true level (0 = data)")
    return write_figure(figure, path)


def write_calibration(
    report: Mapping[str, Any],  # the fields of `training.validation.LevelChecks`
    path: str | Path,
) -> Path:
    """Calibration of the level posteriors and mean adjacent ratios by level, as a PNG under `path`.

    Both panels are in nats, with standard errors, and 0 for true densities.
    """
    figure, (posterior, ratio) = new_figure(2)
    values = report["log_mean_posterior"]
    draw_by_level(posterior, range(len(values)), values, report["log_mean_posterior_stderr"])
    label_axes(posterior, "log(mean posterior / prior) [nats]", "level (0 = data)")
    draw_by_level(ratio, report["bin_level"], report["log_mean_ratio"], report["log_mean_ratio_stderr"])
    label_axes(ratio, "log E[p_t / p_t+1] [nats]", "level (0 = data)")
    return write_figure(figure, path)


def write_level_mse(
    level: ArrayLike,  # (N,) levels
    mse: ArrayLike,  # (N,) mean squared error of eps_hat at each, in units of the noise variance
    path: str | Path,
) -> Path:
    """The denoising error per noise level, as a PNG under `path`.

    The dashed line at 1 is the error of eps_hat = 0. Raises ValueError for unequal lengths.
    """
    levels, errors = np.asarray(level, dtype=np.float64), np.asarray(mse, dtype=np.float64)
    if levels.shape != errors.shape or levels.ndim != 1:
        raise ValueError(f"level has shape {levels.shape}, mse {errors.shape}: expected two (N,) vectors")
    figure, (axes,) = new_figure(1)
    axes.axhline(1.0, color="grey", linestyle="--", linewidth=0.8)
    axes.plot(levels, errors, marker=".", linewidth=1.2)
    if np.nanmin(errors, initial=1.0) > 0:
        axes.set_yscale("log")
    label_axes(axes, "denoising error, mean (eps_hat - eps)^2", "level (0 = data)")
    return write_figure(figure, path)


def write_acceptance(
    report: Mapping[str, Any],  # `sampling.MoveLog.to_json()`
    path: str | Path,
) -> Path:
    """Acceptance and step size of a corrected sampler's moves by level, as a PNG under `path`.

    The dashed line is the target acceptance rate of the pilot run.
    """
    figure, (acceptance, step_size) = new_figure(2)
    acceptance.axhline(report["target_acceptance"], color="grey", linestyle="--", linewidth=0.8)
    acceptance.plot(report["levels"], report["acceptance"], marker=".", linewidth=1.2)
    acceptance.set_ylim(-0.02, 1.02)
    label_axes(acceptance, "share of accepted moves (dashed: target)", "level (0 = data)")
    step_size.plot(report["levels"], report["step_size"], marker=".", linewidth=1.2)
    step_size.set_yscale("log")
    label_axes(step_size, "step size h", "level (0 = data)")
    return write_figure(figure, path)
