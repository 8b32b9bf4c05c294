"""Readers of picture files: an image folder, a zip of one, and what they share with other sources."""

# n chosen images, C channels, H W pixels

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path, PurePosixPath

import numpy as np

from cdm_fast.data.order import Indices
from cdm_fast.data.pictures import MAX_SIDE, SUFFIXES, Pixels, decode
from cdm_fast.data.source import Part, Source, make_source
from cdm_fast.host.reading import (
    MAX_PICTURE_BYTES,
    bad,
    check_member,
    check_size,
    error_text,
    open_zip,
    read_bytes,
    read_member,
    require_inside,
)

# Top-level folders with these names, if "train" is among them, are splits and not classes.
_SPLIT_OF_FOLDER = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
}

# Enter it to read pictures: it gives the function from a picture's key to the content of its file.
Opener = Callable[[], AbstractContextManager[Callable[[str], bytes]]]


def picture_part(
    name: object, keys: Sequence[str], labels: Indices | None, opener: Opener, reference: Part | None = None
) -> Part:
    """A part whose pictures are decoded when read.

    All have the shape of the first picture of `reference`, by default of this part. Reading raises UserError
    for a damaged picture, one of another size, or a colour one among grey ones.
    """

    def read(indices: Indices, image_size: int | None, channels: int | None) -> Pixels:
        with opener() as fetch:
            if reference is None:
                first = decode(fetch(keys[0]), f"{name}/{keys[0]}", image_size, channels)
            else:
                first = reference.read(_FIRST, image_size, channels)[0]
            if max(first.shape) > MAX_SIDE:
                height, width = first.shape[1:]
                raise bad(name, f"holds {width}x{height} pictures; give an image size, at most {MAX_SIDE}")
            check_size(name, len(indices) * first.size)
            out = np.empty((len(indices), *first.shape), np.uint8)
            packed = 0
            for count, (row, index) in enumerate(zip(out, indices, strict=True), start=1):
                content = fetch(keys[index])
                pixels = decode(content, f"{name}/{keys[index]}", image_size, channels)
                _check_like(f"{name}/{keys[index]}", pixels, first)
                row[:] = pixels  # one grey plane fills three of colour
                packed += len(content)
                if image_size is None:  # else the user chose how large they become
                    check_size(name, count * first.size, packed)
        return out

    return Part(len(keys), labels, read)


_FIRST: Indices = np.zeros(1, np.int64)


def _check_like(name: str, pixels: Pixels, first: Pixels) -> None:
    if pixels.shape[1:] != first.shape[1:]:
        height, width = first.shape[1:]
        own = f"{pixels.shape[2]}x{pixels.shape[1]}"
        raise bad(name, f"is {own}, the first picture is {width}x{height}; give an image size")
    if len(pixels) > len(first):
        raise bad(name, "is in colour, the first picture is grey; ask for 1 or 3 channels")


def read_image_folder(folder: Path) -> Source:
    """Pictures in a folder and its sub-folders; class sub-folders become labels (see `_classes`).

    With sub-folders named train, test (and validation or val), these are the splits. Hidden files and files
    without a picture's suffix are passed over. Raises UserError for an empty folder or a link that leaves it.
    """

    @contextmanager
    def opener() -> Iterator[Callable[[str], bytes]]:
        yield lambda key: read_bytes(folder / key, MAX_PICTURE_BYTES, folder)

    return _collect(folder, sorted(_walk(folder)), opener)


def _walk(folder: Path) -> Iterator[str]:
    """Relative names of the pictures under a folder. Links may point to files inside it, nowhere else."""

    def stop(error: OSError) -> None:
        raise bad(error.filename, f"cannot be listed ({error_text(error)}); check its permissions")

    for place, folders, files in os.walk(folder, onerror=stop):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        for name in (*folders, *files):
            path = Path(place, name)
            if path.is_symlink():
                require_inside(path, folder)
                if name in folders:
                    raise bad(path, "is a link to a folder; put the files themselves there")
        for name in files:
            if _is_picture(name):
                yield Path(place, name).relative_to(folder).as_posix()


def read_image_zip(path: Path) -> Source:
    """The same as `read_image_folder` for a zip file of the folder; nothing is extracted."""
    with open_zip(path) as archive:
        for info in archive.infolist():
            check_member(path, info)
        names = {info.filename for info in archive.infolist() if not info.filename.endswith("/")}
    keys = sorted(
        name
        for name in names
        if _is_picture(name) and not any(_is_hidden(part) for part in PurePosixPath(name).parts)
    )

    @contextmanager
    def opener() -> Iterator[Callable[[str], bytes]]:
        with open_zip(path) as archive:
            yield lambda key: read_member(path, archive, archive.getinfo(key), MAX_PICTURE_BYTES)

    return _collect(path, keys, opener)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_picture(name: str) -> bool:
    return not _is_hidden(PurePosixPath(name).name) and PurePosixPath(name).suffix.lower() in SUFFIXES


def _collect(path: Path, keys: list[str], opener: Opener) -> Source:
    if not keys:
        raise bad(path, f"holds no pictures ({' '.join(sorted(SUFFIXES))}); give a folder or zip of them")
    shared = len(PurePosixPath(os.path.commonpath([str(PurePosixPath(key).parent) for key in keys])).parts)
    folders = [PurePosixPath(key).parts[shared:-1] for key in keys]
    tops = {parts[0] if parts else "" for parts in folders}
    by_split = {"train": keys}
    if "train" in tops and tops <= _SPLIT_OF_FOLDER.keys():
        by_split = {}
        for key, parts in zip(keys, folders, strict=True):
            by_split.setdefault(_SPLIT_OF_FOLDER[parts[0]], []).append(key)
        shared += 1
    classes = _classes(path, by_split["train"], shared)
    found: dict[str, Part] = {}
    for split in sorted(by_split, key=lambda split: split != "train"):
        labels = _labels(path, by_split[split], shared, classes)
        found[split] = picture_part(path, by_split[split], labels, opener, found.get("train"))
    return make_source(path, found, num_classes=len(classes) or None)


def _classes(path: Path, keys: list[str], depth: int) -> list[str]:
    """Class names in label order: the sub-folders at `depth`, by number if all are numbers, else by name.

    One class tells nothing apart, so pictures that all lie in one folder have no labels.
    """
    names = {_class_of(key, depth) for key in keys}
    if len(names) == 1:
        return []
    if "" in names:
        stray = next(key for key in keys if not _class_of(key, depth))
        raise bad(
            f"{path}/{stray}", "lies beside class sub-folders; move it into one, or all into one folder"
        )
    numbered = all(name.isdecimal() and len(name) < 10 for name in names)
    return sorted(names, key=lambda name: (int(name) if numbered else 0, name))


def _class_of(key: str, depth: int) -> str:
    parts = PurePosixPath(key).parts[depth:-1]
    return parts[0] if parts else ""


def _labels(path: Path, keys: list[str], depth: int, classes: list[str]) -> Indices | None:
    if not classes:
        return None
    label_of = {name: label for label, name in enumerate(classes)}
    for key in keys:
        if _class_of(key, depth) not in label_of:
            raise bad(f"{path}/{key}", "is of a class that has no training pictures; add some or remove it")
    return np.array([label_of[_class_of(key, depth)] for key in keys], np.int64)
