"""Philox4x32-10: random numbers as a function of (seed, offset), stream and element index.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The numbers are the same
on every backend: 32-bit words bit for bit, normals to 1e-6. So noise can be recomputed instead of stored.

Element `i` of a draw (its index in contiguous order) uses word `i % 4` of the block whose counter is
`(i // 4, stream, offset mod 2^32, offset // 2^32)` under the key `(seed mod 2^32, seed // 2^32)`. Two draws
are independent when they differ in the seed, the offset or the stream.

Every 32-bit word is held in an int64 tensor: PyTorch has hardly any arithmetic for unsigned integers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

# One word of the counter is the index of a block of four elements.
MAX_ELEMENTS = 4 * 2**32

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

# log(1 + f) = f - f^2/2 + f^3 P(f) on [sqrt(1/2) - 1, sqrt(2) - 1], to 9e-9. csrc/philox.h holds
# the same constants. sin(pi/2 x) = x S(x^2) and cos(pi/2 x) = 1 + x^2 C(x^2) on [-1/2, 1/2], to 3e-8.
LOG_COEFFICIENTS = (
    0.333333283662796,
    -0.25000298023223877,
    0.20001468062400818,
    -0.16642247140407562,
    0.14202174544334412,
    -0.12972238659858704,
    0.12712307274341583,
    -0.08101558685302734,
)
SIN_COEFFICIENTS = (1.5707963705062866, -0.6459634900093079, 0.07968021929264069, -0.004602163098752499)
COS_COEFFICIENTS = (-1.2337005138397217, 0.253669410943985, -0.02086152881383896, 0.0009067417122423649)
LN2 = 0.6931471824645996
SQRT_HALF_BITS = 0x3F3504F3


class Stream(IntEnum):
    """The purpose of a draw: one (seed, offset) serves all of these without overlap."""

    NOISE = 0
    DEQUANTISATION = 1
    FLIP = 2
    DROPOUT = 3
    SAMPLING = 4


def philox4x32_10(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The block cipher itself: four words from a counter of four words and a key of two.

    counter, key: int64 tensors of one shape (or shapes that broadcast) with values in [0, 2^32). Returns four
    int64 tensors of words. Source: Salmon et al. 2011, section 3.3.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The product of two words may exceed 2^63; it wraps, and its 64 bits are still correct.
        product_0, product_1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            _high(product_1) ^ c1 ^ k0,
            product_1 & _MASK,
            _high(product_0) ^ c3 ^ k1,
            product_0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def philox_words(seed: Tensor, num: int, stream: Stream, before: Tensor | None = None) -> Tensor:
    """Words 0..num-1 of a stream: (num,) int64 with values in [0, 2^32).

    seed: (2,) int64, (seed, offset), on the device where the words are wanted. before: an int64 scalar there,
    the number of words to skip. Raises TypeError or ValueError for any other seed, ValueError for
    num > 2^34.
    """
    check_seed(seed, seed.device)
    if before is None:
        return torch.stack(_blocks(seed, num, stream), dim=-1).flatten()[:num]
    words = torch.stack(_blocks(seed, num + 3, stream, before // 4), dim=-1).flatten()
    return words[torch.arange(num, device=seed.device) + before % 4]


def philox_uniform(seed: Tensor, shape: Sequence[int], stream: Stream = Stream.DEQUANTISATION) -> Tensor:
    """Uniform numbers in [0, 1) on a grid of 2^-24: float32 of the given shape, filled in contiguous order.

    seed: as in `philox_words`, which lists the errors. Differs from one draw to the next only through
    (seed, offset) and stream.
    """
    words = philox_words(seed, math.prod(shape), stream)
    return ((words >> 8).to(torch.float32) * 2.0**-24).reshape(shape)


def philox_normal(seed: Tensor, shape: Sequence[int], stream: Stream = Stream.NOISE) -> Tensor:
    """Standard normal numbers: float32 of the given shape, filled in contiguous order.

    Box-Muller: words (0, 1) and (2, 3) of a block give two normals each,
    `sqrt(-2 log u) (cos, sin)(2 pi v)`, in fp32 with every operation and its order fixed and no fused
    multiply-add, so that all backends agree to 1e-6. The largest magnitude is 6.77.

    seed: as in `philox_words`, which lists the errors.
    """
    num = math.prod(shape)
    check_seed(seed, seed.device)
    w0, w1, w2, w3 = _blocks(seed, num, stream)
    normals = torch.stack((*box_muller(w0, w1), *box_muller(w2, w3)), dim=-1)
    return normals.flatten()[:num].reshape(shape)


def philox_flip(seed: Tensor, batch: int) -> Tensor:
    """One fair coin per image, the top bit of its word in the FLIP stream: (batch,) bool.

    seed: as in `philox_words`, which lists the errors.
    """
    return (philox_words(seed, batch, Stream.FLIP) >> 31).bool()


def drop_threshold(dropout: float) -> int:
    """Elements whose word in the DROPOUT stream is below this are dropped; `dropout` is their probability."""
    return int(dropout * 2**32)


def box_muller(word_u: Tensor, word_v: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normals from two words: fp32 tensors of the words' shape."""
    # float(word) rounds, so u lies in [2^-33, 1]: its logarithm is finite and at most 0.
    u = word_u.to(torch.float32) * 2.0**-32 + 2.0**-33
    # PyTorch's fp32 root is not always correctly rounded; the fp64 root rounded to fp32 is.
    radius = (-2.0 * _log(u)).double().sqrt().to(torch.float32)
    cos, sin = _cos_sin(word_v)
    return radius * cos, radius * sin


