"""Triton kernels of the head's cotangent, eps_hat, x0_hat and the squared error.

`cdm_fast/ops/denoise.py` is the specification. B batch, N rows of the head's weight, D features, K classes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from cdm_fast.kernels import on_its_device
from torch import Tensor

_TILE = 1024
_CLASS_TILE = 16


@on_its_device
def epilogue(grad_x: Tensor, x: Tensor, s_t: Tensor, out: Tensor) -> None:
    """Fills out like x with eps_hat. All contiguous; all but grad_x in one dtype, that of the arithmetic."""
    grid, sizes = _grid(x)
    _epilogue_kernel[grid](grad_x, x, s_t, s_t, out, *sizes, clean=False, tile=_TILE)


@on_its_device
def clean_image(grad_x: Tensor, x: Tensor, a_t: Tensor, s_t: Tensor, out: Tensor) -> None:
    """Fills out like x with x0_hat; dtypes as in `epilogue`."""
    grid, sizes = _grid(x)
    _epilogue_kernel[grid](grad_x, x, a_t, s_t, out, *sizes, clean=True, tile=_TILE)


@on_its_device
def loss(grad_x: Tensor, x: Tensor, s_t: Tensor, eps: Tensor, out: Tensor) -> None:
    """Fills out (B,) with the squared error; dtypes as in `epilogue`. The same bits every time."""
    grid, sizes = _grid(x)
    partial = out.new_empty((x.shape[0], sizes[1]))
    _loss_kernel[grid](grad_x, x, s_t, eps, partial, *sizes, tile=_TILE)
    torch.sum(partial, dim=1, out=out)


@on_its_device
def loss_backward(grad_x: Tensor, x: Tensor, s_t: Tensor, eps: Tensor, grad_sum: Tensor, out: Tensor) -> None:
    """Fills out like grad_x with the gradient of <grad_sum, loss>; dtypes as in `epilogue`."""
    grid, sizes = _grid(x)
    _loss_backward_kernel[grid](grad_x, x, s_t, eps, grad_sum, out, *sizes, tile=_TILE)


@on_its_device
def cotangent(weight_c: Tensor, level: Tensor, class_weight: Tensor | None, out: Tensor) -> None:
    """Fills out (B, D). All contiguous; class_weight in fp32 (fp64 for fp64)."""
    num_rows, num_features = weight_c.shape
    num_classes = 1 if class_weight is None else class_weight.shape[1]
    tile = _feature_tile(num_features)
    tiles = triton.cdiv(num_features, tile)
    _cotangent_kernel[(level.shape[0] * tiles,)](
        weight_c,
        level,
        weight_c if class_weight is None else class_weight,
        out,
        tiles,
        num_rows,
        num_features,
        num_classes,
        weighted=class_weight is not None,
        wide=weight_c.dtype == torch.float64,
        tile=tile,
    )


@on_its_device
def cotangent_backward(
    weight_c: Tensor,
    level: Tensor,
    class_weight: Tensor | None,
    grad: Tensor,
    grad_weight: Tensor,
    grad_class_weight: Tensor,
) -> None:
    """Fills grad_weight (N, D) and, with class weights, grad_class_weight (B, K): always the same bits."""
    num_rows, num_features = weight_c.shape
    num_classes = 1 if class_weight is None else class_weight.shape[1]
    tile = _feature_tile(num_features)
    weighted = class_weight is not None
    sizes = (level.shape[0], num_rows, num_features, num_classes)
    weights = class_weight if class_weight is not None else weight_c
    tiles = triton.cdiv(num_features, tile)
    _cotangent_grad_weight_kernel[(num_rows * tiles,)](
        level, weights, grad, grad_weight, tiles, *sizes, weighted=weighted, tile=tile
    )
    if weighted:
        tiles = triton.cdiv(num_classes, _CLASS_TILE)
        tensors = weight_c, level, grad, grad_class_weight
        _cotangent_grad_class_weight_kernel[(level.shape[0] * tiles,)](
            *tensors, tiles, *sizes, class_tile=_CLASS_TILE, tile=min(tile, 64)
        )


def _grid(x: Tensor) -> tuple[tuple[int], tuple[int, int]]:
    """One program per image and tile: the grid, and (elements of an image, tiles of an image)."""
    image_size = x.numel() // x.shape[0]
    tiles = triton.cdiv(image_size, _TILE)
    return (x.shape[0] * tiles,), (image_size, tiles)


def _feature_tile(num_features: int) -> int:
    return min(256, max(16, triton.next_power_of_2(num_features)))


@triton.jit
def _place(image_size: int, tiles: int, tile: tl.constexpr) -> tuple:
    """(image, tile of the image, index in the batch, mask) of a program's elements."""
    image = (tl.program_id(0) // tiles).to(tl.int64)
    number = (tl.program_id(0) % tiles).to(tl.int64)
    within = number * tile + tl.arange(0, tile)
    return image, number, image * image_size + within, within < image_size


@triton.jit
def _epilogue_kernel(
    grad_x_ptr: tl.tensor,
    x_ptr: tl.tensor,
    a_ptr: tl.tensor,
    s_ptr: tl.tensor,
    out_ptr: tl.tensor,
    image_size: int,
    tiles: int,
    clean: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    image, number, index, inside = _place(image_size, tiles, tile)
    x = tl.load(x_ptr + index, mask=inside, other=0)
    g = tl.load(grad_x_ptr + index, mask=inside, other=0).to(x.dtype)
    s = tl.load(s_ptr + image)
    out = s * (g + x)
    if clean:
        out = (x - s * out) / tl.load(a_ptr + image)
    tl.store(out_ptr + index, out, mask=inside)


@triton.jit
def _loss_kernel(
    grad_x_ptr: tl.tensor,
    x_ptr: tl.tensor,
    s_ptr: tl.tensor,
    eps_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    image_size: int,
    tiles: int,
    tile: tl.constexpr,
) -> None:
    image, number, index, inside = _place(image_size, tiles, tile)
    x = tl.load(x_ptr + index, mask=inside, other=0)
    g = tl.load(grad_x_ptr + index, mask=inside, other=0).to(x.dtype)
    error = tl.load(s_ptr + image) * (g + x) - tl.load(eps_ptr + index, mask=inside, other=0)
    error = tl.where(inside, error, 0.0)
    tl.store(partial_ptr + image * tiles + number, tl.sum(error * error, 0))


@triton.jit
def _loss_backward_kernel(
    grad_x_ptr: tl.tensor,
    x_ptr: tl.tensor,
    s_ptr: tl.tensor,
    eps_ptr: tl.tensor,
    grad_sum_ptr: tl.tensor,
    out_ptr: tl.tensor,
    image_size: int,
    tiles: int,
    tile: tl.constexpr,
) -> None:
    image, number, index, inside = _place(image_size, tiles, tile)
    x = tl.load(x_ptr + index, mask=inside, other=0)
    g = tl.load(grad_x_ptr + index, mask=inside, other=0).to(x.dtype)
    s = tl.load(s_ptr + image)
    error = s * (g + x) - tl.load(eps_ptr + index, mask=inside, other=0)
    out = 2.0 * s * tl.load(grad_sum_ptr + image) * error
    tl.store(out_ptr + index, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _cotangent_kernel(
    weight_ptr: tl.tensor,
    level_ptr: tl.tensor,
    class_weight_ptr: tl.tensor,
    out_ptr: tl.tensor,
    tiles: int,
    num_rows: int,
    num_features: int,
    num_classes: int,
    weighted: tl.constexpr,
    wide: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    compute: tl.constexpr = tl.float64 if wide else tl.float32
    b = (tl.program_id(0) // tiles).to(tl.int64)
    d = tl.program_id(0) % tiles * tile + tl.arange(0, tile)
    row = tl.load(level_ptr + b) * num_classes
    known = (row >= 0) & (row < num_rows)
    is_row = known & (row < num_rows - 1) & (d < num_features)
    last = (num_rows - 1).to(tl.int64) * num_features
    out = tl.load(weight_ptr + last + d, mask=is_row, other=0).to(compute)
    for c in range(num_classes):
        of_class = tl.load(weight_ptr + (row + c) * num_features + d, mask=is_row, other=0).to(compute)
        if weighted:
            of_class *= tl.load(class_weight_ptr + b * num_classes + c)
        out -= of_class
    out += tl.where(known, 0.0, float("nan"))
    tl.store(out_ptr + b * num_features + d, out.to(out_ptr.dtype.element_ty), mask=d < num_features)


@triton.jit
def _cotangent_grad_weight_kernel(
    level_ptr: tl.tensor,
    class_weight_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    grad_weight_ptr: tl.tensor,
    tiles: int,
    batch: int,
    num_rows: int,
    num_features: int,
    num_classes: int,
    weighted: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    row = (tl.program_id(0) // tiles).to(tl.int64)
    d = tl.program_id(0) % tiles * tile + tl.arange(0, tile)
    level, c = row // num_classes, row % num_classes
    is_noise = row == num_rows - 1
    out = tl.zeros((tile,), grad_weight_ptr.dtype.element_ty)
    for b in range(batch):
        of_b = tl.load(level_ptr + b)
        is_mine = tl.where(is_noise, of_b * num_classes != num_rows - 1, of_b == level)
        mask = is_mine & (d < num_features)
        g = tl.load(grad_ptr + b * num_features + d, mask=mask, other=0).to(out.dtype)
        factor = tl.where(is_noise, 1.0, -1.0).to(out.dtype)
        if weighted:
            share = tl.load(class_weight_ptr + b * num_classes + c)
            factor = tl.where(is_noise, factor, -share)
        known = (of_b >= 0) & (of_b * num_classes < num_rows)
        out += factor * g + tl.where(is_noise & (known == 0), float("nan"), 0.0)
    tl.store(grad_weight_ptr + row * num_features + d, out, mask=d < num_features)


@triton.jit
def _cotangent_grad_class_weight_kernel(
    weight_ptr: tl.tensor,
    level_ptr: tl.tensor,
    grad_ptr: tl.tensor,
    out_ptr: tl.tensor,
    tiles: int,
    batch: int,
    num_rows: int,
    num_features: int,
    num_classes: int,
    class_tile: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    b = (tl.program_id(0) // tiles).to(tl.int64)
    c = tl.program_id(0) % tiles * class_tile + tl.arange(0, class_tile)
    compute: tl.constexpr = out_ptr.dtype.element_ty
    first = tl.load(level_ptr + b) * num_classes
    known = (first >= 0) & (first < num_rows)
    is_row = known & (first < num_rows - 1) & (c < num_classes)
    total = tl.zeros((class_tile, tile), compute)
    for start in range(0, num_features, tile):
        d = start + tl.arange(0, tile)
        inside = d < num_features
        at = weight_ptr + (first + c)[:, None] * num_features + d[None, :]
        of_class = tl.load(at, mask=is_row[:, None] & inside[None, :], other=0).to(compute)
        grad = tl.load(grad_ptr + b * num_features + d, mask=inside, other=0).to(compute)
        total -= of_class * tl.where(is_row[:, None], grad[None, :], 0)
    out = tl.sum(total, 1) + tl.where(known, 0.0, float("nan"))
    tl.store(out_ptr + b * num_classes + c, out, mask=c < num_classes)
