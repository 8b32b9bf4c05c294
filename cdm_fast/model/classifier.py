"""The discriminative baseline: an ordinary classifier of clean images with the trunk of the other models.

# B batch, K classes
"""

import torch
from torch import Tensor, nn

from cdm_fast.errors import UserError
from cdm_fast.model.denoiser import Denoiser
from cdm_fast.model.schedule import NoiseSchedule


class Classifier(Denoiser):
    """A classifier: `network(x)` is `log p(c | x)` up to one constant per x, trained by cross-entropy alone.

    It has a schedule so that the training loop of the other models can train it. It is trained at one level:
    level 0, clean images, or the level of the noise under which it will classify. It cannot denoise:
    sampling, likelihoods and plots of levels raise UserError.

    Args:
        network: a module from (B, ...) to logits (B, K), with an attribute `num_classes`.
        schedule: the schedule of the models with which it is compared.
        level: noise level of the training images, 0..T.
    """

    def __init__(self, network: nn.Module, schedule: NoiseSchedule, level: int = 0) -> None:
        super().__init__(network, schedule)
        self.level = level
        self.num_classes: int = network.num_classes  # type: ignore[assignment]

    def draw_levels(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """(num,) int64, all equal to its level."""
        return torch.full((num,), self.level, device=self.a.device)

    def features(self, x: Tensor) -> Tensor:
        """The input of the last layer, (B, D), for `evaluation.quality` without Inception weights.

        The network is an `AdjointNetwork`.
        A distance between such features is neither FID nor KID: compare it only with figures from the same
        classifier.
        """
        return self.network.features(x, keep_residuals=False)[0]  # type: ignore[operator]

    def logits(self, x: Tensor) -> Tensor:
        """(B, K) logits of x (B, ...)."""
        return self.network(x)

    def log_class_posterior(self, x: Tensor) -> Tensor:
        """`log p(c | x)` in nats, (B, K), for images with or without noise; they are scaled by `a[level]`."""
        x = self.a[self.level].to(x.dtype) * x if self.level else x
        return self.logits(x).log_softmax(1)

    def denoise(self, x: Tensor, level: int | Tensor, label: Tensor | None = None) -> Tensor:
        """Raises UserError: a classifier cannot denoise."""
        raise UserError(
            "this is a run of --objective classifier, which cannot denoise or draw images:"
            " only the command classify takes it"
        )
