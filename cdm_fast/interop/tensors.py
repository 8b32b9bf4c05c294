"""Tensors by name out of strangers' files, whatever their name ends in: safetensors or torch.save's zip."""

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
    """Whether a file begins as a safetensors file does: with the length of a JSON object, and its brace.

    Raises UserError as `open_regular` does.
    """
    with open_regular(path) as stream:
        start = stream.read(9)
    return (
        len(start) == 9 and 2 <= struct.unpack("<Q", start[:8])[0] <= MAX_HEADER_BYTES and start[8:] == b"{"
    )


def read_any(path: Path) -> Any:
    """The content of a file: a dict of tensors out of safetensors, or what torch.save wrote, without code.

    Raises UserError that names the file when it is missing, damaged, of neither kind, or asks for more.
    """
    if not is_safetensors(path):
        return load_plain(path)
    try:
        return safetensors.torch.load(read_bytes(path, MAX_DATA_BYTES))
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise bad(path, f"is damaged ({error_text(error)}); fetch it again") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The same, where it is one dict of names and tensors; UserError otherwise."""
    content = read_any(path)
    plain = isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    )
    if not plain:
        raise UserError(f"{path} is no dict of names and tensors; save a state_dict")
    return content
