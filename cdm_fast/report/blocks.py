"""The blocks of the page (pictures, tables, text), which the template lays out."""

import base64
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cdm_fast.data.pictures import encode_png
from cdm_fast.plots.canvas import panels_in_a_column


@dataclass(frozen=True)
class Picture:
    """A picture as a data URI. plot: True for lines on white, which dark mode inverts; False for images."""

    title: str
    source: str
    plot: bool = True
    note: str = ""
    kind: str = "picture"


@dataclass(frozen=True)
class Tile:
    """One small image and a word below it."""

    source: str
    caption: str = ""


@dataclass(frozen=True)
class Tiles:
    """Rows of small images with their names."""

    title: str
    rows: Sequence[tuple[str, Sequence[Tile]]]
    note: str = ""
    kind: str = "tiles"


@dataclass(frozen=True)
class Bars:
    """A bar chart: rows of (name, share from 0 to 1, text beside the bar)."""

    title: str
    rows: Sequence[tuple[str, float, str]]
    note: str = ""
    kind: str = "bars"


@dataclass(frozen=True)
class Table:
    """A table; `folded` hides it until it is opened."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[str] = ()
    folded: bool = False
    kind: str = "table"


@dataclass(frozen=True)
class Missing:
    """Stands for a missing part: the reason, and the command that creates it."""

    title: str
    reason: str
    command: str = ""
    kind: str = "missing"


Block = Picture | Tiles | Bars | Table | Missing


@dataclass(frozen=True)
class RunPage:
    """The content of the page for one run: facts and figures for the top, and the blocks of each section."""

    name: str
    facts: Sequence[tuple[str, str]]
    figures: dict[str, str]
    sections: dict[str, list[Block]]
    kind: str = ""  # of model


def png_source(content: bytes) -> str:
    """A PNG file as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def tile_source(pixels: Tensor) -> str:
    """An image (C,H,W) uint8 as a data URI."""
    return png_source(encode_png(pixels.cpu()))


def drawn(write: Callable[[Path], Any]) -> str:
    """The plot that `write(path)` draws, as an SVG data URI, with its panels below each other."""
    with tempfile.TemporaryDirectory() as folder, panels_in_a_column():
        path = Path(folder) / "plot.svg"
        write(path)
        return f"data:image/svg+xml;base64,{base64.b64encode(path.read_bytes()).decode()}"
