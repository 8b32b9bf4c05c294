"""A CUDA device that is not there: `pytest tests/ops --test-device pretend-cuda`.

Tensors lie on the CPU and say that they lie on cuda:0, unless they were put on the CPU by name. What a GPU
refuses is refused: a generator of the CPU, an operation over tensors of both places, NumPy. So a test that
would fail on a GPU for where its tensors are fails without one; Triton's kernels run interpreted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cdm_fast.ops import backend

DEVICE = torch.device("cuda", 0)
_HOST = "_lies_on_the_host"
_MOVES = {
    "to",
    "cpu",
    "cuda",
    "copy_",
    "type_as",
    "set_",
    "_make_subclass",
}  # may take tensors of both places


class PretendCuda(TorchFunctionMode):
    """While it is entered, tensors are made "on" `DEVICE`."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        tensors = [value for value in _flat((args, kwargs)) if isinstance(value, Tensor)]
        if name == "__get__":
            return _attribute(func, args[0])
        if name == "numpy" and not _on_host(args[0]):
            raise TypeError(f"can't convert {DEVICE} device type tensor to numpy")
        target, args, kwargs = _target(name, args, kwargs)
        host = target == "cpu" if target else _place_of(tensors)
        if name not in _MOVES:
            _require_one_place(name, tensors)
        _require_generator(host, args, kwargs)
        result = args[0] if name == "cuda" else func(*args, **kwargs)
        return _placed(result, host, tensors)


def _flat(values: Any) -> Iterator[Any]:
    if isinstance(values, dict):
        values = values.values()
    elif not isinstance(values, (tuple, list)):
        yield values
        return
    for value in values:
        yield from _flat(value)


def _on_host(tensor: Tensor) -> bool:
    return tensor.__dict__.get(_HOST, False)


def _attribute(func: Callable, tensor: Tensor) -> Any:
    """`tensor.device` and its kin."""
    value, pretended = func(tensor), not _on_host(tensor)
    if isinstance(value, torch.device) and value.type == "cpu" and pretended:
        return DEVICE
    attribute = getattr(getattr(func, "__self__", None), "__name__", "")
    if attribute in ("is_cuda", "is_cpu") and pretended and not tensor.is_meta:
        return attribute == "is_cuda"
    if isinstance(value, Tensor):
        return _placed(value, not pretended, [tensor])
    return value


def _target(name: str, args: tuple, kwargs: dict) -> tuple[str | None, tuple, dict]:
    """The type of the device that a call names, if any, and the call as the CPU can do it."""
    found = {"cpu": "cpu", "cuda": "cuda"}.get(name)

    def real(value: Any) -> Any:
        nonlocal found
        is_name = isinstance(value, str) and value.split(":")[0] in ("cpu", "cuda")
        if not is_name and not isinstance(value, torch.device):
            return value
        device = torch.device(value)
        found = device.type
        return torch.device("cpu") if device.type == "cuda" else device

    if name == "to":
        args = (args[0], *map(real, args[1:]))
        others = [value for value in args[1:] if isinstance(value, Tensor)]
        found = found or ("cpu" if others and _on_host(others[0]) else "cuda" if others else None)
    if "device" in kwargs:
        kwargs["device"] = real(kwargs["device"])
    return found, args, kwargs


def _place_of(tensors: list[Tensor]) -> bool:
    """Whether an operation over them gives a tensor of the host: numbers follow the tensors beside them."""
    with torch._C.DisableTorchFunction():
        deciding = [x for x in tensors if x.dim() > 0] or tensors
    return any(map(_on_host, deciding))


def _require_one_place(name: str, tensors: list[Tensor]) -> None:
    """Raises RuntimeError as PyTorch does; a number in a tensor of no dimension may lie anywhere."""
    with torch._C.DisableTorchFunction():
        places = {_on_host(x) for x in tensors if x.dim() > 0 and x.device.type == "cpu"}
    if len(places) > 1:
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, got {DEVICE} and cpu")


def _require_generator(host: bool, args: tuple, kwargs: dict) -> None:
    if not host and any(isinstance(value, torch.Generator) for value in _flat((args, kwargs))):
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")


def _placed(result: Any, host: bool, inputs: list[Tensor]) -> Any:
    """The results, marked with their place; one that is an input in another place becomes a view of it."""
    if isinstance(result, Tensor):
        if any(result is tensor for tensor in inputs) and _on_host(result) != host:
            with torch._C.DisableTorchFunction():
                result = result.view_as(result)
        if host:
            setattr(result, _HOST, True)
        return result
    if type(result) in (tuple, list):
        return type(result)(_placed(value, host, inputs) for value in result)
    return result


def install() -> None:
    """Pretends from now on, in this process. Triton's interpreter and torch's tracers see the plain CPU."""
    PretendCuda().__enter__()
    # What is traced on the plain CPU takes the kernels that the pretended device has.
    backend._FASTEST_FIRST["cpu"] = backend._FASTEST_FIRST["cuda"]
    torch.library.opcheck = _plainly(torch.library.opcheck)
    compile_ = torch.compile
    torch.compile = lambda *args, **kwargs: _plainly(compile_(*args, **kwargs))
    try:
        from triton.runtime.interpreter import GridExecutor
    except ImportError:
        return
    GridExecutor.__call__ = _plainly(GridExecutor.__call__)


def _plainly(function: Callable) -> Callable:
    """The function where nothing is pretended."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return run
