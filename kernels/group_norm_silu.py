"""Triton kernels of GroupNorm + SiLU + dropout: forward, VJP, and the derivative of the VJP.

`cdm_fast/ops/group_norm_silu.py` is the specification; docs/explanation/group_norm_silu.md derives it.
Channels-last images go to `group_norm_silu_split.py`, except small ones, where one launch is better than
three. Here a program takes one or more whole groups of one image and reads their pixels twice: once for the
sums, once for the result. Its tile has three axes: group, channel of the group, pixel.
"""

from __future__ import annotations

import triton
import triton.language as tl
from cdm_fast.kernels import group_norm_silu_split, on_its_device
from cdm_fast.kernels.group_norm_silu_split import masked, silu_first, silu_second
from torch import Tensor

from cdm_fast.ops import philox

SPLIT_PIXELS = 257  # groups of channels-last images with this many pixels or more are split
_SPLIT_PIXELS_OF_FEW = 65  # the same, where fewer than _PROGRAMS programs would run otherwise
_PROGRAMS = 256  # to keep 132 multiprocessors reading
_TILE = 512  # elements
_CHANNELS_LAST_TILE = 2048  # elements, 16 per thread
_CHANNELS_LAST_TILE_OF_MANY_SUMS = 1024  # ten sums per element: larger tiles spill registers
_CHANNELS_TO_SUM = 16  # per program: few, so that several programs run at once
_LINE_BYTES = 128  # a cache line, which neighbouring channels of channels-last images should fill


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
    """Fills y, mean and rstd. Images are dense and all contiguous or all channels-last; weight and bias are
    both (C,) or both (B, C), and the images' (B, C) may be the same ones, of stride 0.

    skip: the channels that follow those of x, if any.
    """
    if _splits(x, skip, num_groups):
        outputs = y, mean, rstd, num_groups, eps
        group_norm_silu_split.forward(x, skip, weight, bias, seed, *outputs, silu, dropout)
        return
    grid, sizes = _geometry(x, skip, weight, num_groups)
    inputs = x, _pointer(skip, x), weight, bias, _pointer(seed, x)
    _forward_kernel[grid](*inputs, y, mean, rstd, eps, **sizes, silu=silu, **_dropout(dropout))


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
    """Fills grad_x, grad_skip and, per image, grad_weight and grad_bias (B, C)."""
    if _splits(x, skip, num_groups):
        tensors = g, x, skip, weight, bias, mean, rstd, seed, grad_x, grad_skip, grad_weight, grad_bias
        group_norm_silu_split.vjp(*tensors, num_groups, silu, dropout)
        return
    grid, sizes = _geometry(x, skip, weight, num_groups)
    inputs = g, x, _pointer(skip, x), weight, bias, mean, rstd, _pointer(seed, x)
    outputs = grad_x, _pointer(grad_skip, x), grad_weight, grad_bias
    _vjp_kernel[grid](*inputs, *outputs, **sizes, silu=silu, **_dropout(dropout))


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
    """Fills grad_g, grad_x, grad_skip and, per image, grad_weight and grad_bias (B, C)."""
    if _splits(x, skip, num_groups):
        inputs = v, v_skip, g, x, skip, weight, bias, mean, rstd, seed
        outputs = grad_g, grad_x, grad_skip, grad_weight, grad_bias
        group_norm_silu_split.vjp_backward(*inputs, *outputs, num_groups, silu, dropout)
        return
    grid, sizes = _geometry(x, skip, weight, num_groups, _CHANNELS_LAST_TILE_OF_MANY_SUMS)
    inputs = v, _pointer(v_skip, x), g, x, _pointer(skip, x), weight, bias, mean, rstd, _pointer(seed, x)
    outputs = grad_g, grad_x, _pointer(grad_skip, x), grad_weight, grad_bias
    _vjp_backward_kernel[grid](*inputs, *outputs, **sizes, silu=silu, **_dropout(dropout))


