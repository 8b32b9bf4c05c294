"""The pictures of a run: loss curves, level confusion matrix, denoising error per level.

Figures are matplotlib objects drawn by Agg, never pyplot: no display, no global state, no leak in a long run.

# L = T+2 noise levels, N bins of neighbouring levels
"""

import gc
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from cdm_fast.errors import UserError
from cdm_fast.host.files import write_atomically
from cdm_fast.host.optional import need

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

# Panels of the loss picture: key in log.jsonl -> (title, logarithmic axis).
LOSS_PANELS = {
    "loss": ("training loss", True),
    "ce": ("cross-entropy [nats]", False),
    "mse": ("denoising error, mean (eps_hat - eps)^2", True),
    "bits_per_dim": ("validation, bits/dim (unaudited)", False),
}


def read_log(
    path: str | Path,  # log.jsonl of a run
) -> list[dict[str, Any]]:
    """The records of a JSON-lines log, oldest first; a torn last line (a killed run) is left out.

    Raises UserError when the file is missing, or names the first line that is not a JSON object.
    """
    path = Path(path)
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; give a run directory that was trained"
        ) from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number}: not JSON ({error.msg}); delete that line") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: not a JSON object; delete that line")
        records.append(record)
    return records


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
    figure, panels = _figure(len(curves))
    for axes, (key, (steps, values)) in zip(panels, curves.items(), strict=True):
        title, logarithmic = LOSS_PANELS[key]
        axes.plot(steps, values, linewidth=1.2, marker="." if len(steps) < 20 else "")
        if logarithmic and min(values) > 0:
            axes.set_yscale("log")
        _label(axes, title, "step")
    return _write(figure, path)


def write_confusion(
    confusion: ArrayLike,  # (N, N): row = true level, column = posterior mass over predicted levels
    path: str | Path,
    num_levels: int | None = None,  # L, for the axes; default N
) -> Path:
    """The mean level posterior by true level (rows sum to 1), as a PNG under `path`.

    A good classifier of the noise level shows a narrow band on the diagonal: neighbouring levels can hardly
    be told apart, distant ones can. Colours follow the square root, or the off-diagonal would be invisible.
    Raises ValueError for anything but a square matrix.
    """
    matrix = np.asarray(confusion, dtype=np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"confusion has shape {matrix.shape}: expected a square matrix (true, predicted)")
    last = (num_levels or len(matrix)) - 1
    figure, (axes,) = _figure(1, height=4.6)
    image = axes.imshow(
        matrix,
        origin="lower",
        extent=(-0.5, last + 0.5, -0.5, last + 0.5),
        norm=_square_root_colours(),
        cmap="viridis",
        interpolation="nearest",
    )
    figure.colorbar(image, ax=axes, label="posterior mass", shrink=0.7)
    _label(axes, "mean level posterior", "predicted level", "true level (0 = data)")
    return _write(figure, path)


def write_level_mse(
    level: ArrayLike,  # (N,) levels
    mse: ArrayLike,  # (N,) mean squared error of eps_hat at each, in units of the noise variance
    path: str | Path,
) -> Path:
    """The denoising error per noise level, as a PNG under `path`.

    The dashed line at 1 is what eps_hat = 0 would score: all noise left in. Raises ValueError for unequal
    lengths.
    """
    levels, errors = np.asarray(level, dtype=np.float64), np.asarray(mse, dtype=np.float64)
    if levels.shape != errors.shape or levels.ndim != 1:
        raise ValueError(f"level has shape {levels.shape}, mse {errors.shape}: expected two (N,) vectors")
    figure, (axes,) = _figure(1)
    axes.axhline(1.0, color="grey", linestyle="--", linewidth=0.8)
    axes.plot(levels, errors, marker=".", linewidth=1.2)
    if np.nanmin(errors, initial=1.0) > 0:
        axes.set_yscale("log")
    _label(axes, "denoising error, mean (eps_hat - eps)^2", "level (0 = data)")
    return _write(figure, path)


def write_rows(
    rows: Mapping[str, Tensor],  # name -> (B,C,H,W) uint8, B may differ
    path: str | Path,
    title: str,
    columns: Sequence[str] = (),  # names
) -> Path:
    """Rows of images with their names, enlarged smoothly so that a person can read tiny ones, as a PNG."""
    sheet = _sheet(rows)
    figure = _empty_figure(1 + sheet.shape[1] / 100, 0.5 + sheet.shape[0] / 100)
    axes = figure.subplots()
    _show_sheet(axes, sheet, list(rows), columns)
    axes.set_title(title, fontsize=10)
    return _write(figure, path)


