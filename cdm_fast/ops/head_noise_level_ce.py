"""`noise_level_ce` of a linear head, computed from its features without holding all logits at once.

B batch, D features, L = T+2 noise levels, K classes, N = (L-1) K + 1 rows of the head: row `t K + c` is for
class c at level t <= T, the last for pure noise. All logits z are relative to that of pure noise, so that
common constants cancel.

The rows are processed in blocks of whole levels. The forward pass keeps one running log-sum-exp per image;
the backward pass recomputes each block's logits. The products are PyTorch's on every device.

This saves memory, not time: the logits are computed twice. With gradients, B = 128, D = 256, L = 1002,
fp32, against the head followed by `noise_level_ce` (2 threads of an AMD EPYC, Zen 5, torch 2.13; pytest
benchmarks/bench_head_noise_level_ce.py --benchmark-only --threads 2), peak memory beyond the gradients:

    K              1      10     100    1000
    here, MiB      1.5    12     12     13
    one by one     0.5    4.9    49     489
    speed          0.61   0.67   0.77   not timed    (1 means equally fast)

These speeds are for otherwise idle cores; on busy cores it is slower still, because it synchronises its
threads more often. It is worthwhile if memory is short, from about 30 classes on. No GPU has been measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_fast.ops import backend, checks
from cdm_fast.ops.noise_level_ce import NoiseLevelCE, noise_level_ce_reference
from cdm_fast.ops.precision import compute_dtype
from cdm_fast.ops.registry import define, overload

# Number of logits held at a time, unless one level of a batch has more. On a CPU 2^18 to 2^21 are equally
# fast; on a GPU each block costs a dozen launches.
BLOCK_ELEMENTS = 1 << 20
# Smaller shares of a softmax, below 1e-30, have no gradient in fp32, as in csrc/noise_level_ce_body.h.
LOWEST_LOG_SHARE = -69.0


def head_noise_level_ce_reference(
    h: Tensor,  # (B, D)
    weight_c: Tensor,  # (N, D)
    bias_c: Tensor,  # (N,)
    level: Tensor,  # (B,) int64
    label: Tensor | None = None,  # (B,) int64
    num_classes: int = 1,
) -> NoiseLevelCE:
    """The specification of `head_noise_level_ce` in plain PyTorch; see there."""
    with torch.autocast(h.device.type, enabled=False):
        logits = F.linear(_wide(h), _wide(weight_c), _wide(bias_c))
        return noise_level_ce_reference(logits, level, label, num_classes)


def head_noise_level_ce(
    h: Tensor,  # (B, D)
    weight_c: Tensor,  # (N, D)
    bias_c: Tensor,  # (N,)
    level: Tensor,  # (B,) int64
    label: Tensor | None = None,  # (B,) int64
    num_classes: int = 1,
) -> NoiseLevelCE:
    """`noise_level_ce(h @ weight_c.T + bias_c, level, label, num_classes)` in memory for one block of logits.

    h: features; fp32, bf16, fp16 or fp64. weight_c, bias_c: the head's cumulated parameters, of h's dtype.
    level: 0..L-1.
    label: 0..K-1, or -1 for an image without a label; None means -1 throughout.
    num_classes: K; N - 1 must be a multiple of it.

    Computed in fp32 (fp64 for fp64). Differentiable once with respect to h, weight_c and bias_c
    (use_backend("reference"): to any order). Raises TypeError or ValueError, naming the argument, for
    arguments that do not match the above. Source: CDM Alg. 1 and Thm 3.2.
    """
    num_levels = _check(h, weight_c, bias_c, level, label, num_classes)
    checks.check_index_range("level", level, 0, num_levels)
    if label is not None:
        checks.check_index_range("label", label, -1, num_classes)
    if backend.selected_backend() == "reference":
        return head_noise_level_ce_reference(h, weight_c, bias_c, level, label, num_classes)
    label = torch.full_like(level, -1) if label is None else label
    op = overload("head_noise_level_ce", "native")
    loss, log_ratio, _ = op(h, weight_c, bias_c, level, label, num_classes)
    return NoiseLevelCE(loss, log_ratio)


def _wide(x: Tensor) -> Tensor:
    return x.to(compute_dtype(x.dtype))


def _forward(
    h: Tensor, weight_c: Tensor, bias_c: Tensor, level: Tensor, label: Tensor, num_classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """loss, log_ratio, and log_total (B,): the log-sum-exp of all z."""
    with torch.autocast(h.device.type, enabled=False):
        h = _wide(h)
        origin, noise = _noise_logit(h, weight_c, bias_c)
        is_noise = level == (len(weight_c) - 1) // num_classes
        picked = torch.where(is_noise, noise, torch.nan)  # remains NaN for a level out of range
        log_total = noise
        for first_level, rows in _blocks(len(h), len(weight_c), num_classes):
            z = _block_logits(h, weight_c, bias_c, rows, origin)
            true, _, inside = _true_logits(z, level - first_level, label, num_classes)
            picked = torch.where(inside, _picked(true, label), picked)
            log_total = torch.logaddexp(log_total, z.logsumexp(1))
        return log_total - picked, picked - noise, log_total


def _backward_blocks(
    h: Tensor,
    weight_c: Tensor,
    bias_c: Tensor,
    level: Tensor,
    label: Tensor,
    num_classes: int,
    log_total: Tensor,
    grad_loss: Tensor,
    grad_log_ratio: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to h, weight_c and bias_c; log_total as `_forward` returned it."""
    with torch.autocast(h.device.type, enabled=False):
        features, dtype = _wide(h), h.dtype
        origin, noise = _noise_logit(features, weight_c, bias_c)
        grad_weight, grad_bias = torch.empty_like(weight_c), torch.empty_like(bias_c)
        grad_true = grad_log_ratio - grad_loss
        is_noise = level == (len(weight_c) - 1) // num_classes
        grad_noise = grad_loss * torch.exp(noise - log_total) - grad_log_ratio
        grad_noise = grad_noise + torch.where(is_noise, grad_true, 0)
        grad_h = grad_noise[:, None] * _wide(weight_c[-1])
        grad_weight[-1], grad_bias[-1] = grad_noise @ features, grad_noise.sum()
        for first_level, rows in _blocks(len(h), len(weight_c), num_classes):
            z = _block_logits(features, weight_c, bias_c, rows, origin)
            true, place, inside = _true_logits(z, level - first_level, label, num_classes)
            # Shares of a level with all logits -inf are NaN; no image here has such a level.
            share = torch.where(inside[:, None], _class_shares(true, label) * grad_true[:, None], 0)
            grad_z = _shares(z.sub_(log_total[:, None])).mul_(grad_loss[:, None])
            grad_z.unflatten(1, (-1, num_classes)).scatter_add_(1, place, share[:, None])
            grad_h.addmm_(grad_z, _wide(weight_c[rows]))
            grad_weight[rows], grad_bias[rows] = grad_z.T @ features, grad_z.sum(0)
        return grad_h.to(dtype), grad_weight, grad_bias


