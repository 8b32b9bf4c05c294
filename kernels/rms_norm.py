"""Triton kernels of RMSNorm: forward, VJP, and the derivative of the VJP.

`cdm_fast/ops/rms_norm.py` is the specification. A program holds whole tokens, so that everything is read
once. Where the gradient of the weight is wanted it takes all tokens of an image, and adds up their share.
"""

from __future__ import annotations

import triton
import triton.language as tl
from cdm_fast.kernels import on_its_device
from torch import Tensor

_ELEMENTS = 2048  # of the tokens that a program holds at a time
_ELEMENTS_OF_MANY = 1024  # the same where it holds three tensors


@on_its_device
def forward(x: Tensor, weight: Tensor, y: Tensor, rstd: Tensor, eps: float) -> None:
    """Fills y and rstd. All tensors are contiguous; weight is (C,) or (B, C), in the dtype of rstd."""
    grid, sizes = _geometry(x, weight, _ELEMENTS, all_tokens=False)
    _forward_kernel[grid](x, weight, y, rstd, eps, **sizes)


@on_its_device
def vjp(
    g: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, grad_x: Tensor, grad_weight: Tensor | None
) -> None:
    """Fills grad_x and, if it is given, grad_weight (B, C), of each image."""
    wanted = grad_weight is not None
    grid, sizes = _geometry(x, weight, _ELEMENTS, all_tokens=wanted)
    target = rstd if grad_weight is None else grad_weight
    _vjp_kernel[grid](g, x, weight, rstd, grad_x, target, **sizes, of_weight=wanted)


@on_its_device
def vjp_backward(
    v: Tensor,
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    grad_g: Tensor,
    grad_x: Tensor,
    grad_weight: Tensor,
) -> None:
    """Fills grad_g, grad_x and grad_weight (B, C), of each image."""
    grid, sizes = _geometry(x, weight, _ELEMENTS_OF_MANY, all_tokens=True)
    _vjp_backward_kernel[grid](v, g, x, weight, rstd, grad_g, grad_x, grad_weight, **sizes)