def _sheet(rows: Mapping[str, Tensor]) -> NDArray[np.uint8]:
    """(H',W',3): rows of images, (B,C,H,W) uint8 each, enlarged, with white between them."""
    tiles = [[_enlarged(image) for image in images] for images in rows.values()]
    height, width = tiles[0][0].shape[:2]
    longest = max(map(len, tiles))
    sheet = np.full((len(tiles) * (height + 4), longest * (width + 4), 3), 255, dtype=np.uint8)
    for row, images in enumerate(tiles):
        for column, image in enumerate(images):
            top, left = row * (height + 4) + 2, column * (width + 4) + 2
            sheet[top : top + height, left : left + width] = image
    return sheet


def _show_sheet(axes: "Axes", sheet: NDArray[np.uint8], rows: Sequence[str], columns: Sequence[str]) -> None:
    """A sheet with the names of its rows, and of its columns if they have any."""
    height = sheet.shape[0] / len(rows)
    width = sheet.shape[1] / max(1, len(columns))
    axes.imshow(sheet, interpolation="nearest")
    axes.set_yticks([(row + 0.5) * height for row in range(len(rows))], list(rows))
    axes.set_xticks([(column + 0.5) * width for column in range(len(columns))], list(columns))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _enlarged(image: Tensor) -> NDArray[np.uint8]:
    """(C,H,W) uint8, C 1 or 3 -> (H',W',3), the longer side 64 pixels or its own if that is more."""
    _, height, width = image.shape
    scale = max(1.0, 64 / max(height, width))
    size = (round(height * scale), round(width * scale))
    big = F.interpolate(image[None].float(), size, mode="bicubic").round().clamp(0, 255)[0]
    return big.to(torch.uint8).expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()


def write_classes(
    report: Mapping[str, Any],  # `ClassReport.to_json()`
    path: str | Path,
) -> Path:
    """Confusion matrix and reliability diagram of a classifier, as a PNG under `path`.

    Rows of the matrix sum to 1; colours follow the square root, or rare mistakes would be invisible. On the
    dashed diagonal of the diagram confidence is accuracy; a dot's area is its bin's share of the images.
    """
    figure, (matrix, diagram) = _figure(2, height=4.6)
    confusion = np.asarray(report["confusion"], dtype=np.float64)
    rows = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    image = matrix.imshow(rows, norm=_square_root_colours(vmax=1), cmap="viridis", interpolation="nearest")
    figure.colorbar(image, ax=matrix, label="share of the true class", shrink=0.7)
    for row, column in np.argwhere(confusion) if len(confusion) <= 20 else ():
        colour = "black" if rows[row, column] > 0.4 else "white"
        matrix.text(
            column, row, str(int(confusion[row, column])), ha="center", va="center", fontsize=7, color=colour
        )
    _label(matrix, f"accuracy {100 * report['accuracy']:.2f} %", "predicted class", "true class")
    bins = report["reliability"]
    count = np.asarray(bins["count"], dtype=np.float64)
    diagram.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=0.8)
    diagram.plot(*(np.asarray(bins[key])[count > 0] for key in ("confidence", "accuracy")), linewidth=1.2)
    diagram.scatter(bins["confidence"], bins["accuracy"], s=4 + 300 * count / count.sum(), alpha=0.6)
    diagram.set(xlim=(0, 1.02), ylim=(0, 1.02))
    _label(diagram, f"calibration error {100 * report['ece']:.2f} %", "mean confidence", "accuracy")
    return _write(figure, path)


def write_corruptions(
    accuracy: Mapping[str, Sequence[float]],  # kind -> accuracy at severities 1, 2, ...
    clean: float,
    path: str | Path,
) -> Path:
    """Accuracy by kind of corruption and severity, and each kind's mean, as a PNG under `path`.

    The dashed line is the accuracy on clean images.
    """
    values = np.asarray(list(accuracy.values()), dtype=np.float64)
    kinds = [kind.replace("_", " ") for kind in accuracy]
    figure, (table, means) = _figure(2, height=4.6)
    image = table.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=table, label="accuracy", shrink=0.7)
    for (row, column), value in np.ndenumerate(values):
        colour = "black" if value > 0.6 else "white"
        table.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=colour)
    table.set_xticks(range(values.shape[1]), [str(severity + 1) for severity in range(values.shape[1])])
    table.set_yticks(range(len(kinds)), kinds, fontsize=8)
    _label(table, f"mean {100 * values.mean():.1f} %", "severity", "")
    means.barh(kinds, values.mean(1))
    means.axvline(clean, color="grey", linestyle="--", linewidth=0.8)
    means.invert_yaxis()
    means.tick_params(axis="y", labelsize=8)
    means.set_xlim(0, 1.02)
    _label(means, f"clean {100 * clean:.1f} %", "accuracy, mean over severities")
    return _write(figure, path)


