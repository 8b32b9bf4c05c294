"""Heads: from features to one logit per level, per (level, class) pair, or per class.

Joint logits give the densities of all classes at all levels from one forward pass.

# B batch, D features, L = T+2 noise levels, K classes, N = (L-1) K + 1 logits: z[t, c] at t K + c for t <= T,
# and z_N of pure noise, which belongs to no class, at the end; R rank
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdm_fast.errors import UserError
from cdm_fast.nn.embedding import check_labels
from cdm_fast.nn.layers import full_precision
from cdm_fast.ops import from_noise_down, head_cotangent, linear
from cdm_fast.ops.head_noise_level_ce import head_noise_level_ce
from cdm_fast.ops.low_rank_noise_level_ce import low_rank_logits, low_rank_noise_level_ce

Conditioning = Literal["embedding", "joint"]


class CumulativeHead(nn.Linear):
    """From features to one logit per level: `f = cumsum(W h + b)`, computed as `h cumsum(W)^T + cumsum(b)`.

    The cotangent of `F(x,t) = f[T+1] - f[t]` at the features is the difference of two rows of `cumsum(W)`.
    """

    takes_label = False  # whether a label chooses among the logits; else it enters the trunk

    def cumulated(self) -> tuple[Tensor, Tensor]:
        """`(W_c (L, D), b_c (L,))`."""
        return self.weight.cumsum(0), self.bias.cumsum(0)

    def logits(self, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Logits (B, L) of features (B, D) under cumulated parameters, in the parameters' precision."""
        with full_precision(h):
            return linear(h, weight, bias)

    def forward(self, h: Tensor) -> Tensor:
        """(B, D) -> logits (B, L)."""
        return self.logits(h, *self.cumulated())

    @torch.no_grad()
    def start_at_zero(self) -> None:
        """Makes all logits zero, with weights that still learn."""
        self.weight.zero_()
        self.bias.zero_()

    @torch.no_grad()
    def shift(self, by: Tensor) -> None:
        """Adds `by` (L,) to the logits, through the bias."""
        self.bias.add_(by.diff(prepend=by.new_zeros(1)).to(self.bias))

    def shift_each(self, by: Tensor) -> None:
        """Adds `by`, one number per logit, to the logits; here the same as `shift`."""
        self.shift(by)

    def cotangent(
        self,
        h: Tensor,  # (B, D)
        cumulated: tuple[Tensor, Tensor],
        level: Tensor,  # (B,) int64
        label: Tensor | None = None,
        guidance: float = 0.0,
        at_level: Tensor | None = None,
    ) -> Tensor:  # (B, D)
        """Gradient of `f[T+1] - f[level]` with respect to the features; it is the same for every `h`.

        `label`, `guidance` and `at_level` are for heads over classes (`ClassHead`) and are not used here.
        """
        return head_cotangent(cumulated[0], level)

    def pick(self, logits: Tensor, level: Tensor) -> Tensor | None:
        """The argument `at_level` of `cotangent`, selected from all logits; None for this head."""
        return None


class PlainHead(CumulativeHead):
    """From features to one logit per class, `f = W h + b`: the head of an ordinary classifier of images."""

    def cumulated(self) -> tuple[Tensor, Tensor]:
        """The parameters themselves, `(W (K, D), b (K,))`: classes have no order to sum along."""
        return self.weight, self.bias


