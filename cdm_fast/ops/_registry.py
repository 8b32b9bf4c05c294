"""Registers an op with torch: its schema, its shapes for tracing, its first derivative.

The C++ and CUDA kernels attach themselves to the op `cdm_fast::NAME` when the extension loads; the Triton
launcher is the op `cdm_fast::NAME_triton` with the same schema, since it takes CPU tensors too (interpreted).
Ops defined this way cost a few microseconds a call, a third of `torch.library.custom_op`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("cdm_fast", "FRAGMENT")


def define(
    name: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    triton: Callable[..., Any],
    cpu: Callable[..., Any] | None = None,
    save: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Defines `cdm_fast::{name}` and `cdm_fast::{name}_triton`, both with the schema "(...) -> ...".

    fake: returns empty results of the right shapes. triton: the launcher. cpu: the CPU implementation of an
    op that is composed in Python. save(ctx, inputs, output) and backward(ctx, *grads) as in
    `torch.library.register_autograd`; without them the op has no derivative, and asking for one raises
    RuntimeError. Inside them, `ctx.backend` is the backend to pass on to `overload`.
    """
    for backend in ("native", "triton"):
        full_name = _full_name(name, backend)
        _library.define(full_name + schema)
        torch.library.register_fake(f"cdm_fast::{full_name}", fake, lib=_library)
        torch.library.register_autograd(
            f"cdm_fast::{full_name}",
            backward or _no_derivative(name),
            setup_context=_with_backend(save, backend),
            lib=_library,
        )
    _library.impl(_full_name(name, "triton"), triton, "CompositeExplicitAutograd")
    if cpu is not None:
        _library.impl(_full_name(name, "native"), cpu, "CPU")


def overload(name: str, backend: str) -> Callable[..., Any]:
    """The op that runs `name` on a backend that `resolve` returned (other than "reference")."""
    return getattr(torch.ops.cdm_fast, _full_name(name, backend)).default


def _full_name(name: str, backend: str) -> str:
    return f"{name}_triton" if backend == "triton" else name


def _with_backend(save: Callable[..., None] | None, backend: str) -> Callable[..., None]:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.backend = backend
        if save is not None:
            save(ctx, inputs, output)

    return setup_context


def _no_derivative(name: str) -> Callable[..., Any]:
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"cdm_fast::{name} has no derivative: a fused op is differentiable once; "
            "use_backend('reference') differentiates to any order"
        )

    return backward
