"""Pictures of certified accuracy and of selective classification."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cdm_fast.plots.canvas import label_axes, new_figure, write_figure


def write_certified(
    reports: Sequence[Mapping[str, Any]],  # `CertificationReport.to_json()` of each sigma
    path: str | Path,
) -> Path:
    """Certified accuracy against L2 radius, a colour for each sigma, as a PNG under `path`.

    Solid lines are certificates by votes, dashed ones by mean posterior.
    """
    figure, (axes,) = new_figure(1)
    for report in reports:
        name = f"sigma {report['sigma']:g}"
        (line,) = axes.plot(report["radii"], report["certified_accuracy"], marker="o", label=name)
        mean = report["certified_accuracy_of_mean"]
        axes.plot(report["radii"], mean, linestyle="--", linewidth=1, color=line.get_color())
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False)
    label_axes(axes, "certified accuracy", "L2 radius, white being 1", "share of images")
    return write_figure(figure, path)


def write_selective(
    curves: Mapping[str, Sequence[float]],  # by name, the risk at coverage 1/n, 2/n, ..., 1
    path: str | Path,
) -> Path:
    """Share of wrong answers against the share of images that are answered, as a PNG under `path`."""
    figure, (axes,) = new_figure(1)
    for name, risk in curves.items():
        axes.plot(np.arange(1, len(risk) + 1) / len(risk), risk, label=name)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    label_axes(axes, "risk against coverage", "share of images answered", "share of wrong answers")
    return write_figure(figure, path)
