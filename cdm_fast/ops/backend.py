"""The choice of backend for each op: the only file that asks what is built, installed and present.

An op is written up to four times: "reference" (plain PyTorch, anywhere), "cpp" (C++, CPU), "cuda" (CUDA
C++), "triton" (GPUs, or CPU tensors under Triton's interpreter). `declare` records which of them an op has,
`resolve` picks one. "auto", the default, takes the fastest backend that works for the given tensor.

Attention on "triton" has two methods: "fused" is one kernel that keeps the score matrix in registers,
"composed" uses PyTorch's batched products with passes over the matrix between them. `attention_method` picks
one by the table in attention_methods.json, which `python -m benchmarks.support.attention_methods` measures.
"""

from __future__ import annotations

import json
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cdm_fast.ops import build_record

BACKENDS = ("auto", "reference", "cpp", "cuda", "triton")
ATTENTION_METHODS = ("auto", "fused", "composed")
ATTENTION_TABLE = Path(__file__).with_name("attention_methods.json")

# Backends that "auto" tries per device type, fastest first; "reference" if none works.
_FASTEST_FIRST = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}

_HOW_TO_BUILD = (
    "install a C++ compiler, then `CDM_FAST_REQUIRE_EXT=1 pip install -e .`, "
    "which stops and says why if the build fails"
)


class Coverage(NamedTuple):
    """The device and dtypes for which one backend of an op works."""

    device: str
    dtypes: tuple[torch.dtype, ...]


class Choice(NamedTuple):
    """One line of `describe`: what "auto" runs for an op on a device, and why."""

    op: str
    device: str
    backend: str
    reason: str


class _OfThread(threading.local):
    """The selection of the enclosing `with` blocks; None outside of any.

    Other threads do not see it, so one thread may evaluate under the reference while another trains. It is a
    `threading.local` and not a `ContextVar`, because torch.compile can trace reads and writes of the former
    (and recompiles when the value changes), but not of the latter.
    """

    backend: str | None = None
    attention_method: str | None = None


_coverage: dict[str, dict[str, Coverage]] = {}
_default = "auto"  # of every thread, see `set_backend`
_of_thread = _OfThread()


def declare(op: str, **backends: Coverage) -> None:
    """Records which kernels an op has, e.g. `declare("noising", cpp=Coverage("cpu", (torch.float32,)))`."""
    _coverage[op] = backends


def set_backend(name: str) -> None:
    """Selects the backend of every op in all threads of the process, outside of `use_backend` blocks.

    Args:
        name: one of `BACKENDS`; "auto" takes the fastest one that works for each tensor.

    Raises:
        ValueError: another name.
        RuntimeError: the backend cannot run here; the message says how to get it.
    """
    global _default
    _check_backend(name)
    _default = name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Selects the backend of every op that this thread runs inside the block; other threads keep theirs.

    Args:
        name: as in `set_backend`, which also lists the errors.

    Example:
        >>> import torch
        >>> from cdm_fast.ops import level_logits, use_backend
        >>> with use_backend("reference"):  # plain PyTorch, differentiable to any order
        ...     level_logits(torch.zeros(2, 5)).shape
        torch.Size([2, 5])
    """
    _check_backend(name)
    before, _of_thread.backend = _of_thread.backend, name
    try:
        yield
    finally:
        _of_thread.backend = before


def selected_backend() -> str:
    """The name given to the innermost `use_backend`, else to `set_backend`; "auto" to begin with."""
    return _of_thread.backend or _default


def _check_backend(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    reason = missing(name)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run here: {reason}")


def under_this_selection(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, bound to the backend and attention method selected now, for calls from any thread.

    For recomputation in a backward pass, which autograd runs in another thread on a GPU.
    """
    selected = _of_thread.backend, _of_thread.attention_method

    def run(*arguments: Any) -> Any:
        before = _of_thread.backend, _of_thread.attention_method
        _of_thread.backend, _of_thread.attention_method = selected
        try:
            return function(*arguments)
        finally:
            _of_thread.backend, _of_thread.attention_method = before

    return run


def kernel_layout(image: Tensor) -> torch.memory_format:
    """The memory format in which a convolution of `image` (B, C, H, W) reads its kernels without a copy.

    For a channels-last image, cuDNN copies kernels of another format at each use.
    """
    last = image.is_cuda and image.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.preserve_format


