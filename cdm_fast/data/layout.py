"""The layout of picture folders: which folders are splits, which are classes, and which have no meaning."""

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from cdm_fast.data.names import listed, split_of
from cdm_fast.data.pictures import SUFFIXES
from cdm_fast.host.reading import bad

_CLUTTER = frozenset({"__MACOSX", "Thumbs.db", "desktop.ini"})


def is_hidden(name: str) -> bool:
    """True for files and folders that operating systems leave behind, which are no data."""
    return name.startswith(".") or name in _CLUTTER


def is_note(name: str) -> bool:
    """True for notes about the data, such as a README."""
    return name.lower().startswith(("readme", "license", "licence"))


# Names are split by hand: with pathlib a million of them take a minute.


def parts_of(name: str) -> list[str]:
    """The folders in the path of a file, and its name."""
    return [part for part in name.split("/") if part not in ("", ".")]


def suffix_of(name: str) -> str:
    """Such as `.png`, in lower case; "" without one."""
    own = name.rpartition("/")[2]
    dot = own.rfind(".")
    return own[dot:].lower() if dot > 0 else ""


def is_picture(name: str) -> bool:
    """True if a reader opens files with this suffix."""
    return suffix_of(name) in SUFFIXES


def by_split(path: Path, pictures: list[str], lost: Sequence[str]) -> tuple[dict[str, list[str]], int]:
    """Pictures by split (all "train" if no folder names a split), and the depth of class folders.

    lost: pictures in formats that are not read, which are considered in recognising the layout.
    Raises UserError if split folders lie beside other folders, below class folders, or without a training
    folder, and if a split holds only lost pictures.
    """
    every = [*pictures, *lost]
    folders = [parts_of(name)[:-1] for name in every]
    shared = len(os.path.commonprefix([min(folders), max(folders)]))
    tops = {part_of(name, shared) for name in every}
    found = {top: split for top in sorted(tops) if (split := split_of(top)) is not None}
    if not found:
        _refuse_inner_splits(path, every, shared)
        return {"train": pictures}, shared
    _check_splits(path, tops, found)
    splits: dict[str, list[str]] = {}
    for name in pictures:
        splits.setdefault(found[part_of(name, shared)], []).append(name)
    empty = [top for top, split in found.items() if split not in splits]
    if empty:
        raise bad(f"{path}/{empty[0]}", "holds no pictures that are read; convert them to PNG")
    return splits, shared + 1


def _check_splits(path: Path, tops: set[str], found: dict[str, str]) -> None:
    """UserError unless all top folders are different splits, one of them for training."""
    others = sorted(tops - found.keys())
    if others:
        beside = "pictures" if others == [""] else listed(f"{top}/" for top in others if top)
        raise bad(
            path,
            f"has {listed(f'{top}/' for top in found)}, which names a split, beside {beside}, which does not;"
            " move what is no split elsewhere, or rename the folder if it is a class",
        )
    if "train" not in found.values():
        raise bad(
            path, f"has {listed(f'{top}/' for top in found)} and no folder train; add the training pictures"
        )
    for split in set(found.values()):
        same = [top for top, other in found.items() if other == split]
        if len(same) > 1:
            raise bad(path, f"has {listed(f'{top}/' for top in same)}, both of which mean {split}; keep one")


def _refuse_inner_splits(path: Path, names: Sequence[str], shared: int) -> None:
    """UserError for split folders within class folders: their test pictures would be trained on."""
    for name in names:
        inner = parts_of(name)[shared + 1 : -1]
        split = next((part for part in inner if split_of(part)), None)
        if split is not None:
            raise bad(
                f"{path}/{name}",
                f"lies in a folder {split}, which names a split, within another; put split folders on top:"
                " train/CLASS, test/CLASS",
            )


def part_of(name: str, depth: int) -> str:
    """The folder at a depth in the path of a picture; "" for a picture that lies higher."""
    parts = parts_of(name)
    return parts[depth] if depth < len(parts) - 1 else ""


def is_numbered_archive(names: Sequence[str], depth: int) -> bool:
    """True if folders only divide a long list of numbered files, as 00000/img00000001.png or 01000/01234.png.

    The archives of StyleGAN and EDM, and FFHQ, are of this kind: such folders are no classes.
    """
    folders = set()
    for name in names:
        folder, number = part_of(name, depth), re.search(r"(\d{5,12})$", PurePosixPath(name).stem)
        if number is None or not re.fullmatch(r"\d{4,9}", folder):
            return False
        thousand = int(number[1]) // 1000
        if int(folder) not in (thousand, thousand * 1000):
            return False
        folders.add(folder)
    return True
