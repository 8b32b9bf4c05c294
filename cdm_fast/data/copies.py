"""Prepared copies: the images of a source as uint8 rows in a file that processes map and share.

A copy is a folder CACHE/KEY with

    rows        the images, (N, C, H, W) uint8: train, then validation, then test
    labels      (N,) int64 in the same order; empty without labels
    about.json  their description, and a digest of both files

KEY is a digest of everything that determines the content. A copy is written under another name, by the
process that holds KEY.lock, and renamed when it is complete.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import mmap
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from cdm_fast.config.json import from_json, parse_json
from cdm_fast.data.names import SPLITS
from cdm_fast.data.order import Indices
from cdm_fast.data.parallel import read_chunks
from cdm_fast.data.pictures import Fit
from cdm_fast.data.source import Part, Source
from cdm_fast.errors import DiskError, UserError
from cdm_fast.host.files import atomic_directory, remove, remove_unfinished
from cdm_fast.host.progress import ProgressBar, to_stderr
from cdm_fast.host.reading import bad, shown

VERSION = 1  # of the readers and of this layout; increasing it invalidates all copies
VARIABLE = "CDM_FAST_CACHE"
OFF = "off"
# Below these sizes a copy gains nothing: the source is read in a second or two.
_FEWEST_PICTURES, _FEWEST_BYTES = 2000, 2**26
_MAX_ABOUT_BYTES = 2**26

# Without it Linux refuses to map more than the available memory. Python 3.13 has a name for this flag.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)

_maps: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()  # by address
_chosen: ContextVar[str | None] = ContextVar("cache", default=None)


@contextlib.contextmanager
def cached_in(cache: str | None) -> Iterator[None]:
    """Inside the block copies are kept in this folder, or not at all with "off"; None changes nothing."""
    token = _chosen.set(cache or _chosen.get())
    try:
        yield
    finally:
        _chosen.reset(token)


def cache_folder() -> Path | None:
    """The folder of copies: from `cached_in`, CDM_FAST_CACHE, or the user's cache folder; None if off."""
    said = _chosen.get() or os.environ.get(VARIABLE)
    if said:
        return None if said == OFF else Path(said).expanduser()
    try:
        from platformdirs import user_cache_dir
    except ImportError:
        return None
    return Path(user_cache_dir("cdm_fast", appauthor=False)) / "data"


@dataclass(frozen=True)
class About:
    """The description of a copy: counts of the splits, (C,H,W), and the facts of its source."""

    version: int
    kind: str
    train: int
    validation: int
    test: int
    shape: tuple[int, ...]
    labelled: bool
    num_grey_levels: int
    num_classes: int | None
    class_names: tuple[str, ...] | None
    unread: tuple[str, ...]
    digest: str

    @property
    def count(self) -> int:
        return self.train + self.validation + self.test

    @property
    def num_bytes(self) -> int:
        return self.count * math.prod(self.shape)


@dataclass(frozen=True)
class Copy:
    """A complete copy, memory-mapped: pages are read when used, and shared by all processes that map them."""

    folder: Path
    about: About

    def split(self, split: str) -> tuple[Tensor, Tensor | None]:
        """Images (n,C,H,W) uint8 and labels (n,) int64 of a split. Writing to the images changes no file."""
        first = sum(getattr(self.about, earlier) for earlier in SPLITS[: SPLITS.index(split)])
        rows = slice(first, first + getattr(self.about, split))
        images = map_file(self.folder / "rows").view(self.about.count, *self.about.shape)[rows]
        if not self.about.labelled:
            return images, None
        return images, map_file(self.folder / "labels").view(torch.int64)[rows].clone()

    def verify(self) -> bool:
        """True if both files are unchanged since they were written; reads them completely."""
        digest = hashlib.blake2b(digest_size=16)
        for name in ("rows", "labels"):
            with open(self.folder / name, "rb") as file:
                while block := file.read(2**22):
                    digest.update(block)
        return digest.hexdigest() == self.about.digest


def map_file(path: Path) -> Tensor:
    """A file as a (bytes,) uint8 tensor, mapped privately: writes stay in this process."""
    with open(path, "rb") as file:
        flags = mmap.MAP_PRIVATE | _NO_RESERVE
        mapped = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    tensor = torch.frombuffer(mapped, dtype=torch.uint8)
    _maps[tensor.data_ptr()] = mapped
    return tensor


def expect_random_reads(images: Tensor) -> None:
    """Tells the kernel that rows of `images` are read in random order; does nothing if they are not mapped.

    Otherwise each row that is not in memory brings 128 KiB of its neighbours along, which is slow where the
    file is larger than the memory: 266 instead of 5 ms for 64 rows of 784 bytes (docs/measurements/data.md).
    """
    mapped = _maps.get(images.untyped_storage().data_ptr()) if images.device.type == "cpu" else None
    if mapped is not None and images.numel():
        first = int(images.storage_offset())
        start = first // mmap.PAGESIZE * mmap.PAGESIZE
        mapped.madvise(mmap.MADV_RANDOM, start, first + images.numel() - start)


def key_of(mark: str, fit: Fit, split_seed: int, encoded_by: str) -> str:
    """The name of a copy: a digest of the source's mark and of all settings that determine its content.

    encoded_by: version of the decoder.
    """
    facts = [VERSION, mark, fit.image_size, fit.channels, fit.crop, fit.resample, split_seed, encoded_by]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


