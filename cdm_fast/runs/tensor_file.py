"""Writing tensors as safetensors, one at a time, off the training thread.

The library's writer holds a whole file in memory, twice, and the interpreter's lock while it copies. This one
holds one tensor, and does its copying, hashing and writing where other threads go on. Reading is the
library's: what it does not accept is no checkpoint.
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
    """A new file whose size and SHA-256 are known once it is on the disk.

    Args:
        path: its name.
        proceed: called before each piece; may raise to leave the file unfinished.
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
        """Of all that was written, in hexadecimal."""
        return self._hash.hexdigest()

    def write(self, data: bytes | memoryview) -> None:
        """Appends all of `data`; OSError when the system refuses."""
        view = memoryview(data)
        while len(view):
            self._proceed()
            written = self._file.write(view[:_PIECE])  # may take less than it was given
            self._hash.update(view[:written])
            self.bytes += written
            view = view[written:]


def write_tensors(file: HashedFile, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors on the CPU, of any memory layout, in the safetensors format.

    Raises ValueError naming the first tensor that holds a value that is not finite.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # keeps all aligned
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
    """Whether no value is NaN or infinite: by the sum, which costs no memory, unless that overflows."""
    if values.dtype.kind != "f":
        return True
    with np.errstate(over="ignore", invalid="ignore"):
        return math.isfinite(values.sum()) or bool(np.isfinite(values).all())
