"""Drawing the noise levels of a batch.

# B batch, L = T+2 noise levels
"""

import torch
from torch import Tensor

from cdm_fast.config import TrainConfig
from cdm_fast.model import CDM, DDM
from cdm_fast.model.classifier import Classifier


def draw_levels(
    model: CDM | DDM | Classifier, num: int, config: TrainConfig, generator: torch.Generator
) -> Tensor:
    """(num,) int64 levels from the model's p(t), drawn as `config.level_draws` specifies."""
    probability = level_probability(model) if config.level_draws == "stratified" else None
    if probability is None:
        return model.draw_levels(num, generator)
    return stratified_levels(probability, num, generator)


def level_probability(model: CDM | DDM | Classifier) -> Tensor | None:
    """p(t), (L,) float64, from which levels are drawn; None for a classifier, which has a single level."""
    if isinstance(model, CDM):
        return model.log_level_prior.double().exp()
    if isinstance(model, DDM):  # evenly from 1..T
        even = torch.ones(model.schedule.num_levels, dtype=torch.float64, device=model.a.device)
        even[0] = even[-1] = 0
        return even
    return None


def stratified_levels(
    probability: Tensor,  # (L,) float64, up to a factor
    num: int,
    generator: torch.Generator,
) -> Tensor:  # (num,) int64
    """Stratified levels: an even grid with one random shift, through the inverse CDF, in random order.

    `F^-1((i + u) / num)` for i = 0..num-1, with one u ~ U[0, 1) (arXiv 2107.00630, appendix), shuffled.
    Each position has the distribution `probability`; level t occurs `floor(num p_t)` or `ceil(num p_t)`
    times, so that the mean of a function over the batch varies less than with independent draws.

    >>> p = torch.ones(4, dtype=torch.float64)
    >>> stratified_levels(p, 8, torch.Generator().manual_seed(0)).bincount().tolist()
    [2, 2, 2, 2]
    """
    device = probability.device
    cumulated = probability.cumsum(0)
    shift = torch.rand((), dtype=torch.float64, device=device, generator=generator)
    grid = (torch.arange(num, dtype=torch.float64, device=device) + shift) * (cumulated[-1] / num)
    # From the right, so that a level of probability 0 is never drawn; rounding may reach the very end.
    last = torch.searchsorted(cumulated, cumulated[-1:])
    level = torch.searchsorted(cumulated, grid, right=True).minimum(last)
    return level[torch.randperm(num, device=device, generator=generator)]