class ClassHead(CumulativeHead):
    """Base of the heads over (level, class) pairs: N joint logits, among which a label selects.

    Subclasses define how the logits of a level follow from its rows of the weight: `rows_per_level`,
    `common_rows`, `_per_class` and `_row_weights`.
    """

    takes_label = True
    common_rows: int  # of a level's rows the first, whose sum enters every class's logit once
    num_classes: int  # K
    rows_per_level: int

    def cumulated(self) -> tuple[Tensor, Tensor]:
        """`(W_c, b_c)`, with one row per row of the weight."""
        sizes = self.rows_per_level, self.common_rows
        return from_noise_down(self.weight, *sizes), from_noise_down(self.bias, *sizes)

    @torch.no_grad()
    def shift(self, by: Tensor) -> None:
        """Adds `by` (L,) to the logits of every level, for all its classes, through the bias."""
        self.bias[:-1].unflatten(0, (-1, self.rows_per_level))[:, : self.common_rows] += by.diff()[:, None]
        self.bias[-1] += by[-1]

    def cotangent(
        self,
        h: Tensor,  # (B, D)
        cumulated: tuple[Tensor, Tensor],
        level: Tensor,  # (B,) int64
        label: Tensor | None = None,  # (B,) int64, -1 for none
        guidance: float = 0.0,
        at_level: Tensor | None = None,  # (B, K), z[level], if it is known already
    ) -> Tensor:  # (B, D)
        """Gradient of `z_N - z[level, label]` with respect to `h`, or of `z_N - f[level]` without a label.

        `f[t] = logsumexp_c z[t, c]` has the derivative `softmax_c z[t, c]`, which depends on `h` and stays
        in the autograd graph. With guidance w the scalar of labelled rows is
        `z_N - ((1 + w) z[level, label] - w f[level])`.
        Raises UserError for a label out of range.
        """
        check_labels(label, self.num_classes, h.shape[0])
        weight, _ = cumulated
        with full_precision(h):
            at_level = self.at_level(h, cumulated, level) if at_level is None else at_level
            return head_cotangent(weight, level, self._row_weights(class_weights(at_level, label, guidance)))

    def weighted_cotangent(
        self,
        weight: Tensor,  # cumulated
        level: Tensor,  # (B,) int64
        class_weight: Tensor,  # (B, K); need not sum to 1
    ) -> Tensor:  # (B, D)
        """Gradient of `sum_c class_weight[c] (z_N - z[level, c])` with respect to the features."""
        of_noise = (class_weight.sum(1) - 1) * (level * self.rows_per_level < len(weight) - 1)
        with full_precision(weight):
            cotangent = head_cotangent(weight, level, self._row_weights(class_weight))
        return cotangent + of_noise[:, None] * weight[-1]

    def at_level(
        self,
        h: Tensor,  # (B, D)
        cumulated: tuple[Tensor, Tensor],
        level: Tensor,  # (B,) int64
    ) -> Tensor:  # (B, K)
        """z[level], computed without the other levels' logits; meaningless at pure noise (level T+1)."""
        weight, bias = cumulated
        of_level = torch.arange(self.rows_per_level, device=level.device)
        rows = (level[:, None] * self.rows_per_level + of_level).clamp(max=len(weight) - 1)
        picked = weight.index_select(0, rows.flatten()).unflatten(0, rows.shape)  # (B, rows of a level, D)
        with full_precision(h):
            basis = (picked @ h.to(weight.dtype).unsqueeze(2)).squeeze(2) + bias[rows]
            return self._per_class(basis)

    def pick(self, logits: Tensor, level: Tensor) -> Tensor:
        """z[level] (B, K), selected from all logits (B, N); meaningless at pure noise."""
        return logits_at(logits, level, self.num_classes)

    def cross_entropy(
        self,
        h: Tensor,  # (B, D)
        cumulated: tuple[Tensor, Tensor],
        level: Tensor,  # (B,) int64
        label: Tensor | None = None,  # (B,) int64, -1 for none
    ) -> Tensor:  # (B,)
        """`-log p(level, label | h)` in nats, without holding all logits at once: for many classes."""
        raise NotImplementedError

    def _per_class(self, picked: Tensor) -> Tensor:
        """(B, K): the logits of the classes, from the outputs of one level's rows."""
        raise NotImplementedError

    def _row_weights(self, class_weight: Tensor) -> Tensor:
        """The weight of each of a level's rows in `sum_c class_weight[c] z[level, c]`."""
        raise NotImplementedError


class JointHead(ClassHead):
    """From features to joint logits: `z_N = w_N h`, and `z[t,c] = z_N - sum_{u>=t} w[u,c] h` below noise.

    Pure noise has no class, so the classes differ more and more towards the data. All classes start with the
    same weights. With K = 1 these are the differences of `CumulativeHead`'s logits.

    Args:
        in_features: D.
        num_levels: L.
        num_classes: K, at least 1.

    Raises:
        UserError: fewer than one class.
    """

    def __init__(self, in_features: int, num_levels: int, num_classes: int) -> None:
        if num_classes < 1:
            raise UserError(f"num_classes is {num_classes}: it must be at least 1")
        super().__init__(in_features, (num_levels - 1) * num_classes + 1)
        self.num_classes = self.rows_per_level = self.common_rows = num_classes
        with torch.no_grad():
            for parameter in (self.weight, self.bias):
                each = parameter[:-1].unflatten(0, (num_levels - 1, num_classes))
                each.copy_(each[:, :1].clone().expand_as(each))

    @torch.no_grad()
    def shift_each(self, by: Tensor) -> None:
        """Adds `by` (N,) to the logits, a separate constant for every (level, class) pair."""
        noise = by[-1:].expand(1, self.num_classes)
        joint = torch.cat([by[:-1].unflatten(0, (-1, self.num_classes)), noise])
        self.bias.add_(torch.cat([joint.diff(dim=0).flatten(), by[-1:]]).to(self.bias))

    def cross_entropy(
        self, h: Tensor, cumulated: tuple[Tensor, Tensor], level: Tensor, label: Tensor | None = None
    ) -> Tensor:
        return head_noise_level_ce(h, *cumulated, level, label, self.num_classes).loss

    def _per_class(self, picked: Tensor) -> Tensor:
        return picked

    def _row_weights(self, class_weight: Tensor) -> Tensor:
        return class_weight


