"""Triton kernel of the noise of single images; `cdm_fast/ops/image_noise.py` is the specification."""

from __future__ import annotations

import triton
import triton.language as tl
from cdm_fast.kernels import on_its_device
from cdm_fast.kernels.noising import _box_muller
from torch import Tensor

from cdm_fast.ops import philox

_SAMPLING = tl.constexpr(int(philox.Stream.SAMPLING))

_BLOCKS = 256  # of a program: 1024 numbers


@on_its_device
def image_noise(image: Tensor, seed_low: int, seed_high: int, draw: int, out: Tensor) -> None:
    """Fills out (B, size): with normals where it is fp32, with words where it is int64."""
    batch, size = out.shape
    blocks = min(_BLOCKS, max(4, triton.next_power_of_2(triton.cdiv(size, 4))))
    tiles = triton.cdiv(size, 4 * blocks)
    normal = out.is_floating_point()
    sizes = {"blocks": blocks, "normal": normal, "enable_fp_fusion": False}
    _image_noise_kernel[(batch * tiles,)](image, seed_low, seed_high, draw, out, size, tiles, **sizes)


@triton.jit(do_not_specialize=["seed_low", "seed_high", "draw"])
def _image_noise_kernel(
    image_ptr: tl.tensor,
    seed_low: int,
    seed_high: int,
    draw: int,
    out_ptr: tl.tensor,
    size: int,
    tiles: int,
    blocks: tl.constexpr,
    normal: tl.constexpr,
) -> None:
    row = (tl.program_id(0) // tiles).to(tl.int64)
    block = tl.program_id(0) % tiles * blocks + tl.arange(0, blocks)
    zero = (block * 0).to(tl.uint32)
    image = tl.load(image_ptr + row).to(tl.uint32) + zero
    seed = (seed_high + tl.zeros((), tl.uint64)) << 32 | (seed_low + tl.zeros((), tl.uint64))
    draws = (draw + tl.zeros((), tl.uint64)).to(tl.uint32) + zero
    w0, w1, w2, w3 = tl.philox(seed, block.to(tl.uint32), zero + _SAMPLING, image, draws, 10)
    if normal:
        z0, z1 = _box_muller(w0, w1)
        z2, z3 = _box_muller(w2, w3)
        values = tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))
    else:
        values = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3)).to(tl.int64)
    index = tl.program_id(0) % tiles * (4 * blocks) + tl.arange(0, 4 * blocks)
    tl.store(out_ptr + row * size + index, values, mask=index < size)
