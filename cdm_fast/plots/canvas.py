"""The base of all plots: figures with panels, labelled axes, and PNG files that are written atomically.

Figures are drawn by Agg, without pyplot: no display, no global state, and no memory leak in a long run.
"""

import contextlib
import gc
import io
from collections.abc import Iterator
from contextvars import ContextVar
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


_in_a_column: ContextVar[bool] = ContextVar("panels in a column", default=False)


@contextlib.contextmanager
def panels_in_a_column() -> Iterator[None]:
    """Inside the block the panels of new figures stand below each other, as narrow screens need them."""
    token = _in_a_column.set(True)
    try:
        yield
    finally:
        _in_a_column.reset(token)


def new_figure(num_panels: int, height: float = 3.2) -> "tuple[Figure, list[Axes]]":
    """A figure of panels, each 4.8 by `height` inches, from left to right; see `panels_in_a_column`."""
    rows, columns = (num_panels, 1) if _in_a_column.get() else (1, num_panels)
    figure = empty_figure(4.8 * columns, height * rows)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def label_axes(axes: "Axes", title: str, x: str, y: str | None = None) -> None:
    """Sets title and labels; without a y label the title names the quantity, and a grid is drawn."""
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    if y is None:
        axes.grid(alpha=0.3)
    else:
        axes.set_ylabel(y)


def write_figure(figure: "Figure", path: str | Path) -> Path:
    """Writes a figure as a PNG, or under a name that ends in .svg as an SVG, and returns its path."""
    content, kind = io.BytesIO(), "svg" if Path(path).suffix == ".svg" else "png"
    figure.savefig(content, format=kind, dpi=110, metadata={"Date": None} if kind == "svg" else None)
    # A figure is a reference cycle of few objects and megabytes, which the collector is slow to free. This
    # frees earlier figures.
    gc.collect()
    return write_atomically(path, content.getvalue())
