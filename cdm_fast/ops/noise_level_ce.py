"""Cross-entropy over noise levels (and classes), and the log-ratio that the likelihood is read from.

B batch, L = T+2 noise levels, K classes. Logits come as (B, L); as joint logits (B, (T+1) K + 1), entry
`t K + c` for class c at level t <= T and one entry for pure noise, which has no class; or as (B, L, K).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cdm_fast.ops import _checks


class NoiseLevelCE(NamedTuple):
    """What `noise_level_ce` returns, in fp32 (fp64 for fp64 logits)."""

    loss: Tensor  # (B,) nats, cross-entropy
    log_ratio: Tensor  # (B,) nats, f[level] - f[T+1]


def noise_level_ce_reference(
    logits: Tensor,  # (B, (L-1) K + 1) or (B, L, K)
    level: Tensor,  # (B,) int64
    label: Tensor | None = None,  # (B,) int64
    num_classes: int = 1,
) -> NoiseLevelCE:
    """The specification of `noise_level_ce` in plain PyTorch; see there."""
    f = level_logits(logits, num_classes)
    picked = f.gather(1, level[:, None]).squeeze(1)
    if label is not None:
        z = logits.flatten(1).to(f.dtype)
        entry = (level * num_classes + label.clamp(min=0)).clamp(max=z.shape[1] - 1)
        labelled = (label >= 0) & (level < f.shape[1] - 1)
        picked = torch.where(labelled, z.gather(1, entry[:, None]).squeeze(1), picked)
    return NoiseLevelCE(f.logsumexp(1) - picked, picked - f[:, -1])


def level_logits(logits: Tensor, num_classes: int = 1) -> Tensor:
    """f[t] = logsumexp_c z[t, c], the class-free logits: (B, L) in fp32 (fp64 for fp64 logits).

    logits, num_classes: as in `noise_level_ce`. Differentiable to any order.
    """
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if z.dim() == 3:
        return z.logsumexp(-1)
    if num_classes == 1:
        return z
    return torch.cat([z[:, :-1].unflatten(1, (-1, num_classes)).logsumexp(-1), z[:, -1:]], dim=1)


def log_posterior(logits: Tensor, num_classes: int = 1) -> Tensor:
    """log p(t | x), summed over classes: (B, L) nats in fp32 (fp64 for fp64 logits).

    logits, num_classes: as in `noise_level_ce`. Differentiable to any order.
    """
    return level_logits(logits, num_classes).log_softmax(1)


def noise_level_ce(
    logits: Tensor,  # (B, (L-1) K + 1) or (B, L, K)
    level: Tensor,  # (B,) int64
    label: Tensor | None = None,  # (B,) int64
    num_classes: int = 1,
) -> NoiseLevelCE:
    """Cross-entropy of the true (level, class) among all pairs, and the log-ratio of the pair to pure noise.

    With `f_true` = z[level, label], or logsumexp_c z[level, c] without a label or at level T+1,

        loss = logsumexp over all logits - f_true;   log_ratio = f_true - f[T+1]

    logits: fp32, bf16, fp16 or fp64, any magnitude up to 1e4 and beyond; accumulated in fp32 (fp64).
    level: 0..L-1.
    label: 0..K-1, or -1 for an image without a label; None means -1 throughout.
    num_classes: K; 1 for plain logits (B, L). For logits (B, L, K) their last size.

    Differentiable once with respect to the logits (the reference: to any order). Raises TypeError or
    ValueError, naming the argument, for what does not fit the above. Source: CDM Alg. 1 and Thm 3.2.
    """
    num_levels, num_classes = _check(logits, level, label, num_classes)
    _checks.check_index_range("level", level, 0, num_levels)
    if label is not None:
        _checks.check_index_range("label", label, -1, num_classes)
    return noise_level_ce_reference(logits, level, label, num_classes)


def _check(logits: Tensor, level: Tensor, label: Tensor | None, num_classes: int) -> tuple[int, int]:
    """Returns (L, K); raises as `noise_level_ce` says."""
    _checks.check_tensor("logits", logits, dtypes=_checks.FLOATING)
    _checks.check_batch("logits", logits)
    if logits.dim() == 3 and num_classes in (1, logits.shape[2]):
        num_levels, num_classes = logits.shape[1], logits.shape[2]
    elif logits.dim() == 2 and num_classes >= 1 and (logits.shape[1] - 1) % num_classes == 0:
        num_levels = (logits.shape[1] - 1) // num_classes + 1
    else:
        raise ValueError(
            f"logits: expected shape (B, (L-1) K + 1) or (B, L, K) with num_classes K = {num_classes}, "
            f"got {tuple(logits.shape)}"
        )
    shape, device = (logits.shape[0],), logits.device
    _checks.check_tensor("level", level, dtypes=(torch.int64,), shape=shape, device=device)
    if label is not None:
        _checks.check_tensor("label", label, dtypes=(torch.int64,), shape=shape, device=device)
    return num_levels, num_classes
