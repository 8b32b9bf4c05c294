"""Models given a class: the class fixed, guidance towards it, and interpolation between two.

# B batch, L = T+2 noise levels, K classes
"""

import torch
from torch import Tensor

from cdm_fast.errors import UserError
from cdm_fast.model.cdm import CDM
from cdm_fast.model.denoiser import Denoiser, Wrapped, Wrapper
from cdm_fast.model.energy import Energy


class OfClass(Wrapper[CDM], Energy):
    """One class of a class-conditional CDM as a separate density, `p(x|label)`.

    See also `Product` and `Mixture`, which compose such densities.

    Args:
        model: a CDM trained with classes.
        label: the class, 0..K-1.

    Raises:
        UserError: a model without classes, or a class that does not exist.

    >>> from cdm_fast import CDM, MLP, NoiseSchedule
    >>> schedule = NoiseSchedule.uniform(T=10)
    >>> model = CDM(MLP(2, schedule.num_levels, hidden=8, num_classes=3, conditioning="joint"), schedule)
    >>> x = torch.zeros(4, 2)
    >>> torch.equal(OfClass(model, 2).log_prob(x), model.log_prob(x, label=torch.tensor([2, 2, 2, 2])))
    True
    """

    def __init__(self, model: CDM, label: int) -> None:
        super().__init__(model)
        self.label = label
        classes = model.num_classes
        if classes is None:
            raise UserError(f"class {label} was asked of a model that was trained without classes")
        if not 0 <= label < classes:
            raise UserError(f"class {label} does not exist: the model knows the classes 0 to {classes - 1}")

    def log_prob_levels_and_score(
        self, x: Tensor, level: int | Tensor, label: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As in `Energy`, for the fixed class. Raises UserError for a label."""
        refuse_label(label)
        return self.model.log_prob_levels_and_score(x, level, self.labels(x))

    def log_prob_levels(self, x: Tensor, *, label: Tensor | None = None) -> Tensor:
        """`log p_t(x|c)` of the fixed class in nats at every level, (B, L). Raises UserError for a label."""
        refuse_label(label)
        return self.model.log_prob_levels(x, label=self.labels(x))

    def labels(self, x: Tensor) -> Tensor:
        """The class of each image of x, (B,) int64."""
        return torch.full((len(x),), self.label, device=x.device)


def refuse_label(label: Tensor | None) -> None:
    """UserError unless `label` is None: a composition has no classes of its own."""
    if label is not None:
        raise UserError(
            "a composition takes no label: compose the classes themselves, as OfClass(model, label)"
        )


class Guided(Wrapper[Wrapped]):
    """A class-conditional model under classifier-free guidance (arXiv 2207.12598).

    `eps_hat = (1 + w) eps_hat(x, label) - w eps_hat(x)`. `sample(guidance=w)` wraps its model in this class.
    See also `GuidedEnergy`, for a model that knows `log p_t`.

    Args:
        model: any class-conditional denoiser.
        guidance: w; 0 leaves the model unchanged.

    >>> from cdm_fast import DDM, MLPDenoiser, NoiseSchedule
    >>> model = DDM(MLPDenoiser(2, hidden=8, num_classes=3), NoiseSchedule.uniform(T=10))
    >>> x, label = torch.randn(4, 2), torch.tensor([0, 1, 2, 0])
    >>> guided = Guided(model, 1.5).denoise(x, 5, label)
    >>> torch.allclose(guided, 2.5 * model.denoise(x, 5, label) - 1.5 * model.denoise(x, 5), atol=1e-5)
    True
    """

    def __init__(self, model: Wrapped, guidance: float) -> None:
        super().__init__(model)
        self.guidance = guidance

    def denoise(self, x: Tensor, level: int | Tensor, label: Tensor | None = None) -> Tensor:
        """The guided `eps_hat`, like `x`; without a label, the model's unguided `eps_hat`."""
        if label is None:
            return self.model.denoise(x, level)
        return self.model.guided_denoise(x, level, label, self.guidance)


class GuidedEnergy(Guided[Energy], Energy):
    """`Guided` for a model that knows `log p_t`: the energy `(1 + w) log p_t(x|label) - w log p_t(x)`.

    Args:
        model: a class-conditional CDM.
        guidance: w; 0 leaves the model unchanged.
    """

    def log_prob_levels_and_score(
        self, x: Tensor, level: int | Tensor, label: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As in `Energy`, for the guided log-density; without a label, for the model's own."""
        if label is None:
            return self.model.log_prob_levels_and_score(x, level)
        return self.model.guided_log_prob_levels_and_score(x, level, label, self.guidance)


class Between(Wrapper[Denoiser]):
    """An interpolation between the labelled class and another one.

    `eps_hat = (1 - u) eps_hat(x, label) + u eps_hat(x, other)` with u = `fraction`: the denoiser of
    `p_t(x|label)^(1-u) p_t(x|other)^u` at every level, up to a factor.

    Args:
        model: any class-conditional denoiser; `Guided` applies guidance to both classes.
        other: the class at fraction 1, 0..K-1.
        fraction: u, 0..1.
    """

    def __init__(self, model: Denoiser, other: int, fraction: float) -> None:
        super().__init__(model)
        self.other = other
        self.fraction = fraction

    def denoise(self, x: Tensor, level: int | Tensor, label: Tensor | None = None) -> Tensor:
        """The interpolated `eps_hat`, like `x`; without a label, the model's own."""
        if label is None:
            return self.model.denoise(x, level)
        here, there = (self.model.denoise(x, level, c) for c in (label, torch.full_like(label, self.other)))
        return torch.lerp(here, there, self.fraction)
