"""Calls of every Triton launcher, for whoever records or compiles what they launch instead of running it.

LAUNCHES has each kernel in each variant, at sizes of a training step. LARGE has sizes at which a second grid
axis or a 32-bit index would end; its tensors must be fake. `empty(*shape, dtype=)` makes a tensor.
"""

from collections.abc import Callable
from typing import Any

import torch

Empty = Callable[..., torch.Tensor]
INT64, BF16 = torch.int64, torch.bfloat16


def _images(
    empty: Empty, shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype
) -> torch.Tensor:
    if layout == torch.contiguous_format:
        return empty(*shape, dtype=dtype)
    batch, channels, height, width = shape
    return empty(batch, height, width, channels, dtype=dtype).permute(0, 3, 1, 2)


def noising(kernels: Any, empty: Empty) -> None:
    images, tables = (4, 3, 32, 32), (empty(1002), empty(1002))
    level, seed = empty(4, dtype=INT64), empty(2, dtype=INT64)
    pixels, bf16 = empty(*images, dtype=torch.uint8), empty(*images, dtype=BF16)
    kernels.noising(pixels, level, *tables, seed, None, 256, True, bf16, empty(*images), empty(*images))
    kernels.noising(
        empty(*images), level, *tables, None, empty(*images), 0, False, empty(*images), empty(0), empty(0)
    )
    dtypes = torch.uint8, BF16, torch.float32
    last = [_images(empty, images, torch.channels_last, dtype) for dtype in dtypes]
    kernels.noising(last[0], level, *tables, seed, None, 256, True, last[1], last[2], last[2])


def large_noising(kernels: Any, empty: Empty) -> None:
    images, level = empty(2**17, 3, 128, 128), empty(2**17, dtype=INT64)
    tables = empty(1002), empty(1002)
    kernels.noising(images, level, *tables, None, images, 0, False, images, empty(0), empty(0))


def noise_level_ce(kernels: Any, empty: Empty) -> None:
    for dtype, labelled, classes in ((torch.float32, False, 1), (BF16, True, 10)):
        _noise_level_ce(kernels, empty, 4, dtype, labelled, classes)


def large_noise_level_ce(kernels: Any, empty: Empty) -> None:
    _noise_level_ce(kernels, empty, 2**17, BF16, True, 10)
    _noise_level_ce(kernels, empty, 8, BF16, True, 2**19)


def _noise_level_ce(
    kernels: Any, empty: Empty, batch: int, dtype: torch.dtype, labelled: bool, classes: int
) -> None:
    level = empty(batch, dtype=INT64)
    logits = empty(batch, 1001 * classes + 1, dtype=dtype)
    common = (logits, level, level if labelled else None, 1002, classes)
    kernels.forward(*common, empty(batch), empty(batch), empty(batch, 6))
    kernels.backward(*common, empty(batch, 6), empty(batch), empty(batch), empty(*logits.shape, dtype=dtype))
    kernels.level_logits(logits, 1002, classes, empty(batch, 1002))


def denoise(kernels: Any, empty: Empty) -> None:
    _denoise_images(kernels, empty, 4, 64)
    for rows, classes in ((1002, None), (10011, 10)):
        _cotangent(kernels, empty, 4, rows, classes)


def large_denoise(kernels: Any, empty: Empty) -> None:
    _denoise_images(kernels, empty, 2**15, 256)
    _cotangent(kernels, empty, 4, 12 * 65_536 + 1, 65_536)
    _cotangent(kernels, empty, 2**16, 2**24 + 1, None)


def _denoise_images(kernels: Any, empty: Empty, batch: int, size: int) -> None:
    images, per_image = empty(batch, 3, size, size), empty(batch)
    grad_x = empty(*images.shape, dtype=BF16)
    kernels.epilogue(grad_x, images, per_image, images)
    kernels.clean_image(grad_x, images, per_image, per_image, images)
    kernels.loss(grad_x, images, per_image, images, per_image)
    kernels.loss_backward(grad_x, images, per_image, images, per_image, grad_x)


