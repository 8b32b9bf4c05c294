"""Noising in one pass: x_t = a[level] x_0 + s[level] eps.

B batch, L = T+2 noise levels; an image is (B, ...), its elements numbered in contiguous (B, C, H, W) order.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from cdm_fast.ops import backend as _backend
from cdm_fast.ops import checks
from cdm_fast.ops.backend import Coverage
from cdm_fast.ops.philox import Stream, check_seed, philox_flip, philox_normal, philox_uniform
from cdm_fast.ops.precision import compute_dtype
from cdm_fast.ops.registry import define, overload

_backend.declare(
    "noising",
    cpp=Coverage("cpu", (torch.uint8, torch.float32, torch.bfloat16, torch.float64)),
    cuda=Coverage("cuda", (torch.uint8, torch.float32, torch.bfloat16, torch.float16)),
    triton=Coverage("cuda", (torch.uint8, *checks.FLOATING)),
)


class NoisingResult(NamedTuple):
    """The result of `noising`: the noisy image, its noise, and the image that was noised."""

    x_t: Tensor  # like x_0, in the requested dtype
    eps: Tensor  # like x_0, fp32 (fp64 for fp64 images); the given tensor, if there was one
    x0: Tensor  # like x_0, fp32 (fp64 for fp64 images), in [-1, 1], flipped if x_t is


def noising_reference(
    x0: Tensor,  # (B, ...)
    level: Tensor,  # (B,) int64
    a: Tensor,  # (L,)
    s: Tensor,  # (L,)
    seed: Tensor | None = None,  # (2,) int64
    *,
    eps: Tensor | None = None,
    num_grey_levels: int | None = None,
    flip: bool = False,
    dtype: torch.dtype | None = None,
) -> NoisingResult:
    """The specification of `noising` in plain PyTorch; see there."""
    compute = compute_dtype(x0.dtype)
    per_image = (-1,) + (1,) * (x0.dim() - 1)
    layout = _layout(x0)
    clean = x0.to(compute).contiguous(memory_format=layout)
    seed = cast(Tensor, seed)  # `noising` checks that it is given if something is drawn
    if flip:
        coin = philox_flip(seed, x0.shape[0]).reshape(per_image)
        clean = torch.where(coin, clean.flip(-1), clean)
    if num_grey_levels is not None:
        uniform = philox_uniform(seed, x0.shape, Stream.DEQUANTISATION)
        clean = (clean + uniform) * (2.0 / num_grey_levels) - 1.0
    noise = eps
    if noise is None:
        noise = philox_normal(seed, x0.shape).to(compute).contiguous(memory_format=layout)
    a_t, s_t = (table.to(compute).index_select(0, level).reshape(per_image) for table in (a, s))
    x_t = a_t * clean + s_t * noise.to(compute)
    return NoisingResult(x_t.to(dtype or (compute if num_grey_levels else x0.dtype)), noise, clean)


def noising(
    x0: Tensor,  # (B, ...)
    level: Tensor,  # (B,) int64
    a: Tensor,  # (L,)
    s: Tensor,  # (L,)
    seed: Tensor | None = None,  # (2,) int64
    *,
    eps: Tensor | None = None,
    num_grey_levels: int | None = None,
    flip: bool = False,
    dtype: torch.dtype | None = None,
) -> NoisingResult:
    """x_t = a[level] x_0 + s[level] eps in one pass, with dequantisation, flips and the draw of the noise.

    x0: float images in [-1, 1], or uint8 ones with values below `num_grey_levels` = N, which become
        2 (u + U) / N - 1 with U uniform in [0, 1).
    level: noise level per image, 0..L-1.
    a, s: the schedule's tables, fp32 or fp64; constants, they carry no gradient.
    seed: (seed, offset) on the device of x0; decides the noise (unless `eps` is given), U and the flips, each
        from its own Philox stream, so that `philox_normal(seed, x0.shape)` is the noise again.
    eps: the noise; drawn by default.
    flip: mirror each image along its last axis with probability 1/2; noise and U apply to the mirrored image.
    dtype: dtype of x_t; by default the dtype of x0, or fp32 for uint8.

    Channels-last images give channels-last results, without a copy; the random numbers of an element are
    those of its index in contiguous order. All arithmetic is in fp32 (fp64 for fp64 images). Differentiable
    with respect to x0 and eps. Raises TypeError or ValueError, naming the argument, for arguments that do not
    match the above. Source: DDPM eq. 4.
    """
    _check(x0, level, a, s, seed, eps, num_grey_levels, flip, dtype)
    checks.check_index_range("level", level, 0, a.shape[0])
    backend = _backend.resolve("noising", x0)
    if backend == "reference":
        return noising_reference(
            x0, level, a, s, seed, eps=eps, num_grey_levels=num_grey_levels, flip=flip, dtype=dtype
        )
    compute = compute_dtype(x0.dtype)
    wanted = dtype or (compute if x0.dtype == torch.uint8 else x0.dtype)
    stored = wanted if _stores(backend, compute, wanted) else compute
    layout = _layout(x0)
    noise = None if eps is None else eps.to(compute).contiguous(memory_format=layout)
    x_t, drawn, clean = overload("noising", backend)(
        x0.contiguous(memory_format=layout),
        level.contiguous(),
        a.to(compute).contiguous(),
        s.to(compute).contiguous(),
        seed,
        noise,
        num_grey_levels or 0,
        flip,
        stored,
    )
    returned_x0 = clean if flip or num_grey_levels else x0.to(compute)
    return NoisingResult(x_t.to(wanted), drawn if eps is None else eps, returned_x0)


def _layout(x0: Tensor) -> torch.memory_format:
    """The memory format of the results: channels-last if x0 is, else contiguous."""
    if x0.dim() == 4 and not x0.is_contiguous() and x0.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _stores(backend: str, compute: torch.dtype, dtype: torch.dtype) -> bool:
    """True if the kernels write x_t in this dtype; otherwise it is converted afterwards."""
    if compute == torch.float64:
        return dtype == compute
    return dtype in (compute, torch.bfloat16) or (dtype == torch.float16 and backend != "cpp")


def _fake(
    x0: Tensor,
    level: Tensor,
    a: Tensor,
    s: Tensor,
    seed: Tensor | None,
    eps: Tensor | None,
    num_grey_levels: int,
    flip: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, the drawn noise, the image after dequantisation and flip; empty if not applicable."""
    empty = partial(torch.empty_like, x0, memory_format=_layout(x0))
    return (
        empty(dtype=dtype),
        empty(dtype=a.dtype) if eps is None else a.new_empty(0),
        empty(dtype=a.dtype) if flip or num_grey_levels else a.new_empty(0),
    )


