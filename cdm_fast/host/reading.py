"""Reads untrusted files and zip archives, with limits on size and expansion."""

import lzma
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from cdm_fast.errors import UserError

MAX_DATA_BYTES = 2**34  # of pixels in one split, in memory: ImageNet at 64x64 is 2**33.9
MAX_PICTURE_BYTES = 2**26  # of one compressed picture file

# Compressed data may expand to the first number of bytes at any ratio; beyond it, at most by the factor.
# Deflate reaches 1032; real images stay far below (Fashion-MNIST: 1.8).
FREE_EXPANSION_BYTES = 2**26
MAX_EXPANSION = 200

_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    OSError,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    IndexError,
    struct.error,
)


def bad(name: object, problem: str) -> UserError:
    """The error `NAME: PROBLEM` on one line, with control characters escaped."""
    return UserError(f"{shown(str(name), 400)}: {shown(' '.join(problem.split()), 500)}")


def shown(text: str, limit: int) -> str:
    """Untrusted text for a terminal: control characters are escaped, and its middle is cut beyond `limit`."""
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"


def check_size(name: object, num_bytes: int, packed_bytes: int | None = None) -> None:
    """Raises UserError if `num_bytes` exceed the limit, or the allowed expansion of `packed_bytes`."""
    if num_bytes > MAX_DATA_BYTES:
        raise bad(
            name, f"would take {num_bytes} bytes, above the limit of {MAX_DATA_BYTES}; use a part of it"
        )
    if packed_bytes is not None and num_bytes > max(FREE_EXPANSION_BYTES, MAX_EXPANSION * packed_bytes):
        raise bad(
            name,
            f"{packed_bytes} compressed bytes claim to hold {num_bytes}, as a decompression bomb does; "
            "store it uncompressed if it is genuine",
        )


def require_inside(path: Path, folder: Path) -> None:
    """Raises UserError if `path`, which lies in `folder`, is a link to a target outside of it."""
    root = os.path.realpath(folder)
    if not Path(os.path.realpath(path)).is_relative_to(root):
        raise bad(path, "is a link that leads out of its folder; put the file itself there")


@contextmanager
def open_regular(path: Path, folder: Path | None = None) -> Iterator[BinaryIO]:
    """Opens a regular file for reading; UserError if missing, unreadable, or a device, pipe or folder.

    folder: the folder that the file belongs to; a link to a target outside of it is refused.
    """
    if folder is not None:
        require_inside(path, folder)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise bad(path, "is not a regular file; give the path of a file")
        stream = open(path, "rb")
    except FileNotFoundError:
        raise bad(path, "no such file; check the path") from None
    except OSError as error:
        raise bad(path, f"cannot be opened ({error_text(error)}); check its permissions") from None
    with stream:
        yield stream


def read_bytes(path: Path, limit: int, folder: Path | None = None) -> bytes:
    """The content of a regular file of at most `limit` bytes (see `open_regular`); UserError otherwise."""
    with open_regular(path, folder) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > limit:
            raise bad(path, f"has {size} bytes, above the limit of {limit}; make it smaller")
        try:
            return stream.read(min(limit, max(size, 2**20)))  # Python allocates the requested size
        except OSError as error:
            raise bad(path, f"cannot be read ({error_text(error)}); copy it again") from None


def error_text(error: BaseException) -> str:
    """A library's exception as a few words without its file name."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


@contextmanager
def open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """Opens a zip archive (also .npz); UserError if it is missing, or its directory is damaged or forged."""
    with open_regular(path) as stream:
        try:
            archive = zipfile.ZipFile(stream)
        except _ZIP_ERRORS as error:
            raise bad(path, f"is not a whole zip file ({error_text(error)}); create it again") from None
        with archive:
            packed = sum(info.compress_size for info in archive.infolist())
            if packed > os.fstat(stream.fileno()).st_size:
                raise bad(path, "holds overlapping members, as a decompression bomb does; create it again")
            yield archive


def check_member(path: Path, info: zipfile.ZipInfo) -> None:
    """Raises UserError if a zip entry is encrypted, a link, outside the archive, or of a rare compression."""
    name = f"{path}/{info.filename}"
    parts = PurePosixPath(info.filename).parts
    if info.filename.startswith("/") or ".." in parts or "\\" in info.filename or ":" in info.filename[:2]:
        raise bad(name, "leads out of the zip file; create the zip again with relative names")
    if stat.S_ISLNK(info.external_attr >> 16):
        raise bad(name, "is a symbolic link; create the zip again with the files themselves")
    if info.flag_bits & 1:
        raise bad(name, "is encrypted; create the zip again without a password")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise bad(name, "is packed with a rare method; create the zip again with deflate or none")


def read_member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, limit: int) -> bytes:
    """The content of one zip entry of at most `limit` bytes; UserError if damaged, hostile or too large."""
    check_member(path, info)
    name = f"{path}/{info.filename}"
    check_size(name, info.file_size, info.compress_size)
    if info.file_size > limit:
        raise bad(name, f"has {info.file_size} bytes, above the limit of {limit}; make it smaller")
    try:
        with archive.open(info) as stream:
            content = stream.read(info.file_size)
            stream.read(1)  # reaching the end makes zipfile verify the checksum
    except _ZIP_ERRORS as error:
        raise bad(name, f"is damaged ({error_text(error)}); copy or create the zip again") from None
    if len(content) != info.file_size:
        raise bad(name, f"is truncated: {len(content)} bytes of {info.file_size}; create the zip again")
    return content
