"""`noise_level_ce` of the joint logits of a low-rank head, in memory for one block of them.

`z[t,c] = basis[t,0] + sum_r basis[t,r] classes[c,r]`: R + 1 numbers per level instead of K, so the basis of
all levels fits into memory where the logits do not. Blocks of whole levels are computed and reduced
immediately; the backward pass recomputes them. The products are PyTorch's on every device.

# B batch, L = T+2 noise levels, K classes, R rank, M = (L-1) (R+1) + 1
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cdm_fast.ops.noise_level_ce import noise_level_ce_reference

# Number of logits held at a time, unless one level of a batch has more: 16 MiB in fp32.
BLOCK_ELEMENTS = 1 << 22


def low_rank_logits(
    basis: Tensor,  # (..., R+1)
    classes: Tensor,  # (K, R)
) -> Tensor:  # (..., K)
    """`basis[0] + sum_r basis[r] classes[c, r]` of every class."""
    return basis[..., :1] + basis[..., 1:] @ classes.T


def low_rank_noise_level_ce_reference(
    basis: Tensor,  # (B, M)
    classes: Tensor,  # (K, R)
    level: Tensor,  # (B,) int64
    label: Tensor | None = None,  # (B,) int64
) -> Tensor:  # (B,)
    """The specification of `low_rank_noise_level_ce` in plain PyTorch; see there."""
    joint = low_rank_logits(_by_level(basis, classes), classes)
    logits = torch.cat([joint.flatten(1), basis[:, -1:]], dim=1)
    return noise_level_ce_reference(logits, level, label, len(classes)).loss


def low_rank_noise_level_ce(
    basis: Tensor,  # (B, M)
    classes: Tensor,  # (K, R)
    level: Tensor,  # (B,) int64
    label: Tensor | None = None,  # (B,) int64
) -> Tensor:  # (B,)
    """The cross-entropy of `noise_level_ce` in nats, for joint logits that are never held all at once.

    basis: level by level for t <= T, last the logit of pure noise; fp32 or fp64, of classes' dtype.
    level: 0..T+1. label: 0..K-1, or -1 for an image without a label; None means -1 throughout.

    Differentiable with respect to basis and classes. Source: CDM Alg. 1.
    """
    by_level, noise = _by_level(basis, classes), basis[:, -1]
    # All logits are relative to that of pure noise, so that common terms cancel; relative to 0 if it is -inf.
    origin = torch.where(noise == -torch.inf, 0.0, noise)
    noise = noise - origin
    label = torch.full_like(level, -1) if label is None else label
    step = max(1, BLOCK_ELEMENTS // (len(basis) * len(classes)))
    # -inf, where the derivative of logsumexp is NaN, is replaced by a very low number with the same effect.
    possible = by_level.clamp(min=torch.finfo(basis.dtype).min / 2)
    blocks = [
        checkpoint(_log_total, block, origin, classes, use_reentrant=False, preserve_rng_state=False)
        for block in possible.split(step, dim=1)
    ]
    total = torch.stack([noise, *blocks]).logsumexp(0)
    place = level.clamp(max=by_level.shape[1] - 1)[:, None, None].expand(-1, 1, by_level.shape[2])
    true = low_rank_logits(by_level.gather(1, place).squeeze(1), classes)  # (B, K)
    labelled = true.gather(1, label.clamp(min=0)[:, None]).squeeze(1)
    picked = torch.where(label >= 0, labelled, true.logsumexp(1)) - origin
    return total - torch.where(level < by_level.shape[1], picked, noise)


def _by_level(basis: Tensor, classes: Tensor) -> Tensor:
    """(B, L-1, R+1)."""
    return basis[:, :-1].unflatten(1, (-1, classes.shape[1] + 1))


def _log_total(block: Tensor, origin: Tensor, classes: Tensor) -> Tensor:
    """(B,): log-sum-exp of the block's logits, relative to `origin`."""
    return low_rank_logits(block, classes).logsumexp((1, 2)) - origin
