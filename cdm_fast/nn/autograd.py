"""The interface of `AdjointNetwork` for any network, with input gradients by `torch.func`.

# B batch, L = T+2 noise levels, K classes, N = L logits, or (L-1) K + 1 joint ones (`heads.py`)
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cdm_fast.nn.heads import logits_at
from cdm_fast.ops import noise_level_ce, use_backend


@dataclass(frozen=True)
class AutogradNetwork:
    """The methods of `AdjointNetwork` for logits computed by any function of `x` and a label.

    Differentiates under the reference backend, which is differentiable to any order.

    Args:
        logits: (x (B, ...), label (B,) int64 or None) -> (B, N).
        joint_classes: K of joint logits; None for logits over levels, where the function takes the label.
    """

    logits: Callable[[Tensor, Tensor | None], Tensor]
    joint_classes: int | None

    def ratio_gradient(
        self, x: Tensor, level: Tensor, label: Tensor | None = None, guidance: float = 0.0
    ) -> Tensor:
        """As in `AdjointNetwork.ratio_gradient`."""
        return self.logits_and_ratio_gradient(x, level, label, guidance)[1]

    def logits_and_ratio_gradient(
        self, x: Tensor, level: Tensor, label: Tensor | None = None, guidance: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """As in `AdjointNetwork.logits_and_ratio_gradient`."""
        with use_backend("reference"):
            gradient = torch.func.grad(self._noise_ratio, has_aux=True)
            grad_x, logits = gradient(x, level, label, guidance)
        return logits, grad_x

    def logits_and_gradient_at(
        self, x: Tensor, label: Tensor | None = None, guidance: float = 0.0
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """As in `AdjointNetwork.logits_and_gradient_at`, but the gradient takes another forward pass."""
        return self.logits(x, label), lambda level: self.ratio_gradient(x, level, label, guidance)

    def logits_and_pullback(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor, Tensor], Tensor]]:
        """As in `AdjointNetwork.logits_and_pullback`; for joint logits only."""
        with use_backend("reference"):
            logits, pull_logits, *_ = torch.func.vjp(lambda x: self.logits(x, None), x)
        num_levels = (logits.shape[1] - 1) // (self.joint_classes or 1)  # without pure noise

        def pull(level: Tensor, class_weight: Tensor) -> Tensor:
            levels = torch.arange(num_levels, device=level.device)
            joint = (levels == level[:, None])[:, :, None] * class_weight[:, None]  # (B, L-1, K)
            cotangent = torch.cat([-joint.flatten(1), joint.sum((1, 2))[:, None]], dim=1)
            return pull_logits(cotangent.to(logits))[0]

        return logits, pull

    def cross_entropy_and_ratio_gradient(
        self, x: Tensor, level: Tensor, label: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As in `AdjointNetwork.cross_entropy_and_ratio_gradient`, from all joint logits at once."""
        classes = self.joint_classes or 1
        logits, grad_x = self.logits_and_ratio_gradient(x, level, label)
        at_level = logits_at(logits, level, classes)
        return noise_level_ce(logits, level, label, classes).loss, at_level, grad_x

    def class_logits(self, x: Tensor, level: Tensor) -> Tensor:
        """As in `AdjointNetwork.class_logits`, from all joint logits."""
        return logits_at(self.logits(x, None), level, self.joint_classes or 1)

    def _noise_ratio(
        self, x: Tensor, level: Tensor, label: Tensor | None, guidance: float
    ) -> tuple[Tensor, Tensor]:
        """`sum_b (f[T+1] - f[level_b])`, whose gradient contains that of each sample; and the logits."""
        logits, classes = self.logits(x, label), self.joint_classes
        if classes is None:
            return -noise_level_ce(logits, level).log_ratio.sum(), logits
        log_ratio = noise_level_ce(logits, level, label, classes).log_ratio
        if guidance:
            marginal = noise_level_ce(logits, level, None, classes).log_ratio
            log_ratio = (1 + guidance) * log_ratio - guidance * marginal
        return -log_ratio.sum(), logits
