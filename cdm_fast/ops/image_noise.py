"""Noise per image: a function of (seed, number of the image, draw), independent of batch and device.

B images. The counter of a Philox block is (block within the image, SAMPLING, image, draw), its key the seed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cdm_fast.ops import backend as _backend
from cdm_fast.ops import checks
from cdm_fast.ops.backend import Coverage
from cdm_fast.ops.philox import Stream, box_muller, philox4x32_10
from cdm_fast.ops.registry import define, overload

_backend.declare("image_noise", triton=Coverage("cuda", (torch.int64,)))


def image_normals(
    image: Tensor,  # (B,) int64, 0..2^32-1
    size: int,
    seed: int,
    draw: int,
) -> Tensor:  # (B, size)
    """Standard normal numbers in fp32: `size` per image, the `draw`-th draw of this seed.

    seed: 0..2^64-1; draw: 0..2^32-1. All backends agree to 1e-6 (see `philox_normal`). Raises TypeError or
    ValueError, naming the argument, for arguments that do not match the above.
    """
    _check(image, size, seed, draw)
    return _call("image_normals", image_normals_reference, image, size, seed, draw)


def image_words(
    image: Tensor,  # (B,) int64, 0..2^32-1
    size: int,
    seed: int,
    draw: int,
) -> Tensor:  # (B, size)
    """Random 32-bit words in int64, bit for bit the same everywhere; arguments as in `image_normals`."""
    _check(image, size, seed, draw)
    return _call("image_words", image_words_reference, image, size, seed, draw)


def image_normals_reference(image: Tensor, size: int, seed: int, draw: int) -> Tensor:
    """The specification of `image_normals` in plain PyTorch; see there."""
    w0, w1, w2, w3 = _blocks(image, size, seed, draw)
    normals = torch.stack((*box_muller(w0, w1), *box_muller(w2, w3)), dim=-1)
    return normals.flatten(1)[:, :size]


def image_words_reference(image: Tensor, size: int, seed: int, draw: int) -> Tensor:
    """The specification of `image_words` in plain PyTorch; see there."""
    return torch.stack(_blocks(image, size, seed, draw), dim=-1).flatten(1)[:, :size]


def _blocks(image: Tensor, size: int, seed: int, draw: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The blocks that hold `size` words of each image, four (B, blocks) words."""
    device = image.device
    block = torch.arange((size + 3) // 4, device=device)
    stream, draws = torch.full_like(block, Stream.SAMPLING), torch.full_like(block, draw)
    low, high = (torch.full((), word, device=device) for word in (seed & 0xFFFFFFFF, seed >> 32))
    return philox4x32_10((block, stream, image[:, None], draws), (low, high))


def _check(image: Tensor, size: int, seed: int, draw: int) -> None:
    checks.check_tensor("image", image, dtypes=(torch.int64,), shape=(None,))
    for name, value, bits in (("size", size, 34), ("seed", seed, 64), ("draw", draw, 32)):
        if not 0 <= value < 2**bits:
            raise ValueError(f"{name}: expected an integer in 0..2^{bits}-1, got {value}")


def _call(name: str, reference: Any, image: Tensor, size: int, seed: int, draw: int) -> Tensor:
    backend = _backend.resolve("image_noise", image)
    if backend == "reference" or image.numel() * size == 0:
        return reference(image, size, seed, draw)
    return overload(name, backend)(image.contiguous(), size, seed & 0xFFFFFFFF, seed >> 32, draw)


def _triton_normals(image: Tensor, size: int, *key: int) -> Tensor:
    return _triton(image.new_empty((len(image), size), dtype=torch.float32), image, size, *key)


def _triton_words(image: Tensor, size: int, *key: int) -> Tensor:
    return _triton(image.new_empty((len(image), size)), image, size, *key)


def _triton(out: Tensor, image: Tensor, size: int, *key: int) -> Tensor:
    from cdm_fast.kernels import image_noise as kernels

    kernels.image_noise(image, *key, out)
    return out


_SCHEMA = "(Tensor image, int size, int seed_low, int seed_high, int draw) -> Tensor"
define(
    "image_normals",
    _SCHEMA,
    fake=lambda image, size, *_: image.new_empty((len(image), size), dtype=torch.float32),
    triton=_triton_normals,
)
define(
    "image_words",
    _SCHEMA,
    fake=lambda image, size, *_: image.new_empty((len(image), size)),
    triton=_triton_words,
)
