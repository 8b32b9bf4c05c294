"""Readers of data sets stored as plain arrays: scikit-learn digits, IDX folders (MNIST family)."""

# N images, C channels, H W pixels

import gzip
import math
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cdm_fast.data.layout import is_hidden, is_note
from cdm_fast.data.names import listed
from cdm_fast.data.pictures import Pixels
from cdm_fast.data.source import Part, Source, array_part, check_labels, make_source
from cdm_fast.errors import UserError
from cdm_fast.host.optional import need
from cdm_fast.host.reading import bad, check_size, error_text, open_regular

_IDX_STEMS = {"train": "train", "test": "t10k"}
_IDX_BYTES = 0x08


def read_digits() -> Source:
    """scikit-learn's 1,797 handwritten digits: 8x8, 17 grey levels (0..16), 10 classes, no splits."""
    found = need("sklearn.datasets", "the data source digits").load_digits()
    images = found.images.astype(np.uint8)[:, None]
    parts = {"train": array_part("digits", images, found.target.astype(np.int64), num_grey_levels=17)}
    return make_source("digits", parts, "scikit-learn's digits", num_grey_levels=17, num_classes=10)


def is_idx_folder(folder: Path) -> bool:
    """Whether a folder holds any of the MNIST family's files."""
    return any(_idx_path(folder, stem, kind) for stem in _IDX_STEMS.values() for kind in ("images", "labels"))


def is_idx_name(name: str) -> bool:
    """Whether a file of this name is one of the MNIST family's."""
    return name in _IDX_NAMES


def read_idx_folder(folder: Path) -> Source:
    """The MNIST family: four files named `train-images-idx3-ubyte`, `t10k-labels-idx1-ubyte` and so on.

    The names may have a dot before `idx`, and `.gz` at the end. Images (N,H,W) and labels (N,) are unsigned
    bytes. Raises UserError for a missing, damaged or inconsistent file.
    """
    parts: dict[str, Part] = {}
    for split, stem in _IDX_STEMS.items():
        images_path, labels_path = _idx_path(folder, stem, "images"), _idx_path(folder, stem, "labels")
        if images_path is None or labels_path is None:
            missing = f"{stem}-images-idx3-ubyte" if images_path is None else f"{stem}-labels-idx1-ubyte"
            raise bad(folder, f"has no {missing} (or .gz of it); put all four files of the data set there")
        images = read_idx(images_path, 3, folder)
        labels = check_labels(labels_path, read_idx(labels_path, 1, folder), len(images))
        parts[split] = array_part(images_path, images[:, None], labels)
    return make_source(folder, parts, "IDX files (MNIST family)", unread=unread_beside(folder, is_idx_name))


def _idx_path(folder: Path, stem: str, kind: str) -> Path | None:
    names = _idx_names(stem, kind)
    return next((folder / name for name in names if (folder / name).exists()), None)


def _idx_names(stem: str, kind: str) -> list[str]:
    rank = 3 if kind == "images" else 1
    return [f"{stem}-{kind}{mark}idx{rank}-ubyte{packing}" for packing in ("", ".gz") for mark in "-."]


_IDX_NAMES = frozenset(
    name for stem in _IDX_STEMS.values() for kind in ("images", "labels") for name in _idx_names(stem, kind)
)


def unread_beside(folder: Path, is_read: Callable[[str], bool]) -> tuple[str, ...]:
    """Other files directly in a folder of files with known names, except the usual notes."""
    names = sorted(entry.name for entry in os.scandir(folder) if not is_hidden(entry.name))
    rest = [name for name in names if not is_read(name) and not is_note(name)]
    return (f"{listed(rest)} in {folder}",) if rest else ()


def read_idx(path: Path, rank: int, folder: Path | None = None) -> Pixels:
    """One IDX file of unsigned bytes with `rank` axes, plain or gzipped. UserError if it is anything else.

    folder: links must not lead out of it.

    Format: two zero bytes, a type (8: bytes), the number of axes, each length as big-endian uint32, the data.
    """
    with open_regular(path, folder) as raw:
        file_size = os.fstat(raw.fileno()).st_size
        packed = path.suffix == ".gz"
        stream = gzip.GzipFile(fileobj=raw) if packed else raw
        try:
            shape = _idx_shape(path, stream.read(4 + 4 * rank), rank)
            size = math.prod(shape)
            check_size(path, size, file_size if packed else None)
            if not packed and file_size != 4 + 4 * rank + size:
                raise _wrong_length(path, shape, f"{file_size - 4 - 4 * rank} bytes")
            body = stream.read(size + 1)  # one byte more, so that gzip verifies its checksum
        except (OSError, EOFError, zlib.error) as error:
            raise bad(path, f"is damaged or truncated ({error_text(error)}); fetch it again") from None
    if len(body) != size:
        raise _wrong_length(path, shape, f"{len(body)} bytes" if len(body) < size else "more")
    return np.frombuffer(body, np.uint8).reshape(shape)


def _idx_shape(path: Path, header: bytes, rank: int) -> tuple[int, ...]:
    if len(header) < 4 + 4 * rank or header[:2] != b"\0\0":
        raise bad(path, "does not start with an IDX header; fetch it again")
    if header[2] != _IDX_BYTES or header[3] != rank:
        found = f"numbers of type {header[2]:#04x} on {header[3]} axes"
        raise bad(path, f"holds {found}, not unsigned bytes (0x08) on {rank}; give the original file")
    return struct.unpack(f">{rank}I", header[4:])


def _wrong_length(path: Path, shape: tuple[int, ...], found: str) -> UserError:
    return bad(path, f"is truncated or too long: its header says {shape}, it holds {found}; fetch it again")