def _geometry(
    x: Tensor, weight: Tensor, elements: int, all_tokens: bool
) -> tuple[tuple[int], dict[str, int]]:
    """The grid, and sizes: a program takes one tile of tokens, or all tokens of an image."""
    batch, tokens, channels = x.shape
    columns = max(16, triton.next_power_of_2(channels))
    rows = max(1, min(elements // columns, triton.next_power_of_2(tokens)))
    chunks = 1 if all_tokens else triton.cdiv(tokens, rows)
    sizes = {
        "tokens": tokens,
        "channels": channels,
        "parameter_stride": channels if weight.dim() == 2 else 0,
        "chunks": chunks,
        "chunk": tokens if all_tokens else rows,
        "rows": rows,
        "columns": columns,
        "num_warps": 8 if columns > _ELEMENTS else 4,
    }
    return (batch * chunks,), sizes


@triton.jit
def _image(chunks: int, chunk: int, tokens: int) -> tuple:
    """(image, its first token, the end of its tokens) of this program."""
    first = tl.program_id(0) % chunks * chunk
    return (tl.program_id(0) // chunks).to(tl.int64), first, tl.minimum(first + chunk, tokens)


@triton.jit
def _tile(
    image: tl.tensor,
    start: tl.tensor,
    tokens: int,
    channels: int,
    rows: tl.constexpr,
    columns: tl.constexpr,
) -> tuple:
    """(tokens of the batch, which exist, elements (rows, columns), which exist)"""
    token, column = start + tl.arange(0, rows), tl.arange(0, columns)
    row, exists = image * tokens + token, token < tokens
    at = row[:, None] * channels + column[None, :]
    return row, exists, at, exists[:, None] & (column < channels)[None, :]


@triton.jit
def _weight(
    weight_ptr: tl.tensor,
    image: tl.tensor,
    parameter_stride: int,
    channels: int,
    columns: tl.constexpr,
) -> tl.tensor:
    """(1, columns), 0 beyond the channels."""
    column = tl.arange(0, columns)
    weight = tl.load(weight_ptr + image * parameter_stride + column, mask=column < channels, other=0)
    return weight[None, :]


@triton.jit
def _forward_kernel(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    y_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    eps: float,
    tokens: int,
    channels: int,
    parameter_stride: int,
    chunks: int,
    chunk: int,
    rows: tl.constexpr,
    columns: tl.constexpr,
) -> None:
    compute = rstd_ptr.dtype.element_ty
    image, start, _ = _image(chunks, chunk, tokens)
    weight = _weight(weight_ptr, image, parameter_stride, channels, columns)
    row, exists, at, inside = _tile(image, start, tokens, channels, rows, columns)
    x = tl.load(x_ptr + at, mask=inside, other=0).to(compute)
    rstd = 1 / tl.sqrt(tl.sum(x * x, axis=1) / channels.to(compute) + eps)
    tl.store(rstd_ptr + row, rstd, mask=exists)
    y = weight * (x * rstd[:, None])
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _vjp_kernel(
    g_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    grad_x_ptr: tl.tensor,
    grad_weight_ptr: tl.tensor,
    tokens: int,
    channels: int,
    parameter_stride: int,
    chunks: int,
    chunk: int,
    of_weight: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
) -> None:
    compute = rstd_ptr.dtype.element_ty
    image, first, end = _image(chunks, chunk, tokens)
    weight = _weight(weight_ptr, image, parameter_stride, channels, columns)
    total = tl.zeros((rows, columns), compute)
    for start in range(first, end, rows):
        row, exists, at, inside = _tile(image, start, tokens, channels, rows, columns)
        rstd = tl.load(rstd_ptr + row, mask=exists, other=0)[:, None]
        xhat = tl.load(x_ptr + at, mask=inside, other=0).to(compute) * rstd
        g = tl.load(g_ptr + at, mask=inside, other=0).to(compute)
        p = g * weight
        mean_px = tl.sum(p * xhat, axis=1)[:, None] / channels.to(compute)
        grad_x = rstd * (p - xhat * mean_px)
        tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
        if of_weight:
            total += g * xhat
    if of_weight:
        _store_total(grad_weight_ptr, total, image, channels, columns)


@triton.jit
def _vjp_backward_kernel(
    v_ptr: tl.tensor,
    g_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    grad_g_ptr: tl.tensor,
    grad_x_ptr: tl.tensor,
    grad_weight_ptr: tl.tensor,
    tokens: int,
    channels: int,
    parameter_stride: int,
    chunks: int,
    chunk: int,
    rows: tl.constexpr,
    columns: tl.constexpr,
) -> None:
    compute = rstd_ptr.dtype.element_ty
    image, first, end = _image(chunks, chunk, tokens)
    weight = _weight(weight_ptr, image, parameter_stride, channels, columns)
    total = tl.zeros((rows, columns), compute)
    size = channels.to(compute)
    for start in range(first, end, rows):
        row, exists, at, inside = _tile(image, start, tokens, channels, rows, columns)
        rstd = tl.load(rstd_ptr + row, mask=exists, other=0)[:, None]
        xhat = tl.load(x_ptr + at, mask=inside, other=0).to(compute) * rstd
        g = tl.load(g_ptr + at, mask=inside, other=0).to(compute)
        v = tl.load(v_ptr + at, mask=inside, other=0).to(compute)
        p = g * weight
        mean_px = tl.sum(p * xhat, axis=1)[:, None] / size
        mean_vx = tl.sum(v * xhat, axis=1)[:, None] / size
        mean_vp = tl.sum(v * p, axis=1)[:, None] / size
        q = rstd * (v - xhat * mean_vx)
        total += q * g
        tl.store(grad_g_ptr + at, (q * weight).to(grad_g_ptr.dtype.element_ty), mask=inside)
        slope = 3 * mean_vx * mean_px - mean_vp
        grad_x = rstd * rstd * (xhat * slope - v * mean_px - p * mean_vx)
        tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    _store_total(grad_weight_ptr, total, image, channels, columns)


@triton.jit
def _store_total(
    grad_weight_ptr: tl.tensor,
    total: tl.tensor,
    image: tl.tensor,
    channels: int,
    columns: tl.constexpr,
) -> None:
    column = tl.arange(0, columns)
    tl.store(grad_weight_ptr + image * channels + column, tl.sum(total, axis=0), mask=column < channels)
