"""Reads the weights of EDM's and EDM2's published pickles without running code in them.

Such a file pickles whole networks together with their source code. Here every name in it becomes an inert
object, and only functions that rebuild tensors are interpreted: the tensors are found in the dictionaries of
the pickled modules. The caller provides the network:

    network.load_state_dict(read_edm("edm-cifar10-32x32-uncond-vp.pkl"))
    model = SigmaDenoiser(network)
"""

import io
import math
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdm_fast.errors import UserError
from cdm_fast.host.plain_pickle import DAMAGE, check_tuples
from cdm_fast.host.reading import MAX_DATA_BYTES, bad, error_text, read_bytes, shown

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
}
_LEGACY_PREFIX = 3  # pickles before the storage itself: magic number, protocol, facts of the machine
MAX_DEPTH = 100  # nesting depth of modules


def read_edm(file: str | Path, key: str = "ema") -> dict[str, Tensor]:
    """The state_dict of a network that EDM or EDM2 pickled, on the CPU.

    key: entry of the file's dictionary; "ema" is the network with which its authors sample.
    Raises UserError for a file that is missing, damaged or not such a pickle.
    """
    path = Path(file)
    content = read_bytes(path, MAX_DATA_BYTES)
    try:
        found = _load(io.BytesIO(content))
    except UserError:
        raise
    except (*DAMAGE, RecursionError) as error:
        raise bad(path, f"is damaged, or no pickle ({shown(error_text(error), 100)})") from None
    if not isinstance(found, dict) or key not in found:
        held = ", ".join(shown(str(name), 40) for name in list(found)[:6]) if isinstance(found, dict) else ""
        raise bad(path, f"holds no {key!r}{f' (it holds {held})' if held else ''}; give a network's pickle")
    tensors: dict[str, Tensor] = {}
    _collect(found[key], "", tensors, MAX_DEPTH)
    if not tensors:
        raise bad(path, f"holds no tensors under {key!r}; give a network's pickle")
    return tensors


class _Inert(dict):
    """A placeholder for any object of the file: it stores its arguments and does nothing."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__()
        self.arguments, self.state = arguments, None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    def append(self, item: Any) -> None:
        """The method of a list; the item is dropped."""

    def extend(self, items: Any) -> None:
        """The method of a list; the items are dropped."""


# The pure Python unpickler: its memo is a dict, so a hostile index allocates no memory.
class _Reader(pickle._Unpickler):
    """An unpickler for which every name is `_Inert`, except functions that rebuild tensors."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("collections", "OrderedDict"): dict,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): _parameter,
            ("torch.storage", "_load_from_bytes"): _storage,
            ("_codecs", "encode"): _encoded,  # how old protocols write bytes
            ("__builtin__", "set"): _names,
            ("builtins", "set"): _names,
        }
        if (module, name) in known:
            return known[module, name]
        return type(name if name.isidentifier() else "Inert", (_Inert,), {})

    def persistent_load(self, pid: Any) -> Any:
        """The description of a storage in the old format of torch.save."""
        return pid

    def get_extension(self, code: int) -> None:
        """Refuses extension codes."""
        raise pickle.UnpicklingError(f"extension code {code}")


def _load(stream: io.BytesIO) -> Any:
    """The next pickle of a stream; tuples are checked before they are built."""
    begin = stream.tell()
    check_tuples(Path("the pickle"), stream)
    stream.seek(begin)
    return _Reader(stream).load()


def _storage(content: Any) -> Tensor:
    """One storage from the bytes of PyTorch's old format: pickles, then the numbers."""
    if not isinstance(content, bytes):
        raise pickle.UnpicklingError("a storage that is not bytes")
    stream = io.BytesIO(content)
    for _ in range(_LEGACY_PREFIX):
        _load(stream)
    described = _load(stream)
    _load(stream)  # the list of keys: there is one storage
    if not isinstance(described, tuple) or len(described) < 5 or described[0] != "storage":
        raise pickle.UnpicklingError("a storage of another format")
    dtype = _DTYPES.get(getattr(described[1], "__name__", ""))
    numel = int.from_bytes(stream.read(8), "little")
    if dtype is None or numel != described[4]:
        raise pickle.UnpicklingError("a storage of another type or size")
    data = stream.read()
    if len(data) != numel * dtype.itemsize:
        raise pickle.UnpicklingError("a storage of another size")
    return torch.frombuffer(bytearray(data), dtype=dtype) if numel else torch.empty(0, dtype=dtype)


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """A copy of a view, which must lie within its storage and hold no more numbers than it."""
    numbers = (offset, *size, *stride)
    if not isinstance(storage, Tensor) or not all(type(n) is int and 0 <= n < 2**40 for n in numbers):
        raise pickle.UnpicklingError("a tensor that is no view of a storage")
    if len(size) != len(stride) or math.prod(size) > len(storage):
        raise pickle.UnpicklingError("a tensor of more numbers than its storage")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) and last >= len(storage):
        raise pickle.UnpicklingError("a tensor beyond its storage")
    return storage.as_strided(size, stride, offset).clone()


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _encoded(text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("bytes of another encoding")
    return text.encode("latin1")


def _names(items: Any = ()) -> set[str]:
    return {item for item in items if isinstance(item, str)}


def _collect(module: Any, prefix: str, tensors: dict[str, Tensor], depth: int) -> None:
    """Adds the tensors of a module's dictionary, and of the modules in it, under their state_dict names."""
    state = _attributes(module)
    if state is None or depth == 0:
        return
    for kind in ("_parameters", "_buffers"):
        skipped = state.get("_non_persistent_buffers_set")
        for name, value in (state.get(kind) or {}).items():
            if isinstance(value, Tensor) and not (isinstance(skipped, set) and name in skipped):
                tensors[f"{prefix}{name}"] = value
    for name, inner in (state.get("_modules") or {}).items():
        _collect(inner, f"{prefix}{name}.", tensors, depth - 1)


def _attributes(module: Any) -> dict[str, Any] | None:
    """The `__dict__` of a module: stored directly, or in the record of its source code."""
    if not isinstance(module, _Inert):
        return None
    if isinstance(module.state, dict):
        return module.state
    record = module.arguments[0] if module.arguments else None
    state = record.get("state") if isinstance(record, dict) else None
    return state if isinstance(state, dict) else None
