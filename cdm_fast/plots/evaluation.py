"""Pictures of an evaluation: classes, corruptions, attacks, likelihoods, outliers, noise."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from cdm_fast.plots.canvas import draw_by_level, label_axes, new_figure, square_root_colours, write_figure
from cdm_fast.plots.sheet import make_sheet, show_sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def write_classes(
    report: Mapping[str, Any],  # `ClassReport.to_json()`
    path: str | Path,
) -> Path:
    """Confusion matrix and reliability diagram of a classifier, as a PNG under `path`.

    Rows of the matrix sum to 1; colours show the square root, so that rare mistakes are visible. On the
    dashed diagonal of the diagram confidence equals accuracy; a dot's area is its bin's share of the images.
    """
    figure, (matrix, diagram) = new_figure(2, height=4.6)
    confusion = np.asarray(report["confusion"], dtype=np.float64)
    rows = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    image = matrix.imshow(rows, norm=square_root_colours(vmax=1), cmap="viridis", interpolation="nearest")
    figure.colorbar(image, ax=matrix, label="share of the true class", shrink=0.7)
    for row, column in np.argwhere(confusion) if len(confusion) <= 20 else ():
        colour = "black" if rows[row, column] > 0.4 else "white"
        matrix.text(
            column, row, str(int(confusion[row, column])), ha="center", va="center", fontsize=7, color=colour
        )
    label_axes(matrix, f"accuracy {100 * report['accuracy']:.2f} %", "predicted class", "true class")
    bins = report["reliability"]
    count = np.asarray(bins["count"], dtype=np.float64)
    diagram.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=0.8)
    diagram.plot(*(np.asarray(bins[key])[count > 0] for key in ("confidence", "accuracy")), linewidth=1.2)
    diagram.scatter(bins["confidence"], bins["accuracy"], s=4 + 300 * count / count.sum(), alpha=0.6)
    diagram.set(xlim=(0, 1.02), ylim=(0, 1.02))
    label_axes(diagram, f"calibration error {100 * report['ece']:.2f} %", "mean confidence", "accuracy")
    return write_figure(figure, path)


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
    figure, (table, means) = new_figure(2, height=4.6)
    image = table.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto", interpolation="nearest")
    figure.colorbar(image, ax=table, label="accuracy", shrink=0.7)
    for (row, column), value in np.ndenumerate(values):
        colour = "black" if value > 0.6 else "white"
        table.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=colour)
    table.set_xticks(range(values.shape[1]), [str(severity + 1) for severity in range(values.shape[1])])
    table.set_yticks(range(len(kinds)), kinds, fontsize=8)
    label_axes(table, f"mean {100 * values.mean():.1f} %", "severity", "")
    means.barh(kinds, values.mean(1))
    means.axvline(clean, color="grey", linestyle="--", linewidth=0.8)
    means.invert_yaxis()
    means.tick_params(axis="y", labelsize=8)
    means.set_xlim(0, 1.02)
    label_axes(means, f"clean {100 * clean:.1f} %", "accuracy, mean over severities")
    return write_figure(figure, path)


def write_attack(
    report: Mapping[str, Any],  # `AttackReport.to_json()`
    path: str | Path,
) -> Path:
    """Accuracy against budget, and the AUROC of detection by log p(x), as a PNG under `path`.

    The dashed curve is the share of images that keep their class or are rejected by log p(x).
    """
    areas = report["detection_auroc"]  # None for a `Classifier`
    figure, (accuracy, *others) = new_figure(1 if areas is None else 2)
    budgets = [0.0, *report["budgets"]]
    errors = [0.0, *report["accuracy_stderr"]]
    values = [report["clean_accuracy"], *report["accuracy"]]
    accuracy.errorbar(budgets, values, yerr=errors, marker=".", linewidth=1.2, capsize=3)
    if report["undetected"] is not None:
        handled = 1 - np.asarray(report["undetected"])
        accuracy.plot(report["budgets"], handled, linestyle="--", marker=".", label="right, or rejected")
        accuracy.legend(fontsize=8)
    accuracy.set_ylim(-0.02, 1.02)
    where = f"budget, {report['norm']}, white is 1"
    label_axes(accuracy, f"accuracy under {report['attack']}, {report['steps']} steps", where)
    for detection in others:
        detection.axhline(0.5, color="grey", linestyle="--", linewidth=0.8)
        detection.plot(report["budgets"], areas, marker=".", linewidth=1.2)
        detection.set_ylim(-0.02, 1.02)
        label_axes(detection, "attacked or clean, by log p(x): AUROC", where)
    return write_figure(figure, path)


def write_audit(
    report: Mapping[str, Any],  # `AuditReport.to_json()`
    path: str | Path,
) -> Path:
    """Four panels of a likelihood audit, as a PNG under `path`.

    They show every figure with its standard error, and, by level, single pass minus ODE, log Z, and the ratio
    check.
    """
    figure, (figures, difference, integral, ratios) = new_figure(4)
    named = [("single pass", "bits_per_dim"), ("audited", "audited_bits_per_dim")]
    named += [("ODE", "ode_bits_per_dim"), ("bound", "elbo_bits_per_dim")]
    shown = [(name, report[key], report[f"{key}_stderr"]) for name, key in named if report[key] is not None]
    names, values, errors = zip(*shown, strict=True)
    figures.errorbar(range(len(names)), values, yerr=errors, fmt="o", capsize=4)
    figures.set_xticks(range(len(names)), names)
    figures.set_xlim(-0.5, len(names) - 0.5)
    label_axes(figures, f"bits/dim at level {report['level']}", "lower is better where it is normalised")
    ode, z, check = report["ode"], report["log_z"], report["ratio_check"]
    draw_by_level(difference, ode["levels"], ode["difference_at"], ode["difference_at_stderr"])
    label_axes(difference, "single pass minus ODE, bits/dim", "level (0 = data)")
    for key, name in (("log_z", "down"), ("log_z_half", "down, half as many"), ("log_z_up", "up from data")):
        draw_by_level(integral, z["levels"], z[key], z[f"{key}_stderr"], name)
    integral.legend(fontsize=8)
    label_axes(integral, "log Z of the single pass, nats", "level (0 = data)")
    draw_by_level(ratios, check["levels"], check["log_mean_ratio"], check["log_mean_ratio_stderr"])
    label_axes(ratios, "log mean of p_t / p_t+1, nats", "level t (0 = data)")
    return write_figure(figure, path)


def write_outliers(
    rows: Mapping[str, Tensor],  # name -> (B,C,H,W) uint8
    bits: Mapping[str, ArrayLike],  # name of a data set -> bits/dim of its images
    typical: float,  # bits/dim
    report: Mapping[str, Any],  # `OutlierReport.to_json()`
    curves: Mapping[
        str, tuple[ArrayLike, ArrayLike]
    ],  # score -> false alarms, detected; {} without other data
    path: str | Path,
) -> Path:
    """The most and least likely images, bits/dim of each set, and the separation by scores, as a PNG.

    The third panel shows ROC curves against other data, or the mean AUROC by severity of corruption.
    """
    severities = report["corruptions_mean"]
    figure, (sheet, histogram, *others) = new_figure(3 if curves or severities else 2, height=3.6)
    show_sheet(sheet, make_sheet(rows), [name.replace(" ", "\n") for name in rows], ())
    sheet.set_title(f"by likelihood at level {report['level']}", fontsize=10)
    _draw_histogram(histogram, bits)
    histogram.axvline(typical, color="grey", linestyle="--", linewidth=0.8, label="typical")
    histogram.legend(fontsize=8)
    for panel in others:
        if curves:
            _draw_curves(panel, curves, report["against"]["auroc"])
        else:
            _draw_severities(panel, severities)
        panel.set_ylim(-0.02, 1.02)
        panel.legend(fontsize=8)
    return write_figure(figure, path)


def _draw_histogram(panel: "Axes", bits: Mapping[str, ArrayLike]) -> None:
    """bits/dim by name of a data set, each as shares of its images."""
    values = {name: np.asarray(each, dtype=np.float64) for name, each in bits.items()}
    edges = np.histogram_bin_edges(np.concatenate(list(values.values())), 40).tolist()
    for name, each in values.items():
        panel.hist(each, edges, weights=np.full(len(each), 1 / len(each)), alpha=0.6, label=name)
    label_axes(panel, "share of the images", "bits/dim")


def write_histogram(
    bits: ArrayLike,  # (n,) bits/dim of images
    path: str | Path,
) -> Path:
    """bits/dim over images, and their mean as a dashed line, as a picture under `path`."""
    figure, (axes,) = new_figure(1)
    _draw_histogram(axes, {"images": bits})
    axes.axvline(float(np.mean(np.asarray(bits))), color="grey", linestyle="--", linewidth=0.8)
    return write_figure(figure, path)


def _draw_curves(
    panel: "Axes",
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]],  # score -> false alarms, detected
    areas: Mapping[str, float],  # score -> AUROC
) -> None:
    panel.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=0.8)
    for score, (false_alarms, detected) in curves.items():
        name = f"{score.replace('_', ' ')}, AUROC {areas[score]:.3f}"
        panel.plot(false_alarms, detected, linewidth=1.2, label=name)
    label_axes(panel, "other images detected", "false alarms")


def _draw_severities(
    panel: "Axes",
    areas: Mapping[str, Sequence[float]],  # score -> mean AUROC at severity 1, 2, ...
) -> None:
    panel.axhline(0.5, color="grey", linestyle="--", linewidth=0.8)
    for score, each in areas.items():
        panel.plot(range(1, len(each) + 1), each, marker=".", linewidth=1.2, label=score.replace("_", " "))
    panel.set_xticks(range(1, 1 + max(map(len, areas.values()))))
    label_axes(panel, "corrupted or not: AUROC, mean over kinds", "severity")


def write_sigma(
    report: Mapping[str, Any],  # `SigmaCalibration.to_json()`
    path: str | Path,
) -> Path:
    """Known noise against estimated, median and 10th to 90th percentile, as a PNG under `path`.

    Estimates on the dashed line are exact. The axes are logarithmic and omit estimates of 0.
    """
    figure, (axes,) = new_figure(1, height=4.2)
    sigma = np.asarray(report["sigma"])
    axes.plot(sigma, sigma, color="grey", linestyle="--", linewidth=0.8)
    axes.fill_between(sigma, report["low"], report["high"], alpha=0.3)
    axes.plot(sigma, report["median"], marker=".", linewidth=1.2)
    axes.set(xscale="log", yscale="log")
    label_axes(axes, f"sigma estimated, {report['num_images']} images", "sigma added, of [-1, 1]")
    return write_figure(figure, path)
