"""Untrusted pickles, of `torch.save` and of numpy arrays: checked first, without running code in them.

PyTorch's `weights_only` loading runs no code, but a hostile file can still make it allocate gigabytes, expand
a decompression bomb, or hash a tuple of 2**60 leaves. Here the archive must be uncompressed, and its pickle
may refer only to tensors and dicts.
"""

import io
import math
import pickle
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from cdm_fast.errors import UserError
from cdm_fast.host.reading import MAX_DATA_BYTES, bad, error_text, open_zip, read_bytes, read_member, shown

MAX_PICKLE_BYTES = 2**26  # of the pickle alone; the tensors are separate members
MAX_TUPLE_LEAVES = 1000  # a tensor's size, stride and storage have a dozen

_STORAGES = "Float Double Half BFloat16 Long Int Short Char Byte Bool".split()
_ALLOWED = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {kind}Storage" for kind in _STORAGES),
}

_NAMES = ("GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4")

# The errors of PyTorch's loader for damaged files.
DAMAGE = (
    pickle.UnpicklingError,
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    MemoryError,
    struct.error,
)


def load_plain(path: Path) -> Any:
    """The content of a file of `torch.save`, on the CPU: numbers, strings, tensors, lists and dicts of them.

    Raises UserError that names the file if it is missing, damaged, older than PyTorch 1.6, compressed, or
    refers to anything else. Needs memory for twice the file.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of unusual storages; the callers check the result
            return torch.load(_checked(path), map_location="cpu", weights_only=True)
    except DAMAGE as error:
        if isinstance(error, UserError):
            raise
        raise bad(path, f"is damaged ({shown(error_text(error), 100)}); fetch it again") from None


def _checked(path: Path) -> io.BytesIO:
    """The archive rebuilt from the checked members, so that PyTorch's reader sees no other members."""
    packed = io.BytesIO()
    with open_zip(path) as archive, zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as copy:
        members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if "data.pkl" not in members or len(members) < len(archive.infolist()):
            raise bad(path, "is no torch checkpoint (PyTorch 1.6 or newer); save it again with torch.save")
        if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
            raise bad(path, "is compressed, which torch.save never does; save it again with torch.save")
        for name, info in members.items():
            limit = MAX_PICKLE_BYTES if name == "data.pkl" else MAX_DATA_BYTES
            content = read_member(path, archive, info, limit)
            if name == "data.pkl":
                _check_pickle(path, content)
            copy.writestr(f"archive/{name}", content)
    packed.seek(0)
    return packed


def _check_pickle(path: Path, program: bytes) -> None:
    """UserError if a pickle refers to anything but tensors and dicts, or holds a tuple with many leaves."""

    def allow(name: str, argument: Any) -> None:
        if name != "GLOBAL" or argument not in _ALLOWED:
            named = ascii(argument)[:80] if name == "GLOBAL" else name
            raise bad(path, f"wants to execute code ({named}) and was refused; save its state_dicts alone")

    check_tuples(path, program, allow)


def check_tuples(
    path: Path, program: bytes | BinaryIO, allow: Callable[[str, Any], None] = lambda name, argument: None
) -> None:
    """Raises UserError if a pickle holds a tuple with more than `MAX_TUPLE_LEAVES` leaves.

    Only tuples are followed: as dictionary keys they are hashed, which visits a shared leaf once per path.

    allow: called with the opcode and argument of every global that the pickle names; may raise.
    """
    stack: list[int] = []  # leaves of each value, 1 unless it is a tuple; -1 for a mark
    memo: dict[int, int] = {}
    for opcode, argument, _ in _opcodes(program):
        name, index = opcode.name, argument if isinstance(argument, int) else len(memo)
        if name in _NAMES:
            allow(name, argument)
        if name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            memo[index] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[index])
        else:
            _step(opcode, stack)
        if stack and stack[-1] > MAX_TUPLE_LEAVES:
            raise bad(path, "holds a tuple within tuples without end; save its state_dicts alone")


def _opcodes(program: bytes | BinaryIO) -> Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]]:
    """Opcodes and arguments of the pickle, without the warnings of decoding a damaged string."""
    with warnings.catch_warnings(action="ignore"):
        yield from pickletools.genops(program)


