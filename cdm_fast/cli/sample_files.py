"""The output of `cdm-fast sample`: a sheet, an .npz, or a folder of PNGs, written batch by batch.

# B batch, N images in all, C channels, H W pixels
"""

import contextlib
import math
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import torch
from torch import Tensor

from cdm_fast.config import RunConfig
from cdm_fast.data import quantize
from cdm_fast.data.pictures import encode_png
from cdm_fast.data.pixels import displayable
from cdm_fast.errors import DiskError, UserError
from cdm_fast.host.files import replacing
from cdm_fast.host.processes import is_main
from cdm_fast.training.report import write_sheet

MOST_ON_A_SHEET = 10_000  # images, all of which are held in memory
_CHUNK = 2**20  # bytes that are compressed at a time


class ImageSink(Protocol):
    """Writes images batch by batch. A sheet or an .npz appears at `close`, the files of a folder at once."""

    def add(self, images: Tensor, labels: Tensor | None) -> None:
        """The next images, (B,C,H,W) in [-1, 1], and their classes, (B,) int64."""

    def close(self) -> None:
        """Completes the output with the images that were added."""


def open_sink(path: Path, num: int, config: RunConfig, title: str) -> ImageSink:
    """The sink for `num` images, chosen by the suffix of the path.

    Raises UserError for another suffix, a folder that is not empty, too many images for a sheet, and too
    little space on the disk.
    """
    if path.suffix == ".npz":
        pixels = num * math.prod(config.image.shape)
        _require_room(path.parent, num, "bytes", pixels, lambda folder: shutil.disk_usage(folder).free)
        return _Npz(path, config)
    if path.is_dir() or not path.suffix:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path} exists already; give the name of a new or empty folder")
        _require_room(path, num, "files", num, _free_files)
        return _Folder(path, num, config)
    if path.suffix != ".png":
        raise UserError(f"--out {path}: give a name that ends in .png or .npz, or that of a folder")
    if num > MOST_ON_A_SHEET:
        raise UserError(
            f"--num {num} is more than a sheet holds ({MOST_ON_A_SHEET}); give --out a folder or a name that"
            " ends in .npz"
        )
    return _Sheet(path, config, title)


class _Sheet:
    """A .png of all images, with a row for each class if there are few classes."""

    def __init__(self, path: Path, config: RunConfig, title: str) -> None:
        self._path, self._config, self._title = path, config, title
        self._images: list[Tensor] = []
        self._labels: list[Tensor] = []

    def add(self, images: Tensor, labels: Tensor | None) -> None:
        self._images.append(displayable(images, self._config.image.num_grey_levels, self._config.data.pixels))
        self._labels += [] if labels is None else [labels]

    def close(self) -> None:
        labels = torch.cat(self._labels) if self._labels else None
        write_sheet(torch.cat(self._images), labels, self._path, self._title)


class _Npz:
    """An .npz that `--data` reads: images (N,H,W,C) uint8, labels (N,) int64 if any, num_grey_levels."""

    def __init__(self, path: Path, config: RunConfig) -> None:
        self._path, self._config = path, config
        self._columns: dict[str, _Column] = {}

    def add(self, images: Tensor, labels: Tensor | None) -> None:
        grey = quantize(images, self._config.image.num_grey_levels, self._config.data.pixels)
        batch = {"images": grey.permute(0, 2, 3, 1).cpu().contiguous().numpy()}
        if labels is not None:
            batch["labels"] = labels.numpy()
        if not is_main():
            return
        with _disk(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            for name, rows in batch.items():
                if name not in self._columns:
                    self._columns[name] = _Column(self._path.parent, rows)
                self._columns[name].add(rows)

    def close(self) -> None:
        if not is_main():
            return
        with (
            _disk(self._path),
            replacing(self._path) as unfinished,
            zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED) as archive,
        ):
            for name, column in self._columns.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    column.write(member)
            with archive.open("num_grey_levels.npy", "w") as member:
                grey = np.array(self._config.image.num_grey_levels)
                np.lib.format.write_array(member, grey)


class _Column:
    """An array whose rows are buffered on the disk until their number, which the header needs, is known.

    The buffer is a file without a name, which vanishes with the process.
    """

    def __init__(self, folder: Path, rows: np.ndarray) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)
        self._type, self._shape, self._count = rows.dtype, rows.shape[1:], 0

    def add(self, rows: np.ndarray) -> None:
        self._file.write(rows.data)
        self._count += len(rows)

    def write(self, member: IO[bytes]) -> None:
        """The array in numpy's format."""
        shape = (self._count, *self._shape)
        header = {"descr": self._type.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(member, header)
        self._file.seek(0)
        shutil.copyfileobj(self._file, member, _CHUNK)


class _Folder:
    """A folder of PNGs 000000.png, 000001.png, ..., in one folder per class where there are classes."""

    def __init__(self, path: Path, num: int, config: RunConfig) -> None:
        self._path, self._config, self._count = path, config, 0
        self._digits = max(6, len(str(num - 1)))

    def add(self, images: Tensor, labels: Tensor | None) -> None:
        pixels = displayable(images, self._config.image.num_grey_levels, self._config.data.pixels).cpu()
        folders = [self._path] * len(pixels)
        if labels is not None:
            folders = [self._path / str(label) for label in labels.tolist()]
        names = [f"{self._count + i:0{self._digits}d}.png" for i in range(len(pixels))]
        self._count += len(pixels)
        if not is_main():
            return
        with _disk(self._path):
            for folder in set(folders):
                folder.mkdir(parents=True, exist_ok=True)
            for picture, folder, name in zip(pixels, folders, names, strict=True):
                with replacing(folder / name) as unfinished:
                    unfinished.write_bytes(encode_png(picture))

    def close(self) -> None:
        """Every file is complete already."""


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Converts errors of the disk (no space, no permission) into a DiskError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise DiskError(f"cannot write {path}: {reason}; make room there or name another path") from error


def _require_room(folder: Path, num: int, unit: str, needed: int, free: Callable[[Path], int]) -> None:
    """UserError unless the file system of a folder, which need not exist, has `needed` units free."""
    existing = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    with _disk(folder):
        left = free(existing)
    if left < needed:
        raise UserError(
            f"--num {num} needs {needed} {unit} in {folder}, and {left} are free; draw fewer, or make room"
        )


def _free_files(folder: Path) -> int:
    """How many more files a file system can hold."""
    found = os.statvfs(folder)
    files = found.f_favail if found.f_files else sys.maxsize  # some count no files
    return min(files, found.f_bavail)  # a file takes a block at least