def _shares(log_share: Tensor) -> Tensor:
    """The exponential, in place; below `LOWEST_LOG_SHARE` 0 in fp32, as subnormals slow products down."""
    if log_share.dtype == torch.float32:
        F.threshold(log_share, LOWEST_LOG_SHARE, -torch.inf, inplace=True)
    return log_share.exp_()


def _noise_logit(h: Tensor, weight_c: Tensor, bias_c: Tensor) -> tuple[Tensor, Tensor]:
    """The origin that is subtracted from all logits, and the logit of pure noise relative to it: both (B,).

    The origin is the logit of pure noise, from the last row, and so the second is 0; if that logit is -inf,
    the origin is 0.
    """
    noise = torch.mv(h, _wide(weight_c[-1])) + _wide(bias_c[-1])
    origin = torch.where(noise == -torch.inf, 0.0, noise)
    return origin, noise - origin


def _blocks(batch: int, num_rows: int, num_classes: int) -> Iterator[tuple[int, slice]]:
    """(first level, rows) of each block of whole levels; pure noise is in none of them."""
    levels = max(1, BLOCK_ELEMENTS // (batch * num_classes))
    for first_row in range(0, num_rows - 1, levels * num_classes):
        last_row = min(first_row + levels * num_classes, num_rows - 1)
        yield first_row // num_classes, slice(first_row, last_row)


def _block_logits(h: Tensor, weight_c: Tensor, bias_c: Tensor, rows: slice, origin: Tensor) -> Tensor:
    """(B, rows): z of a block."""
    return torch.addmm(_wide(bias_c[rows]), h, _wide(weight_c[rows]).T).sub_(origin[:, None])


def _true_logits(z: Tensor, level: Tensor, label: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """The logits (B, K) of each image's level, their indices (B, 1, K), and whether the block has the level.

    level: relative to the block's first. A copy: z may be overwritten afterwards.
    """
    z = z.unflatten(1, (-1, num_classes))
    inside = (level >= 0) & (level < z.shape[1]) & (label < num_classes)
    place = level.clamp(0, z.shape[1] - 1)[:, None, None].expand(-1, 1, num_classes)
    return z.gather(1, place).squeeze(1), place, inside


def _picked(true: Tensor, label: Tensor) -> Tensor:
    """(B,): z[level, label], or logsumexp_c z[level, c] without a label."""
    labelled = true.gather(1, label.clamp(0, true.shape[1] - 1)[:, None]).squeeze(1)
    return torch.where(label >= 0, labelled, true.logsumexp(1))


def _class_shares(true: Tensor, label: Tensor) -> Tensor:
    """(B, K): the derivative of `_picked`, one-hot or softmax_c z[level, c]."""
    one_hot = torch.arange(true.shape[1], device=label.device) == label[:, None]
    return torch.where(label[:, None] >= 0, one_hot.to(true.dtype), true.softmax(1))


def _fake(h: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    compute = compute_dtype(h.dtype)
    loss, log_ratio, log_total = (h.new_empty(len(h), dtype=compute) for _ in range(3))
    return loss, log_ratio, log_total


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.num_classes = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])


def _backward(ctx: Any, grad_loss: Tensor, grad_log_ratio: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    *inputs, log_total = ctx.saved_tensors
    op = overload("head_noise_level_ce_backward", ctx.backend)
    gradients = op(*inputs, ctx.num_classes, log_total, grad_loss, grad_log_ratio)
    return *gradients, None, None, None


define(
    "head_noise_level_ce",
    "(Tensor h, Tensor weight_c, Tensor bias_c, Tensor level, Tensor label, int num_classes)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    cpu=_forward,
    cuda=_forward,
    save=_save,
    backward=_backward,
)
define(
    "head_noise_level_ce_backward",
    "(Tensor h, Tensor weight_c, Tensor bias_c, Tensor level, Tensor label, int num_classes,"
    " Tensor log_total, Tensor grad_loss, Tensor grad_log_ratio) -> (Tensor, Tensor, Tensor)",
    fake=lambda h, weight_c, bias_c, *_: tuple(torch.empty_like(x) for x in (h, weight_c, bias_c)),
    cpu=_backward_blocks,
    cuda=_backward_blocks,
)


def _check(
    h: Tensor, weight_c: Tensor, bias_c: Tensor, level: Tensor, label: Tensor | None, num_classes: int
) -> int:
    """Returns L; raises the errors of `head_noise_level_ce`."""
    checks.check_tensor("h", h, dtypes=checks.FLOATING, shape=(None, None))
    checks.check_batch("h", h)
    device, dtypes = h.device, (h.dtype,)
    checks.check_tensor("weight_c", weight_c, dtypes=dtypes, shape=(None, h.shape[1]), device=device)
    num_rows = weight_c.shape[0]
    if num_classes < 1 or num_rows < 2 or (num_rows - 1) % num_classes != 0:
        raise ValueError(
            f"weight_c: expected (L-1) K + 1 rows with num_classes K = {num_classes}, got {num_rows}"
        )
    checks.check_tensor("bias_c", bias_c, dtypes=dtypes, shape=(num_rows,), device=device)
    for name, value in (("level", level), ("label", label)):
        if value is not None:
            checks.check_tensor(name, value, dtypes=(torch.int64,), shape=(h.shape[0],), device=device)
    return (num_rows - 1) // num_classes + 1