def mark_of(path: Path) -> str | None:
    """A digest of names, sizes and times of a file, or of all files below a folder; None for neither."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        facts = sorted(_facts(str(path), "")) if path.is_dir() else [_fact(path.name, path.stat())]
    except (OSError, ValueError):
        return None  # the reader tells what is wrong
    digest.update("\0".join(facts).encode("utf8", "surrogateescape"))
    return digest.hexdigest()


def _fact(name: str, found: os.stat_result) -> str:
    return f"{name}\0{found.st_size}\0{found.st_mtime_ns}"


def _facts(folder: str, prefix: str) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _facts(entry.path, f"{prefix}{entry.name}/")
            else:
                yield _fact(f"{prefix}{entry.name}", entry.stat())


def find(cache: Path, key: str) -> Copy | None:
    """The complete copy with this name; None if there is none, or one of another version or size."""
    folder = cache / key
    try:
        with open(folder / "about.json", "rb") as file:
            value = parse_json(file.read(_MAX_ABOUT_BYTES))
        about = from_json(About, value, str(folder))
        sizes = [(folder / name).stat().st_size for name in ("rows", "labels")]
    except (OSError, ValueError, UserError):
        return None
    wanted = [about.num_bytes, 8 * about.count * about.labelled]
    return Copy(folder, about) if about.version == VERSION and sizes == wanted and about.count else None


def is_worth_it(source: Source, num_bytes: int) -> bool:
    """True if a source takes long enough to read, or enough memory, to be worth a copy."""
    count = sum(part.count for part in source.parts.values())
    return num_bytes >= _FEWEST_BYTES or (source.encoded and count >= _FEWEST_PICTURES)


Chosen = dict[str, tuple[Part, Indices]]  # by split: its part, and the indices of its images in it


def prepare(
    cache: Path, key: str, source: Source, chosen: Chosen, fit: Fit, unchanged: Callable[[], bool]
) -> Copy:
    """The copy with this name, made if there is none; one process makes it, and others wait for it.

    unchanged: returns whether the source is still unchanged. Raises DiskError if writing fails, leaving
    nothing behind, and UserError as in the source, or if the source has changed meanwhile.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _only_writer(cache, key, source.name):
            found = find(cache, key)
            if found is not None:
                return found
            with atomic_directory(cache / key) as unfinished:
                about = _write(unfinished, source, chosen, fit)
                if not unchanged():
                    raise bad(source.name, "has changed while it was read; start again when it is complete")
            return Copy(cache / key, about)
    except OSError as error:
        raise DiskError(
            f"no prepared copy in {cache}: {error.strerror or error}; make room, or name another folder by"
            f" --cache or {VARIABLE}"
        ) from error


@contextlib.contextmanager
def _only_writer(cache: Path, key: str, name: str) -> Iterator[None]:
    """Holds KEY.lock, which is released with the process; removes files left by killed processes."""
    with open(cache / f"{key}.lock", "ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            to_stderr(f"another process is reading {shown(name, 200)}: waiting for its copy")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP):
                raise
            yield  # a file system without locks: each process writes under its own name
            return
        remove_unfinished(cache, key)
        yield


def _write(folder: Path, source: Source, chosen: Chosen, fit: Fit) -> About:
    """Writes all files of a copy, each flushed to the disk; returns the content of about.json."""
    counts = {split: len(chosen[split][1]) if split in chosen else 0 for split in SPLITS}
    total = sum(counts.values())
    digest = hashlib.blake2b(digest_size=16)
    shape: tuple[int, ...] = ()
    labels = []
    progress = ProgressBar(f"reading {source.name}", total, delay=2.0, every_process=True)
    with open(folder / "rows", "wb") as file, progress:
        for split in SPLITS:
            if split not in chosen:
                continue
            part, indices = chosen[split]
            with part.open(fit) as rows:
                if not shape:
                    shape = rows.shape
                    os.posix_fallocate(file.fileno(), 0, total * math.prod(shape))
                for chunk in read_chunks(rows, indices, progress):
                    file.write(chunk.data)
                    digest.update(chunk.data)
            if part.labels is not None:
                labels.append(part.labels[indices].tobytes())
        _flush(file.fileno(), file.flush)
    digest.update(b"".join(labels))
    about = About(
        VERSION,
        source.kind,
        **counts,
        shape=shape,
        labelled=bool(labels),
        num_grey_levels=source.num_grey_levels,
        num_classes=source.num_classes,
        class_names=source.class_names,
        unread=source.unread,
        digest=digest.hexdigest(),
    )
    for name, content in (("labels", b"".join(labels)), ("about.json", json.dumps(asdict(about)).encode())):
        with open(folder / name, "wb") as file:
            file.write(content)
            _flush(file.fileno(), file.flush)
    return about


def _flush(descriptor: int, flush: Callable[[], None]) -> None:
    flush()
    os.fsync(descriptor)


def clear(cache: Path, key: str | None = None) -> tuple[int, int]:
    """Removes one copy or all; returns their number and bytes. Copies being written are kept.

    Only folders named like a copy are removed.
    """
    removed = freed = 0
    for lock in sorted(cache.glob(f"{key or '?' * 32}.lock")):
        with open(lock, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue
            folder = cache / lock.stem
            remove_unfinished(cache, lock.stem)
            if folder.is_dir():
                freed += sum(path.stat().st_size for path in folder.iterdir())
                removed += 1
                remove(folder)
                shutil.rmtree(folder, ignore_errors=True)
    return removed, freed
