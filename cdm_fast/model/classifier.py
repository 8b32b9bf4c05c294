"""The discriminative baseline: the trunk of the others as an ordinary classifier of clean images.

# B batch, K classes
"""

import torch
from torch import Tensor, nn

from cdm_fast.errors import UserError
from cdm_fast.model.denoiser import Denoiser
from cdm_fast.model.schedule import NoiseSchedule


class Classifier(Denoiser):
    """`network(x)` is `log p(c | x)` up to one constant per x; trained by cross-entropy, and nothing else.

    A schedule makes it trainable as the others are, at one level throughout: 0, clean images, or the level of
    the noise under which it is to classify. It has no denoiser: whatever asks for one (sampling, likelihoods,
    plots of levels) raises UserError.

    Args:
        network: a module from (B, ...) to logits (B, K), with an attribute `num_classes`.
        schedule: of the runs to compare with.
        level: at which it is trained, 0..T.
    """

    def __init__(self, network: nn.Module, schedule: NoiseSchedule, level: int = 0) -> None:
        super().__init__(network, schedule)
        self.level = level
        self.num_classes: int = network.num_classes  # type: ignore[assignment]

    def draw_levels(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """(num,) int64: its own level."""
        return torch.full((num,), self.level, device=self.a.device)

    def features(self, x: Tensor) -> Tensor:
        """What the last layer reads, (B, D), for `quality` where there are no Inception weights.

        Such a distance is neither FID nor KID, and compares with figures of the same classifier alone.
        """
        return self.network.features(x)  # type: ignore[operator]

    def logits(self, x: Tensor) -> Tensor:
        """(B, K)."""
        return self.network(x)

    def log_class_posterior(self, x: Tensor) -> Tensor:
        """`log p(c | x)` in nats, (B, K), of images with or without noise; scaled by `a[level]` first."""
        x = self.a[self.level].to(x.dtype) * x if self.level else x
        return self.logits(x).log_softmax(1)

    def denoise(self, x: Tensor, level: int | Tensor, label: Tensor | None = None) -> Tensor:
        """Raises UserError."""
        raise UserError(
            "this is a run of --objective classifier, which cannot denoise or draw images:"
            " it serves classify alone"
        )
