"""Denoisers whose score is the gradient of a known function: `log p_t(x)` up to constants.

# B batch, L = T+2 noise levels
"""

import math

import torch
from torch import Tensor

from cdm_fast.model.denoiser import Denoiser


class Energy(Denoiser):
    """A denoiser whose score is the gradient of a function that it knows: `log p_t(x)` up to constants.

    What Metropolis-adjusted moves need. At level T+1 every energy is N(0, I), so that walks start from exact
    draws. Subclasses provide `log_prob_levels_and_score`; the rest follows.
    """

    def log_prob_levels_and_score(
        self, x: Tensor, level: int | Tensor, label: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`(log_prob_levels(x) (B, L), score(x, level) like x)` from one evaluation."""
        raise NotImplementedError

    def guided_log_prob_levels_and_score(
        self, x: Tensor, level: int | Tensor, label: Tensor, guidance: float
    ) -> tuple[Tensor, Tensor]:
        """The same of `(1 + w) log p_t(x|label) - w log p_t(x)`, w = `guidance`, whose denoiser is
        `guided_denoise`. The two are evaluated as one batch."""
        level = self.schedule.levels(level, x)
        labels = torch.cat([label, torch.full_like(label, -1)])
        both = self.log_prob_levels_and_score(torch.cat([x, x]), level.repeat(2), labels)
        log_prob, score = ((1 + guidance) * given - guidance * free for given, free in map(_halves, both))
        return log_prob, score

    def log_prob_levels(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        """`log p_t(x)` in nats at every level, (B, L)."""
        return self.log_prob_levels_and_score(x, 0, label)[0]

    def log_prob(self, x: Tensor, level: int | Tensor = 0, label: Tensor | None = None) -> Tensor:
        """`log p_t(x)` in nats, (B,), or `log p_t(x|c)` of labelled ones; `level` an int or (B,) int64."""
        index = self.schedule.levels(level, x)[:, None]
        return self.log_prob_levels(x, label).gather(1, index)[:, 0]

    def score(self, x: Tensor, level: int | Tensor, label: Tensor | None = None) -> Tensor:
        """`grad_x log p_t(x)`, like `x`, at every level, 0 and T+1 included."""
        return self.log_prob_levels_and_score(x, level, label)[1]

    def denoise(self, x: Tensor, level: int | Tensor, label: Tensor | None = None) -> Tensor:
        level = self.schedule.levels(level, x)
        return -self.amplitudes(level, x)[1] * self.score(x, level, label)


def _halves(both: Tensor) -> tuple[Tensor, Tensor]:
    first, second = both.chunk(2)
    return first, second


def log_normal(x: Tensor) -> Tensor:
    """`log N(x; 0, I)` in nats, (B,)."""
    x = x.flatten(1)
    return -0.5 * (x.square().sum(dim=1) + x.shape[1] * math.log(2 * math.pi))
