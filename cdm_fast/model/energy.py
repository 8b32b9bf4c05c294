"""Denoisers that know `log p_t(x)` up to a constant per level, and whose score is its gradient.

# B batch, L = T+2 noise levels
"""

import math

import torch
from torch import Tensor

from cdm_fast.model.denoiser import Denoiser


class Energy(Denoiser):
    """A denoiser that knows `log p_t(x)` up to a constant per level, and whose score is its gradient.

    Metropolis-adjusted moves need both (`sampling.MALA`, `sampling.SMC`). At level T+1 every energy is
    N(0, I), so sampling starts from exact draws. A subclass provides `log_prob_levels_and_score`; all other
    methods follow from it. `CDM`, `Product`, `Mixture`, `OfClass` and `Posterior` are energies.

    >>> from cdm_fast import NoiseSchedule
    >>> class StandardNormal(Energy):  # N(0, I) data are N(0, (a^2 + s^2) I) at every level, here N(0, I)
    ...     def log_prob_levels_and_score(self, x, level, label=None):
    ...         return log_normal(x)[:, None].expand(-1, self.schedule.num_levels), -x
    >>> model = StandardNormal(torch.nn.Identity(), NoiseSchedule.uniform(T=3))
    >>> x = torch.ones(1, 2)
    >>> model.log_prob(x), model.denoise(x, 4)
    (tensor([-2.8379]), tensor([[1., 1.]]))
    """

    def log_prob_levels_and_score(
        self, x: Tensor, level: int | Tensor, label: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`(log_prob_levels(x) (B, L), score(x, level) like x)` from one evaluation.

        Args:
            x: (B, ...).
            level: level of the score, int or (B,) int64, 0..T+1.
            label: (B,) int64, for a class-conditional model; -1 or None stands for no class.

        Raises:
            UserError: a level that does not exist.
        """
        raise NotImplementedError

    def guided_log_prob_levels_and_score(
        self, x: Tensor, level: int | Tensor, label: Tensor, guidance: float
    ) -> tuple[Tensor, Tensor]:
        """`log_prob_levels_and_score` of `(1 + w) log p_t(x|label) - w log p_t(x)`, with w = `guidance`.

        The corresponding denoiser is `guided_denoise`. The two densities are evaluated as one batch.
        """
        level = self.schedule.levels(level, x)
        labels = torch.cat([label, torch.full_like(label, -1)])
        both = self.log_prob_levels_and_score(torch.cat([x, x]), level.repeat(2), labels)
        log_prob, score = (
            (1 + guidance) * conditional - guidance * marginal for conditional, marginal in map(_halves, both)
        )
        return log_prob, score

    def log_prob_levels(self, x: Tensor, *, label: Tensor | None = None) -> Tensor:
        """`log p_t(x)` in nats at every level, (B, L); with `label` (B,) int64, `log p_t(x|label)`."""
        return self.log_prob_levels_and_score(x, 0, label)[0]

    def log_prob(self, x: Tensor, level: int | Tensor = 0, *, label: Tensor | None = None) -> Tensor:
        """`log p_t(x)` in nats, (B,); with a label, `log p_t(x|label)`.

        Args:
            x: (B, ...).
            level: int or (B,) int64, 0..T+1; level 0 is the density of the data.
            label: (B,) int64, for a class-conditional model; -1 or None stands for no class.

        Raises:
            UserError: a level that does not exist.

        >>> from cdm_fast import CDM, MLP, NoiseSchedule
        >>> schedule = NoiseSchedule.uniform(T=10)
        >>> model = CDM(MLP(2, schedule.num_levels, hidden=8), schedule)
        >>> x = torch.zeros(3, 2)
        >>> torch.equal(model.log_prob(x, level=4), model.log_prob_levels(x)[:, 4])
        True
        >>> bool((model.log_prob(x, level=11) == log_normal(x)).all())  # pure noise is N(0, I)
        True
        """
        index = self.schedule.levels(level, x)[:, None]
        return self.log_prob_levels(x, label=label).gather(1, index)[:, 0]

    def score(self, x: Tensor, level: int | Tensor, label: Tensor | None = None) -> Tensor:
        """`grad_x log p_t(x)`, like `x`, at every level, 0 and T+1 included."""
        return self.log_prob_levels_and_score(x, level, label)[1]

    def denoise(self, x: Tensor, level: int | Tensor, label: Tensor | None = None) -> Tensor:
        """`eps_hat = -s score`, like `x`; arguments and errors as in `Denoiser.denoise`."""
        level = self.schedule.levels(level, x)
        return -self.amplitudes(level, x)[1] * self.score(x, level, label)


def _halves(both: Tensor) -> tuple[Tensor, Tensor]:
    first, second = both.chunk(2)
    return first, second


def log_normal(x: Tensor) -> Tensor:
    """`log N(x; 0, I)` of x (B, ...) in nats, (B,)."""
    x = x.flatten(1)
    return -0.5 * (x.square().sum(dim=1) + x.shape[1] * math.log(2 * math.pi))