def _cotangent(kernels: Any, empty: Empty, batch: int, rows: int, classes: int | None) -> None:
    weight, level, out = empty(rows, 256), empty(batch, dtype=INT64), empty(batch, 256)
    shares = None if classes is None else empty(batch, classes)
    kernels.cotangent(weight, level, shares, out)
    kernels.cotangent_backward(weight, level, shares, out, weight, shares)


def group_norm_silu(kernels: Any, empty: Empty) -> None:
    seed = empty(3, dtype=INT64)
    contiguous, channels_last = torch.contiguous_format, torch.channels_last
    for second, size, layout, dropout in (
        (0, 16, contiguous, 0.0),
        (0, 8, channels_last, 0.1),
        (128, 16, contiguous, 0.0),
        (128, 8, channels_last, 0.0),
        (0, 16, channels_last, 0.1),
        (256, 16, channels_last, 0.0),
    ):
        batch = 64 if layout == channels_last else 4  # programs enough for one kernel
        _group_norm_silu(kernels, empty, (batch, 256, size, size), second, layout, seed, dropout)


def group_norm_silu_split(kernels: Any, empty: Empty) -> None:
    seed = empty(3, dtype=INT64)
    for second, dropout in ((0, 0.1), (128, 0.0)):
        _group_norm_silu(kernels, empty, (4, 256, 16, 16), second, torch.channels_last, seed, dropout)


def large_group_norm_silu(kernels: Any, empty: Empty) -> None:
    _group_norm_silu(kernels, empty, (2**17, 256, 32, 32), 128, torch.contiguous_format, None, 0.0)


def large_group_norm_silu_split(kernels: Any, empty: Empty) -> None:
    _group_norm_silu(kernels, empty, (2**17, 256, 32, 32), 128, torch.channels_last, None, 0.0)
    _group_norm_silu(kernels, empty, (1, 256, 2048, 2048), 128, torch.channels_last, None, 0.0)


def _group_norm_silu(
    kernels: Any,
    empty: Empty,
    shape: tuple[int, ...],
    second: int,
    layout: torch.memory_format,
    seed: torch.Tensor | None,
    dropout: float,
) -> None:
    batch, channels, *spatial = shape
    whole = channels + second
    x, y = _images(empty, shape, layout, BF16), _images(empty, (batch, whole, *spatial), layout, BF16)
    skip = _images(empty, (batch, second, *spatial), layout, BF16) if second else None
    stats, parameters = (empty(batch, 32), empty(batch, 32)), (empty(whole), empty(whole))
    gradients = empty(batch, whole), empty(batch, whole)
    inputs, options = (x, skip, *parameters), (True, dropout)
    kernels.forward(*inputs, seed, y, *stats, 32, 1e-6, *options)
    kernels.vjp(y, *inputs, *stats, seed, x, skip, *gradients, 32, *options)
    kernels.vjp_backward(x, skip, y, *inputs, *stats, seed, y, x, skip, *gradients, 32, *options)
    if hasattr(kernels, "sum_images"):
        kernels.sum_images(*gradients, empty(whole), empty(whole))


def image_noise(kernels: Any, empty: Empty) -> None:
    image = empty(4, dtype=INT64)
    kernels.image_noise(image, 1, 2, 3, empty(4, 3072))
    kernels.image_noise(image, 1, 2, 3, empty(4, 3072, dtype=INT64))


def large_image_noise(kernels: Any, empty: Empty) -> None:
    kernels.image_noise(empty(2**17, dtype=INT64), 1, 2, 3, empty(2**17, 3 * 128 * 128))


def attention(kernels: Any, empty: Empty) -> None:
    for width, dtype in ((64, BF16), (256, BF16), (64, torch.float32)):
        _attention(kernels, empty, (4, 256, width), dtype)


def large_attention(kernels: Any, empty: Empty) -> None:
    _attention(kernels, empty, (2**15, 4096, 256), BF16)
    _attention(kernels, empty, (1, 2**22, 1024), BF16)


