"""What a network must offer for the fast path: features, their adjoint, and a head over noise levels.

# B batch, D features, L = T+2 noise levels
"""

from typing import Any

from torch import Tensor, nn

from cdm_fast.nn.layers import CumulativeHead
from cdm_fast.ops import head_cotangent


class AdjointNetwork(nn.Module):
    """A noise-level classifier `f = head(features(x))` whose input gradient is a forward computation.

    Subclasses provide `features`, `adjoint`, `linear_layer` (the head) and `input_shape`.
    """

    linear_layer: CumulativeHead
    input_shape: tuple[int, ...]

    def features(
        self, x: Tensor, label: Tensor | None = None, keep_residuals: bool = True
    ) -> tuple[Tensor, Any]:
        """`x` (B, *input_shape) -> features (B, D), and (if kept) the residuals that `adjoint` needs."""
        raise NotImplementedError

    def adjoint(self, residuals: Any, g: Tensor) -> Tensor:
        """Gradient of `<g, features(x)>` with respect to `x`; `g` (B, D)."""
        raise NotImplementedError

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """Logits (B, L): `f(x)[t] = log p(t | x)` up to one constant per x."""
        return self.linear_layer(self.features(x, label, keep_residuals=False)[0])

    def ratio_gradient(self, x: Tensor, level: Tensor, label: Tensor | None = None) -> Tensor:
        """`grad_x (f(x)[T+1] - f(x)[level])`, like `x`, without evaluating the head. `level` (B,) int64."""
        _, residuals = self.features(x, label)
        return self.adjoint(residuals, head_cotangent(self.linear_layer.cumulated()[0], level))

    def logits_and_ratio_gradient(
        self, x: Tensor, level: Tensor, label: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits (B, L) and `grad_x (f(x)[T+1] - f(x)[level])` from one set of features."""
        h, residuals = self.features(x, label)
        weight, bias = self.linear_layer.cumulated()
        logits = self.linear_layer.logits(h, weight, bias)
        return logits, self.adjoint(residuals, head_cotangent(weight, level))
