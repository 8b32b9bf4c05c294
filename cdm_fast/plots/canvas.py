"""The base of all plots: figures with panels, labelled axes, and PNG files that are written atomically.

Figures are drawn by Agg, without pyplot: no display, no global state, and no memory leak in a long run.
"""

import gc
import io
from pathlib import Path
from typing import TYPE_CHECKING

from numpy.typing import ArrayLike

from cdm_fast.host.files import write_atomically
from cdm_fast.host.optional import need

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure


def draw_by_level(
    axes: "Axes", levels: ArrayLike, values: ArrayLike, errors: ArrayLike, name: str | None = None
) -> None:
    """Values with error bars, and a line at 0, the value for normalised densities."""
    axes.axhline(0.0, color="grey", linestyle="--", linewidth=0.8)
    axes.errorbar(
        levels, values, yerr=errors, marker=".", markersize=3, linewidth=0.8, elinewidth=0.5, label=name
    )


def empty_figure(width: float, height: float) -> "Figure":  # in inches
    """A figure drawn by Agg; raises UserError if matplotlib is not installed."""
    figure = need("matplotlib.figure", "drawing plots").Figure(figsize=(width, height), layout="constrained")
    need("matplotlib.backends.backend_agg", "drawing plots").FigureCanvasAgg(figure)
    return figure


def square_root_colours(vmax: float | None = None) -> "PowerNorm":
    """A norm that maps values from 0 to `vmax` to colours by their square root, so that small values show."""
    return need("matplotlib.colors", "drawing plots").PowerNorm(0.5, vmin=0, vmax=vmax)


def new_figure(num_panels: int, height: float = 3.2) -> "tuple[Figure, list[Axes]]":
    """A figure `height` inches high, and its panels from left to right."""
    figure = empty_figure(4.8 * num_panels, height)
    return figure, list(figure.subplots(1, num_panels, squeeze=False)[0])


def label_axes(axes: "Axes", title: str, x: str, y: str | None = None) -> None:
    """Sets title and labels; without a y label the title names the quantity, and a grid is drawn."""
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    if y is None:
        axes.grid(alpha=0.3)
    else:
        axes.set_ylabel(y)


def write_figure(figure: "Figure", path: str | Path) -> Path:
    """Writes a figure as a PNG and returns its path."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=110)
    # A figure is a reference cycle of few objects and megabytes, which the collector is slow to free. This
    # frees earlier figures.
    gc.collect()
    return write_atomically(path, png.getvalue())