class LowRankHead(ClassHead):
    """A `JointHead` of low rank: a few rows per level, and class vectors that all levels share.

    `z[t,c] = z_N - sum_{u>=t} (w[u,0] + sum_r v[c,r] w[u,r]) h`: R + 1 rows per level, and for each class a
    vector v[c] of R numbers, the same at all levels. With R < K - 1 it saves memory; with R >= K - 1 it can
    represent every full head, and with few classes it learns faster than one. Classes start equal: v = 0.

    Args:
        in_features: D.
        num_levels: L.
        num_classes: K, at least 1.
        rank: R, at least 1.

    Raises:
        UserError: fewer than one class, or a rank below 1.
    """

    common_rows = 1

    def __init__(self, in_features: int, num_levels: int, num_classes: int, rank: int) -> None:
        if rank < 1 or num_classes < 1:
            raise UserError(f"num_classes is {num_classes} and rank {rank}: both must be at least 1")
        super().__init__(in_features, (num_levels - 1) * (rank + 1) + 1)
        self.num_classes, self.rows_per_level = num_classes, rank + 1
        self.classes = nn.Parameter(torch.zeros(num_classes, rank))

    def logits(self, h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Logits (B, N) of all classes: for few images or few classes."""
        basis = super().logits(h, weight, bias)
        with full_precision(h):
            joint = low_rank_logits(basis[:, :-1].unflatten(1, (-1, self.rows_per_level)), self.classes)
        return torch.cat([joint.flatten(1), basis[:, -1:]], dim=1)

    @torch.no_grad()
    def start_at_zero(self) -> None:
        """Zeroes what all classes share; the class vectors are zero, and the rows that they weigh learn."""
        self.classes.zero_()
        self.bias.zero_()
        self.weight[-1:].zero_()
        self.weight[:-1].unflatten(0, (-1, self.rows_per_level))[:, : self.common_rows] = 0

    def shift_each(self, by: Tensor) -> None:
        """Not possible: classes share the rows of a level. Raises UserError."""
        raise UserError("a head of low rank has no constant for every (level, class) pair: use head_rank=0")

    def cross_entropy(
        self, h: Tensor, cumulated: tuple[Tensor, Tensor], level: Tensor, label: Tensor | None = None
    ) -> Tensor:
        with full_precision(h):
            return low_rank_noise_level_ce(F.linear(h, *cumulated), self.classes, level, label)

    def _per_class(self, picked: Tensor) -> Tensor:
        return low_rank_logits(picked, self.classes)

    def _row_weights(self, class_weight: Tensor) -> Tensor:
        return torch.cat([class_weight.sum(1, keepdim=True), class_weight @ self.classes], dim=1)


def logits_at(logits: Tensor, level: Tensor, num_classes: int) -> Tensor:
    """(B, K): z[level], selected from all joint logits (B, N); arbitrary at pure noise."""
    joint = logits[:, :-1].unflatten(1, (-1, num_classes))
    index = level.clamp(max=joint.shape[1] - 1)[:, None, None].expand(-1, 1, num_classes)
    return joint.gather(1, index).squeeze(1)


def class_weights(
    at_level: Tensor,  # (B, K), z[level, c]
    label: Tensor | None,  # (B,) int64, -1 for none
    guidance: float = 0.0,
) -> Tensor:  # (B, K), rows sum to 1
    """Derivative of `(1 + w) z[level, label] - w f[level]`, or of f alone, with respect to z[level, c]."""
    share = at_level.softmax(1)
    if label is None:
        return share
    one_hot = (torch.arange(at_level.shape[1], device=label.device) == label[:, None]).to(share.dtype)
    return torch.where(label[:, None] >= 0, (1 + guidance) * one_hot - guidance * share, share)


def noise_head(
    in_features: int, num_levels: int, num_classes: int | None, conditioning: Conditioning, rank: int = 0
) -> CumulativeHead:
    """The head for `conditioning`; UserError for an unknown one, or for a joint one without `num_classes`.

    rank: rank of a joint head's classes; 0 for a full head.
    """
    if conditioning == "embedding":
        return CumulativeHead(in_features, num_levels)
    if conditioning != "joint":
        raise UserError(f"unknown conditioning {conditioning!r}: choose 'embedding' or 'joint'")
    if num_classes is None:
        raise UserError("conditioning='joint' needs num_classes")
    if rank:
        return LowRankHead(in_features, num_levels, num_classes, rank)
    return JointHead(in_features, num_levels, num_classes)


def embedded_classes(num_classes: int | None, conditioning: Conditioning) -> int | None:
    """K if the label enters the trunk, None if it only chooses among the head's logits."""
    return num_classes if conditioning == "embedding" else None
