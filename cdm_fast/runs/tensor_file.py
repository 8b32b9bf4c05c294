"""Writes safetensors files one tensor at a time, for a background thread.

The writer of the safetensors library holds two copies of the file in memory, and the interpreter lock while
it copies. This writer holds one tensor, and copies, hashes and writes without the lock. Files are read with
the library.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_PIECE = 8 << 20  # bytes written and hashed at a time


class HashedFile:
    """A new file that computes its size and SHA-256 while it is written; closing flushes it to the disk.

    Args:
        path: its name.
        proceed: called before each piece; may raise to abandon the file.
    """

    def __init__(self, path: Path, proceed: Callable[[], None]) -> None:
        self._file = open(path, "wb", buffering=0)
        self._proceed = proceed
        self._hash = hashlib.sha256()
        self.bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                os.fsync(self._file.fileno())

    @property
    def sha256(self) -> str:
        """SHA-256 of all bytes written, in hexadecimal."""
        return self._hash.hexdigest()

    def write(self, data: bytes | memoryview) -> None:
        """Appends all of `data`; OSError when the system refuses."""
        view = memoryview(data)
        while len(view):
            self._proceed()
            written = self._file.write(view[:_PIECE])  # may write fewer bytes
            self._hash.update(view[:written])
            self.bytes += written
            view = view[written:]


def write_tensors(file: HashedFile, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors on the CPU, of any memory layout, in the safetensors format.

    Raises ValueError naming the first tensor that holds a value that is not finite.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # keeps tensors aligned
    header, end = {}, 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
        values = np.ascontiguousarray(tensors[name].numpy()).reshape(-1)
        if not _all_finite(values):
            raise ValueError(f"{name} is not finite")
        file.write(values.view(np.uint8).data)


def _all_finite(values: NDArray[np.generic]) -> bool:
    """True if all values are finite: if their sum is, or else (the sum may overflow) if each of them is."""
    if values.dtype.kind != "f":
        return True
    with np.errstate(over="ignore", invalid="ignore"):
        return math.isfinite(values.sum()) or bool(np.isfinite(values).all())
