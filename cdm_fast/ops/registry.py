"""Registers an op with torch: its schema, its shapes for tracing, its first derivative.

The C++ and CUDA kernels attach themselves to the op `cdm_fast::NAME` when the extension loads; the Triton
launcher is the op `cdm_fast::NAME_triton` with the same schema, since it takes CPU tensors too (interpreted).

The autograd kernel is written here because `torch.library.register_autograd` costs three times as much per
call, which matters for ops that take tens of microseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("cdm_fast", "FRAGMENT")
_autograd_kernels: dict[str, Callable[..., Any]] = {}


def define(
    name: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    triton: Callable[..., Any] | None = None,
    cpu: Callable[..., Any] | None = None,
    cuda: Callable[..., Any] | None = None,
    save: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Defines `cdm_fast::{name}` and `cdm_fast::{name}_triton`, both with the schema "(...) -> ...".

    fake: returns empty results of the right shapes. triton: the launcher; without it the second op is
    omitted. cpu, cuda: the implementation of an op composed in Python, per device. save(ctx, inputs, output)
    and backward(ctx, *grads) as in `torch.library.register_autograd`; without them the op has no derivative,
    and asking for one raises RuntimeError. Inside them, `ctx.backend` is the backend to pass to `overload`.
    """
    for backend in ("native",) if triton is None else ("native", "triton"):
        full_name = _full_name(name, backend)
        _library.define(full_name + schema)
        torch.library.register_fake(f"cdm_fast::{full_name}", fake, lib=_library)
        op = getattr(torch.ops.cdm_fast, full_name).default
        autograd = _autograd_kernel(op, backend, save, backward or _no_derivative(name))
        _library.impl(full_name, autograd, "Autograd")
        _autograd_kernels[full_name] = autograd
    if triton is not None:
        _library.impl(_full_name(name, "triton"), triton, "CompositeExplicitAutograd")
    for device, implementation in (("CPU", cpu), ("CUDA", cuda)):
        if implementation is not None:
            _library.impl(_full_name(name, "native"), implementation, device)


def overload(name: str, backend: str) -> Callable[..., Any]:
    """The callable that runs `name` on a backend that `resolve` returned (other than "reference").

    While tracing, the op itself; in eager code its autograd kernel, which saves one trip through the
    dispatcher.
    """
    full_name = _full_name(name, backend)
    if torch.compiler.is_compiling():
        return getattr(torch.ops.cdm_fast, full_name).default
    return _autograd_kernels[full_name]


def _full_name(name: str, backend: str) -> str:
    return f"{name}_triton" if backend == "triton" else name


def _autograd_kernel(
    op: Callable[..., Any],
    backend: str,
    save: Callable[..., None] | None,
    backward: Callable[..., Any],
) -> Callable[..., Any]:
    """The op's autograd kernel; below autograd the dispatcher finds the device's kernel."""

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*inputs)
            ctx.backend = backend
            if save is not None:
                save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            # Not below autograd: under checkpointing, reading ctx.saved_tensors recomputes them.
            return backward(ctx, *grads)

    def kernel(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            return Node.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    return kernel


def _no_derivative(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"cdm_fast::{name} has no derivative: a fused op is differentiable once; "
            "use_backend('reference') differentiates to any order"
        )

    return backward
