"""Readers of picture files: an image folder, a zip of one, a table of file names."""

# n chosen images, C channels, H W pixels

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from cdm_fast.data.labelling import Labelling, label_pictures
from cdm_fast.data.layout import by_split, is_hidden, is_note, is_picture, suffix_of
from cdm_fast.data.names import listed
from cdm_fast.data.order import Indices
from cdm_fast.data.pictures import MAX_SIDE, SUFFIXES, UNREAD_SUFFIXES, Fit, Pixels, decode_quietly, quiet
from cdm_fast.data.source import FIRST, Part, Rows, Source, make_source
from cdm_fast.data.tables import KNOWN_TABLES, MAX_TABLE_BYTES, Table, parse_table
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

# A context manager for reading files: it yields a function from a file's key and a size limit to its content.
Fetch = Callable[[str, int], bytes]
Opener = Callable[[], AbstractContextManager[Fetch]]


def picture_part(
    name: object, keys: Sequence[str], labels: Indices | None, opener: Opener, reference: Part | None = None
) -> Part:
    """A part whose pictures are decoded when read.

    All must have the shape of the first picture of `reference`, by default of this part. Reading raises
    UserError for a damaged picture, one of another size, or a colour picture among grey ones.
    """

    @contextmanager
    def opened(fit: Fit) -> Iterator[Rows]:
        with quiet(), opener() as fetch:
            if reference is None:
                first = decode_quietly(fetch(keys[0], MAX_PICTURE_BYTES), f"{name}/{keys[0]}", fit)
            else:
                with reference.open(fit) as rows:
                    first = rows.read(FIRST)[0]
            if max(first.shape) > MAX_SIDE:
                height, width = first.shape[1:]
                raise bad(
                    name,
                    f"holds {height}x{width} pictures (height x width); give an image size, at most"
                    f" {MAX_SIDE} a side",
                )
            expansion = _Expansion(name, bounded=fit.image_size is None)  # else the user chose the size

            def read(indices: Indices) -> Pixels:
                out = np.empty((len(indices), *first.shape), np.uint8)
                for row, index in zip(out, indices, strict=True):
                    content = fetch(keys[index], MAX_PICTURE_BYTES)
                    pixels = decode_quietly(content, f"{name}/{keys[index]}", fit)
                    _check_like(f"{name}/{keys[index]}", pixels, first)
                    row[:] = pixels  # one grey plane fills three of colour
                    expansion.add(first.size, len(content))
                return out

            channels, height, width = first.shape
            yield Rows((channels, height, width), read)

    return Part(len(keys), labels, opened)


class _Expansion:
    """Counts the packed and unpacked bytes of a part's pictures, over all threads that read it."""

    def __init__(self, name: object, bounded: bool) -> None:
        self._name, self._bounded, self._lock = name, bounded, threading.Lock()
        self._size = self._packed = 0

    def add(self, size: int, packed: int) -> None:
        """Raises UserError if they expand like a decompression bomb."""
        with self._lock:
            self._size, self._packed = self._size + size, self._packed + packed
        if self._bounded:
            check_size(self._name, min(self._size, 2**33), self._packed)


def _check_like(name: str, pixels: Pixels, first: Pixels) -> None:
    if pixels.shape[1:] != first.shape[1:]:
        height, width = first.shape[1:]
        own = "{}x{}".format(*pixels.shape[1:])
        raise bad(
            name,
            f"is {own} (height x width), the first picture is {height}x{width}; give an image size"
            " (--image-size)",
        )
    if len(pixels) > len(first):
        raise bad(
            name,
            "is in colour, the first picture is grey; ask for 1 or 3 channels (--channels 3: all in colour)",
        )


@dataclass(frozen=True)
class Listing:
    """The files of a folder or a zip: their names relative to it, and how to read them."""

    path: Path
    noun: str  # "folder" or "zip"
    files: list[str]
    opener: Opener


def read_image_folder(folder: Path) -> Source:
    """Pictures in a folder and its sub-folders, labelled by class sub-folders or a table of labels.

    Sub-folders named train, test and validation, or with other usual names for these, are the splits. Hidden
    files are ignored; any other file that is not read is named in a warning. Raises UserError for an empty
    folder, a link that leaves it, and an ambiguous layout.
    """
    return _collect(Listing(folder, "folder", sorted(walk(folder)), _folder_opener(folder, walked=True)))


def _folder_opener(folder: Path, walked: bool = False) -> Opener:
    """walked: `walk` has checked the links already, which takes longer than reading a small file."""

    @contextmanager
    def opener() -> Iterator[Fetch]:
        inside = None if walked else folder
        yield lambda key, limit: read_bytes(Path(f"{folder}/{key}"), limit, inside)

    return opener


def walk(folder: Path) -> Iterator[str]:
    """Relative names of the files under a folder. Links may point only to files inside it."""
    yield from _walk(folder, str(folder), "")


def _walk(root: Path, place: str, prefix: str) -> Iterator[str]:
    try:
        with os.scandir(place) as listing:
            entries = list(listing)
    except OSError as error:
        raise bad(place, f"cannot be listed ({error_text(error)}); check its permissions") from None
    for entry in entries:
        is_folder = entry.is_dir(follow_symlinks=False)
        if entry.is_symlink():
            require_inside(Path(entry.path), root)
            if os.path.isdir(entry.path) and not is_hidden(entry.name):  # False for a link to itself
                raise bad(entry.path, "is a link to a folder; put the files themselves there")
        if is_hidden(entry.name):
            continue
        if is_folder:
            yield from _walk(root, entry.path, f"{prefix}{entry.name}/")
        else:
            yield f"{prefix}{entry.name}"


