"""The moving average of a model's weights."""

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


class Ema(Generic[Model]):
    """A moving average of a model's weights, kept as a second model in evaluation mode.

    The decay rises as (1 + n)/(10 + n) after n updates until it reaches `decay`, so that the initial weights
    are soon forgotten.

    Args:
        model: the model whose weights are averaged.
        decay: the final decay, in [0, 1).
        start: the average is a copy of the weights for this many steps, and its decay is constant afterwards;
            None for the rising decay.
    """

    def __init__(self, model: Model, decay: float, start: int | None = None) -> None:
        self.decay, self.start = decay, start
        self._model = copy.deepcopy(model).eval().requires_grad_(False)
        self._averages = [parameter.detach() for parameter in self._model.parameters()]
        self._weights = [parameter.detach() for parameter in model.parameters()]

    @property
    def model(self) -> Model:
        """The averaged model."""
        return self._model

    @torch.no_grad()
    def update(self, step: int) -> None:
        """average <- decay average + (1 - decay) weights; `step` counts from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        if self.start is not None:
            decay = self.decay if step >= self.start else 0.0
        torch._foreach_lerp_(self._averages, self._weights, 1 - decay)