def write_attack(
    report: Mapping[str, Any],  # `AttackReport.to_json()`
    path: str | Path,
) -> Path:
    """Accuracy against budget, and how well log p(x) tells attacked images, as a PNG under `path`."""
    areas = report["detection_auroc"]  # None for a classifier
    figure, (accuracy, *others) = _figure(1 if areas is None else 2)
    budgets = [0.0, *report["budgets"]]
    errors = [0.0, *report["accuracy_stderr"]]
    values = [report["clean_accuracy"], *report["accuracy"]]
    accuracy.errorbar(budgets, values, yerr=errors, marker=".", linewidth=1.2, capsize=3)
    accuracy.set_ylim(-0.02, 1.02)
    where = f"budget, {report['norm']}, white is 1"
    _label(accuracy, f"accuracy under {report['attack']}, {report['steps']} steps", where)
    for detection in others:
        detection.axhline(0.5, color="grey", linestyle="--", linewidth=0.8)
        detection.plot(report["budgets"], areas, marker=".", linewidth=1.2)
        detection.set_ylim(-0.02, 1.02)
        _label(detection, "attacked or clean, by log p(x): AUROC", where)
    return _write(figure, path)


def write_audit(
    report: Mapping[str, Any],  # `AuditReport.to_json()`
    path: str | Path,
) -> Path:
    """Four panels of a likelihood audit, as a PNG under `path`.

    Every figure with its standard error; single pass minus ODE, log Z and the ratio check by level.
    """
    figure, (figures, difference, integral, ratios) = _figure(4)
    named = [("single pass", "bits_per_dim"), ("audited", "audited_bits_per_dim")]
    named += [("ODE", "ode_bits_per_dim"), ("bound", "elbo_bits_per_dim")]
    shown = [(name, report[key], report[f"{key}_stderr"]) for name, key in named if report[key] is not None]
    names, values, errors = zip(*shown, strict=True)
    figures.errorbar(range(len(names)), values, yerr=errors, fmt="o", capsize=4)
    figures.set_xticks(range(len(names)), names)
    figures.set_xlim(-0.5, len(names) - 0.5)
    _label(figures, f"bits/dim at level {report['level']}", "lower is better where it is normalised")
    ode, z, check = report["ode"], report["log_z"], report["ratio_check"]
    _by_level(difference, ode["levels"], ode["difference_at"], ode["difference_at_stderr"])
    _label(difference, "single pass minus ODE, bits/dim", "level (0 = data)")
    for key, name in (("log_z", "down"), ("log_z_half", "down, half as many"), ("log_z_up", "up from data")):
        _by_level(integral, z["levels"], z[key], z[f"{key}_stderr"], name)
    integral.legend(fontsize=8)
    _label(integral, "log Z of the single pass, nats", "level (0 = data)")
    _by_level(ratios, check["levels"], check["log_mean_ratio"], check["log_mean_ratio_stderr"])
    _label(ratios, "log mean of p_t / p_t+1, nats", "level t (0 = data)")
    return _write(figure, path)


def write_outliers(
    rows: Mapping[str, Tensor],  # name -> (B,C,H,W) uint8
    bits: Mapping[str, ArrayLike],  # name of a data set -> bits/dim of its images
    typical: float,  # bits/dim
    report: Mapping[str, Any],  # `OutlierReport.to_json()`
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]],  # score -> false alarms, detected; none without others
    path: str | Path,
) -> Path:
    """The most and least likely images, bits/dim of each set, and how well scores tell them, as a PNG.

    The third panel shows ROC curves against other data, or the mean AUROC by severity of corruption.
    """
    severities = report["corruptions_mean"]
    figure, (sheet, histogram, *others) = _figure(3 if curves or severities else 2, height=3.6)
    _show_sheet(sheet, _sheet(rows), [name.replace(" ", "\n") for name in rows], ())
    sheet.set_title(f"by likelihood at level {report['level']}", fontsize=10)
    values = {name: np.asarray(each, dtype=np.float64) for name, each in bits.items()}
    edges = np.histogram_bin_edges(np.concatenate(list(values.values())), 40).tolist()
    for name, each in values.items():
        histogram.hist(each, edges, weights=np.full(len(each), 1 / len(each)), alpha=0.6, label=name)
    histogram.axvline(typical, color="grey", linestyle="--", linewidth=0.8, label="typical")
    histogram.legend(fontsize=8)
    _label(histogram, "share of the images", "bits/dim")
    for panel in others:
        if curves:
            panel.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=0.8)
            for score, (false_alarms, detected) in curves.items():
                name = f"{score.replace('_', ' ')}, AUROC {report['against']['auroc'][score]:.3f}"
                panel.plot(false_alarms, detected, linewidth=1.2, label=name)
            _label(panel, "other images detected", "false alarms")
        else:
            panel.axhline(0.5, color="grey", linestyle="--", linewidth=0.8)
            for score, areas in severities.items():
                name = score.replace("_", " ")
                panel.plot(range(1, len(areas) + 1), areas, marker=".", linewidth=1.2, label=name)
            panel.set_xticks(range(1, 1 + max(map(len, severities.values()))))
            _label(panel, "corrupted or not: AUROC, mean over kinds", "severity")
        panel.set_ylim(-0.02, 1.02)
        panel.legend(fontsize=8)
    return _write(figure, path)