def _triton(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    from cdm_fast.kernels import noising as kernels

    results = _fake(*inputs)
    x0, level, a, s, seed, eps, num_grey_levels, flip, _ = inputs
    kernels.noising(x0, level, a, s, seed, eps, num_grey_levels, flip, *results)
    return results


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x0, level, a, s, seed, _, _, ctx.flip, _ = inputs
    ctx.save_for_backward(level, a, s, seed)
    ctx.dtype = x0.dtype
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Any, grad_clean: Tensor) -> tuple[Tensor | None, ...]:
    """x_t is linear in x0 and eps, this gradient is rarely needed: plain PyTorch, differentiable again."""
    level, a, s, seed = ctx.saved_tensors
    per_image = (-1,) + (1,) * (grad.dim() - 1)
    grad_x0 = grad_eps = None
    if ctx.needs_input_grad[0]:
        grad_x0 = a.index_select(0, level).reshape(per_image) * grad
        if ctx.flip:
            grad_x0 = grad_x0 + grad_clean
            coin = philox_flip(seed, grad.shape[0]).reshape(per_image)
            grad_x0 = torch.where(coin, grad_x0.flip(-1), grad_x0)
        grad_x0 = grad_x0.to(ctx.dtype)
    if ctx.needs_input_grad[5]:
        grad_eps = s.index_select(0, level).reshape(per_image) * grad
    return grad_x0, None, None, None, None, grad_eps, None, None, None


define(
    "noising",
    "(Tensor x0, Tensor level, Tensor a, Tensor s, Tensor? seed, Tensor? eps, int num_grey_levels,"
    " bool flip, ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    triton=_triton,
    save=_save,
    backward=_backward,
)


def _check(
    x0: Tensor,
    level: Tensor,
    a: Tensor,
    s: Tensor,
    seed: Tensor | None,
    eps: Tensor | None,
    num_grey_levels: int | None,
    flip: bool,
    dtype: torch.dtype | None,
) -> None:
    checks.check_tensor("x0", x0, dtypes=(torch.uint8, *checks.FLOATING))
    checks.check_batch("x0", x0)
    device = x0.device
    checks.check_tensor("level", level, dtypes=(torch.int64,), shape=(x0.shape[0],), device=device)
    checks.check_tensor("a", a, dtypes=(torch.float32, torch.float64), shape=(None,), device=device)
    checks.check_tensor("s", s, dtypes=(a.dtype,), shape=(a.shape[0],), device=device)
    if a.requires_grad or s.requires_grad:
        raise ValueError("a, s: expected tables without gradient; they are constants of the schedule")
    if eps is not None:
        checks.check_tensor("eps", eps, dtypes=checks.FLOATING, shape=tuple(x0.shape), device=device)
    if (x0.dtype == torch.uint8) != (num_grey_levels is not None):
        raise ValueError(
            f"num_grey_levels: expected an int for uint8 images and None for float ones, "
            f"got {num_grey_levels} for {x0.dtype}"
        )
    if num_grey_levels is not None and not 2 <= num_grey_levels <= 256:
        raise ValueError(f"num_grey_levels: expected 2..256, got {num_grey_levels}")
    if dtype is not None and dtype not in checks.FLOATING:
        raise TypeError(f"dtype: expected a floating dtype for x_t, got {dtype}")
    if seed is not None:
        check_seed(seed, device)
    elif eps is None or flip or num_grey_levels is not None:
        raise ValueError("seed: expected a tensor (seed, offset), got None, and there is something to draw")
