"""Triton kernels of the cross-entropy over noise levels and classes, and of its gradient.

`cdm_fast/ops/noise_level_ce.py` is the specification. A logsumexp is kept as its maximum and the log of
the scaled sum, so that nothing is lost when the maximum is large.
"""

from __future__ import annotations

import triton
import triton.language as tl
from cdm_fast.kernels import on_its_device
from torch import Tensor

_BLOCK = 4096


@on_its_device
def forward(
    logits: Tensor,
    level: Tensor,
    label: Tensor | None,
    num_levels: int,
    num_classes: int,
    loss: Tensor,
    log_ratio: Tensor,
    sums: Tensor,
) -> None:
    """Fills loss and log_ratio (B,), and sums (B, 6): three logsumexps of all, true and noise logits.

    logits (B, N) in any floating dtype, the results fp32 (fp64 for fp64). All contiguous.
    """
    block, class_block = _block(logits.shape[1]), _block(num_classes)
    _forward_kernel[(logits.shape[0],)](
        logits,
        level,
        level if label is None else label,
        loss,
        log_ratio,
        sums,
        logits.shape[1],
        num_levels,
        num_classes,
        labelled=label is not None,
        block=block,
        class_block=class_block,
        num_warps=_warps(block),
    )


@on_its_device
def backward(
    logits: Tensor,
    level: Tensor,
    label: Tensor | None,
    num_levels: int,
    num_classes: int,
    sums: Tensor,
    grad_loss: Tensor | None,
    grad_log_ratio: Tensor | None,
    grad_logits: Tensor,
) -> None:
    """Fills grad_logits like logits, given the sums of `forward`. All contiguous; no gradient means 0."""
    batch, num_logits = logits.shape
    block = _block(num_logits)
    blocks = triton.cdiv(num_logits, block)
    _backward_kernel[(batch * blocks,)](
        logits,
        level,
        level if label is None else label,
        sums,
        sums if grad_loss is None else grad_loss,
        sums if grad_log_ratio is None else grad_log_ratio,
        grad_logits,
        blocks,
        num_logits,
        num_levels,
        num_classes,
        labelled=label is not None,
        loss_used=grad_loss is not None,
        log_ratio_used=grad_log_ratio is not None,
        block=block,
        num_warps=_warps(block),
    )


