"""Untrusted files of `torch.save`: the archive and its pickle are checked before PyTorch loads them.

PyTorch's `weights_only` loading runs no code, but a hostile file can still make it allocate gigabytes, expand
a decompression bomb, or hash a tuple of 2**60 leaves. Here the archive must be uncompressed, and its pickle
may name nothing but tensors and dicts.
"""

import io
import pickle
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from cdm_fast.errors import UserError
from cdm_fast.host.reading import MAX_DATA_BYTES, bad, error_text, open_zip, read_member, shown

MAX_PICKLE_BYTES = 2**26  # of the pickle alone; the tensors are members of their own
MAX_TUPLE_LEAVES = 1000  # a tensor's size, stride and storage have a dozen

_STORAGES = "Float Double Half BFloat16 Long Int Short Char Byte Bool".split()
_ALLOWED = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {kind}Storage" for kind in _STORAGES),
}

_NAMES = ("GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4")

# What PyTorch's loader raises for damaged files.
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

    Raises UserError that names the file when it is missing, damaged, older than PyTorch 1.6, compressed, or
    asks for anything else. Takes twice the memory of the file.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of unusual storages; the callers check the result
            return torch.load(_checked(path), map_location="cpu", weights_only=True)
    except DAMAGE as error:
        if isinstance(error, UserError):
            raise
        raise bad(path, f"is damaged ({shown(error_text(error), 100)}); fetch it again") from None


def _checked(path: Path) -> io.BytesIO:
    """The archive rebuilt from the checked members, so that PyTorch's reader sees no others."""
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
    """UserError if a pickle names anything but tensors and dicts, or holds a tuple with many leaves."""

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