@on_its_device
def sum_images(grad_weight: Tensor, grad_bias: Tensor, weight_sum: Tensor, bias_sum: Tensor) -> None:
    """Fills weight_sum and bias_sum (C,) with the sums of (B, C) over the images, both in one launch."""
    batch, channels = grad_weight.shape
    grid = (2 * triton.cdiv(channels, _CHANNELS_TO_SUM),)
    rows = min(triton.next_power_of_2(batch), 64)
    sizes = {"rows": rows, "tile": _CHANNELS_TO_SUM}
    _sum_images_kernel[grid](grad_weight, grad_bias, weight_sum, bias_sum, batch, channels, **sizes)


def _splits(x: Tensor, skip: Tensor | None, num_groups: int) -> bool:
    """Whether three launches, of as many programs as the device runs, are better than one."""
    if x.is_contiguous():
        return False
    batch, split = x.shape[:2]
    pixels = x.numel() // (batch * split)
    channels = split if skip is None else split + skip.shape[1]
    programs = batch * triton.cdiv(num_groups, _groups_of_a_line(channels, num_groups, x.element_size()))
    return pixels >= SPLIT_PIXELS or (pixels >= _SPLIT_PIXELS_OF_FEW and programs < _PROGRAMS)


def _groups_of_a_line(channels: int, num_groups: int, element_size: int) -> int:
    """How many groups a program takes of a channels-last image: a power of two."""
    line = max(1, _LINE_BYTES // element_size // triton.next_power_of_2(channels // num_groups))
    return min(triton.next_power_of_2(num_groups), line)


def _geometry(
    x: Tensor, skip: Tensor | None, weight: Tensor, num_groups: int, most: int = _CHANNELS_LAST_TILE
) -> tuple[tuple[int, ...], dict[str, int]]:
    channels_last = not x.is_contiguous()
    batch, split = x.shape[:2]
    channels = split if skip is None else split + skip.shape[1]
    pixels = x.numel() // (batch * split)
    group_channels = channels // num_groups
    channel_tile = triton.next_power_of_2(group_channels)
    groups_tile = _groups_of_a_line(channels, num_groups, x.element_size()) if channels_last else 1
    elements = most if channels_last else _TILE
    pixel_tile = max(1, min(triton.next_power_of_2(pixels), elements // (channel_tile * groups_tile)))
    sizes = {
        "channels": channels,
        "split": split,
        "pixels": pixels,
        "groups": num_groups,
        "parameter_stride": weight.stride(0) if weight.dim() == 2 else 0,
        "channel_step": 1 if channels_last else pixels,
        "pixel_step": channels if channels_last else 1,
        "group_channels": group_channels,  # known to the compiler: neighbours are loaded together
        "groups_tile": groups_tile,
        "channel_tile": channel_tile,
        "pixel_tile": pixel_tile,
        "in_two": skip is not None,
        "channels_last": channels_last,
    }
    return (batch * triton.cdiv(num_groups, groups_tile),), sizes


def _dropout(dropout: float) -> dict[str, float]:
    """The compile-time constants of dropout; threshold 0 means none."""
    return {"drop_threshold": philox.drop_threshold(dropout), "keep_scale": 1 / (1 - dropout)}


def _pointer(optional: Tensor | None, x: Tensor) -> Tensor:
    """A pointer that a kernel does not use stands for a tensor that is None."""
    return x if optional is None else optional


@triton.jit
def _forward_kernel(
    x_ptr: tl.tensor,
    skip_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    y_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    rstd_ptr: tl.tensor,
    eps: float,
    channels: int,
    split: int,
    pixels: int,
    groups: int,
    parameter_stride: int,
    channel_step: int,
    pixel_step: int,
    group_channels: tl.constexpr,
    groups_tile: tl.constexpr,
    channel_tile: tl.constexpr,
    pixel_tile: tl.constexpr,
    in_two: tl.constexpr,
    channels_last: tl.constexpr,
    silu: tl.constexpr,
    drop_threshold: tl.constexpr,
    keep_scale: tl.constexpr,
) -> None:
    image, group, channel, present = _place(groups, group_channels, groups_tile, channel_tile)
    base = image * channels * pixels + channel * channel_step
    shape = channels, split, pixels, pixel_step
    x_at, piece_step = _piece(x_ptr, skip_ptr, base, image, channel, shape, in_two, channels_last)
    compute = mean_ptr.dtype.element_ty

    # Tiles are merged by their own mean and squares around it (Chan, Golub, LeVeque 1979): nothing cancels.
    mean = tl.zeros((groups_tile, 1, 1), compute)
    squares = tl.zeros((groups_tile, 1, 1), compute)
    for start in range(0, pixels, pixel_tile):
        pixel, inside = _pixels(start, pixels, present, pixel_tile)
        x = tl.load(x_at + pixel * piece_step, mask=inside, other=0).to(compute)
        seen = (start * (channels // groups)).to(compute)
        size = (tl.minimum(pixel_tile, pixels - start) * group_channels).to(compute)
        tile_mean = _sum(x) / size
        centred = tl.where(inside, x - tile_mean, 0)
        difference = tile_mean - mean
        mean += difference * (size / (seen + size))
        squares += _sum(centred * centred) + difference * difference * (seen * size / (seen + size))
    rstd = 1 / tl.sqrt(squares / (pixels * group_channels).to(compute) + eps)
    at = image * groups + group
    tl.store(mean_ptr + at, mean, mask=group < groups)
    tl.store(rstd_ptr + at, rstd, mask=group < groups)

    weight = tl.load(weight_ptr + image * parameter_stride + channel, mask=present, other=0)
    bias = tl.load(bias_ptr + image * parameter_stride + channel, mask=present, other=0)
    for start in range(0, pixels, pixel_tile):
        pixel, inside = _pixels(start, pixels, present, pixel_tile)
        x = tl.load(x_at + pixel * piece_step, mask=inside, other=0).to(compute)
        y = weight * ((x - mean) * rstd) + bias
        if silu:
            y = y * tl.sigmoid(y)
        if drop_threshold > 0:
            y = _dropped(y, seed_ptr, image, pixel, channel, pixels, channels, drop_threshold, keep_scale)
        tl.store(y_ptr + base + pixel * pixel_step, y.to(y_ptr.dtype.element_ty), mask=inside)


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
    grad_x_ptr: tl.tensor,
    grad_skip_ptr: tl.tensor,
    grad_weight_ptr: tl.tensor,
    grad_bias_ptr: tl.tensor,
    channels: int,
    split: int,
    pixels: int,
    groups: int,
    parameter_stride: int,
    channel_step: int,
    pixel_step: int,
    group_channels: tl.constexpr,
    groups_tile: tl.constexpr,
    channel_tile: tl.constexpr,
    pixel_tile: tl.constexpr,
    in_two: tl.constexpr,
    channels_last: tl.constexpr,
    silu: tl.constexpr,
    drop_threshold: tl.constexpr,
    keep_scale: tl.constexpr,
) -> None:
    image, group, channel, present = _place(groups, group_channels, groups_tile, channel_tile)
    base = image * channels * pixels + channel * channel_step
    shape = channels, split, pixels, pixel_step
    x_at, piece_step = _piece(x_ptr, skip_ptr, base, image, channel, shape, in_two, channels_last)
    grad_x_at, _ = _piece(grad_x_ptr, grad_skip_ptr, base, image, channel, shape, in_two, channels_last)
    compute = mean_ptr.dtype.element_ty
    mean = tl.load(mean_ptr + image * groups + group, mask=group < groups, other=0)
    rstd = tl.load(rstd_ptr + image * groups + group, mask=group < groups, other=0)
    weight = tl.load(weight_ptr + image * parameter_stride + channel, mask=present, other=0)
    bias = tl.load(bias_ptr + image * parameter_stride + channel, mask=present, other=0)

    sum_s1 = tl.zeros((groups_tile, channel_tile, pixel_tile), compute)
    sum_s1x = tl.zeros((groups_tile, channel_tile, pixel_tile), compute)
    for start in range(0, pixels, pixel_tile):
        pixel, inside = _pixels(start, pixels, present, pixel_tile)
        at = base + pixel * pixel_step
        xhat = (tl.load(x_at + pixel * piece_step, mask=inside, other=0).to(compute) - mean) * rstd
        s1 = tl.load(g_ptr + at, mask=inside, other=0).to(compute)
        if drop_threshold > 0:
            s1 = _dropped(s1, seed_ptr, image, pixel, channel, pixels, channels, drop_threshold, keep_scale)
        if silu:
            s1 = s1 * silu_first(weight * xhat + bias)
        sum_s1 += s1
        sum_s1x += s1 * xhat
    channel_s1 = tl.sum(sum_s1, axis=2, keep_dims=True)
    channel_s1x = tl.sum(sum_s1x, axis=2, keep_dims=True)
    tl.store(grad_bias_ptr + image * channels + channel, channel_s1, mask=present)
    tl.store(grad_weight_ptr + image * channels + channel, channel_s1x, mask=present)

    size = (pixels * group_channels).to(compute)
    mean_p = _sum(weight * channel_s1) / size
    mean_px = _sum(weight * channel_s1x) / size
    for start in range(0, pixels, pixel_tile):
        pixel, inside = _pixels(start, pixels, present, pixel_tile)
        at = base + pixel * pixel_step
        xhat = (tl.load(x_at + pixel * piece_step, mask=inside, other=0).to(compute) - mean) * rstd
        p = weight * tl.load(g_ptr + at, mask=inside, other=0).to(compute)
        if drop_threshold > 0:
            p = _dropped(p, seed_ptr, image, pixel, channel, pixels, channels, drop_threshold, keep_scale)
        if silu:
            p = p * silu_first(weight * xhat + bias)
        grad_x = rstd * (p - mean_p - xhat * mean_px)
        tl.store(grad_x_at + pixel * piece_step, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)


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
    grad_g_ptr: tl.tensor,
    grad_x_ptr: tl.tensor,
    grad_skip_ptr: tl.tensor,
    grad_weight_ptr: tl.tensor,
    grad_bias_ptr: tl.tensor,
    channels: int,
    split: int,
    pixels: int,
    groups: int,
    parameter_stride: int,
    channel_step: int,
    pixel_step: int,
    group_channels: tl.constexpr,
    groups_tile: tl.constexpr,
    channel_tile: tl.constexpr,
    pixel_tile: tl.constexpr,
    in_two: tl.constexpr,
    channels_last: tl.constexpr,
    silu: tl.constexpr,
    drop_threshold: tl.constexpr,
    keep_scale: tl.constexpr,
) -> None:
    image, group, channel, present = _place(groups, group_channels, groups_tile, channel_tile)
    base = image * channels * pixels + channel * channel_step
    shape = channels, split, pixels, pixel_step
    x_at, piece_step = _piece(x_ptr, skip_ptr, base, image, channel, shape, in_two, channels_last)
    v_at, _ = _piece(v_ptr, v_skip_ptr, base, image, channel, shape, in_two, channels_last)
    grad_x_at, _ = _piece(grad_x_ptr, grad_skip_ptr, base, image, channel, shape, in_two, channels_last)
    compute = mean_ptr.dtype.element_ty
    mean = tl.load(mean_ptr + image * groups + group, mask=group < groups, other=0)
    rstd = tl.load(rstd_ptr + image * groups + group, mask=group < groups, other=0)
    weight = tl.load(weight_ptr + image * parameter_stride + channel, mask=present, other=0)
    bias = tl.load(bias_ptr + image * parameter_stride + channel, mask=present, other=0)

    # Sums over a channel's pixels, with s1 = g mask silu'(u) and s2 = g mask silu''(u).
    nothing = tl.zeros((groups_tile, channel_tile, pixel_tile), compute)
    sum_s1, sum_s1x, sum_v, sum_vx, sum_vs1 = nothing, nothing, nothing, nothing, nothing
    sum_s2, sum_s2x, sum_s2xx, sum_vs2, sum_vs2x = nothing, nothing, nothing, nothing, nothing
    for start in range(0, pixels, pixel_tile):
        pixel, inside = _pixels(start, pixels, present, pixel_tile)
        at = base + pixel * pixel_step
        xhat = (tl.load(x_at + pixel * piece_step, mask=inside, other=0).to(compute) - mean) * rstd
        v = tl.load(v_at + pixel * piece_step, mask=inside, other=0).to(compute)
        s1 = tl.load(g_ptr + at, mask=inside, other=0).to(compute)
        if drop_threshold > 0:
            s1 = _dropped(s1, seed_ptr, image, pixel, channel, pixels, channels, drop_threshold, keep_scale)
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
    s1 = tl.sum(sum_s1, axis=2, keep_dims=True)
    s1x = tl.sum(sum_s1x, axis=2, keep_dims=True)
    vs1 = tl.sum(sum_vs1, axis=2, keep_dims=True)

    size = (pixels * group_channels).to(compute)
    mean_p, mean_px, mean_vp = _sum(weight * s1) / size, _sum(weight * s1x) / size, _sum(weight * vs1) / size
    mean_v, mean_vx = _sum(sum_v) / size, _sum(sum_vx) / size
    grad_bias = s1 * 0
    grad_weight = s1 * 0
    if silu:
        s2x = tl.sum(sum_s2x, axis=2, keep_dims=True)
        t = tl.sum(sum_vs2 - mean_v * sum_s2, axis=2, keep_dims=True) - mean_vx * s2x
        tx = tl.sum(sum_vs2x - mean_vx * sum_s2xx, axis=2, keep_dims=True) - mean_v * s2x
        grad_bias = weight * rstd * t
        grad_weight = weight * rstd * tx
    # <v, VJP> / n, whose derivative through rstd is -rstd xhat times it.
    value = rstd * (mean_vp - mean_p * mean_v - mean_px * mean_vx)
    constant = _sum(weight * grad_bias) / size - rstd * (mean_px * mean_v + mean_vx * mean_p)
    slope = _sum(weight * grad_weight) / size - 2 * rstd * mean_px * mean_vx + value
    grad_weight += rstd * (vs1 - mean_v * s1 - mean_vx * s1x)
    tl.store(grad_bias_ptr + image * channels + channel, grad_bias, mask=present)
    tl.store(grad_weight_ptr + image * channels + channel, grad_weight, mask=present)

    for start in range(0, pixels, pixel_tile):
        pixel, inside = _pixels(start, pixels, present, pixel_tile)
        at = base + pixel * pixel_step
        xhat = (tl.load(x_at + pixel * piece_step, mask=inside, other=0).to(compute) - mean) * rstd
        v = tl.load(v_at + pixel * piece_step, mask=inside, other=0).to(compute)
        g = tl.load(g_ptr + at, mask=inside, other=0).to(compute)
        grad_g = rstd * weight * (v - mean_v - xhat * mean_vx)
        grad_xhat = -rstd * v * mean_px
        if drop_threshold > 0:
            g = _dropped(g, seed_ptr, image, pixel, channel, pixels, channels, drop_threshold, keep_scale)
        if silu:
            u = weight * xhat + bias
            grad_xhat += grad_g * weight * g * silu_second(u)
            g = g * silu_first(u)
            grad_g = grad_g * silu_first(u)
        grad_xhat -= rstd * weight * g * mean_vx
        if drop_threshold > 0:
            grad_g = _dropped(
                grad_g, seed_ptr, image, pixel, channel, pixels, channels, drop_threshold, keep_scale
            )
        grad_x = rstd * (grad_xhat - constant - xhat * slope)
        tl.store(grad_g_ptr + at, grad_g.to(grad_g_ptr.dtype.element_ty), mask=inside)
        tl.store(grad_x_at + pixel * piece_step, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _sum_images_kernel(
    grad_weight_ptr: tl.tensor,
    grad_bias_ptr: tl.tensor,
    weight_sum_ptr: tl.tensor,
    bias_sum_ptr: tl.tensor,
    batch: int,
    channels: int,
    rows: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    source, target = grad_weight_ptr, weight_sum_ptr
    if tl.program_id(0) % 2 == 1:
        source, target = grad_bias_ptr, bias_sum_ptr
    channel = tl.program_id(0) // 2 * tile + tl.arange(0, tile)
    total = tl.zeros((rows, tile), source.dtype.element_ty)
    for start in range(0, batch, rows):
        image = start + tl.arange(0, rows).to(tl.int64)
        inside = (image < batch)[:, None] & (channel < channels)[None, :]
        total += tl.load(source + image[:, None] * channels + channel[None, :], mask=inside, other=0)
    tl.store(target + channel, tl.sum(total, axis=0), mask=channel < channels)


@triton.jit
def _place(
    groups: int, group_channels: tl.constexpr, groups_tile: tl.constexpr, channel_tile: tl.constexpr
) -> tuple:
    """(image, groups (g, 1, 1), channels (g, c, 1), which of these exist) of this program."""
    blocks = tl.cdiv(groups, groups_tile)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    group = tl.program_id(0) % blocks * groups_tile + tl.arange(0, groups_tile)[:, None, None]
    within = tl.arange(0, channel_tile)[None, :, None]
    present = (group < groups) & (within < group_channels)
    return image, group, group * group_channels + within, present


@triton.jit
def _piece(
    first_ptr: tl.tensor,
    second_ptr: tl.tensor,
    base: tl.tensor,
    image: tl.tensor,
    channel: tl.tensor,
    shape: tl.tuple,
    in_two: tl.constexpr,
    channels_last: tl.constexpr,
) -> tuple:
    """(pointers to the channels' first pixels, step between pixels) in a tensor of one piece or two."""
    channels, split, pixels, pixel_step = shape
    pointer, step = first_ptr + base, pixel_step
    if in_two:
        in_first = channel < split
        width = tl.where(in_first, split, channels - split)
        within = tl.where(in_first, channel, channel - split)
        start = image * width * pixels + (within if channels_last else within * pixels)
        pointer = tl.where(in_first, first_ptr + start, second_ptr + start)
        if channels_last:
            step = width
    return pointer, step


@triton.jit
def _pixels(start: int, pixels: int, present: tl.tensor, pixel_tile: tl.constexpr) -> tuple:
    """(pixels (1, 1, p) from `start`, which elements of the tile exist)."""
    pixel = start + tl.arange(0, pixel_tile)[None, None, :]
    return pixel, present & (pixel < pixels)


@triton.jit
def _sum(x: tl.tensor) -> tl.tensor:
    """Sum over channels and pixels, group by group: (g, 1, 1)."""
    return tl.sum(tl.sum(x, axis=2, keep_dims=True), axis=1, keep_dims=True)


@triton.jit
def _dropped(
    value: tl.tensor,
    seed_ptr: tl.tensor,
    image: tl.tensor,
    pixel: tl.tensor,
    channel: tl.tensor,
    pixels: int,
    channels: int,
    drop_threshold: tl.constexpr,
    keep_scale: tl.constexpr,
) -> tl.tensor:
    """value times the dropout mask: word i % 4 of block i / 4, i counted in channels-last order."""
    index = ((tl.load(seed_ptr + 2) + image) * pixels + pixel) * channels + channel
    return masked(value, seed_ptr, index, drop_threshold, keep_scale)
