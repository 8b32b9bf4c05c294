"""Triton kernels of the gate of a gated MLP with dropout: forward, VJP, and the derivative of the VJP.

`cdm_fast/ops/swiglu.py` is the specification. Everything is elementwise; a program takes a run of elements of
the narrow tensors, in contiguous order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from cdm_fast.kernels import on_its_device
from cdm_fast.kernels.group_norm_silu_split import masked, silu_first, silu_second
from torch import Tensor

from cdm_fast.ops import philox

_TILE = 1024


@on_its_device
def forward(h: Tensor, seed: Tensor | None, y: Tensor, dropout: float) -> None:
    """Fills y (B, N, H) from h (B, N, 2 H). All tensors are contiguous; seed (3,) int64 or None."""
    grid, sizes = _geometry(y, dropout)
    _forward_kernel[grid](h, _pointer(seed, h), y, **sizes)


@on_its_device
def vjp(g: Tensor, h: Tensor, seed: Tensor | None, grad_h: Tensor, dropout: float) -> None:
    """Fills grad_h."""
    grid, sizes = _geometry(g, dropout)
    _vjp_kernel[grid](g, h, _pointer(seed, h), grad_h, **sizes)


@on_its_device
def vjp_backward(
    v: Tensor, g: Tensor, h: Tensor, seed: Tensor | None, grad_g: Tensor, grad_h: Tensor, dropout: float
) -> None:
    """Fills grad_g and grad_h."""
    grid, sizes = _geometry(g, dropout)
    _vjp_backward_kernel[grid](v, g, h, _pointer(seed, h), grad_g, grad_h, **sizes)


def _geometry(narrow: Tensor, dropout: float) -> tuple[tuple[int], dict[str, float]]:
    """The grid, sizes, and the constants of dropout; threshold 0 means none."""
    size = narrow.numel()
    sizes = {
        "size": size,
        "image_size": size // narrow.shape[0],
        "hidden": narrow.shape[2],
        "drop_threshold": philox.drop_threshold(dropout),
        "keep_scale": 1 / (1 - dropout),
        "tile": min(_TILE, max(16, triton.next_power_of_2(size))),
    }
    return (triton.cdiv(size, int(sizes["tile"])),), sizes


def _pointer(seed: Tensor | None, h: Tensor) -> Tensor:
    """A pointer that a kernel does not use stands for a seed that is None."""
    return h if seed is None else seed


@triton.jit
def _place(size: int, hidden: int, tile: tl.constexpr) -> tuple:
    """(elements of a narrow tensor, their gates in a wide one, which exist); values are `hidden` further."""
    index = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    return index, index + index // hidden * hidden, index < size


@triton.jit
def _gate_and_value(
    ptr: tl.tensor, wide: tl.tensor, hidden: int, inside: tl.tensor, compute: tl.constexpr
) -> tuple:
    gate = tl.load(ptr + wide, mask=inside, other=0).to(compute)
    return gate, tl.load(ptr + wide + hidden, mask=inside, other=0).to(compute)


@triton.jit
def _dropped(
    value: tl.tensor,
    seed_ptr: tl.tensor,
    index: tl.tensor,
    image_size: int,
    drop_threshold: tl.constexpr,
    keep_scale: tl.constexpr,
) -> tl.tensor:
    if drop_threshold > 0:
        first = tl.load(seed_ptr + 2) * image_size
        value = masked(value, seed_ptr, first + index, drop_threshold, keep_scale)
    return value


@triton.jit
def _forward_kernel(
    h_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    y_ptr: tl.tensor,
    size: int,
    image_size: int,
    hidden: int,
    drop_threshold: tl.constexpr,
    keep_scale: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    compute: tl.constexpr = tl.float64 if h_ptr.dtype.element_ty == tl.float64 else tl.float32
    index, wide, inside = _place(size, hidden, tile)
    gate, value = _gate_and_value(h_ptr, wide, hidden, inside, compute)
    y = gate * tl.sigmoid(gate) * value
    y = _dropped(y, seed_ptr, index, image_size, drop_threshold, keep_scale)
    tl.store(y_ptr + index, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _vjp_kernel(
    g_ptr: tl.tensor,
    h_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    grad_h_ptr: tl.tensor,
    size: int,
    image_size: int,
    hidden: int,
    drop_threshold: tl.constexpr,
    keep_scale: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    compute: tl.constexpr = tl.float64 if h_ptr.dtype.element_ty == tl.float64 else tl.float32
    index, wide, inside = _place(size, hidden, tile)
    gate, value = _gate_and_value(h_ptr, wide, hidden, inside, compute)
    g = tl.load(g_ptr + index, mask=inside, other=0).to(compute)
    g = _dropped(g, seed_ptr, index, image_size, drop_threshold, keep_scale)
    of_gate, of_value = g * value * silu_first(gate), g * gate * tl.sigmoid(gate)
    tl.store(grad_h_ptr + wide, of_gate.to(grad_h_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_h_ptr + wide + hidden, of_value.to(grad_h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _vjp_backward_kernel(
    v_ptr: tl.tensor,
    g_ptr: tl.tensor,
    h_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    grad_g_ptr: tl.tensor,
    grad_h_ptr: tl.tensor,
    size: int,
    image_size: int,
    hidden: int,
    drop_threshold: tl.constexpr,
    keep_scale: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    compute: tl.constexpr = tl.float64 if h_ptr.dtype.element_ty == tl.float64 else tl.float32
    index, wide, inside = _place(size, hidden, tile)
    gate, value = _gate_and_value(h_ptr, wide, hidden, inside, compute)
    v_gate, v_value = _gate_and_value(v_ptr, wide, hidden, inside, compute)
    g = tl.load(g_ptr + index, mask=inside, other=0).to(compute)
    g = _dropped(g, seed_ptr, index, image_size, drop_threshold, keep_scale)
    first = silu_first(gate)
    grad_g = v_gate * value * first + v_value * gate * tl.sigmoid(gate)
    grad_g = _dropped(grad_g, seed_ptr, index, image_size, drop_threshold, keep_scale)
    of_gate = g * (v_gate * value * silu_second(gate) + v_value * first)
    tl.store(grad_g_ptr + index, grad_g.to(grad_g_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_h_ptr + wide, of_gate.to(grad_h_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_h_ptr + wide + hidden, (g * v_gate * first).to(grad_h_ptr.dtype.element_ty), mask=inside)
