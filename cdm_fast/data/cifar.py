"""Readers of CIFAR-10 and CIFAR-100, in the binary version and in the pickled Python version."""

# N images, C channels, H W pixels

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cdm_fast.data.arrays import unread_beside
from cdm_fast.data.order import Indices
from cdm_fast.data.pictures import Pixels
from cdm_fast.data.source import Part, Source, array_part, make_source
from cdm_fast.host.plain_pickle import load_arrays
from cdm_fast.host.reading import bad, check_size, open_regular

_PIXELS = 3 * 32 * 32
_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))


@dataclass(frozen=True)
class _Version:
    """One published version: the folder to which its archive unpacks, and its files."""

    folder: str
    train: tuple[str, ...]
    test: str
    num_classes: int
    kind: str
    companions: tuple[str, ...]  # files of the archive that hold no images

    @property
    def pickled(self) -> bool:
        return "." not in self.test


_VERSIONS = (
    _Version(
        "cifar-10-batches-bin",
        tuple(f"{name}.bin" for name in _BATCHES),
        "test_batch.bin",
        10,
        "CIFAR-10, binary version",
        ("batches.meta.txt",),
    ),
    _Version(
        "cifar-100-binary",
        ("train.bin",),
        "test.bin",
        100,
        "CIFAR-100, binary version, fine labels",
        ("coarse_label_names.txt", "fine_label_names.txt"),
    ),
    _Version(
        "cifar-10-batches-py", _BATCHES, "test_batch", 10, "CIFAR-10, Python version", ("batches.meta",)
    ),
    _Version(
        "cifar-100-python",
        ("train",),
        "test",
        100,
        "CIFAR-100, Python version, fine labels",
        ("meta", "file.txt~"),
    ),
)


def is_cifar_folder(folder: Path) -> bool:
    """True if a folder, or a subfolder with the name of CIFAR's archive, holds a version of CIFAR."""
    return any(_find(folder, version) is not None for version in _VERSIONS)


def is_cifar_name(name: str) -> bool:
    """True if a file of this name can only belong to CIFAR."""
    return name.removesuffix(".bin") in (*_BATCHES, "test_batch")


def _find(folder: Path, version: _Version) -> Path | None:
    """The folder of a version: it holds one of its files, and next to "train" without suffix also "meta"."""
    for place in (folder, folder / version.folder):
        names = [*version.train, version.test]
        if any((place / name).is_file() for name in names):
            if version.train != ("train",) or (place / "meta").is_file():
                return place
    return None


def read_cifar_folder(folder: Path) -> Source:
    """CIFAR-10 or CIFAR-100 (fine labels): (N,3,32,32), with a test split.

    Raises UserError for a missing, truncated or damaged file, a label out of range, and a folder that holds
    more than one version.
    """
    found = [(version, place) for version in _VERSIONS if (place := _find(folder, version)) is not None]
    if len(found) != 1:
        kinds = " and ".join(version.kind for version, _ in found) or "no version of CIFAR"
        raise bad(folder, f"holds {kinds}; give the folder of one")
    ((version, place),) = found
    read = _pickled_records if version.pickled else _binary_records
    parts: dict[str, Part] = {}
    for split, names in (("train", version.train), ("test", (version.test,))):
        batches = [read(place / name, folder, version) for name in names]
        images = np.concatenate([images for images, _ in batches])
        labels = np.concatenate([labels for _, labels in batches])
        parts[split] = array_part(place, images.reshape(-1, 3, 32, 32), labels)
    known = {*version.train, version.test, *version.companions}
    return make_source(
        folder,
        parts,
        version.kind,
        num_classes=version.num_classes,
        unread=unread_beside(place, known.__contains__),
    )


def _binary_records(path: Path, folder: Path, version: _Version) -> tuple[Pixels, Indices]:
    """Images (N,3072) and labels of one file of records.

    A record is the label byte(s), the fine one last, then 3072 bytes in channel, row, column order.
    """
    label_bytes = 2 if version.num_classes == 100 else 1
    length = label_bytes + _PIXELS
    with open_regular(path, folder) as stream:
        size = os.fstat(stream.fileno()).st_size
        check_size(path, size)
        if size == 0 or size % length:
            raise bad(
                path, f"is truncated: {size} bytes are no multiple of a record's {length}; fetch it again"
            )
        records = np.frombuffer(stream.read(size), np.uint8).reshape(-1, length)
    labels = records[:, label_bytes - 1].astype(np.int64)
    return records[:, label_bytes:], _in_range(path, labels, version)


def _pickled_records(path: Path, folder: Path, version: _Version) -> tuple[Pixels, Indices]:
    """Images (N,3072) and labels from one pickled dictionary, without running code in it."""
    found = load_arrays(path, folder)
    images = found.get("data")
    labels = found.get("fine_labels" if version.num_classes == 100 else "labels")
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (_PIXELS,):
        raise bad(path, "holds no array data of N x 3072 bytes; fetch it again")
    if not isinstance(labels, list) or not all(type(label) is int and abs(label) < 2**62 for label in labels):
        raise bad(path, "holds no list of labels; fetch it again")
    if len(labels) != len(images) or not labels:
        raise bad(path, f"holds {len(labels)} labels for {len(images)} images; fetch it again")
    return images, _in_range(path, np.array(labels, np.int64), version)


def _in_range(path: Path, labels: Indices, version: _Version) -> Indices:
    outside = (labels < 0) | (labels >= version.num_classes)
    if outside.any():
        label = labels[int(np.argmax(outside))]
        raise bad(path, f"holds label {label}, out of range 0 to {version.num_classes - 1}; fetch it again")
    return labels
