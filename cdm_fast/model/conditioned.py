"""Models given a class: guided towards it, on the way between two, or with the class fixed.

# B batch, L = T+2 noise levels, K classes
"""

import torch
from torch import Tensor

from cdm_fast.errors import UserError
from cdm_fast.model.cdm import CDM
from cdm_fast.model.denoiser import Denoiser, Wrapped, Wrapper
from cdm_fast.model.energy import Energy


class OfClass(Wrapper[CDM], Energy):
    """One class of a class-conditional CDM as a density of its own.

    Args:
        model: trained with classes.
        label: the class.

    Raises:
        UserError: a model without classes, or a class that it does not know.
    """

    def __init__(self, model: CDM, label: int) -> None:
        super().__init__(model)
        self.label = label
        classes = model.num_classes
        if classes is None:
            raise UserError(f"class {label} of a model that was trained without classes")
        if not 0 <= label < classes:
            raise UserError(f"class {label} does not exist: the model knows the classes 0 to {classes - 1}")

    def log_prob_levels_and_score(
        self, x: Tensor, level: int | Tensor, label: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.model.log_prob_levels_and_score(x, level, self._label(x, label))

    def log_prob_levels(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        return self.model.log_prob_levels(x, self._label(x, label))

    def _label(self, x: Tensor, label: Tensor | None) -> Tensor:
        refuse_label(label)
        return torch.full((len(x),), self.label, device=x.device)


def refuse_label(label: Tensor | None) -> None:
    if label is not None:
        raise UserError(
            "a composition takes no label: compose the classes themselves, as OfClass(model, label)"
        )


class Guided(Wrapper[Wrapped]):
    """A class-conditional model that overstates the class: see `Denoiser.guided_denoise`.

    Args:
        model: the model.
        guidance: w; 0 leaves the model as it is.
    """

    def __init__(self, model: Wrapped, guidance: float) -> None:
        super().__init__(model)
        self.guidance = guidance

    def denoise(self, x: Tensor, level: int | Tensor, label: Tensor | None = None) -> Tensor:
        if label is None:
            return self.model.denoise(x, level)
        return self.model.guided_denoise(x, level, label, self.guidance)


class GuidedEnergy(Guided[Energy], Energy):
    """The same of a model that knows `log p_t`: `(1 + w) log p_t(x|label) - w log p_t(x)` is an energy too.

    Args:
        model: the model.
        guidance: w.
    """

    def log_prob_levels_and_score(
        self, x: Tensor, level: int | Tensor, label: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if label is None:
            return self.model.log_prob_levels_and_score(x, level)
        return self.model.guided_log_prob_levels_and_score(x, level, label, self.guidance)


class Between(Wrapper[Denoiser]):
    """A class-conditional model on the way from the labelled class to another.

    `eps_hat = (1 - share) eps_hat(x, label) + share eps_hat(x, other)`, the denoiser of logits mixed in these
    proportions, that is of `p(x|label)^(1-share) p(x|other)^share` at every level up to a factor.

    Args:
        model: the model; `Guided` overstates both classes.
        other: the class at share 1, 0..K-1.
        share: 0..1.
    """

    def __init__(self, model: Denoiser, other: int, share: float) -> None:
        super().__init__(model)
        self.other = other
        self.share = share

    def denoise(self, x: Tensor, level: int | Tensor, label: Tensor | None = None) -> Tensor:
        if label is None:
            return self.model.denoise(x, level)
        here, there = (self.model.denoise(x, level, c) for c in (label, torch.full_like(label, self.other)))
        return torch.lerp(here, there, self.share)
