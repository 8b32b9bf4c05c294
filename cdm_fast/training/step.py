"""One training step: its batch, loss, gradient and optimizer.

Every random draw of step n is a function of (seed, n).

# B batch, C channels, H W pixels, K classes
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from cdm_fast.config import RunConfig, TrainConfig
from cdm_fast.data import ImageData
from cdm_fast.data.deform import deform_some
from cdm_fast.data.pixels import to_points
from cdm_fast.host.device import upload
from cdm_fast.host.distributed import all_reduce_mean, gather_full, rank_rows
from cdm_fast.host.processes import this_process
from cdm_fast.model import CDM, DDM
from cdm_fast.model.classifier import Classifier
from cdm_fast.model.losses import (
    LossTerms,
    Noised,
    draw_other_classes,
    draw_seed,
    noised_cdm_loss,
    noised_classifier_loss,
    noised_ddm_loss,
)
from cdm_fast.nn.trunk import Trunk
from cdm_fast.nn.working import is_compiled, working_weights
from cdm_fast.ops import noising
from cdm_fast.ops.precision import ieee_fp32
from cdm_fast.training.adversarial import adversarial_weight, perturbed
from cdm_fast.training.ema import Ema
from cdm_fast.training.feed import images_of
from cdm_fast.training.folds import step_indices, use_base_of_step
from cdm_fast.training.levels import draw_levels

LossFunction = Callable[..., LossTerms]  # (model, batch)


def parts_of(batch: Noised, count: int) -> Iterator[Noised]:
    """The batch in `count` equal parts, (B/count, ...) each; `count` must divide B."""
    pieces = [[None] * count if tensor is None else tensor.chunk(count) for tensor in batch]
    return (Noised(*part) for part in zip(*pieces, strict=True))


class StepResult(NamedTuple):
    """Scalars of one step, on the device."""

    loss: Tensor
    ce: Tensor  # nats; 0 for a DDM
    mse: Tensor
    grad_norm: Tensor  # norm of the whole gradient, before clipping
    bad: Tensor  # 1.0 if loss or gradient was not finite, and no weight changed; else 0.0


def training_step(
    model: CDM | DDM | Classifier,
    optimizer: torch.optim.Optimizer,  # fused: its `found_inf` skips the step on the device
    ema: Ema,
    batch: Noised,
    loss_function: LossFunction,
    *,
    step: int = 0,
    clip_norm: float = 0.0,
    parts: int = 1,
    precision: str = "fp32",
    keep_local: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> StepResult:
    """One optimizer step: loss, gradient, clipping, update, moving average. Does not wait for the device.

    Args:
        batch: this rank's rows, split into `parts` equal parts whose gradients are accumulated.
        loss_function: see `make_loss`.
        step: step number from 0, for the warm-up of the average.
        clip_norm: largest norm of the whole gradient; 0 for no limit.
        precision: "bf16" runs the network under autocast.
        keep_local: entered around all parts but the last; see `parallel.Wrapped.keep_local`.

    A step whose loss or gradient is not finite changes no weight and no moment; its result has `bad` set.
    """
    optimizer.zero_grad()
    totals = accumulate_gradient(
        model, batch, loss_function, parts=parts, precision=precision, keep_local=keep_local
    )
    totals = all_reduce_mean(totals)
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    grad_norm = gather_full(nn.utils.clip_grad_norm_(parameters, clip_norm or math.inf))
    bad = (~(torch.isfinite(grad_norm) & torch.isfinite(totals[0]))).float()
    optimizer.found_inf = bad  # type: ignore[attr-defined]
    optimizer.step()
    ema.update(step)
    loss, ce, mse = totals
    return StepResult(loss, ce, mse, grad_norm, bad)


def accumulate_gradient(
    model: CDM | DDM | Classifier,
    batch: Noised,
    loss_function: LossFunction,
    *,
    parts: int = 1,
    precision: str = "fp32",
    keep_local: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Tensor:
    """Accumulates the gradient of the batch in the weights, part by part; returns (3,) loss, CE (or 0), MSE.

    Arguments as in `training_step`. In a run of several processes the gradient is averaged over them, and the
    returned numbers are those of this rank's rows.
    """
    device = batch.x_t.device.type
    totals = torch.zeros(
        3, device=batch.x_t.device, dtype=torch.promote_types(batch.x_t.dtype, torch.float32)
    )
    # DDP needs the parameters themselves, and a compiled graph casts by itself.
    lends = precision == "bf16" and this_process().count == 1 and not is_compiled(loss_function)
    for number, part in enumerate(parts_of(batch, parts), 1):
        with keep_local() if number < parts else nullcontext():
            with ieee_fp32(), working_weights(model, torch.bfloat16) if lends else nullcontext():
                with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                    terms = loss_function(model, part)
                (terms.loss / parts).backward()
        ce = torch.zeros_like(terms.mse) if terms.ce is None else terms.ce
        totals += torch.stack([terms.loss, ce, terms.mse]).detach() / parts
    return totals


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of a step (from 0): linear warm-up, then constant, step or cosine decay."""
    rate = config.lr * min(1.0, (step + 1) / max(config.warmup, 1))
    if config.decay == "step":
        rate *= config.decay_factor ** (step // config.decay_every)
    if config.decay == "cosine":
        rate *= (1 + math.cos(math.pi * min(step / config.steps, 1.0))) / 2
    return rate


def begin_step(model: CDM | DDM | Classifier, config: RunConfig, step: int) -> None:
    """Sets what is particular to a step (from 0): random numbers, dropout, and the base of its images."""
    seed_step(config.train.seed, step)
    set_dropout(model, config, step)
    use_base_of_step(model, step)


def set_dropout(model: CDM | DDM | Classifier, config: RunConfig, step: int) -> None:
    """Sets dropout for step `step` (from 0): the config's rate, or 0 from `dropout_until` on.

    With dropout to the end, training fits the likelihood of the network with dropout; without dropout the
    normalisation of its levels is wrong by about 0.2 bits/dim on 8x8 digits (docs/explanation/likelihood.md).
    """
    on = step < config.train.dropout_until * config.train.steps
    cast(Trunk, model.network).dropout = config.network.dropout if on else 0.0


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Fused Adam or AdamW over all parameters of the model."""
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    decay = config.weight_decay if config.optimizer == "adamw" else 0.0
    return kind(model.parameters(), lr=config.lr, weight_decay=decay, fused=True)


def make_loss(config: TrainConfig) -> LossFunction:
    """The loss function `f(model, batch)` of the config's objective, with its weights bound."""
    if config.objective == "ddm":
        return noised_ddm_loss
    if config.objective == "classifier":
        return partial(noised_classifier_loss, adversarial_weight=adversarial_weight(config))
    return partial(
        noised_cdm_loss,
        ce_weight=config.ce_weight,
        mse_weight=config.mse_weight,
        class_weight=config.class_weight,
        adversarial_weight=adversarial_weight(config),
    )


def derived_seed(seed: int, step: int, purpose: str) -> int:
    """A 63-bit seed, a hash of the arguments."""
    words = hashlib.blake2b(f"{seed} {step} {purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(words) >> 1


def seed_step(seed: int, step: int) -> None:
    """Seeds the global generator, from which dropout draws, for one step."""
    torch.manual_seed(derived_seed(seed, step, "dropout"))


def draw_batch(data: ImageData, model: CDM | DDM | Classifier, config: RunConfig, step: int) -> Noised:
    """The batch of a step (from 0), a function of (seed, step): images, dequantisation, flips, levels, noise.

    With `--adversarial` it has attacked images too, which depend on the model's weights as well.

    Each of several processes draws the whole batch, which is cheap compared with a step, and returns its
    rows. The labels must be on the model's device; the images may be in host memory.
    """
    train, device = config.train, model.a.device
    generator = torch.Generator(device).manual_seed(derived_seed(train.seed, step, "batch"))

    def indices(step: int) -> Tensor:
        return step_indices(len(data.images), config, step)

    on_host = indices(step)
    level = draw_levels(model, train.batch_size, train, generator)
    index, grey = upload(on_host, device), data.num_grey_levels
    images = images_of(data, on_host, index, lambda: indices(step + 1))
    images = _deformed(images, config, grey, step)
    points = config.data.pixels == "points"
    x_t, eps, x0 = noising(
        to_points(images, grey) if points else images,
        level,
        model.a,
        model.s,
        draw_seed(device, generator),
        num_grey_levels=None if points else grey,
        flip=config.data.flip,
    )
    label = _draw_labels(data, config, index, generator)
    other = _draw_others(model, config, label, step)
    x_t, eps, level = (rank_rows(drawn, train.accumulate) for drawn in (x_t, eps, level))
    if train.channels_last:
        x_t, eps = (x.contiguous(memory_format=torch.channels_last) for x in (x_t, eps))
    label, other = (
        drawn if drawn is None else rank_rows(drawn, train.accumulate) for drawn in (label, other)
    )
    attacked = None
    if train.adversarial != "none" and label is not None:
        generator = torch.Generator(device).manual_seed(derived_seed(train.seed, step, "adversarial"))
        clean = rank_rows(x0, train.accumulate)
        if train.channels_last:
            clean = clean.contiguous(memory_format=torch.channels_last)
        attacked = perturbed(model, clean, label, config, generator)
    return Noised(x_t, eps, level, label, attacked, other)


def _draw_others(
    model: CDM | DDM | Classifier, config: RunConfig, label: Tensor | None, step: int
) -> Tensor | None:
    """`draw_other_classes` of a step, by draws of their own."""
    generator = torch.Generator(model.a.device).manual_seed(
        derived_seed(config.train.seed, step, "other classes")
    )
    return draw_other_classes(model, label, config.train.class_weight, generator)


def _deformed(images: Tensor, config: RunConfig, num_grey_levels: int, step: int) -> Tensor:
    """The images of a step, a share of them deformed as the config says; by draws of their own."""
    train = config.train
    if not train.deform or step >= train.deform_until * train.steps:
        return images
    generator = torch.Generator(images.device).manual_seed(derived_seed(train.seed, step, "deform"))
    return deform_some(images, train.deform, num_grey_levels, generator)


def _draw_labels(
    data: ImageData, config: RunConfig, index: Tensor, generator: torch.Generator
) -> Tensor | None:
    """(B,) labels: all for a classifier, some replaced by -1 for a class-conditional run; else None."""
    if config.train.objective == "classifier" and data.labels is not None:
        return data.labels[index]
    if config.network.conditioning == "none" or data.labels is None:
        return None
    dropped = torch.rand(len(index), generator=generator, device=index.device) < config.train.label_dropout
    return data.labels[index].masked_fill(dropped, -1)
