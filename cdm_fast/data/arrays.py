"""Readers of data sets that are one plain array: scikit-learn digits, IDX folders, CIFAR binaries."""

# N images, C channels, H W pixels

import gzip
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np

from cdm_fast.data.pictures import Pixels
from cdm_fast.data.source import Part, Source, array_part, check_labels, make_source
from cdm_fast.errors import UserError
from cdm_fast.host.optional import need
from cdm_fast.host.reading import bad, check_size, error_text, open_regular

_IDX_STEMS = {"train": "train", "test": "t10k"}
_IDX_BYTES = 0x08

# (folder that its archive unpacks to, train files, test file, label bytes a record, classes)
_CIFAR_KINDS = (
    ("cifar-10-batches-bin", tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin", 1, 10),
    ("cifar-100-binary", ("train.bin",), "test.bin", 2, 100),
)
_CIFAR_PIXELS = 3 * 32 * 32


def read_digits() -> Source:
    """scikit-learn's 1,797 handwritten digits: 8x8, 17 grey levels (0..16), 10 classes, no shipped splits."""
    found = need("sklearn.datasets", "the data source digits").load_digits()
    images = found.images.astype(np.uint8)[:, None]
    parts = {"train": array_part("digits", images, found.target.astype(np.int64), num_grey_levels=17)}
    return make_source("digits", parts, num_grey_levels=17, num_classes=10)


def is_idx_folder(folder: Path) -> bool:
    """Whether a folder holds any of the MNIST family's files."""
    return any(_idx_path(folder, stem, kind) for stem in _IDX_STEMS.values() for kind in ("images", "labels"))


def read_idx_folder(folder: Path) -> Source:
    """The MNIST family: four files named `train-images-idx3-ubyte`, `t10k-labels-idx1-ubyte` and so on.

    A dot may stand before `idx`, and `.gz` at the end. Images (N,H,W) and labels (N,) are unsigned bytes.
    Raises UserError for a missing, damaged or misfit file.
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
    return make_source(folder, parts)


def _idx_path(folder: Path, stem: str, kind: str) -> Path | None:
    rank = 3 if kind == "images" else 1
    names = [f"{stem}-{kind}{mark}idx{rank}-ubyte{packing}" for packing in ("", ".gz") for mark in "-."]
    return next((folder / name for name in names if (folder / name).exists()), None)


def read_idx(path: Path, rank: int, folder: Path | None = None) -> Pixels:
    """One IDX file of unsigned bytes with `rank` axes, plain or gzipped. UserError if it is anything else.

    folder: what a link may not lead out of.

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
            body = stream.read(size + 1)  # the one too many makes gzip verify its checksum
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


def is_cifar_folder(folder: Path) -> bool:
    """Whether a folder, or its `cifar-10-batches-bin` or `cifar-100-binary`, holds a version of CIFAR."""
    names = ("data_batch_1", "data_batch_1.bin", "test_batch.bin", "train.bin", "test.bin")
    return any((place / name).is_file() for place in _cifar_places(folder) for name in names)


def _cifar_places(folder: Path) -> tuple[Path, ...]:
    return (folder, *(folder / kind[0] for kind in _CIFAR_KINDS))


def read_cifar_folder(folder: Path) -> Source:
    """CIFAR-10 or CIFAR-100 (fine labels), binary version: (N,3,32,32), a shipped test split.

    A record is the label byte(s), the fine one last, then 3072 bytes in channel, row, column order. Raises
    UserError for a missing or truncated file, a label out of range, or the pickled Python version.
    """
    for _, train_names, test_name, label_bytes, num_classes in _CIFAR_KINDS:
        place = next((place for place in _cifar_places(folder) if (place / train_names[0]).is_file()), None)
        if place is None:
            continue
        parts = {}
        for split, names in (("train", train_names), ("test", (test_name,))):
            records = np.concatenate(
                [_cifar_records(place / name, folder, label_bytes, num_classes) for name in names]
            )
            images = records[:, label_bytes:].reshape(-1, 3, 32, 32)
            parts[split] = array_part(place, images, records[:, label_bytes - 1].astype(np.int64))
        return make_source(folder, parts, num_classes=num_classes)
    raise bad(folder, "has no data_batch_1.bin or train.bin; unpack CIFAR's binary version there")


def _cifar_records(path: Path, folder: Path, label_bytes: int, num_classes: int) -> Pixels:
    """The records of one file, (N, label_bytes + 3072)."""
    length = label_bytes + _CIFAR_PIXELS
    with open_regular(path, folder) as stream:
        size = os.fstat(stream.fileno()).st_size
        check_size(path, size)
        if size == 0 or size % length:
            raise bad(
                path, f"is truncated: {size} bytes are no multiple of a record's {length}; fetch it again"
            )
        records = np.frombuffer(stream.read(size), np.uint8).reshape(-1, length)
    label = records[:, label_bytes - 1].max()
    if label >= num_classes:
        raise bad(path, f"holds label {label}, out of range 0 to {num_classes - 1}; fetch it again")
    return records