@on_its_device
def level_logits(logits: Tensor, num_levels: int, num_classes: int, result: Tensor) -> None:
    """Fills result (B, L), fp32 (fp64 for fp64), with the logsumexp over the classes of each level.

    logits (B, N) in any floating dtype. All contiguous.
    """
    batch, num_logits = logits.shape
    class_block = min(128, _block(num_classes))
    levels = max(1, 2048 // class_block)
    blocks = triton.cdiv(num_levels, levels)
    sizes = blocks, num_logits, num_levels, num_classes
    _level_logits_kernel[(batch * blocks,)](logits, result, *sizes, class_block=class_block, levels=levels)


def _block(size: int) -> int:
    return min(_BLOCK, max(16, triton.next_power_of_2(size)))


def _warps(block: int) -> int:
    return max(1, min(8, block // 256))


@triton.jit
def _true_range(
    level: tl.tensor, label: tl.tensor, num_logits: int, num_levels: int, num_classes: int
) -> tuple:
    """The logits of a level and label as [begin, end); empty where either is out of range."""
    known = (level >= 0) & (level < num_levels) & (label >= -1) & (label < num_classes)
    is_noise = level == num_levels - 1
    one_class = (label >= 0) & (level < num_levels - 1)
    begin = level * num_classes + tl.where(one_class, label, 0)
    end = tl.where(is_noise, num_logits, begin + tl.where(one_class, 1, num_classes))
    return tl.where(known, begin, 0), tl.where(known, end, 0)


@triton.jit
def _log_sum(
    z_ptr: tl.tensor, begin: tl.tensor, end: tl.tensor, compute: tl.constexpr, block: tl.constexpr
) -> tuple:
    """logsumexp of z[begin:end] as (maximum, log of the sum of exp(z - maximum)), in one read."""
    lowest: tl.constexpr = -3.0e38
    maximum = tl.full((block,), lowest, compute)
    total = tl.zeros((block,), compute)
    for first in range(begin, end, block):
        index = first + tl.arange(0, block)
        z = tl.load(z_ptr + index, mask=index < end, other=float("-inf")).to(compute)
        higher = tl.maximum(maximum, z)
        total = total * tl.exp(maximum - higher) + tl.exp(z - higher)
        maximum = higher
    highest = tl.max(maximum, 0)
    return highest, tl.log(tl.sum(total * tl.exp(maximum - highest), 0))


@triton.jit
def _forward_kernel(
    logits_ptr: tl.tensor,
    level_ptr: tl.tensor,
    label_ptr: tl.tensor,
    loss_ptr: tl.tensor,
    log_ratio_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    num_logits: int,
    num_levels: int,
    num_classes: int,
    labelled: tl.constexpr,
    block: tl.constexpr,
    class_block: tl.constexpr,
) -> None:
    b = tl.program_id(0).to(tl.int64)
    compute: tl.constexpr = loss_ptr.dtype.element_ty
    z_ptr = logits_ptr + b * num_logits
    level = tl.load(level_ptr + b)
    label = tl.load(label_ptr + b) if labelled else level * 0 - 1
    begin, end = _true_range(level, label, num_logits, num_levels, num_classes)
    nan = tl.where(end > begin, 0.0, float("nan"))

    first_noise = tl.cast(num_levels - 1, tl.int64) * num_classes
    all_max, all_log = _log_sum(z_ptr, 0, num_logits, compute, block)
    true_max, true_log = _log_sum(z_ptr, begin, end, compute, class_block)
    noise_max, noise_log = _log_sum(z_ptr, first_noise, num_logits, compute, class_block)
    all_max += nan
    true_max += nan
    tl.store(loss_ptr + b, (all_max - true_max) + (all_log - true_log))
    tl.store(log_ratio_ptr + b, (true_max - noise_max) + (true_log - noise_log))
    tl.store(sums_ptr + 6 * b, all_max)
    tl.store(sums_ptr + 6 * b + 1, all_log)
    tl.store(sums_ptr + 6 * b + 2, true_max)
    tl.store(sums_ptr + 6 * b + 3, true_log)
    tl.store(sums_ptr + 6 * b + 4, noise_max)
    tl.store(sums_ptr + 6 * b + 5, noise_log)


@triton.jit
def _level_logits_kernel(
    logits_ptr: tl.tensor,
    result_ptr: tl.tensor,
    blocks: int,
    num_logits: int,
    num_levels: int,
    num_classes: int,
    class_block: tl.constexpr,
    levels: tl.constexpr,
) -> None:
    b = (tl.program_id(0) // blocks).to(tl.int64)
    compute: tl.constexpr = result_ptr.dtype.element_ty
    lowest: tl.constexpr = -3.0e38
    z_ptr = logits_ptr + b * num_logits
    level = (tl.program_id(0) % blocks).to(tl.int64) * levels + tl.arange(0, levels)
    maximum = tl.full((levels,), lowest, compute)
    total = tl.zeros((levels,), compute)
    for first in range(0, num_classes, class_block):
        label = first + tl.arange(0, class_block)[None, :]
        index = level[:, None] * num_classes + label
        inside = (label < num_classes) & (index < num_logits)  # pure noise may have a single logit
        z = tl.load(z_ptr + index, mask=inside, other=float("-inf")).to(compute)
        higher = tl.maximum(maximum, tl.max(z, 1))
        total = total * tl.exp(maximum - higher) + tl.sum(tl.exp(z - higher[:, None]), 1)
        maximum = higher
    real = level < num_levels
    tl.store(result_ptr + b * num_levels + level, maximum + tl.log(tl.where(real, total, 1.0)), mask=real)


@triton.jit
def _term(z: tl.tensor, weight: tl.tensor, inside: tl.tensor, alone: tl.tensor, sums: tl.tensor) -> tl.tensor:
    """weight * softmax where `inside`, else 0. sums: pointer to the maximum and the log of the scaled sum.

    alone: one logit has softmax 1 even if it is -inf.
    """
    exponent = tl.where(inside & (alone == 0), (z - tl.load(sums)) - tl.load(sums + 1), 0.0)
    return tl.where(inside, weight * tl.exp(exponent), 0.0)


@triton.jit
def _backward_kernel(
    logits_ptr: tl.tensor,
    level_ptr: tl.tensor,
    label_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    grad_loss_ptr: tl.tensor,
    grad_log_ratio_ptr: tl.tensor,
    grad_logits_ptr: tl.tensor,
    blocks: int,
    num_logits: int,
    num_levels: int,
    num_classes: int,
    labelled: tl.constexpr,
    loss_used: tl.constexpr,
    log_ratio_used: tl.constexpr,
    block: tl.constexpr,
) -> None:
    b = (tl.program_id(0) // blocks).to(tl.int64)
    compute: tl.constexpr = sums_ptr.dtype.element_ty
    level = tl.load(level_ptr + b)
    label = tl.load(label_ptr + b) if labelled else level * 0 - 1
    begin, end = _true_range(level, label, num_logits, num_levels, num_classes)
    sums = sums_ptr + 6 * b
    zero = tl.zeros((), compute)
    grad_loss = tl.load(grad_loss_ptr + b) if loss_used else zero
    grad_log_ratio = tl.load(grad_log_ratio_ptr + b) if log_ratio_used else zero

    index = (tl.program_id(0) % blocks).to(tl.int64) * block + tl.arange(0, block)
    inside = index < num_logits
    z = tl.load(logits_ptr + b * num_logits + index, mask=inside, other=0).to(compute)
    is_true = (index >= begin) & (index < end)
    first_noise = tl.cast(num_levels - 1, tl.int64) * num_classes
    is_noise = inside & (index >= first_noise)
    one_noise = num_logits - first_noise == 1
    grad = _term(z, grad_loss, inside, num_logits == 1, sums)
    grad += _term(z, grad_log_ratio - grad_loss, is_true, end - begin == 1, sums + 2)
    grad += _term(z, -grad_log_ratio, is_noise, one_noise, sums + 4)
    out = grad_logits_ptr + b * num_logits + index
    tl.store(out, grad.to(grad_logits_ptr.dtype.element_ty), mask=inside)
