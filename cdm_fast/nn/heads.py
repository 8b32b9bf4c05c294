"""The head over (level, class) pairs: the densities of all classes at all levels from one forward pass.

# B batch, D features, L = T+2 noise levels, K classes, N = (L-1) K + 1 logits: z[t, c] at t K + c for t <= T,
# and z_N of pure noise, which belongs to no class, at the end
"""

from typing import Literal

import torch
from torch import Tensor

from cdm_fast.errors import UserError
from cdm_fast.nn.labels import check_labels
from cdm_fast.nn.layers import CumulativeHead, full_precision
from cdm_fast.ops import head_cotangent

Conditioning = Literal["embedding", "joint"]


class JointHead(CumulativeHead):
    """Features to joint logits: `z_N = w_N h`, and downwards from noise `z[t,c] = z_N - sum_{u>=t} w[u,c] h`.

    Pure noise knows no class, so the classes part on the way to the data. They start equal: every class has
    the same weights at first. With K = 1 these are the differences of `CumulativeHead`'s logits.

    Args:
        in_features: D.
        num_levels: L.
        num_classes: K, at least 1.
    """

    def __init__(self, in_features: int, num_levels: int, num_classes: int) -> None:
        if num_classes < 1:
            raise UserError(f"num_classes is {num_classes}: it must be at least 1")
        super().__init__(in_features, (num_levels - 1) * num_classes + 1)
        self.num_classes = num_classes
        with torch.no_grad():
            for parameter in (self.weight, self.bias):
                each = parameter[:-1].unflatten(0, (num_levels - 1, num_classes))
                each.copy_(each[:, :1].clone().expand_as(each))

    def cumulated(self) -> tuple[Tensor, Tensor]:
        """`(W_c (N, D), b_c (N,))`."""
        return self._from_noise_down(self.weight), self._from_noise_down(self.bias)

    def _from_noise_down(self, rows: Tensor) -> Tensor:
        noise = rows[-1:]
        steps = rows[:-1].unflatten(0, (-1, self.num_classes))
        down = steps.flip(0).cumsum(0).flip(0)
        return torch.cat([noise - down.flatten(0, 1), noise])

    def cotangent(
        self,
        h: Tensor,  # (B, D)
        cumulated: tuple[Tensor, Tensor],
        level: Tensor,  # (B,) int64
        label: Tensor | None = None,  # (B,) int64, -1 for none
        guidance: float = 0.0,
        logits: Tensor | None = None,  # (B, N), if they are known already
    ) -> Tensor:  # (B, D)
        """Gradient of `z_N - z[level, label]` with respect to `h`, or of `z_N - f[level]` without a label.

        `f[t] = logsumexp_c z[t, c]` has the derivative `softmax_c z[t, c]`, which depends on `h` and keeps
        its graph. With guidance w labelled rows take `z_N - ((1 + w) z[level, label] - w f[level])`.
        Raises UserError for a label out of range.
        """
        check_labels(label, self.num_classes, len(h))
        weight, bias = cumulated
        with full_precision(h):
            at_level = self._at_level(h, weight, bias, level) if logits is None else self._pick(logits, level)
            return head_cotangent(weight, level, class_weights(at_level, label, guidance))

    def _pick(self, logits: Tensor, level: Tensor) -> Tensor:
        """(B, K): z[level] out of all logits; any level's at pure noise, where the cotangent is 0."""
        joint = logits[:, :-1].unflatten(1, (-1, self.num_classes))
        index = level.clamp(max=joint.shape[1] - 1)[:, None, None].expand(-1, 1, self.num_classes)
        return joint.gather(1, index).squeeze(1)

    def _at_level(self, h: Tensor, weight: Tensor, bias: Tensor, level: Tensor) -> Tensor:
        """(B, K): z[level] alone, without the other levels'."""
        classes = torch.arange(self.num_classes, device=level.device)
        rows = (level[:, None] * self.num_classes + classes).clamp(max=len(weight) - 1)
        picked = weight.index_select(0, rows.flatten()).unflatten(0, rows.shape)  # (B, K, D)
        return (picked @ h.to(weight.dtype).unsqueeze(2)).squeeze(2) + bias[rows]


def class_weights(
    at_level: Tensor,  # (B, K), z[level, c]
    label: Tensor | None,  # (B,) int64, -1 for none
    guidance: float = 0.0,
) -> Tensor:  # (B, K), rows sum to 1
    """The derivative of `(1 + w) z[level, label] - w f[level]`, or of f alone, by `z[level, c]`."""
    share = at_level.softmax(1)
    if label is None:
        return share
    one_hot = (torch.arange(at_level.shape[1], device=label.device) == label[:, None]).to(share.dtype)
    return torch.where(label[:, None] >= 0, (1 + guidance) * one_hot - guidance * share, share)


def noise_head(
    in_features: int, num_levels: int, num_classes: int | None, conditioning: Conditioning
) -> CumulativeHead:
    """The head that `conditioning` asks for; UserError for one that does not exist or lacks its classes."""
    if conditioning == "embedding":
        return CumulativeHead(in_features, num_levels)
    if conditioning != "joint":
        raise UserError(f"unknown conditioning {conditioning!r}: choose 'embedding' or 'joint'")
    if num_classes is None:
        raise UserError("conditioning='joint' needs num_classes")
    return JointHead(in_features, num_levels, num_classes)


def embedded_classes(num_classes: int | None, conditioning: Conditioning) -> int | None:
    """K where the trunk sees the class, None where only the head knows of it."""
    return num_classes if conditioning == "embedding" else None
