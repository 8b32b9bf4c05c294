"""What a network must offer for the fast path: features, their adjoint, and a head over noise levels.

# B batch, D features, L = T+2 noise levels, K classes, N = L logits, or (L-1) K + 1 joint ones (`heads.py`)
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from cdm_fast.nn.heads import Conditioning, CumulativeHead, JointHead, logits_at
from cdm_fast.ops import head_cotangent


class AdjointNetwork(nn.Module):
    """A noise-level classifier `f = head(features(x))` whose input gradient is a forward computation.

    Subclasses provide `features`, `adjoint`, `linear_layer` (the head) and `input_shape`. With a `JointHead`
    the trunk never sees the label: it chooses among the logits.
    """

    linear_layer: CumulativeHead
    input_shape: tuple[int, ...]
    num_classes: int | None
    conditioning: Conditioning

    def features(
        self, x: Tensor, label: Tensor | None = None, keep_residuals: bool = True
    ) -> tuple[Tensor, Any]:
        """`x` (B, *input_shape) -> features (B, D), and (if kept) the residuals that `adjoint` needs."""
        raise NotImplementedError

    def adjoint(self, residuals: Any, g: Tensor) -> Tensor:
        """Gradient of `<g, features(x)>` with respect to `x`; `g` (B, D)."""
        raise NotImplementedError

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """Logits (B, N): `f(x)[t] = log p(t | x)`, or jointly `log p(t, c | x)`, up to one constant per x."""
        return self.linear_layer(self.features(x, label, keep_residuals=False)[0])

    def ratio_gradient(
        self, x: Tensor, level: Tensor, label: Tensor | None = None, guidance: float = 0.0
    ) -> Tensor:
        """`grad_x (f(x)[T+1] - f(x)[level])`, like `x`. `level` (B,) int64.

        A joint head evaluates the logits of that level alone, and takes the label's with `guidance` (see
        `JointHead.cotangent`). Any other needs no logits, and has no `guidance` in one evaluation.
        """
        head = self.linear_layer
        if not isinstance(head, JointHead):
            _, residuals = self.features(x, label)
            return self.adjoint(residuals, head_cotangent(head.cumulated()[0], level))
        h, residuals = self.features(x)
        return self.adjoint(residuals, head.cotangent(h, head.cumulated(), level, label, guidance))

    def logits_and_ratio_gradient(
        self, x: Tensor, level: Tensor, label: Tensor | None = None, guidance: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, N) and `ratio_gradient` from one set of features; arguments as there."""
        head = self.linear_layer
        joint = isinstance(head, JointHead)
        h, residuals = self.features(x, None if joint else label)
        weight, bias = head.cumulated()
        logits = head.logits(h, weight, bias)
        if isinstance(head, JointHead):
            at_level = logits_at(logits, level, head.num_classes)
            cotangent = head.cotangent(h, (weight, bias), level, label, guidance, at_level)
        else:
            cotangent = head_cotangent(weight, level)
        return logits, self.adjoint(residuals, cotangent)

    def logits_and_pullback(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
        """Joint logits (B, N), and a function of the same features for weights that depend on them.

        `pull(level (B,), weight (B, K))` is `grad_x sum_c weight[c] (z_N - z[level, c])`, like `x`.
        """
        head = self.linear_layer
        assert isinstance(head, JointHead)
        h, residuals = self.features(x)
        weight, bias = head.cumulated()

        def pull(level: Tensor, class_weight: Tensor) -> Tensor:
            return self.adjoint(residuals, head.weighted_cotangent(weight, level, class_weight.to(weight)))

        return head.logits(h, weight, bias), pull

    def cross_entropy_and_ratio_gradient(
        self, x: Tensor, level: Tensor, label: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `logits_and_ratio_gradient` of a joint head, with the cross-entropy (B,) in place of the logits,
        and with the logits (B, K) of each input's own level.

        The others never exist all at once: for many classes.
        """
        head = self.linear_layer
        assert isinstance(head, JointHead)
        h, residuals = self.features(x)
        cumulated = head.cumulated()
        loss = head.cross_entropy(h, cumulated, level, label)
        at_level = head.at_level(h, cumulated, level)
        cotangent = head.cotangent(h, cumulated, level, label, at_level=at_level)
        return loss, at_level, self.adjoint(residuals, cotangent)