def write_sigma(
    report: Mapping[str, Any],  # `SigmaCalibration.to_json()`
    path: str | Path,
) -> Path:
    """Known noise against estimated, median and 10th to 90th percentile, as a PNG under `path`.

    Estimates on the dashed line are right. An estimate of 0 (no noise found) has no place on the axis.
    """
    figure, (axes,) = _figure(1, height=4.2)
    sigma = np.asarray(report["sigma"])
    axes.plot(sigma, sigma, color="grey", linestyle="--", linewidth=0.8)
    axes.fill_between(sigma, report["low"], report["high"], alpha=0.3)
    axes.plot(sigma, report["median"], marker=".", linewidth=1.2)
    axes.set(xscale="log", yscale="log")
    _label(axes, f"sigma estimated, {report['num_images']} images", "sigma added, of [-1, 1]")
    return _write(figure, path)


def write_acceptance(
    report: Mapping[str, Any],  # `MoveLog.to_json()`
    path: str | Path,
) -> Path:
    """Acceptance and step size of a corrected sampler's moves by level, as a PNG under `path`.

    The dashed line is the acceptance that the pilot aimed at.
    """
    figure, (acceptance, step_size) = _figure(2)
    acceptance.axhline(report["target_acceptance"], color="grey", linestyle="--", linewidth=0.8)
    acceptance.plot(report["levels"], report["acceptance"], marker=".", linewidth=1.2)
    acceptance.set_ylim(-0.02, 1.02)
    _label(acceptance, "accepted moves, share (dashed: aimed at)", "level (0 = data)")
    step_size.plot(report["levels"], report["step_size"], marker=".", linewidth=1.2)
    step_size.set_yscale("log")
    _label(step_size, "step size h", "level (0 = data)")
    return _write(figure, path)


def _by_level(
    axes: "Axes", levels: ArrayLike, values: ArrayLike, errors: ArrayLike, name: str | None = None
) -> None:
    """Values with error bars over a line at 0, where a normalised density would be."""
    axes.axhline(0.0, color="grey", linestyle="--", linewidth=0.8)
    axes.errorbar(
        levels, values, yerr=errors, marker=".", markersize=3, linewidth=0.8, elinewidth=0.5, label=name
    )


def _empty_figure(width: float, height: float) -> "Figure":  # in inches
    """A figure that Agg draws; UserError without matplotlib."""
    figure = need("matplotlib.figure", "drawing plots").Figure(figsize=(width, height), layout="constrained")
    need("matplotlib.backends.backend_agg", "drawing plots").FigureCanvasAgg(figure)
    return figure


def _square_root_colours(vmax: float | None = None) -> "PowerNorm":
    """Colours that follow the square root of a value from 0 on."""
    return need("matplotlib.colors", "drawing plots").PowerNorm(0.5, vmin=0, vmax=vmax)


def _figure(num_panels: int, height: float = 3.2) -> "tuple[Figure, list[Axes]]":
    figure = _empty_figure(4.8 * num_panels, height)
    return figure, list(figure.subplots(1, num_panels, squeeze=False)[0])


def _label(axes: "Axes", title: str, x: str, y: str | None = None) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    if y is None:
        axes.grid(alpha=0.3)
    else:
        axes.set_ylabel(y)


def _write(figure: "Figure", path: str | Path) -> Path:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    # A figure is a cycle of megabytes in few objects: left to itself the collector comes late. This takes the
    # figures before this one.
    gc.collect()
    return write_atomically(path, png.getvalue())
