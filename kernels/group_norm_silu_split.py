"""Triton kernels of GroupNorm + SiLU + dropout for channels-last images, a group split over programs.

`cdm_fast/ops/group_norm_silu.py` is the specification; docs/explanation/group_norm_silu.md derives it.
Each of the three functions launches three kernels. The first sums over a chunk of pixels, per channel; the
second combines the sums into the numbers that a group's elements need; the third computes the result per
element. A program's tile is pixels by neighbouring channels of any groups, so it reads whole cache lines and
keeps all lanes busy at any group size.

The sums of the chunks are added in a fixed order, so the result is deterministic. The third kernel visits the
images in reverse order, because those read last may still be in the L2 cache.

# B batch, C channels, G groups, k chunk of pixels, w channels of a tile
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from cdm_fast.kernels import on_its_device
from torch import Tensor

from cdm_fast.ops import philox

_DROPOUT = tl.constexpr(int(philox.Stream.DROPOUT))

_WIDTH = 128  # channels of a tile: 256 bytes in bf16
_ELEMENTS = 2048  # per tile, 16 per thread
_ELEMENTS_OF_MANY_SUMS = 1024  # ten sums per element: larger tiles spill registers
_PROGRAMS = 2048  # to keep 132 multiprocessors reading


class Geometry(NamedTuple):
    """How the images are cut."""

    grid: tuple[int]  # of the kernels that read images
    combining_grid: tuple[int]
    chunks: int
    sizes: dict[str, int]  # arguments of the kernels that read images
    combining_sizes: dict[str, int]


@on_its_device
def forward(
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    eps: float,
    silu: bool,
    dropout: float,
) -> None:
    """As `group_norm_silu.forward`, for channels-last images."""
    cut = _geometry(x, skip, weight, num_groups, _ELEMENTS)
    pieces = x, x if skip is None else skip
    moments = _partial_sums(2, cut, mean, weight)
    # Half as many rows at a time: two numbers for every element, and 16 bytes for every thread.
    sizes = {**cut.sizes, "rows": max(1, cut.sizes["rows"] // 2)}
    _moments_kernel[cut.grid](*pieces, moments, **sizes)
    _combine_moments_kernel[cut.combining_grid](moments, mean, rstd, eps, **cut.combining_sizes)
    inputs = *pieces, weight, bias, mean, rstd, x if seed is None else seed
    _normalise_kernel[cut.grid](*inputs, y, **cut.sizes, **_options(silu, dropout, x, skip))


@on_its_device
def vjp(
    g: Tensor,
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    grad_x: Tensor,
    grad_skip: Tensor | None,
    grad_weight: Tensor,
    grad_bias: Tensor,
    num_groups: int,
    silu: bool,
    dropout: float,
) -> None:
    """As `group_norm_silu.vjp`, for channels-last images."""
    cut = _geometry(x, skip, weight, num_groups, _ELEMENTS)
    options = _options(silu, dropout, x, skip)
    seed = x if seed is None else seed
    inputs = g, x, x if skip is None else skip, weight, bias, mean, rstd, seed
    sums, of_groups = _partial_sums(2, cut, mean, weight), _of_groups(2, mean)
    _vjp_sums_kernel[cut.grid](*inputs, sums, **cut.sizes, **options)
    outputs = grad_weight, grad_bias, of_groups
    _combine_vjp_kernel[cut.combining_grid](sums, weight, *outputs, **cut.combining_sizes)
    gradients = grad_x, grad_x if grad_skip is None else grad_skip
    _vjp_kernel[cut.grid](*inputs, of_groups, *gradients, **cut.sizes, **options)


@on_its_device
def vjp_backward(
    v: Tensor,
    v_skip: Tensor | None,
    g: Tensor,
    x: Tensor,
    skip: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    grad_g: Tensor,
    grad_x: Tensor,
    grad_skip: Tensor | None,
    grad_weight: Tensor,
    grad_bias: Tensor,
    num_groups: int,
    silu: bool,
    dropout: float,
) -> None:
    """As `group_norm_silu.vjp_backward`, for channels-last images."""
    cut = _geometry(x, skip, weight, num_groups, _ELEMENTS_OF_MANY_SUMS)
    options = _options(silu, dropout, x, skip)
    seed = x if seed is None else seed
    pieces = v, v if v_skip is None else v_skip, g, x, x if skip is None else skip
    inputs = *pieces, weight, bias, mean, rstd, seed
    sums, of_groups = _partial_sums(10, cut, mean, weight), _of_groups(5, mean)
    _vjp_backward_sums_kernel[cut.grid](*inputs, sums, **cut.sizes, **options)
    outputs = grad_weight, grad_bias, of_groups
    _combine_vjp_backward_kernel[cut.combining_grid](sums, weight, rstd, *outputs, **cut.combining_sizes)
    gradients = grad_g, grad_x, grad_x if grad_skip is None else grad_skip
    _vjp_backward_kernel[cut.grid](*inputs, of_groups, *gradients, **cut.sizes, **options)


def _geometry(x: Tensor, skip: Tensor | None, weight: Tensor, num_groups: int, elements: int) -> Geometry:
    batch, split = x.shape[:2]
    second = 0 if skip is None else skip.shape[1]
    channels, pixels = split + second, x.numel() // (batch * split)
    width = min(_WIDTH, triton.next_power_of_2(max(split, second)))
    rows = max(1, elements // width)
    tiles = triton.cdiv(split, width) + triton.cdiv(second, width)
    # A program takes two tiles of pixels or more, if the image has as many.
    chunks = max(1, min(triton.cdiv(_PROGRAMS, batch * tiles), pixels // (2 * rows)))
    span = triton.cdiv(triton.cdiv(pixels, chunks), rows) * rows
    chunks = triton.cdiv(pixels, span)
    common = {"chunks": chunks, "span": span, "channels": channels, "pixels": pixels, "groups": num_groups}
    common["parameter_stride"] = weight.stride(0) if weight.dim() == 2 else 0
    sizes = {**common, "split": split, "width": width, "rows": rows, "in_two": skip is not None}
    channel_tile = triton.next_power_of_2(channels // num_groups)
    group_tile = max(1, min(triton.next_power_of_2(num_groups), 256 // channel_tile))
    combining_sizes = {**common, "group_tile": group_tile, "channel_tile": channel_tile}
    combining_grid = (batch * triton.cdiv(num_groups, group_tile),)
    return Geometry((batch * tiles * chunks,), combining_grid, chunks, sizes, combining_sizes)


def _partial_sums(count: int, cut: Geometry, mean: Tensor, weight: Tensor) -> Tensor:
    """(B, chunks, count, C), in the precision of the statistics."""
    return mean.new_empty(mean.shape[0], cut.chunks, count, weight.shape[-1])


def _of_groups(count: int, mean: Tensor) -> Tensor:
    """(B, count, G), in the precision of the statistics."""
    return mean.new_empty(mean.shape[0], count, mean.shape[1])


def _options(silu: bool, dropout: float, x: Tensor, skip: Tensor | None) -> dict[str, object]:
    """The compile-time constants; threshold 0 means no dropout. in_fours: four neighbours share a block."""
    in_fours = x.shape[1] % 4 == 0 and (skip is None or skip.shape[1] % 4 == 0)
    threshold, scale = philox.drop_threshold(dropout), 1 / (1 - dropout)
    return {"silu": silu, "drop_threshold": threshold, "keep_scale": scale, "in_fours": in_fours}


@triton.jit
def silu_first(u: tl.tensor) -> tl.tensor:
    """silu'(u)"""
    s = tl.sigmoid(u)
    return s + u * (s * (1 - s))


