"""Conditioning of a class-conditional model's likelihood: a label, no label, or all classes at once.

# n images, K classes
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cdm_fast.config.choices import Given
from cdm_fast.data import ImageData
from cdm_fast.errors import UserError
from cdm_fast.host.device import upload
from cdm_fast.model import CDM, Denoiser
from cdm_fast.model.cdm import normalised_log_prior


def num_classes_of(model: Denoiser) -> int | None:
    """K of a class-conditional model, or None for a model without classes."""
    own = getattr(model, "num_classes", None)
    return own if own is not None else getattr(model.network, "num_classes", None)


def labels_given(model: Denoiser, data: ImageData, given: Given) -> Tensor | None:
    """The labels (n,) int64 on which the likelihoods of `data` are conditioned; None for "none" and "all".

    Raises UserError for a model without classes, data without labels, and labels unknown to the model.
    """
    if given == "none":
        return None
    num_classes = num_classes_of(model)
    if num_classes is None:
        raise UserError(f"--given {given}: this model was trained without classes; leave it out")
    if given == "all":
        return None
    if data.labels is None:
        raise UserError(f"--given label: {data.name} has no labels; give labelled data, or --given all")
    require_known(data.labels, num_classes, data.name)
    return data.labels


def require_known(labels: Tensor, num_classes: int, name: str) -> None:
    """Raises UserError for labels (n,) of the data set `name` outside 0..K-1."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise UserError(
            f"{name} holds label {low if low < 0 else high}, out of range: the model knows the classes 0 to"
            f" {num_classes - 1}; give data of the same classes, or relabel it"
        )


def log_class_prior(
    model: Denoiser,
    class_prior: Tensor | None = None,  # (K,)
) -> Tensor:
    """`log p(c)` (K,) in nats, float64, on the CPU: `class_prior`, or a CDM's own prior, or a uniform one.

    class_prior: K positive numbers, normalised here; anything else raises UserError.
    """
    num_classes = num_classes_of(model)
    assert num_classes is not None, "a model without classes is refused earlier"
    if class_prior is None and isinstance(model, CDM) and model.log_class_prior is not None:
        return model.log_class_prior.double().cpu()
    prior = torch.ones(num_classes) if class_prior is None else class_prior
    return normalised_log_prior(prior, "class", num_classes).cpu()


def of_all_classes(
    model: Denoiser, count: int, log_prob: Callable[[Tensor], Tensor]
) -> Tensor:  # (count,) float64, on the device of what `log_prob` returns
    """`log sum_c p(c) p(x|c)` of `count` images in nats: one call `log_prob(label (count,))` per class."""
    prior = log_class_prior(model)
    each = torch.stack([log_prob(torch.full((count,), c)).double() for c in range(len(prior))])
    return (each + upload(prior, each.device)[:, None]).logsumexp(0)
