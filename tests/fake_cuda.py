"""Code for GPUs, run on CUDA tensors without values: launches, copies and waits are seen, not done.

`FakeCuda` takes every operation that PyTorch dispatches. One on CUDA tensors runs on fake tensors (shapes,
dtypes and devices alone) and is recorded; one on CPU tensors runs as always, so that code on the host has its
values. Call `stand_in()` before torch is imported, in a process of its own.

How launches are counted: one for each dispatched operation that computes on the device (views and
allocations do not); a `_foreach_` or fused operation as the chunks into which PyTorch's `multi_tensor_apply`
cuts its lists; an op of this package as all that its Triton launcher starts, kernels and PyTorch operations
alike, by running that launcher with kernels that only say that they were called.
"""

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from building.host_compiler import compiler_command

SOURCE = Path(__file__).with_suffix(".cpp")


def stand_in(cache: Path) -> None:
    """Makes a PyTorch without CUDA know the device, for this process; needs a C++ compiler (CXX, or c++)."""
    assert "torch" not in sys.modules, "call stand_in() before torch is imported"
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch_home = Path(spec.origin).parent
    version = (torch_home / "version.py").read_bytes() + SOURCE.read_bytes()
    library = cache / f"fake_cuda_{hashlib.blake2b(version, digest_size=8).hexdigest()}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        _compile(torch_home, library)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def _compile(torch_home: Path, library: Path) -> None:
    include, lib = torch_home / "include", torch_home / "lib"
    unfinished = library.with_suffix(f".{os.getpid()}")
    command = [
        *compiler_command(),
        "-std=c++20",
        "-shared",
        "-fPIC",
        f"-I{include}",
        f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}",
        f"-I{sysconfig.get_path('include')}",
        str(SOURCE),
        f"-L{lib}",
        f"-Wl,-rpath,{lib}",
        "-lc10",
        "-ltorch_cpu",
        "-o",
        str(unfinished),
    ]
    subprocess.run(command, check=True)
    unfinished.rename(library)