def copies_in_one_launch(tensor: Tensor) -> bool:
    """True if one strided copy is faster than several with longer inner loops: on a GPU."""
    return tensor.device.type != "cpu"


def resolve(op: str, tensor: Tensor) -> str:
    """The backend that runs `op` on a tensor like this one: "reference", "cpp", "cuda" or "triton".

    If a backend is selected by name, an op without any kernel of that kind uses the choice of "auto". Raises
    RuntimeError if the kernel exists but not for the tensor's device or dtype.
    """
    return _resolve(op, selected_backend(), tensor.device.type, tensor.dtype)


def _resolve(op: str, selected: str, device: str, dtype: torch.dtype) -> str:
    if selected == "reference":
        return selected
    if selected != "auto" and selected in _coverage[op]:
        obstacle = _obstacle(op, selected, device, dtype)
        if obstacle is not None:
            raise RuntimeError(f"{op}: backend {selected!r} was asked for, but {obstacle}")
        return selected
    for backend in _FASTEST_FIRST.get(device, ()):
        if backend in _coverage[op] and _obstacle(op, backend, device, dtype) is None:
            _warn_of_slow_path(op, backend, device, dtype)
            return backend
    _warn_of_slow_path(op, "reference", device, dtype)
    return "reference"


_warned = False


@cache  # so that later calls of an op cost only a lookup
def _warn_of_slow_path(op: str, taken: str, device: str, dtype: torch.dtype) -> None:
    """Warns, once per process, that a GPU runs slower code than it could, and why.

    Slower means the reference although a kernel takes this dtype, or Triton after a failed build of the CUDA
    kernels. Without a GPU, CUDA tensors are fake ones, whose speed does not matter.
    """
    global _warned
    if _warned or device != "cuda" or not torch.cuda.is_available():
        return
    kernels = {name: _coverage[op][name] for name in _FASTEST_FIRST[device] if name in _coverage[op]}
    better = [name for name, coverage in kernels.items() if name != taken and dtype in coverage.dtypes]
    slow = taken == "reference" or (taken == "triton" and build_record.failed("cuda"))
    if not (slow and better):
        return
    _warned = True
    reasons = "; ".join(f"{name}: {missing(name)}" for name in better)
    warnings.warn(
        f"{op} and other ops run on their {taken} backend on the GPU ({reasons}); see `cdm-fast doctor`",
        stacklevel=2,
    )


# What `torch.compiler.assume_constant_result` sets, without its import of the compiler (1.5 s): a compiled
# graph takes the choice as it stands when it is traced.
_resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _obstacle(op: str, backend: str, device: str, dtype: torch.dtype) -> str | None:
    """Why a kernel that exists cannot take this device and dtype, or None if it can."""
    coverage = _coverage[op][backend]
    on_device = device == coverage.device or (backend == "triton" and device == "cpu" and _interpreting())
    if not on_device:
        return f"it runs on {coverage.device} tensors, got one on {device}"
    if dtype not in coverage.dtypes:
        return f"it takes {', '.join(map(str, coverage.dtypes))}, got {dtype}"
    return missing(backend)


def missing(backend: str) -> str | None:
    """Why no op can run on this backend here and how to change that, or None if it can."""
    if backend in ("cpp", "cuda"):
        return _missing_extension(cuda=backend == "cuda")
    if backend == "triton":
        return _missing_triton()
    return None


def _missing_extension(cuda: bool) -> str | None:
    extension = _extension()
    if isinstance(extension, ImportError):
        return _no_extension(extension)
    if not cuda:
        return None
    built = bool(extension.build_info()["cuda"])
    if not torch.cuda.is_available() and (built or not build_record.failed("cuda")):
        return "torch sees no CUDA device"
    return None if built else f"the extension was built without CUDA: {_why_no_cuda()}"


def _why_no_cuda() -> str:
    advice = "install beside a CUDA torch and an nvcc of its major version"
    return build_record.why_left_out("cuda") or advice


def _no_extension(error: ImportError) -> str:
    """Why there is no extension: the build's own reason, else what its import says."""
    reason = build_record.why_left_out("cpp")
    if reason is not None:
        return f"the extension cdm_fast._C was not built: {reason}; then `pip install -e .` again"
    return f"the extension cdm_fast._C does not load ({error}{_other_torch()}); {_HOW_TO_BUILD}"