def read_image_zip(path: Path) -> Source:
    """`read_image_folder` for a zip file of the folder; nothing is extracted."""
    with open_zip(path) as archive:
        for info in archive.infolist():
            check_member(path, info)
        names = {info.filename for info in archive.infolist() if not info.filename.endswith("/")}
    files = sorted(name for name in names if name and not any(map(is_hidden, PurePosixPath(name).parts)))

    @contextmanager
    def opener() -> Iterator[Fetch]:
        with open_zip(path) as archive:
            lock = threading.Lock()  # a ZipFile counts its readers without one

            def fetch(key: str, limit: int) -> bytes:
                with lock:
                    return read_member(path, archive, archive.getinfo(key), limit)

            yield fetch

    return _collect(Listing(path, "zip", files, opener))


def read_table(path: Path) -> Source:
    """The pictures that a CSV or JSONL file names, relative to its own folder, with their labels and splits.

    Raises UserError for names that lead out of the folder or to no file.
    """
    folder = path.parent
    content = read_bytes(path, MAX_TABLE_BYTES)
    table = parse_table(str(path), content)
    assert table is not None  # only a .json may be of another kind
    outside = [name for name in table.files if name.startswith("/") or ".." in PurePosixPath(name).parts]
    if outside:
        raise bad(path, f"names {listed(outside)}, outside of its folder; give names within it")
    missing = [name for name in table.files if not (folder / name).exists()]
    if missing:
        raise bad(path, f"names {len(missing)} files that are not there ({listed(missing)}); restore them")
    if not table.files:
        raise bad(path, "names no files; give at least one")
    if len(set(table.files)) < len(table.files):
        raise bad(path, "names a file twice; remove one of the lines")
    keys = sorted(table.files)
    splits = {"train": keys}
    if table.splits is not None:
        splits = {}
        for key in keys:
            splits.setdefault(table.splits[key], []).append(key)
        if "train" not in splits:
            raise bad(path, "puts no file into the split train; name the training pictures")
    labels = Labelling.of_tables(path, keys, [("", table)])
    facts = [(key, found.st_size, found.st_mtime_ns) for key in keys if (found := (folder / key).stat())]
    mark = hashlib.blake2b(content + repr(facts).encode("utf8", "surrogateescape"), digest_size=16)
    return _source(
        path,
        splits,
        labels,
        _folder_opener(folder),
        f"a table of {len(keys)} pictures",
        labels.unread,
        mark.hexdigest(),
    )


def _collect(listing: Listing) -> Source:
    pictures = [name for name in listing.files if is_picture(name)]
    lost = [name for name in listing.files if suffix_of(name) in UNREAD_SUFFIXES]
    if not pictures:
        raise _no_pictures(listing, lost)
    tables, read = _read_tables(listing)
    splits, depth = by_split(listing.path, pictures, lost)
    labelling = label_pictures(listing.path, splits, depth, tables, lost)
    others = set(listing.files) - set(pictures) - set(lost) - read
    rest = sorted(name for name in others if not is_note(PurePosixPath(name).name))
    unread = [*_lost_note(lost), *labelling.unread]
    if rest:
        unread.append(f"{len(rest)} other file{'s' * (len(rest) > 1)} ({listed(rest)})")
    edm = any(table.edm for _, table in tables)
    kind = f"{'an EDM' if edm else 'a'} {listing.noun}{'' if edm else ' of pictures'}"
    return _source(listing.path, splits, labelling, listing.opener, kind, tuple(unread))


def _source(
    path: Path,
    splits: dict[str, list[str]],
    labelling: Labelling,
    opener: Opener,
    kind: str,
    unread: tuple[str, ...],
    mark: str | None = None,
) -> Source:
    found: dict[str, Part] = {}
    for split in sorted(splits, key=lambda split: split != "train"):
        labels = labelling.numbers(splits[split])
        found[split] = picture_part(path, splits[split], labels, opener, found.get("train"))
    return make_source(
        path,
        found,
        f"{kind} {labelling.how}",
        num_classes=labelling.num_classes,
        unread=unread,
        encoded=True,
        class_names=labelling.class_names,
        mark=mark,
    )


def _read_tables(listing: Listing) -> tuple[list[tuple[str, Table]], set[str]]:
    """The tables of labels among the files, each with its folder; and their names."""
    found, read = [], set()
    with listing.opener() as fetch:
        for name in listing.files:
            if name.rpartition("/")[2].lower() not in KNOWN_TABLES:
                continue
            place = PurePosixPath(name)
            table = parse_table(f"{listing.path}/{name}", fetch(name, MAX_TABLE_BYTES))
            if table is not None:
                found.append(("" if str(place.parent) == "." else f"{place.parent}/", table))
                read.add(name)
    return found, read


def _no_pictures(listing: Listing, lost: list[str]) -> Exception:
    if lost:
        return bad(
            listing.path,
            f"holds no pictures that are read, but {_counted(lost)}; convert them to PNG",
        )
    others = [
        name for name in listing.files if PurePosixPath(name).suffix.lower() in (".npz", ".zip", ".csv")
    ]
    there = f", but {listed(others)}, whose path you can give" if others else ""
    return bad(
        listing.path, f"holds no pictures ({' '.join(sorted(SUFFIXES))}){there}; give a folder or zip of them"
    )


def _counted(names: list[str]) -> str:
    """Such as `5 .avif and 3 .heic`."""
    suffixes = [PurePosixPath(name).suffix.lower() for name in names]
    return " and ".join(f"{suffixes.count(suffix)} {suffix}" for suffix in sorted(set(suffixes)))


def _lost_note(lost: list[str]) -> list[str]:
    return [f"{_counted(lost)} pictures ({listed(lost, 3)}), which convert to PNG"] if lost else []