def fake_cuda_class() -> type:
    """`FakeCuda`; its base class can only be imported after `stand_in`."""
    import torch
    from torch import Tensor
    from torch._prims_common import suggest_memory_format
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
    from torch.utils._python_dispatch import TorchDispatchMode

    class FakeCuda(TorchDispatchMode):
        """While entered, CUDA tensors are fake and what is done with them is recorded in `record`."""

        def __init__(self) -> None:
            super().__init__()
            self.record = Record()
            self._mode = FakeTensorMode(allow_non_fake_inputs=True)
            self._stack = ExitStack()

        def __enter__(self) -> "FakeCuda":
            if not self._entered:
                self._stack.enter_context(_host_without_gpu(self.record))
                self._stack.enter_context(self._mode)
            self._entered += 1
            return super().__enter__()

        def __exit__(self, *error: object) -> None:
            super().__exit__(*error)
            self._entered -= 1
            if not self._entered:
                self._stack.close()

        _entered = 0

        def moved(self, module: torch.nn.Module) -> torch.nn.Module:
            """The module with its weights and buffers replaced by fake ones on the device."""
            for part in module.modules():
                for name, weight in list(part._parameters.items()):
                    if weight is not None:
                        part._parameters[name] = torch.nn.Parameter(self._like(weight), weight.requires_grad)
                for name, buffer in list(part._buffers.items()):
                    if buffer is not None:
                        part._buffers[name] = self._like(buffer)
            return module

        def _like(self, tensor: Tensor) -> Tensor:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")

        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            kwargs = kwargs or {}
            leaves = torch.utils._pytree.tree_leaves((args, kwargs))
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            target = torch.device(kwargs.get("device") or "cpu").type
            on_device = any(isinstance(tensor, FakeTensor) and tensor.is_cuda for tensor in tensors)
            if not on_device and target == "cpu":
                with unset_fake_temporarily():
                    return func(*args, **kwargs)
            name = func._schema.name
            if name.startswith("cdm_fast::") and name.endswith("_triton"):
                self.record.ops[name.removeprefix("cdm_fast::").removesuffix("_triton")] += 1
                with self:
                    return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
            waits = _waits(func, tensors, args, kwargs, on_device)
            if waits:
                self.record.syncs[f"{waits} at {_site()}"] += 1
            if waits and (host := _on_host(name, tensors, kwargs)) is not None:
                return host
            out = func(*args, **kwargs)
            if name in CONVOLUTIONS:
                out = self._laid_out_by_cudnn(name, tensors, out)
            if not (func.is_view or "empty" in name or name.startswith("prim::")):
                self._launched(name, tensors, out, args)
            return out

        def _laid_out_by_cudnn(self, name: str, tensors: list[Tensor], out: Any) -> Any:
            """The results of a convolution, channels-last where its image or its kernel is, as in ATen's
            `cudnn_conv_suggest_memory_format`; a build without cuDNN makes them contiguous. Operands that are
            laid out otherwise are copied first."""
            operands = tensors[:3] if name == "aten::convolution_backward" else tensors[:2]
            kept = torch.contiguous_format, torch.channels_last
            last = any(suggest_memory_format(operand) == kept[1] for operand in operands[-2:])
            last = last and operands[0].dim() == 4 and operands[0].dtype != torch.float64
            for operand in operands:
                if not operand.is_contiguous(memory_format=kept[last]):
                    self.record.launched("copy before a convolution")
            if not last:
                return out
            results = out if isinstance(out, tuple) else (out,)
            results = tuple(
                each.to(memory_format=kept[1]) if each is not None and each.dim() == 4 else each
                for each in results
            )
            return results if isinstance(out, tuple) else results[0]

        def _launched(self, name: str, tensors: list[Tensor], out: Any, args: tuple[Any, ...]) -> None:
            first = next(
                (leaf for leaf in torch.utils._pytree.tree_leaves(out) if isinstance(leaf, Tensor)), None
            )
            if name in NO_KERNEL or (first is not None and not first.is_cuda):
                return
            self.record.launched(name, _chunks(name, args))
            if name in COPIES and first is not None:
                source = tensors[-1] if name == "aten::copy_" else tensors[0]
                kind = (
                    f"{_short(source)} -> {_short(first)}" if source.dtype != first.dtype else _short(first)
                )
                self.record.copies[kind] += 1

    return FakeCuda


NO_KERNEL = {"aten::lift_fresh", "aten::_unsafe_view", "aten::_has_compatible_shallow_copy_type"}
COPIES = {"aten::_to_copy", "aten::copy_", "aten::clone"}
CONVOLUTIONS = {"aten::convolution", "aten::convolution_backward"}
READS_VALUES = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::is_nonzero",
    "aten::equal",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::repeat_interleave",
    "aten::bincount",
}


class Record:
    """What was done on the device: every field counts by name.

    launches: kernels, by operation; sites: kernels, by line of the package; ops: calls of this package's ops;
    copies: device copies, by dtype; syncs: waits of the host, with what waits and where.
    """

    def __init__(self) -> None:
        self.launches: Counter[str] = Counter()
        self.sites: Counter[str] = Counter()
        self.ops: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()

    def launched(self, name: str, count: int = 1) -> None:
        self.launches[name] += count
        self.sites[_site()] += count

    def clear(self) -> None:
        for counter in vars(self).values():
            counter.clear()

    def to_json(self) -> dict[str, dict[str, int]]:
        return {name: dict(counter.most_common()) for name, counter in vars(self).items()}