def _other_torch() -> str:
    """A remark if the extension was built for another version of torch, else an empty string."""
    beside = (build_record.read() or {}).get("torch")
    if beside in (None, torch.__version__):
        return ""
    return f"; it was built beside torch {beside}, this is {torch.__version__}"


def _missing_triton() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed; `pip install 'cdm_fast[triton]'`"
    if not torch.cuda.is_available() and not _interpreting():
        return (
            "torch sees no CUDA device; TRITON_INTERPRET=1 in the environment runs the kernels on CPU, slowly"
        )
    return None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


_loaded: ModuleType | ImportError | None = None


def _extension() -> ModuleType | ImportError:
    """The module cdm_fast._C, loaded on first use (which registers its ops), or why it does not load."""
    global _loaded
    if _loaded is None:
        try:
            from cdm_fast import _C

            _loaded = _C
        except ImportError as error:
            _loaded = error
    return _loaded


def cpu_capability() -> str | None:
    """Instruction set of the C++ kernels: "baseline", "avx2" or "avx512"; None without the extension."""
    extension = _extension()
    return None if isinstance(extension, ImportError) else extension.cpu_capability()


def build_info() -> dict[str, object] | None:
    """How the extension was built (`cuda`, `compiler`, `torch_target_version`); None without it."""
    extension = _extension()
    return None if isinstance(extension, ImportError) else extension.build_info()


# The "composed" method works for these dtypes, and while a program can hold a row of the score matrix.
_COMPOSED_DTYPES = (torch.bfloat16, torch.float32)
_COMPOSED_TOKENS = 4096


@contextmanager
def use_attention_method(name: str) -> Iterator[None]:
    """`with use_attention_method("composed"): ...` forces the method of attention on Triton for the block.

    name: one of `ATTENTION_METHODS`; anything else raises ValueError. Other backends have one method only.
    """
    if name not in ATTENTION_METHODS:
        expected = ", ".join(ATTENTION_METHODS)
        raise ValueError(f"attention method: expected one of {expected}, got {name!r}")
    before, _of_thread.attention_method = _of_thread.attention_method, name
    try:
        yield
    finally:
        _of_thread.attention_method = before


def attention_method(tokens: int, width: int, dtype: torch.dtype) -> str:
    """ "fused" or "composed": how Triton's attention over so many tokens of a head so wide is computed.

    The forced method, or that of the nearest entry of the table. Raises RuntimeError if "composed" is forced
    and cannot run.
    """
    composable = dtype in _COMPOSED_DTYPES and tokens <= _COMPOSED_TOKENS
    forced = _of_thread.attention_method or "auto"
    if forced == "composed" and not composable:
        raise RuntimeError(
            f"attention method 'composed' takes bfloat16 and float32 and up to {_COMPOSED_TOKENS} tokens, "
            f"got {dtype} and {tokens}; use 'fused'"
        )
    if forced != "auto":
        return forced
    return _nearest_method(tokens, width, dtype) if composable else "fused"


@cache
def _nearest_method(tokens: int, width: int, dtype: torch.dtype) -> str:
    entries = json.loads(ATTENTION_TABLE.read_text())["methods"]
    of_dtype = [entry for entry in entries if entry["dtype"] == str(dtype).removeprefix("torch.")]

    def distance(entry: dict[str, object]) -> float:
        pairs = ((entry["tokens"], tokens), (entry["width"], width))
        return sum(abs(math.log2(float(str(there)) / here)) for there, here in pairs)

    return str(min(of_dtype, key=distance)["method"]) if of_dtype else "fused"


def describe() -> list[Choice]:
    """What "auto" runs for a float32 tensor, per op and device of this machine, and why (for `doctor`)."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return [_choice(op, device) for op in sorted(_coverage) for device in devices]


def _choice(op: str, device: str) -> Choice:
    backend = _resolve(op, "auto", device, torch.float32)
    if backend == "cpp":
        return Choice(op, device, backend, f"C++ kernel, {cpu_capability()} instructions")
    if backend != "reference":
        return Choice(op, device, backend, "the fastest that works here")
    reasons = [
        f"{name}: {_obstacle(op, name, device, torch.float32)}"
        for name in _FASTEST_FIRST[device]
        if name in _coverage[op]
    ]
    return Choice(op, device, backend, "; ".join(reasons) or f"there is no {device} kernel of this op")
