"""Tensors by name from untrusted files, whatever their suffix: safetensors or torch.save's zip."""

import struct
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from cdm_fast.errors import UserError
from cdm_fast.host.plain_pickle import load_plain
from cdm_fast.host.reading import MAX_DATA_BYTES, bad, error_text, open_regular, read_bytes

MAX_HEADER_BYTES = 10**8  # safetensors' own limit


def is_safetensors(path: Path) -> bool:
    """True if a file begins like a safetensors file: with the length of a JSON object, and a brace.

    Raises UserError as in `open_regular`.
    """
    with open_regular(path) as stream:
        start = stream.read(9)
    return (
        len(start) == 9 and 2 <= struct.unpack("<Q", start[:8])[0] <= MAX_HEADER_BYTES and start[8:] == b"{"
    )


def read_any(path: Path) -> Any:
    """The content of a file: a dict of tensors from safetensors, or what torch.save wrote, without code.

    Raises UserError that names the file if it is missing, damaged, of neither kind, or would run code.
    """
    if not is_safetensors(path):
        return load_plain(path)
    try:
        return safetensors.torch.load(read_bytes(path, MAX_DATA_BYTES))
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise bad(path, f"is damaged ({error_text(error)}); fetch it again") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """`read_any` of a file with one dict of names and tensors; UserError otherwise."""
    content = read_any(path)
    plain = isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    )
    if not plain:
        raise UserError(f"{path} is not a dict of names and tensors; save a state_dict")
    return content
