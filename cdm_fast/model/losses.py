"""The training losses: cross-entropy over noise levels plus denoising error, and denoising error alone.

# B batch, L = T+2 noise levels
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_fast.config.settings import CE_WEIGHT
from cdm_fast.model.cdm import CDM
from cdm_fast.model.classifier import Classifier
from cdm_fast.model.denoiser import DDM, Denoiser
from cdm_fast.ops import denoise_loss, noising


class LossTerms(NamedTuple):
    """Scalars of one batch: `loss` to minimise, `mse` of eps_hat per value (0 for a classifier), `ce` in nats
    (None for a DDM)."""

    loss: Tensor
    mse: Tensor
    ce: Tensor | None


class Noised(NamedTuple):
    """A batch of noised inputs, with their noise, levels and labels; attacked clean images and other classes,
    if any."""

    x_t: Tensor  # (B, ...)
    eps: Tensor  # like x_t
    level: Tensor  # (B,) int64
    label: Tensor | None = None  # (B,) int64, -1 for none
    attacked: Tensor | None = None  # like x_t, at level 0
    other: Tensor | None = None  # (B,) int64, another class for each label, see `draw_other_classes`


def cdm_loss(
    model: CDM,
    x0: Tensor,  # (B, ...) clean data, in [-1, 1] for images
    level: Tensor | None = None,  # (B,) int64
    eps: Tensor | None = None,  # like x0
    label: Tensor | None = None,  # (B,) int64, -1 for none
    ce_weight: float = CE_WEIGHT,
    mse_weight: float = 1.0,
    generator: torch.Generator | None = None,
    class_weight: float = 0.0,
) -> LossTerms:
    """The loss of a CDM: `ce_weight CE(f(x_t), t) + mse_weight mean((eps_hat - eps)^2)` (CDM Alg. 1).

    The cross-entropy alone gives a poor denoiser; the squared error alone leaves one constant per level
    undetermined, hence no likelihood. With joint logits the cross-entropy is over (level, class) pairs, or
    over levels alone for an input without a label, and the squared error is computed with the denoiser of the
    label, or of the marginal. The cross-entropy is then `-log p(t | x_t) - log p(c | x_t, t)`, and
    `class_weight` times the second term is added. A class embedding has the logits of one class at a time.
    Its `class_weight` multiplies the cross-entropy over the class of the input and one other, drawn at random
    (negative sampling), which takes another evaluation of the logits, with dropout masks of its own. The true
    densities minimise each term.

    Args:
        model: the CDM.
        x0: clean data; images in [-1, 1].
        level: 0..T+1; drawn from the model's p(t) by default.
        eps: N(0, I) noise; drawn by default.
        label: class of each input; -1 stands for no class.
        ce_weight, mse_weight: weights of the two terms; a weight of 0 omits the term.
        generator: draws levels, noise and other classes; PyTorch's global generator by default.
        class_weight: additional weight of the cross-entropy over classes.

    Returns:
        The loss, the mean squared error per value and the cross-entropy in nats, scalars.

    >>> from cdm_fast import CDM, MLP, NoiseSchedule
    >>> schedule = NoiseSchedule.uniform(T=10)
    >>> model = CDM(MLP(2, schedule.num_levels, hidden=8), schedule)
    >>> terms = cdm_loss(model, torch.randn(16, 2), ce_weight=0.01)
    >>> terms.loss.backward()
    >>> torch.allclose(terms.loss, 0.01 * terms.ce + terms.mse)
    True
    """
    if level is None:
        level = model.draw_levels(len(x0), generator)
    batch = _noised(model, x0, level, eps, label, generator)
    batch = batch._replace(other=draw_other_classes(model, label, class_weight, generator))
    return noised_cdm_loss(model, batch, ce_weight, mse_weight, class_weight)


def noised_cdm_loss(
    model: CDM,
    batch: Noised,
    ce_weight: float = CE_WEIGHT,
    mse_weight: float = 1.0,
    class_weight: float = 0.0,
    adversarial_weight: float = 0.0,
) -> LossTerms:
    """`cdm_loss` of a batch that has been noised already, with the other classes of `draw_other_classes`.

    Adds `adversarial_weight` times the cross-entropy over the classes of `batch.attacked`, if there are any.
    """
    x_t, eps, level, label, attacked, other = batch
    cross_entropy, at_level, grad_x = model.cross_entropy_and_ratio_gradient(x_t, level, label, other)
    ce = cross_entropy.mean()
    mse = denoise_loss(grad_x, x_t, model.s[level].to(x_t.dtype), eps).sum() / x_t.numel()
    loss = ce_weight * ce + mse_weight * mse
    if class_weight and at_level is not None and label is not None:
        own = label if model.conditioning == "joint" else label.clamp(max=0)  # the first of two; -1 stays
        loss = loss + class_weight * _class_cross_entropy(at_level, level, own, model.schedule.T)
    if attacked is not None and label is not None:
        clean = torch.zeros_like(level)
        of_attacked = model.class_logits(attacked, clean)
        loss = loss + adversarial_weight * _class_cross_entropy(of_attacked, clean, label, model.schedule.T)
    return LossTerms(loss, mse, ce)


def _class_cross_entropy(at_level: Tensor, level: Tensor, label: Tensor, T: int) -> Tensor:
    """The mean of `-log p(c | x_t, t)` in nats; inputs without a label and pure noise count as 0."""
    known = torch.where(level <= T, label, -1)
    return F.cross_entropy(at_level, known, ignore_index=-1, reduction="sum") / len(label)


def ddm_loss(
    model: DDM,
    x0: Tensor,  # (B, ...) clean data, in [-1, 1] for images
    level: Tensor | None = None,  # (B,) int64
    eps: Tensor | None = None,  # like x0
    label: Tensor | None = None,  # (B,) int64, -1 for none
    generator: torch.Generator | None = None,
) -> LossTerms:
    """The training loss of a DDM: `mean((eps_hat - eps)^2)` (DDPM eq. 14, arXiv 2006.11239).

    Levels are drawn uniformly from 1..T by default; the other arguments are those of `cdm_loss`.

    >>> from cdm_fast import DDM, MLPDenoiser, NoiseSchedule
    >>> model = DDM(MLPDenoiser(2, hidden=8), NoiseSchedule.uniform(T=10))
    >>> ddm_loss(model, torch.randn(16, 2)).loss.backward()
    """
    if level is None:
        level = model.draw_levels(len(x0), generator)
    return noised_ddm_loss(model, _noised(model, x0, level, eps, label, generator))


def noised_ddm_loss(model: DDM, batch: Noised) -> LossTerms:
    """`ddm_loss` of a batch that has been noised already."""
    x_t, eps, level, label, *_ = batch
    mse = (model.denoise(x_t, level, label) - eps).square().mean()
    return LossTerms(mse, mse, None)


def noised_classifier_loss(model: Classifier, batch: Noised, adversarial_weight: float = 0.0) -> LossTerms:
    """Mean of `-log p(label | x)` in nats over a batch at the classifier's level.

    Adds `adversarial_weight` times the same over `batch.attacked`, if there are any.
    """
    assert batch.label is not None
    ce = loss = F.cross_entropy(model.logits(batch.x_t), batch.label)
    if batch.attacked is not None:
        loss = loss + adversarial_weight * F.cross_entropy(model.logits(batch.attacked), batch.label)
    return LossTerms(loss, torch.zeros_like(ce), ce)


def draw_other_classes(
    model: Denoiser | Classifier,
    label: Tensor | None,  # (B,) int64, -1 for none
    class_weight: float,
    generator: torch.Generator | None = None,
) -> Tensor | None:
    """(B,) int64: for each label one of the other classes, all equally likely; -1 for -1.

    None where the loss compares no classes in pairs: without `class_weight` or labels, or if the model is not
    a CDM with an embedding of several classes.
    """
    if not class_weight or label is None or not isinstance(model, CDM) or model.conditioning == "joint":
        return None
    classes = model.num_classes or 1
    if classes == 1:
        return None
    step = torch.randint(1, classes, label.shape, generator=generator, device=label.device)
    return torch.where(label >= 0, (label + step) % classes, label)


def draw_seed(device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """A (2,) int64 Philox key `(seed, offset)` for `noising`."""
    return torch.randint(2**62, (2,), device=device, generator=generator)


def _noised(
    model: Denoiser,
    x0: Tensor,
    level: Tensor,
    eps: Tensor | None,
    label: Tensor | None,
    generator: torch.Generator | None,
) -> Noised:
    seed = draw_seed(x0.device, generator) if eps is None else None
    x_t, eps, _ = noising(x0, level, model.a, model.s, seed, eps=eps)
    return Noised(x_t, eps, level, label)
