"""Sheets of images: rows with names, tiny images enlarged."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from cdm_fast.plots.canvas import empty_figure, write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_THINNEST = 8  # pixels of an image on a sheet, so that signals of one row can be seen


def write_rows(
    rows: Mapping[str, Tensor],  # name -> (B,C,H,W) uint8, B may differ
    path: str | Path,
    title: str,
    columns: Sequence[str] = (),  # names
) -> Path:
    """Writes rows of images with their names, tiny ones enlarged smoothly, as a PNG; returns its path."""
    sheet = make_sheet(rows)
    figure = empty_figure(1 + sheet.shape[1] / 100, 0.5 + sheet.shape[0] / 100)
    axes = figure.subplots()
    show_sheet(axes, sheet, list(rows), columns)
    axes.set_title(title, fontsize=10)
    return write_figure(figure, path)


def make_sheet(rows: Mapping[str, Tensor]) -> NDArray[np.uint8]:
    """One image (H',W',3) of rows of images, (B,C,H,W) uint8 each, enlarged, with white lines between."""
    tiles = [[_enlarged(image) for image in images] for images in rows.values()]
    height, width = tiles[0][0].shape[:2]
    longest = max(map(len, tiles))
    sheet = np.full((len(tiles) * (height + 4), longest * (width + 4), 3), 255, dtype=np.uint8)
    for row, images in enumerate(tiles):
        for column, image in enumerate(images):
            top, left = row * (height + 4) + 2, column * (width + 4) + 2
            sheet[top : top + height, left : left + width] = image
    return sheet


def show_sheet(axes: "Axes", sheet: NDArray[np.uint8], rows: Sequence[str], columns: Sequence[str]) -> None:
    """Draws a sheet with the names of its rows, and of its columns where given."""
    height = sheet.shape[0] / len(rows)
    width = sheet.shape[1] / max(1, len(columns))
    axes.imshow(sheet, interpolation="nearest")
    axes.set_yticks([(row + 0.5) * height for row in range(len(rows))], list(rows))
    axes.set_xticks([(column + 0.5) * width for column in range(len(columns))], list(columns))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _enlarged(image: Tensor) -> NDArray[np.uint8]:
    """(C,H,W) uint8, C 1 or 3 -> (H',W',3), the longer side at least 64 pixels, the other at least 8."""
    _, height, width = image.shape
    scale = max(1.0, 64 / max(height, width))
    size = (max(round(height * scale), _THINNEST), max(round(width * scale), _THINNEST))
    big = F.interpolate(image[None].float(), size, mode="bicubic").round().clamp(0, 255)[0]
    return big.to(torch.uint8).expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()