@triton.jit
def silu_second(u: tl.tensor) -> tl.tensor:
    """silu''(u)"""
    s = tl.sigmoid(u)
    return s * (1 - s) * (2 + u * (1 - 2 * s))


@triton.jit
def philox_block(seed_ptr: tl.tensor, block: tl.tensor) -> tuple:
    """The four words of each block of the dropout stream."""
    block = block.to(tl.uint32)
    seed = tl.load(seed_ptr).to(tl.uint64)
    offset = tl.load(seed_ptr + 1).to(tl.uint64)
    low, high = (offset & 0xFFFFFFFF).to(tl.uint32), (offset >> 32).to(tl.uint32)
    return tl.philox(seed, block, block * 0 + _DROPOUT, block * 0 + low, block * 0 + high, 10)


@triton.jit
def masked(
    value: tl.tensor,
    seed_ptr: tl.tensor,
    index: tl.tensor,
    drop_threshold: tl.constexpr,
    keep_scale: tl.constexpr,
) -> tl.tensor:
    """value times the dropout mask: word i % 4 of block i / 4, i the index in channels-last order."""
    w0, w1, w2, w3 = philox_block(seed_ptr, index // 4)
    which = index % 4
    word = tl.where(which == 0, w0, tl.where(which == 1, w1, tl.where(which == 2, w2, w3)))
    return _kept(value, word, drop_threshold, keep_scale)


@triton.jit
def _kept(
    value: tl.tensor, word: tl.tensor, drop_threshold: tl.constexpr, keep_scale: tl.constexpr
) -> tl.tensor:
    kept = word >= tl.full((), drop_threshold, tl.uint32)
    return value * tl.where(kept, tl.full((), keep_scale, value.dtype), tl.full((), 0, value.dtype))


@triton.jit
def _dropped(
    value: tl.tensor,
    seed_ptr: tl.tensor,
    image: tl.tensor,
    first_pixel: tl.tensor,
    first_channel: tl.tensor,
    pixels: int,
    channels: int,
    rows: tl.constexpr,
    width: tl.constexpr,
    drop_threshold: tl.constexpr,
    keep_scale: tl.constexpr,
    in_fours: tl.constexpr,
) -> tl.tensor:
    """value (rows, width) from that pixel and channel on, times the dropout mask."""
    pixel = (tl.load(seed_ptr + 2) + image) * pixels + first_pixel + tl.arange(0, rows)[:, None]
    if in_fours and width >= 4:
        first = pixel * (channels // 4) + first_channel // 4
        w0, w1, w2, w3 = philox_block(seed_ptr, first + tl.arange(0, width // 4)[None, :])
        word = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
        return _kept(value, word, drop_threshold, keep_scale)
    index = pixel * channels + first_channel + tl.arange(0, width)[None, :]
    return masked(value, seed_ptr, index, drop_threshold, keep_scale)


@triton.jit
def _place(
    program: tl.tensor,
    chunks: int,
    span: int,
    channels: int,
    split: int,
    width: tl.constexpr,
    in_two: tl.constexpr,
) -> tuple:
    """(image, chunk, its first pixel, whether the tile is of the first piece, first channel within the piece,
    channels before the piece, channels of the piece) of a program. A tile has channels of one piece only."""
    first_tiles = tl.cdiv(split, width)
    tiles = first_tiles
    if in_two:
        tiles += tl.cdiv(channels - split, width)
    tile = program % tiles
    chunk = program // tiles % chunks
    image = (program // (tiles * chunks)).to(tl.int64)
    in_first = tile < first_tiles
    before, piece = 0, split
    if in_two:
        tile = tl.where(in_first, tile, tile - first_tiles)
        before = tl.where(in_first, 0, split)
        piece = tl.where(in_first, split, channels - split)
    return image, chunk, chunk.to(tl.int64) * span, in_first, tile * width, before, piece


@triton.jit
def _piece(
    first_ptr: tl.tensor, second_ptr: tl.tensor, in_first: tl.tensor, in_two: tl.constexpr
) -> tl.tensor:
    if in_two:
        return tl.where(in_first, first_ptr, second_ptr)
    return first_ptr


@triton.jit
def _per_channel(pointer: tl.tensor, channel: tl.tensor, exists: tl.tensor) -> tl.tensor:
    """(1, w)"""
    return tl.load(pointer + channel, mask=exists, other=0)[None, :]


@triton.jit
def _store_sum(
    pointer: tl.tensor, number: tl.constexpr, channels: int, total: tl.tensor, exists: tl.tensor
) -> None:
    """Sum `number` of the sums of a chunk, whose first is at `pointer` (w,), from the tile's (p, w)."""
    tl.store(pointer + number * channels, tl.sum(total, 0), mask=exists)


@triton.jit
def _moments_kernel(
    x_ptr: tl.tensor,
    skip_ptr: tl.tensor,
    moments_ptr: tl.tensor,
    chunks: int,
    span: int,
    channels: int,
    pixels: int,
    groups: int,
    parameter_stride: int,
    split: int,
    width: tl.constexpr,
    rows: tl.constexpr,
    in_two: tl.constexpr,
) -> None:
    """Mean, and sum of squares around it, of each channel of a chunk."""
    place = _place(tl.program_id(0), chunks, span, channels, split, width, in_two)
    image, chunk, first, in_first, start, before, piece = place
    compute: tl.constexpr = moments_ptr.dtype.element_ty
    within = start + tl.arange(0, width)
    exists = within < piece
    x_at = _piece(x_ptr, skip_ptr, in_first, in_two) + (image * pixels + first) * piece + within[None, :]

    # Every element of the tile has moments of its own, updated as Welford (1962) does: nothing cancels.
    mean, squares = tl.zeros((rows, width), compute), tl.zeros((rows, width), compute)
    count = tl.zeros((rows, 1), compute)
    for step in range(0, span, rows):
        pixel = step + tl.arange(0, rows)[:, None]
        real = first + pixel < pixels
        x = tl.load(x_at + pixel * piece, mask=real & exists[None, :], other=0).to(compute)
        count += tl.where(real, 1, 0).to(compute)
        change = tl.where(real, x - mean, 0)
        mean += change * (1 / tl.maximum(count, 1))
        squares += change * (x - mean)
    whole_mean = tl.sum(mean * count, 0) / tl.sum(count, 0)
    difference = mean - whole_mean[None, :]
    squares += count * difference * difference
    to = moments_ptr + (image * chunks + chunk) * 2 * channels + before + within
    tl.store(to, whole_mean, mask=exists)
    _store_sum(to, 1, channels, squares, exists)


@triton.jit
def _groups(groups: int, channels: int, group_tile: tl.constexpr, channel_tile: tl.constexpr) -> tuple:
    """(image, groups (g, 1), channels (g, c), which of these exist) of a program that combines sums."""
    blocks = tl.cdiv(groups, group_tile)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    group = tl.program_id(0) % blocks * group_tile + tl.arange(0, group_tile)[:, None]
    within = tl.arange(0, channel_tile)[None, :]
    group_channels = channels // groups
    return image, group, group * group_channels + within, (group < groups) & (within < group_channels)


@triton.jit
def _chunk_sum(
    sums_ptr: tl.tensor,
    number: tl.constexpr,
    count: tl.constexpr,
    image: tl.tensor,
    channel: tl.tensor,
    exists: tl.tensor,
    chunks: int,
    channels: int,
) -> tl.tensor:
    """Sum `number` of `count` over all chunks, in their order: (g, c)."""
    total = channel.to(sums_ptr.dtype.element_ty) * 0
    for chunk in range(chunks):
        at = ((image * chunks + chunk) * count + number) * channels + channel
        total += tl.load(sums_ptr + at, mask=exists, other=0)
    return total


@triton.jit
def _group_sum(x: tl.tensor) -> tl.tensor:
    """(g, 1)"""
    return tl.sum(x, 1)[:, None]


@triton.jit
def _combine_moments_kernel(
    moments_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    eps: float,
    chunks: int,
    span: int,
    channels: int,
    pixels: int,
    groups: int,
    parameter_stride: int,
    group_tile: tl.constexpr,
    channel_tile: tl.constexpr,
) -> None:
    """mean and rstd of groups, from the moments of their channels (Chan, Golub, LeVeque 1979)."""
    image, group, channel, exists = _groups(groups, channels, group_tile, channel_tile)
    compute: tl.constexpr = mean_ptr.dtype.element_ty
    total = tl.zeros((group_tile, channel_tile), compute)
    squares = tl.zeros((group_tile, channel_tile), compute)
    for chunk in range(chunks):
        at = (image * chunks + chunk) * 2 * channels + channel
        size = tl.minimum(span, pixels - chunk * span).to(compute)
        total += size * tl.load(moments_ptr + at, mask=exists, other=0)
    mean = _group_sum(total) / (pixels * (channels // groups)).to(compute)
    for chunk in range(chunks):
        at = (image * chunks + chunk) * 2 * channels + channel
        size = tl.minimum(span, pixels - chunk * span).to(compute)
        difference = tl.where(exists, tl.load(moments_ptr + at, mask=exists, other=0) - mean, 0)
        squares += tl.load(moments_ptr + at + channels, mask=exists, other=0) + size * difference * difference
    variance = _group_sum(squares) / (pixels * (channels // groups)).to(compute)
    tl.store(mean_ptr + image * groups + group, mean, mask=group < groups)
    tl.store(rstd_ptr + image * groups + group, 1 / tl.sqrt(variance + eps), mask=group < groups)


@triton.jit
def _normalise_kernel(
    x_ptr: tl.tensor,
    skip_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    y_ptr: tl.tensor,
    chunks: int,
    span: int,
    channels: int,
    pixels: int,
    groups: int,
    parameter_stride: int,
    split: int,
    width: tl.constexpr,
    rows: tl.constexpr,
    in_two: tl.constexpr,
    silu: tl.constexpr,
    drop_threshold: tl.constexpr,
    keep_scale: tl.constexpr,
    in_fours: tl.constexpr,
) -> None:
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    place = _place(program, chunks, span, channels, split, width, in_two)
    image, _, first, in_first, start, before, piece = place
    compute: tl.constexpr = mean_ptr.dtype.element_ty
    within = start + tl.arange(0, width)
    exists, channel = within < piece, before + within
    pixel_at = image * pixels + first
    x_at = _piece(x_ptr, skip_ptr, in_first, in_two) + pixel_at * piece + within[None, :]
    y_at = y_ptr + pixel_at * channels + channel[None, :]

    group = image * groups + channel // (channels // groups)
    mean, rstd = _per_channel(mean_ptr, group, exists), _per_channel(rstd_ptr, group, exists)
    weight = _per_channel(weight_ptr, image * parameter_stride + channel, exists)
    bias = _per_channel(bias_ptr, image * parameter_stride + channel, exists)
    for step in range(0, span, rows):
        pixel = step + tl.arange(0, rows)[:, None]
        inside = (first + pixel < pixels) & exists[None, :]
        x = tl.load(x_at + pixel * piece, mask=inside, other=0).to(compute)
        y = weight * ((x - mean) * rstd) + bias
        if silu:
            y = y * tl.sigmoid(y)
        if drop_threshold > 0:
            at = image, first + step, before + start, pixels, channels
            y = _dropped(y, seed_ptr, *at, rows, width, drop_threshold, keep_scale, in_fours)
        tl.store(y_at + pixel * channels, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _vjp_sums_kernel(
    g_ptr: tl.tensor,
    x_ptr: tl.tensor,
    skip_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    chunks: int,
    span: int,
    channels: int,
    pixels: int,
    groups: int,
    parameter_stride: int,
    split: int,
    width: tl.constexpr,
    rows: tl.constexpr,
    in_two: tl.constexpr,
    silu: tl.constexpr,
    drop_threshold: tl.constexpr,
    keep_scale: tl.constexpr,
    in_fours: tl.constexpr,
) -> None:
    """Sums of s1 = g mask silu'(u) and of s1 xhat over the pixels of a chunk, channel by channel."""
    place = _place(tl.program_id(0), chunks, span, channels, split, width, in_two)
    image, chunk, first, in_first, start, before, piece = place
    compute: tl.constexpr = mean_ptr.dtype.element_ty
    within = start + tl.arange(0, width)
    exists, channel = within < piece, before + within
    pixel_at = image * pixels + first
    x_at = _piece(x_ptr, skip_ptr, in_first, in_two) + pixel_at * piece + within[None, :]
    g_at = g_ptr + pixel_at * channels + channel[None, :]

    group = image * groups + channel // (channels // groups)
    mean, rstd = _per_channel(mean_ptr, group, exists), _per_channel(rstd_ptr, group, exists)
    weight = _per_channel(weight_ptr, image * parameter_stride + channel, exists)
    bias = _per_channel(bias_ptr, image * parameter_stride + channel, exists)
    sum_s1, sum_s1x = tl.zeros((rows, width), compute), tl.zeros((rows, width), compute)
    for step in range(0, span, rows):
        pixel = step + tl.arange(0, rows)[:, None]
        inside = (first + pixel < pixels) & exists[None, :]
        xhat = (tl.load(x_at + pixel * piece, mask=inside, other=0).to(compute) - mean) * rstd
        s1 = tl.load(g_at + pixel * channels, mask=inside, other=0).to(compute)
        if drop_threshold > 0:
            at = image, first + step, before + start, pixels, channels
            s1 = _dropped(s1, seed_ptr, *at, rows, width, drop_threshold, keep_scale, in_fours)
        if silu:
            s1 = s1 * silu_first(weight * xhat + bias)
        sum_s1 += s1
        sum_s1x += s1 * xhat
    to = sums_ptr + (image * chunks + chunk) * 2 * channels + channel
    _store_sum(to, 0, channels, sum_s1, exists)
    _store_sum(to, 1, channels, sum_s1x, exists)


@triton.jit
def _combine_vjp_kernel(
    sums_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    grad_weight_ptr: tl.tensor,
    grad_bias_ptr: tl.tensor,
    of_groups_ptr: tl.tensor,
    chunks: int,
    span: int,
    channels: int,
    pixels: int,
    groups: int,
    parameter_stride: int,
    group_tile: tl.constexpr,
    channel_tile: tl.constexpr,
) -> None:
    """grad_weight, grad_bias, and of every group mean(p) and mean(p xhat)."""
    image, group, channel, exists = _groups(groups, channels, group_tile, channel_tile)
    s1 = _chunk_sum(sums_ptr, 0, 2, image, channel, exists, chunks, channels)
    s1x = _chunk_sum(sums_ptr, 1, 2, image, channel, exists, chunks, channels)
    tl.store(grad_bias_ptr + image * channels + channel, s1, mask=exists)
    tl.store(grad_weight_ptr + image * channels + channel, s1x, mask=exists)
    weight = tl.load(weight_ptr + image * parameter_stride + channel, mask=exists, other=0)
    size = (pixels * (channels // groups)).to(weight.dtype)
    to = of_groups_ptr + image * 2 * groups + group
    tl.store(to, _group_sum(weight * s1) / size, mask=group < groups)
    tl.store(to + groups, _group_sum(weight * s1x) / size, mask=group < groups)


@triton.jit
def _vjp_kernel(
    g_ptr: tl.tensor,
    x_ptr: tl.tensor,
    skip_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    of_groups_ptr: tl.tensor,
    grad_x_ptr: tl.tensor,
    grad_skip_ptr: tl.tensor,
    chunks: int,
    span: int,
    channels: int,
    pixels: int,
    groups: int,
    parameter_stride: int,
    split: int,
    width: tl.constexpr,
    rows: tl.constexpr,
    in_two: tl.constexpr,
    silu: tl.constexpr,
    drop_threshold: tl.constexpr,
    keep_scale: tl.constexpr,
    in_fours: tl.constexpr,
) -> None:
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    place = _place(program, chunks, span, channels, split, width, in_two)
    image, _, first, in_first, start, before, piece = place
    compute: tl.constexpr = mean_ptr.dtype.element_ty
    within = start + tl.arange(0, width)
    exists, channel = within < piece, before + within
    pixel_at = image * pixels + first
    within_piece = pixel_at * piece + within[None, :]
    x_at = _piece(x_ptr, skip_ptr, in_first, in_two) + within_piece
    to = _piece(grad_x_ptr, grad_skip_ptr, in_first, in_two) + within_piece
    g_at = g_ptr + pixel_at * channels + channel[None, :]

    group = channel // (channels // groups)
    mean = _per_channel(mean_ptr + image * groups, group, exists)
    rstd = _per_channel(rstd_ptr + image * groups, group, exists)
    of_groups = of_groups_ptr + image * 2 * groups
    mean_p = _per_channel(of_groups, group, exists)
    mean_px = _per_channel(of_groups + groups, group, exists)
    weight = _per_channel(weight_ptr, image * parameter_stride + channel, exists)
    bias = _per_channel(bias_ptr, image * parameter_stride + channel, exists)
    for step in range(0, span, rows):
        pixel = step + tl.arange(0, rows)[:, None]
        inside = (first + pixel < pixels) & exists[None, :]
        xhat = (tl.load(x_at + pixel * piece, mask=inside, other=0).to(compute) - mean) * rstd
        p = weight * tl.load(g_at + pixel * channels, mask=inside, other=0).to(compute)
        if drop_threshold > 0:
            at = image, first + step, before + start, pixels, channels
            p = _dropped(p, seed_ptr, *at, rows, width, drop_threshold, keep_scale, in_fours)
        if silu:
            p = p * silu_first(weight * xhat + bias)
        grad_x = rstd * (p - mean_p - xhat * mean_px)
        tl.store(to + pixel * piece, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _vjp_backward_sums_kernel(
    v_ptr: tl.tensor,
    v_skip_ptr: tl.tensor,
    g_ptr: tl.tensor,
    x_ptr: tl.tensor,
    skip_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    chunks: int,
    span: int,
    channels: int,
    pixels: int,
    groups: int,
    parameter_stride: int,
    split: int,
    width: tl.constexpr,
    rows: tl.constexpr,
    in_two: tl.constexpr,
    silu: tl.constexpr,
    drop_threshold: tl.constexpr,
    keep_scale: tl.constexpr,
    in_fours: tl.constexpr,
) -> None:
    """Sums over the pixels of a chunk, channel by channel, with s1 = g mask silu'(u), s2 = g mask silu''(u):
    s1, s1 xhat, v, v xhat, v s1, s2, s2 xhat, s2 xhat^2, v s2, v s2 xhat."""
    place = _place(tl.program_id(0), chunks, span, channels, split, width, in_two)
    image, chunk, first, in_first, start, before, piece = place
    compute: tl.constexpr = mean_ptr.dtype.element_ty
    within = start + tl.arange(0, width)
    exists, channel = within < piece, before + within
    pixel_at = image * pixels + first
    within_piece = pixel_at * piece + within[None, :]
    x_at = _piece(x_ptr, skip_ptr, in_first, in_two) + within_piece
    v_at = _piece(v_ptr, v_skip_ptr, in_first, in_two) + within_piece
    g_at = g_ptr + pixel_at * channels + channel[None, :]

    group = image * groups + channel // (channels // groups)
    mean, rstd = _per_channel(mean_ptr, group, exists), _per_channel(rstd_ptr, group, exists)
    weight = _per_channel(weight_ptr, image * parameter_stride + channel, exists)
    bias = _per_channel(bias_ptr, image * parameter_stride + channel, exists)
    nothing = tl.zeros((rows, width), compute)
    sum_s1, sum_s1x, sum_v, sum_vx, sum_vs1 = nothing, nothing, nothing, nothing, nothing
    sum_s2, sum_s2x, sum_s2xx, sum_vs2, sum_vs2x = nothing, nothing, nothing, nothing, nothing
    for step in range(0, span, rows):
        pixel = step + tl.arange(0, rows)[:, None]
        inside = (first + pixel < pixels) & exists[None, :]
        xhat = (tl.load(x_at + pixel * piece, mask=inside, other=0).to(compute) - mean) * rstd
        v = tl.load(v_at + pixel * piece, mask=inside, other=0).to(compute)
        s1 = tl.load(g_at + pixel * channels, mask=inside, other=0).to(compute)
        if drop_threshold > 0:
            at = image, first + step, before + start, pixels, channels
            s1 = _dropped(s1, seed_ptr, *at, rows, width, drop_threshold, keep_scale, in_fours)
        if silu:
            u = weight * xhat + bias
            s2 = s1 * silu_second(u)
            s1 = s1 * silu_first(u)
            sum_s2 += s2
            sum_s2x += s2 * xhat
            sum_s2xx += s2 * xhat * xhat
            sum_vs2 += v * s2
            sum_vs2x += v * s2 * xhat
        sum_s1 += s1
        sum_s1x += s1 * xhat
        sum_v += v
        sum_vx += v * xhat
        sum_vs1 += v * s1
    to = sums_ptr + (image * chunks + chunk) * 10 * channels + channel
    _store_sum(to, 0, channels, sum_s1, exists)
    _store_sum(to, 1, channels, sum_s1x, exists)
    _store_sum(to, 2, channels, sum_v, exists)
    _store_sum(to, 3, channels, sum_vx, exists)
    _store_sum(to, 4, channels, sum_vs1, exists)
    _store_sum(to, 5, channels, sum_s2, exists)
    _store_sum(to, 6, channels, sum_s2x, exists)
    _store_sum(to, 7, channels, sum_s2xx, exists)
    _store_sum(to, 8, channels, sum_vs2, exists)
    _store_sum(to, 9, channels, sum_vs2x, exists)


@triton.jit
def _combine_vjp_backward_kernel(
    sums_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    grad_weight_ptr: tl.tensor,
    grad_bias_ptr: tl.tensor,
    of_groups_ptr: tl.tensor,
    chunks: int,
    span: int,
    channels: int,
    pixels: int,
    groups: int,
    parameter_stride: int,
    group_tile: tl.constexpr,
    channel_tile: tl.constexpr,
) -> None:
    """grad_weight, grad_bias, and of every group mean(v), mean(v xhat), mean(p xhat), constant and slope."""
    image, group, channel, exists = _groups(groups, channels, group_tile, channel_tile)
    s1 = _chunk_sum(sums_ptr, 0, 10, image, channel, exists, chunks, channels)
    s1x = _chunk_sum(sums_ptr, 1, 10, image, channel, exists, chunks, channels)
    v = _chunk_sum(sums_ptr, 2, 10, image, channel, exists, chunks, channels)
    vx = _chunk_sum(sums_ptr, 3, 10, image, channel, exists, chunks, channels)
    vs1 = _chunk_sum(sums_ptr, 4, 10, image, channel, exists, chunks, channels)
    s2 = _chunk_sum(sums_ptr, 5, 10, image, channel, exists, chunks, channels)
    s2x = _chunk_sum(sums_ptr, 6, 10, image, channel, exists, chunks, channels)
    s2xx = _chunk_sum(sums_ptr, 7, 10, image, channel, exists, chunks, channels)
    vs2 = _chunk_sum(sums_ptr, 8, 10, image, channel, exists, chunks, channels)
    vs2x = _chunk_sum(sums_ptr, 9, 10, image, channel, exists, chunks, channels)

    weight = tl.load(weight_ptr + image * parameter_stride + channel, mask=exists, other=0)
    rstd = tl.load(rstd_ptr + image * groups + group, mask=group < groups, other=0)
    size = (pixels * (channels // groups)).to(weight.dtype)
    mean_p, mean_px = _group_sum(weight * s1) / size, _group_sum(weight * s1x) / size
    mean_vp = _group_sum(weight * vs1) / size
    mean_v, mean_vx = _group_sum(v) / size, _group_sum(vx) / size
    grad_bias = weight * rstd * (vs2 - mean_v * s2 - mean_vx * s2x)
    grad_weight = weight * rstd * (vs2x - mean_vx * s2xx - mean_v * s2x)
    # <v, VJP> / n, whose derivative through rstd is -rstd xhat times it.
    value = rstd * (mean_vp - mean_p * mean_v - mean_px * mean_vx)
    constant = _group_sum(weight * grad_bias) / size - rstd * (mean_px * mean_v + mean_vx * mean_p)
    slope = _group_sum(weight * grad_weight) / size - 2 * rstd * mean_px * mean_vx + value
    grad_weight += rstd * (vs1 - mean_v * s1 - mean_vx * s1x)
    tl.store(grad_bias_ptr + image * channels + channel, grad_bias, mask=exists)
    tl.store(grad_weight_ptr + image * channels + channel, grad_weight, mask=exists)
    to, known = of_groups_ptr + image * 5 * groups + group, group < groups
    tl.store(to, mean_v, mask=known)
    tl.store(to + groups, mean_vx, mask=known)
    tl.store(to + 2 * groups, mean_px, mask=known)
    tl.store(to + 3 * groups, constant, mask=known)
    tl.store(to + 4 * groups, slope, mask=known)


@triton.jit
def _vjp_backward_kernel(
    v_ptr: tl.tensor,
    v_skip_ptr: tl.tensor,
    g_ptr: tl.tensor,
    x_ptr: tl.tensor,
    skip_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    of_groups_ptr: tl.tensor,
    grad_g_ptr: tl.tensor,
    grad_x_ptr: tl.tensor,
    grad_skip_ptr: tl.tensor,
    chunks: int,
    span: int,
    channels: int,
    pixels: int,
    groups: int,
    parameter_stride: int,
    split: int,
    width: tl.constexpr,
    rows: tl.constexpr,
    in_two: tl.constexpr,
    silu: tl.constexpr,
    drop_threshold: tl.constexpr,
    keep_scale: tl.constexpr,
    in_fours: tl.constexpr,
) -> None:
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    place = _place(program, chunks, span, channels, split, width, in_two)
    image, _, first, in_first, start, before, piece = place
    compute: tl.constexpr = mean_ptr.dtype.element_ty
    within = start + tl.arange(0, width)
    exists, channel = within < piece, before + within
    pixel_at = image * pixels + first
    within_piece = pixel_at * piece + within[None, :]
    x_at = _piece(x_ptr, skip_ptr, in_first, in_two) + within_piece
    v_at = _piece(v_ptr, v_skip_ptr, in_first, in_two) + within_piece
    to = _piece(grad_x_ptr, grad_skip_ptr, in_first, in_two) + within_piece
    within_whole = pixel_at * channels + channel[None, :]

    group = channel // (channels // groups)
    mean = _per_channel(mean_ptr + image * groups, group, exists)
    rstd = _per_channel(rstd_ptr + image * groups, group, exists)
    of_groups = of_groups_ptr + image * 5 * groups
    mean_v, mean_vx = _per_channel(of_groups, group, exists), _per_channel(of_groups + groups, group, exists)
    mean_px = _per_channel(of_groups + 2 * groups, group, exists)
    constant = _per_channel(of_groups + 3 * groups, group, exists)
    slope = _per_channel(of_groups + 4 * groups, group, exists)
    weight = _per_channel(weight_ptr, image * parameter_stride + channel, exists)
    bias = _per_channel(bias_ptr, image * parameter_stride + channel, exists)
    for step in range(0, span, rows):
        pixel = step + tl.arange(0, rows)[:, None]
        inside = (first + pixel < pixels) & exists[None, :]
        xhat = (tl.load(x_at + pixel * piece, mask=inside, other=0).to(compute) - mean) * rstd
        v = tl.load(v_at + pixel * piece, mask=inside, other=0).to(compute)
        g = tl.load(g_ptr + within_whole + pixel * channels, mask=inside, other=0).to(compute)
        at = image, first + step, before + start, pixels, channels
        if drop_threshold > 0:
            g = _dropped(g, seed_ptr, *at, rows, width, drop_threshold, keep_scale, in_fours)
        grad_g = rstd * weight * (v - mean_v - xhat * mean_vx)
        grad_xhat = -constant - xhat * slope - rstd * v * mean_px
        if silu:
            u = weight * xhat + bias
            grad_xhat += grad_g * weight * g * silu_second(u)
            first_derivative = silu_first(u)
            g = g * first_derivative
            grad_g = grad_g * first_derivative
        grad_x = rstd * (grad_xhat - rstd * weight * g * mean_vx)
        tl.store(to + pixel * piece, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
        if drop_threshold > 0:
            grad_g = _dropped(grad_g, seed_ptr, *at, rows, width, drop_threshold, keep_scale, in_fours)
        of_g = grad_g.to(grad_g_ptr.dtype.element_ty)
        tl.store(grad_g_ptr + within_whole + pixel * channels, of_g, mask=inside)
