"""Atomic writes of files and folders, and the lock of a run directory."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from cdm_fast.errors import DiskError, UserError
from cdm_fast.host.processes import is_main


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; renamed to `path` when the block ends without an error.

    Any process may use it; the temporary file is removed when the block raises.
    """
    unfinished = path.with_name(f".{path.name}.unfinished-{os.getpid()}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_atomically(path: str | Path, data: bytes) -> Path:
    """Writes a file atomically: it appears under its name only when complete and flushed; returns its path.

    Missing parent folders are created. An existing file is replaced at the end, and kept if writing fails. In
    a run of several processes rank 0 writes. Raises DiskError that names the file if writing fails (no space,
    no permission).
    """
    path = Path(path)
    if not is_main():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as unfinished, open(unfinished, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        reason = error.strerror or str(error)
        raise DiskError(f"cannot write {path}: {reason}; make room there or name another path") from error
    return path


@contextlib.contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """A temporary folder to fill; renamed to `target` when the block ends, removed when it raises."""
    unfinished = target.parent / f".{target.name}.unfinished-{os.getpid()}"
    unfinished.mkdir()
    try:
        yield unfinished
        _flush_directory(unfinished)
        if target.is_dir() and any(target.iterdir()):  # a damaged checkpoint of the same step
            remove(target)
        os.replace(unfinished, target)
        _flush_directory(target.parent)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def remove(folder: Path) -> None:
    """Removes a folder: it is renamed to a hidden name first, so that a partial removal is never seen."""
    hidden = folder.with_name(f".{folder.name}.unfinished-removal")
    with contextlib.suppress(OSError):
        os.replace(folder, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def remove_unfinished(folder: Path, name: str = "") -> None:
    """Removes temporary files and folders left by killed processes: those for `name`, or all."""
    for abandoned in folder.glob(".*.unfinished-*"):
        if not abandoned.name.startswith(f".{name}.unfinished-" if name else "."):
            continue
        if abandoned.is_dir() and not abandoned.is_symlink():
            shutil.rmtree(abandoned, ignore_errors=True)
        else:
            abandoned.unlink(missing_ok=True)


def _flush_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def saving(run: Path) -> Iterator[None]:
    """Converts an OSError of the block (no space, no permission) to a DiskError; earlier saves are intact."""
    try:
        yield
    except OSError as error:
        raise DiskError(
            f"cannot write to {run}: {error.strerror or error}; make room or give another --out"
            " (what was saved before is intact)"
        ) from error


@contextlib.contextmanager
def exclusive_lock(run: Path) -> Iterator[None]:
    """Locks a run directory against a second training until the block or the process ends.

    In a run of several processes rank 0 takes the lock. Raises UserError when another training holds it.
    """
    if not is_main():
        yield
        return
    descriptor = os.open(run, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{run} is being trained by another process; wait for it, or give another --out"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)