def _step(opcode: pickletools.OpcodeInfo, stack: list[int]) -> None:
    """Applies an opcode to the stack of leaf counts."""
    taken: list[int] = []
    for kind in reversed(opcode.stack_before):
        if kind is pickletools.stackslice:
            while stack[-1] != -1:
                taken.append(stack.pop())
        else:
            taken.append(stack.pop())
    leaves = 1 + sum(value for value in taken if value > 0) if opcode.name.startswith("TUPLE") else 1
    for kind in opcode.stack_after:
        stack.append(-1 if kind is pickletools.markobject else leaves)


_ARRAY_DTYPES = ("u1", "i1", "<i2", "<i4", "<i8", "<f4", "<f8")


def load_arrays(path: Path, folder: Path | None = None, limit: int = 2**30) -> dict[str, Any]:
    """The dictionary in a pickle like CIFAR's Python version: numbers, strings, lists and numpy arrays.

    Keys are strings, whether Python 2 or 3 wrote them. Nothing is imported or called: arrays are built here
    from the bytes in the file. folder: links must not lead out of it. Raises UserError that names the file if
    it is missing, damaged, or refers to anything else.
    """
    content = read_bytes(path, limit, folder)
    try:
        check_tuples(path, content)
        found = _ArrayReader(io.BytesIO(content), encoding="bytes").load()
    except UserError:
        raise
    except (*DAMAGE, RecursionError) as error:
        raise bad(path, f"is damaged ({shown(error_text(error), 100)}); fetch it again") from None
    if not isinstance(found, dict):
        raise bad(path, "is a pickle of another kind; fetch it again")
    try:
        return {_text(key): _plain(path, value) for key, value in found.items()}
    except (*DAMAGE, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise bad(path, f"is damaged ({shown(error_text(error), 100)}); fetch it again") from None


class _Pending:
    """A numpy array or dtype while it is read: it stores its arguments and its state."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _PendingArray(_Pending):
    pass


class _PendingDtype(_Pending):
    pass


# The pure Python unpickler: its memo is a dict, so a hostile index allocates no memory.
class _ArrayReader(pickle._Unpickler):
    """An unpickler that knows the names by which numpy rebuilds an array, and refuses all others."""

    def find_class(self, module: str, name: str) -> Any:
        if (name, module) in (("_reconstruct", f"numpy.{core}.multiarray") for core in ("core", "_core")):
            return _PendingArray
        if (name, module) in (("_frombuffer", f"numpy.{core}.numeric") for core in ("core", "_core")):
            return _from_buffer  # of protocol 5
        if (module, name) == ("numpy", "ndarray"):
            return None
        if (module, name) == ("numpy", "dtype"):
            return _PendingDtype
        if (module, name) == ("_codecs", "encode"):  # how old protocols write bytes
            return _encoded
        raise pickle.UnpicklingError(f"it wants to execute code ({module}.{name}) and was refused")

    def get_extension(self, code: int) -> None:
        """Refuses extension codes."""
        raise pickle.UnpicklingError(f"extension code {code}")


def _from_buffer(content: Any, dtype: Any, shape: Any, order: Any) -> _PendingArray:
    array = _PendingArray()
    content = bytes(content) if isinstance(content, bytearray) else content
    array.state = (1, shape, dtype, _text(order) != "C", content)
    return array


def _encoded(text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError("bytes of another encoding")
    return text.encode("latin1")


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def _plain(path: Path, value: Any) -> Any:
    """A pending array as a numpy array; anything else unchanged."""
    if not isinstance(value, _PendingArray):
        return value
    return _array(path, value)


def _array(path: Path, pending: _PendingArray) -> NDArray:
    if not isinstance(pending.state, tuple) or len(pending.state) != 5:
        raise bad(path, "holds an array of another form; fetch it again")
    _, shape, dtype, by_columns, content = pending.state
    known = isinstance(dtype, _PendingDtype) and dtype.arguments
    code = _text(dtype.arguments[0]) if known else ""
    kind = next((kind for kind in _ARRAY_DTYPES if kind.lstrip("<") == code), None)
    big_endian = known and isinstance(dtype.state, tuple) and b">" in dtype.state
    if kind is None or big_endian or by_columns or not isinstance(content, bytes):
        raise bad(path, f"holds an array of type {shown(code, 20)!r} or another order; save it again")
    if not isinstance(shape, tuple) or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
        raise bad(path, "holds an array of another form; fetch it again")
    if math.prod(shape) * np.dtype(kind).itemsize != len(content):
        raise bad(path, "holds an array whose shape contradicts its size; fetch it again")
    return np.frombuffer(content, kind).reshape(shape)