def _attention(kernels: Any, empty: Empty, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, lse = empty(*shape, dtype=dtype), empty(shape[0], 1, shape[1])
    kernels.attention(x, x, x, 0.1, 1, x, lse)
    kernels.attention_vjp(x, x, x, x, x, lse, 0.1, 1, x, x, x)
    kernels.attention_vjp_backward(*(x,) * 8, lse, 0.1, 1, x, x, x, x)


def attention_rows(kernels: Any, empty: Empty) -> None:
    for columns, dtype in ((256, BF16), (4096, BF16), (4096, torch.float32)):
        _attention_rows(kernels, empty, (4, 64, columns), dtype)


def large_attention_rows(kernels: Any, empty: Empty) -> None:
    _attention_rows(kernels, empty, (2**15, 256, 256), BF16)


def _attention_rows(kernels: Any, empty: Empty, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, lse = empty(*shape, dtype=dtype), empty(*shape[:2])
    kernels.softmax(x, lse, 0.1)
    kernels.vjp(x, x, lse, 0.1)
    kernels.vjp_backward(x, x, x, x, lse, 0.1)


def rms_norm(kernels: Any, empty: Empty) -> None:
    for channels, dtype in ((512, BF16), (384, BF16), (128, torch.float32)):
        _rms_norm(kernels, empty, (4, 64, channels), dtype)


def large_rms_norm(kernels: Any, empty: Empty) -> None:
    _rms_norm(kernels, empty, (2**17, 256, 512), BF16)
    _rms_norm(kernels, empty, (1, 2**22, 1024), BF16)


def _rms_norm(kernels: Any, empty: Empty, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, weight = empty(*shape, dtype=dtype), empty(shape[2])
    rstd, of_images = empty(*shape[:2]), empty(shape[0], shape[2])
    kernels.forward(x, weight, x, rstd, 1e-6)
    kernels.vjp(x, x, of_images, rstd, x, None)
    kernels.vjp(x, x, weight, rstd, x, of_images)
    kernels.vjp_backward(x, x, x, weight, rstd, x, x, of_images)


def swiglu(kernels: Any, empty: Empty) -> None:
    seed = empty(3, dtype=INT64)
    for hidden, dropout, dtype in ((1376, 0.1, BF16), (1376, 0.0, BF16), (352, 0.0, torch.float32)):
        _swiglu(kernels, empty, (4, 64, hidden), seed if dropout else None, dropout, dtype)


def large_swiglu(kernels: Any, empty: Empty) -> None:
    _swiglu(kernels, empty, (2**17, 256, 1376), empty(3, dtype=INT64), 0.1, BF16)


def _swiglu(
    kernels: Any,
    empty: Empty,
    shape: tuple[int, int, int],
    seed: torch.Tensor | None,
    dropout: float,
    dtype: torch.dtype,
) -> None:
    h, y = empty(*shape[:2], 2 * shape[2], dtype=dtype), empty(*shape, dtype=dtype)
    kernels.forward(h, seed, y, dropout)
    kernels.vjp(y, h, seed, h, dropout)
    kernels.vjp_backward(h, y, h, seed, y, h, dropout)


LAUNCHES: dict[str, Callable[[Any, Empty], None]] = {
    "noising": noising,
    "image_noise": image_noise,
    "noise_level_ce": noise_level_ce,
    "denoise": denoise,
    "group_norm_silu": group_norm_silu,
    "group_norm_silu_split": group_norm_silu_split,
    "attention": attention,
    "attention_rows": attention_rows,
    "rms_norm": rms_norm,
    "swiglu": swiglu,
}
LARGE: dict[str, Callable[[Any, Empty], None]] = {
    "noising": large_noising,
    "image_noise": large_image_noise,
    "noise_level_ce": large_noise_level_ce,
    "denoise": large_denoise,
    "group_norm_silu": large_group_norm_silu,
    "group_norm_silu_split": large_group_norm_silu_split,
    "attention": large_attention,
    "attention_rows": large_attention_rows,
    "rms_norm": large_rms_norm,
    "swiglu": large_swiglu,
}
