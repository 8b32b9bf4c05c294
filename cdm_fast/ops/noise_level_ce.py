"""Cross-entropy over noise levels (and classes), and `level_logits`, the log-sum-exp over classes.

B batch, L = T+2 noise levels, K classes. Logits come as (B, L); as joint logits (B, (T+1) K + 1), entry
`t K + c` for class c at level t <= T and one entry for pure noise, which has no class; or as (B, L, K).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cdm_fast.ops import backend as _backend
from cdm_fast.ops import checks
from cdm_fast.ops.backend import Coverage
from cdm_fast.ops.precision import compute_dtype
from cdm_fast.ops.registry import define, overload

# CUDA devices have only the Triton kernel.
_backend.declare(
    "level_logits",
    cpp=Coverage("cpu", (torch.float32, torch.bfloat16, torch.float64)),
    triton=Coverage("cuda", checks.FLOATING),
)
_backend.declare(
    "noise_level_ce",
    cpp=Coverage("cpu", (torch.float32, torch.bfloat16, torch.float64)),
    cuda=Coverage("cuda", (torch.float32, torch.bfloat16, torch.float16)),
    triton=Coverage("cuda", checks.FLOATING),
)


class NoiseLevelCE(NamedTuple):
    """The result of `noise_level_ce`, in fp32 (fp64 for fp64 logits)."""

    loss: Tensor  # (B,) nats, cross-entropy
    log_ratio: Tensor  # (B,) nats, f[level] - f[T+1]


def noise_level_ce_reference(
    logits: Tensor,  # (B, (L-1) K + 1) or (B, L, K)
    level: Tensor,  # (B,) int64
    label: Tensor | None = None,  # (B,) int64
    num_classes: int = 1,
) -> NoiseLevelCE:
    """The specification of `noise_level_ce` in plain PyTorch; see there."""
    f = level_logits_reference(logits, num_classes)
    picked = f.gather(1, level[:, None]).squeeze(1)
    if label is not None:
        z = logits.flatten(1).to(f.dtype)
        entry = (level * num_classes + label.clamp(min=0)).clamp(max=z.shape[1] - 1)
        labelled = (label >= 0) & (level < f.shape[1] - 1)
        picked = torch.where(labelled, z.gather(1, entry[:, None]).squeeze(1), picked)
    return NoiseLevelCE(f.logsumexp(1) - picked, picked - f[:, -1])


def level_logits_reference(logits: Tensor, num_classes: int = 1) -> Tensor:
    """The specification of `level_logits` in plain PyTorch; see there."""
    z = logits.to(compute_dtype(logits.dtype))
    if z.dim() == 3:
        return z.logsumexp(-1)
    if num_classes == 1:
        return z
    return torch.cat([z[:, :-1].unflatten(1, (-1, num_classes)).logsumexp(-1), z[:, -1:]], dim=1)


def level_logits(logits: Tensor, num_classes: int = 1) -> Tensor:
    """f[t] = logsumexp_c z[t, c], the class-free logits: (B, L) in fp32 (fp64 for fp64 logits).

    logits, num_classes: as in `noise_level_ce`, which lists the errors. The logits are read once.
    Differentiable to any order, except by `torch.func`, which needs the reference.
    """
    num_levels, num_classes = _check_logits(logits, num_classes)
    backend = _backend.resolve("level_logits", logits)
    if num_classes == 1 or backend == "reference":
        return level_logits_reference(logits, num_classes)
    return overload("level_logits", backend)(logits.flatten(1).contiguous(), num_levels, num_classes)


def noise_level_ce(
    logits: Tensor,  # (B, (L-1) K + 1) or (B, L, K)
    level: Tensor,  # (B,) int64
    label: Tensor | None = None,  # (B,) int64
    num_classes: int = 1,
) -> NoiseLevelCE:
    """Cross-entropy of the true (level, class) among all pairs, and the log-ratio of the pair to pure noise.

    With `f_true` = z[level, label], or logsumexp_c z[level, c] without a label or at level T+1,

        loss = logsumexp over all logits - f_true;   log_ratio = f_true - f[T+1]

    Args:
        logits: fp32, bf16, fp16 or fp64, of any magnitude up to 1e4 and beyond; accumulated in fp32 (fp64).
        level: 0..L-1.
        label: 0..K-1, or -1 for an image without a label; None means -1 throughout.
        num_classes: K; 1 for plain logits (B, L). For logits (B, L, K) their last size.

    Returns:
        `loss` (B,) and `log_ratio` (B,) in nats, differentiable once with respect to the logits (the
        reference: to any order).

    Raises:
        TypeError: an argument of the wrong type or dtype; the message names it.
        ValueError: an argument of the wrong shape, device or range.

    Source: CDM Alg. 1 and Thm 3.2.

    Example:
        >>> import torch
        >>> from cdm_fast.ops import noise_level_ce
        >>> result = noise_level_ce(torch.zeros(2, 4), torch.tensor([0, 3]))
        >>> result.loss  # of uniform logits: log 4
        tensor([1.3863, 1.3863])
        >>> result.log_ratio
        tensor([0., 0.])
    """
    num_levels, num_classes = _check(logits, level, label, num_classes)
    checks.check_index_range("level", level, 0, num_levels)
    if label is not None:
        checks.check_index_range("label", label, -1, num_classes)
    backend = _backend.resolve("noise_level_ce", logits)
    if backend == "reference":
        return noise_level_ce_reference(logits, level, label, num_classes)
    label = None if label is None else label.contiguous()
    logits, level = logits.flatten(1).contiguous(), level.contiguous()
    loss, log_ratio, _ = overload("noise_level_ce", backend)(logits, level, label, num_levels, num_classes)
    return NoiseLevelCE(loss, log_ratio)


def _fake(logits: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """loss, log_ratio, and the (B, 6) sums that the backward pass reads."""
    batch, compute = logits.shape[0], compute_dtype(logits.dtype)
    loss, log_ratio = (logits.new_empty(batch, dtype=compute) for _ in range(2))
    return loss, log_ratio, logits.new_empty((batch, 6), dtype=compute)


def _triton(
    logits: Tensor, level: Tensor, label: Tensor | None, num_levels: int, num_classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    from cdm_fast.kernels import noise_level_ce as kernels

    results = _fake(logits)
    kernels.forward(logits, level, label, num_levels, num_classes, *results)
    return results


def _triton_backward(
    logits: Tensor,
    level: Tensor,
    label: Tensor | None,
    num_levels: int,
    num_classes: int,
    sums: Tensor,
    grad_loss: Tensor | None,
    grad_log_ratio: Tensor | None,
) -> Tensor:
    from cdm_fast.kernels import noise_level_ce as kernels

    grad = torch.empty_like(logits)
    kernels.backward(logits, level, label, num_levels, num_classes, sums, grad_loss, grad_log_ratio, grad)
    return grad


def _triton_level_logits(logits: Tensor, num_levels: int, num_classes: int) -> Tensor:
    from cdm_fast.kernels import noise_level_ce as kernels

    result = _fake_level_logits(logits, num_levels)
    kernels.level_logits(logits, num_levels, num_classes, result)
    return result


def _fake_level_logits(logits: Tensor, num_levels: int, *_: Any) -> Tensor:
    compute = compute_dtype(logits.dtype)
    return logits.new_empty((logits.shape[0], num_levels), dtype=compute)


def _save_level_logits(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, _, ctx.num_classes = inputs
    ctx.save_for_backward(logits, output)


def _level_logits_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """softmax over the classes times the gradient of their level: plain PyTorch, differentiable again."""
    logits, result = ctx.saved_tensors
    of_level = (x.repeat_interleave(ctx.num_classes, 1)[:, : logits.shape[1]] for x in (result, grad))
    f, grad_f = of_level
    return ((logits.to(f.dtype) - f).exp() * grad_f).to(logits.dtype), None, None


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, level, label, ctx.num_levels, ctx.num_classes = inputs
    ctx.save_for_backward(logits, level, label, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """grads: of loss, log_ratio and the sums, which have none; None for an output that is not used."""
    gradients = (None if grad is None else grad.contiguous() for grad in grads[:2])
    logits, level, label, sums = ctx.saved_tensors
    op = overload("noise_level_ce_backward", ctx.backend)
    grad = op(logits, level, label, ctx.num_levels, ctx.num_classes, sums, *gradients)
    return grad, None, None, None, None


define(
    "level_logits",
    "(Tensor logits, int num_levels, int num_classes) -> Tensor",
    fake=_fake_level_logits,
    triton=_triton_level_logits,
    save=_save_level_logits,
    backward=_level_logits_backward,
)
define(
    "noise_level_ce",
    "(Tensor logits, Tensor level, Tensor? label, int num_levels, int num_classes)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    triton=_triton,
    save=_save,
    backward=_backward,
)
define(
    "noise_level_ce_backward",
    "(Tensor logits, Tensor level, Tensor? label, int num_levels, int num_classes, Tensor sums,"
    " Tensor? grad_loss, Tensor? grad_log_ratio) -> Tensor",
    fake=lambda logits, *_: torch.empty_like(logits),
    triton=_triton_backward,
)


def _check_logits(logits: Tensor, num_classes: int) -> tuple[int, int]:
    """Returns (L, K); raises the errors of `noise_level_ce`."""
    checks.check_tensor("logits", logits, dtypes=checks.FLOATING)
    checks.check_batch("logits", logits)
    if logits.dim() == 3 and num_classes in (1, logits.shape[2]):
        return logits.shape[1], logits.shape[2]
    if logits.dim() == 2 and num_classes >= 1 and (logits.shape[1] - 1) % num_classes == 0:
        return (logits.shape[1] - 1) // num_classes + 1, num_classes
    raise ValueError(
        f"logits: expected shape (B, (L-1) K + 1) or (B, L, K) with num_classes K = {num_classes}, "
        f"got {tuple(logits.shape)}"
    )


def _check(logits: Tensor, level: Tensor, label: Tensor | None, num_classes: int) -> tuple[int, int]:
    """Returns (L, K); raises the errors of `noise_level_ce`."""
    num_levels, num_classes = _check_logits(logits, num_classes)
    shape, device = (logits.shape[0],), logits.device
    checks.check_tensor("level", level, dtypes=(torch.int64,), shape=shape, device=device)
    if label is not None:
        checks.check_tensor("label", label, dtypes=(torch.int64,), shape=shape, device=device)
    return num_levels, num_classes
