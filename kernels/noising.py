"""Triton kernel of noising: level gather, Philox noise, dequantisation, flip and multiply-add in one pass.

`cdm_fast/ops/noising.py` is the specification, `cdm_fast/ops/philox.py` that of the random numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from cdm_fast.kernels import on_its_device
from torch import Tensor

from cdm_fast.ops import philox

_NOISE = tl.constexpr(int(philox.Stream.NOISE))
_DEQUANTISATION = tl.constexpr(int(philox.Stream.DEQUANTISATION))
_FLIP = tl.constexpr(int(philox.Stream.FLIP))
_LN2 = tl.constexpr(philox.LN2)
_SQRT_HALF_BITS = tl.constexpr(philox.SQRT_HALF_BITS)
_LOG = tl.constexpr(philox.LOG_COEFFICIENTS)
_SIN = tl.constexpr(philox.SIN_COEFFICIENTS)
_COS = tl.constexpr(philox.COS_COEFFICIENTS)

_TILE = 1024


@on_its_device
def noising(
    x0: Tensor,
    level: Tensor,
    a: Tensor,
    s: Tensor,
    seed: Tensor | None,
    eps: Tensor | None,
    num_grey_levels: int,
    flip: bool,
    x_t: Tensor,
    drawn: Tensor,
    clean: Tensor,
) -> None:
    """Fills x_t like x0, and `drawn` and `clean` where they are not empty.

    All in one layout, contiguous or with the channels last; the rest contiguous.
    a, s, eps, drawn and clean are in the dtype of the arithmetic; x0 and x_t in any.
    """
    batch = x0.shape[0]
    image_size = x0.numel() // batch
    tile = min(_TILE, max(16, triton.next_power_of_2(image_size + 3)))
    # A tile begins at a multiple of 4 of the whole batch, so that it holds whole Philox blocks.
    tiles = triton.cdiv(image_size + 3, tile)
    _kernel[(batch * tiles,)](
        x0,
        level,
        a,
        s,
        seed if seed is not None else level,
        eps if eps is not None else drawn,
        x_t,
        drawn,
        clean,
        image_size,
        x0.shape[-1],
        1 if x0.is_contiguous() else x0.shape[1],
        a.shape[0],
        tiles,
        2.0 / max(num_grey_levels, 1),
        draw=eps is None,
        dequantise=num_grey_levels > 0,
        flip=flip,
        tile=tile,
        enable_fp_fusion=False,
    )


@triton.jit
def _kernel(
    x0_ptr: tl.tensor,
    level_ptr: tl.tensor,
    a_ptr: tl.tensor,
    s_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    eps_ptr: tl.tensor,
    x_t_ptr: tl.tensor,
    drawn_ptr: tl.tensor,
    clean_ptr: tl.tensor,
    image_size: int,
    row: int,
    channels: int,
    num_levels: int,
    tiles: int,
    scale: float,
    draw: tl.constexpr,
    dequantise: tl.constexpr,
    flip: tl.constexpr,
    tile: tl.constexpr,
) -> None:
    image = (tl.program_id(0) // tiles).to(tl.int64)
    start = image * image_size
    first = start // 4 * 4 + (tl.program_id(0) % tiles).to(tl.int64) * tile
    index = first + tl.arange(0, tile)
    inside = (index >= start) & (index < start + image_size)
    compute = a_ptr.dtype.element_ty

    plane = image_size // channels
    place = start + (index - start) % plane * channels + (index - start) // plane
    source = place
    if flip:
        words = _block(seed_ptr, _FLIP, (image // 4).to(tl.uint32))
        word = _word(words[0], words[1], words[2], words[3], image % 4)
        column = (index - start) % row
        source = tl.where((word >> 31) != 0, place + (row - 1 - 2 * column) * channels, place)
    clean = tl.load(x0_ptr + source, mask=inside, other=0).to(compute)
    if dequantise:
        clean = (clean + _uniforms(seed_ptr, first, tile)) * scale + -1.0
    if flip or dequantise:
        tl.store(clean_ptr + place, clean, mask=inside)

    if draw:
        eps = _normals(seed_ptr, first, tile).to(compute)
        tl.store(drawn_ptr + place, eps, mask=inside)
    else:
        eps = tl.load(eps_ptr + place, mask=inside, other=0)

    level = tl.load(level_ptr + image)
    known = (level >= 0) & (level < num_levels)
    a_t = tl.load(a_ptr + level, mask=known, other=float("nan"))
    s_t = tl.load(s_ptr + level, mask=known, other=float("nan"))
    tl.store(x_t_ptr + place, (a_t * clean + s_t * eps).to(x_t_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _block(seed_ptr: tl.tensor, stream: tl.constexpr, block: tl.tensor) -> tuple:
    """The four words of each block (uint32) of a stream."""
    seed = tl.load(seed_ptr).to(tl.uint64)
    offset = tl.load(seed_ptr + 1).to(tl.uint64)
    zero = block * 0
    offset_low = (offset & 0xFFFFFFFF).to(tl.uint32) + zero
    offset_high = (offset >> 32).to(tl.uint32) + zero
    return tl.philox(seed, block, zero + stream, offset_low, offset_high, 10)


@triton.jit
def _word(w0: tl.tensor, w1: tl.tensor, w2: tl.tensor, w3: tl.tensor, index: tl.tensor) -> tl.tensor:
    return tl.where(index == 0, w0, tl.where(index == 1, w1, tl.where(index == 2, w2, w3)))


@triton.jit
def _uniforms(seed_ptr: tl.tensor, first: tl.tensor, tile: tl.constexpr) -> tl.tensor:
    block = (first // 4 + tl.arange(0, tile // 4)).to(tl.uint32)
    w0, w1, w2, w3 = _block(seed_ptr, _DEQUANTISATION, block)
    scale: tl.constexpr = 2.0**-24
    u0, u1 = (w0 >> 8).to(tl.float32) * scale, (w1 >> 8).to(tl.float32) * scale
    u2, u3 = (w2 >> 8).to(tl.float32) * scale, (w3 >> 8).to(tl.float32) * scale
    return tl.interleave(tl.interleave(u0, u2), tl.interleave(u1, u3))


@triton.jit
def _normals(seed_ptr: tl.tensor, first: tl.tensor, tile: tl.constexpr) -> tl.tensor:
    block = (first // 4 + tl.arange(0, tile // 4)).to(tl.uint32)
    w0, w1, w2, w3 = _block(seed_ptr, _NOISE, block)
    z0, z1 = _box_muller(w0, w1)
    z2, z3 = _box_muller(w2, w3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@triton.jit
def _box_muller(word_u: tl.tensor, word_v: tl.tensor) -> tuple:
    u = word_u.to(tl.float32) * 2.0**-32 + 2.0**-33
    radius = tl.sqrt_rn(-2.0 * _log(u))

    shifted = word_v + 0x20000000
    quarter = (shifted >> 30).to(tl.int32)
    rest = (shifted & 0x3FFFFFFF).to(tl.int32) - 0x20000000
    x = rest.to(tl.float32) * 2.0**-30
    square = x * x
    sin = x * _horner(square, _SIN, 3)
    cos = square * _horner(square, _COS, 3) + 1.0
    odd = (quarter & 1) != 0
    cos_v = tl.where(odd, sin, cos) * (1.0 - ((quarter + 1) & 2).to(tl.float32))
    sin_v = tl.where(odd, cos, sin) * (1.0 - (quarter & 2).to(tl.float32))
    return radius * cos_v, radius * sin_v


@triton.jit
def _log(u: tl.tensor) -> tl.tensor:
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    square = f * f
    tail = (f * square) * _horner(f, _LOG, 7)
    return exponent.to(tl.float32) * _LN2 + (f + (tail - 0.5 * square))


@triton.jit
def _horner(x: tl.tensor, coefficients: tl.constexpr, degree: tl.constexpr) -> tl.tensor:
    value = x * 0.0 + coefficients[degree]
    for i in tl.static_range(degree):
        value = value * x + coefficients[degree - 1 - i]
    return value