def check_seed(seed: Tensor, device: torch.device) -> None:
    """Raises TypeError or ValueError unless seed is a (2,) int64 tensor on the device."""
    if not isinstance(seed, Tensor) or seed.dtype != torch.int64:
        got = seed.dtype if isinstance(seed, Tensor) else type(seed).__name__
        raise TypeError(f"seed: expected an int64 tensor (seed, offset), got {got}")
    if seed.shape != (2,):
        raise ValueError(f"seed: expected shape (2,), (seed, offset), got {tuple(seed.shape)}")
    if seed.device != device:
        raise ValueError(f"seed: expected it on {device}, where the images are, got {seed.device}")


def _blocks(
    seed: Tensor, num: int, stream: Stream, before: Tensor | int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The blocks that hold `num` words, after leaving out `before` blocks."""
    if num > MAX_ELEMENTS:
        raise ValueError(f"a draw holds at most {MAX_ELEMENTS} elements, asked for {num}; draw it in parts")
    block = torch.arange((num + 3) // 4, device=seed.device) + before
    seed_low, seed_high = seed[0] & _MASK, _high(seed[0])
    offset_low, offset_high = seed[1] & _MASK, _high(seed[1])
    stream_word = torch.full_like(block, int(stream))
    return philox4x32_10((block, stream_word, offset_low, offset_high), (seed_low, seed_high))


def _high(x: Tensor) -> Tensor:
    """The upper 32 of 64 bits; the mask undoes the sign extension of the shift."""
    return (x >> 32) & _MASK


def _log(u: Tensor) -> Tensor:
    """Natural logarithm of a positive, normal fp32 tensor."""
    bits = u.view(torch.int32)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    square = f * f
    tail = (f * square) * _horner(f, LOG_COEFFICIENTS)
    return exponent.to(torch.float32) * LN2 + (f + (tail - 0.5 * square))


def _cos_sin(word: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of 2 pi word / 2^32, by the nearest quarter turn and a polynomial in the rest."""
    quarter = ((word + (1 << 29)) >> 30) & 3
    x = (((word + (1 << 29)) & 0x3FFFFFFF) - (1 << 29)).to(torch.float32) * 2.0**-30
    square = x * x
    sin = x * _horner(square, SIN_COEFFICIENTS)
    cos = square * _horner(square, COS_COEFFICIENTS) + 1.0
    odd = (quarter & 1).bool()
    cos_sign = torch.where(((quarter + 1) & 2).bool(), -1.0, 1.0)
    sin_sign = torch.where((quarter & 2).bool(), -1.0, 1.0)
    return torch.where(odd, sin, cos) * cos_sign, torch.where(odd, cos, sin) * sin_sign


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    value = torch.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value