def _short(tensor: Any) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _site() -> str:
    """The innermost line of the package that is running."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if ("/cdm_fast/" in path or "/kernels/" in path) and not path.endswith("_registry.py"):
            return f"{path.rsplit('/cdm_fast/')[-1].rsplit('/kernels/')[-1]}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def _waits(
    func: Any, tensors: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any], on_device: bool
) -> str | None:
    """What makes the host wait in this operation, or None."""
    name = func._schema.name
    if name in READS_VALUES:
        return name
    on_host = [tensor for tensor in tensors if not tensor.is_cuda]
    if name == "aten::_to_copy" and kwargs.get("device") is not None:
        source, target = tensors[0], kwargs["device"].type
        upload = not source.is_cuda and target == "cuda"
        download = source.is_cuda and target == "cpu"
        asynchronous = kwargs.get("non_blocking") and getattr(source, "pinned", False)
        return (
            "blocking copy to the device"
            if upload and not asynchronous
            else "copy to the host"
            if download
            else None
        )
    if name == "aten::copy_" and on_host and on_device:
        return "blocking copy between host and device"
    if name.startswith("aten::index") and any(tensor.dim() for tensor in on_host):
        return "index on the host"
    return None


def _on_host(name: str, tensors: list[Any], kwargs: dict[str, Any]) -> Any:
    """What the host is told in place of values that do not exist: ones; None to leave it to PyTorch."""
    import torch
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        if name == "aten::_local_scalar_dense":
            return torch.ones((), dtype=tensors[0].dtype).tolist()
        if name == "aten::_to_copy" and tensors[0].is_cuda:
            return torch.ones(tensors[0].shape, dtype=kwargs.get("dtype") or tensors[0].dtype)
    return None


# csrc of PyTorch, ATen/native/cuda/MultiTensorApply.cuh: tensors of a launch by how many lists it works on,
# blocks of a launch, and elements of a block.
_TENSORS, _BLOCKS, _ELEMENTS = (110, 64, 48, 36, 30), 320, 65536
_CATENATED = 128  # tensors of a launch, ATen/native/cuda/Shape.cu


def _chunks(name: str, args: tuple[Any, ...]) -> int:
    """Launches of an operation: 1, or as many as its lists are cut into."""
    if name == "aten::cat":
        return -(-len(args[0]) // _CATENATED)
    if "foreach" not in name and "fused" not in name:
        return 1
    lists = [arg for arg in args if isinstance(arg, list | tuple) and arg and hasattr(arg[0], "numel")]
    large = [each for each in lists if any(tensor.dim() for tensor in each)] or lists  # steps are no arrays
    depth = len(large) + (not name.endswith("_"))  # which fills a new list
    launches = tensors = blocks = 0
    for tensor in large[0]:
        tensors += 1
        left = -(-tensor.numel() // _ELEMENTS)
        while blocks + left >= _BLOCKS:
            launches, left, tensors, blocks = launches + 1, left - (_BLOCKS - blocks), int(left > 0), 0
        blocks += left
        if tensors >= _TENSORS[min(depth, 5) - 1]:
            launches, tensors, blocks = launches + 1, 0, 0
    return launches + (blocks > 0)


@contextmanager
def _host_without_gpu(record: Record) -> Iterator[None]:
    """Replaces what asks for a real device: the choice of kernels, their launch, pinned memory, autocast."""
    import torch
    import torch.utils._foreach_utils as foreach
    from triton.runtime import interpreter, jit

    from cdm_fast.ops import backend as _backend

    really_missing = _backend.missing

    def missing(backend: str) -> str | None:
        return {"triton": None, "cuda": "this is no GPU"}.get(backend, really_missing(backend))

    def pinned(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
        copy = tensor.clone()
        copy.pinned = True  # type: ignore[attr-defined]
        return copy

    def launch(kernel: Any, *_: Any, **__: Any) -> None:
        record.launched(kernel.fn.__name__)

    replacements = [
        mock.patch.object(_backend, "missing", missing),
        mock.patch.object(torch.Tensor, "pin_memory", pinned),
        mock.patch.object(interpreter.InterpretedFunction, "run", launch),
        mock.patch.object(jit.JITFunction, "run", launch),
        mock.patch.object(torch.cuda, "_exchange_device", lambda device: 0),
        mock.patch.object(torch.cuda, "_maybe_exchange_device", lambda device: 0),
        mock.patch.object(torch.cuda, "current_device", lambda: 0),
        mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        mock.patch.object(torch.cuda, "is_bf16_supported", lambda *_, **__: True),
    ]
    for module in list(sys.modules.values()):  # fake tensors are no obstacle to lists of real ones
        if getattr(module, "_has_foreach_support", None) is foreach._has_foreach_support:
            replacements.append(mock.patch.object(module, "_has_foreach_support", lambda *_: True))
    with ExitStack() as stack:
        for replacement in replacements:
            stack.enter_context(replacement)
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        yield
