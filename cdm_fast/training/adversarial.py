"""Adversarial training: clean images perturbed by a few gradient steps so that the model misclassifies them.

# B images of this process, C channels, H W pixels
"""

from functools import partial

import torch
from torch import Tensor

from cdm_fast.config import RunConfig, TrainConfig
from cdm_fast.data.pixels import noise_of_inputs
from cdm_fast.evaluation.apgd import log_odds_against
from cdm_fast.evaluation.attack_methods import PGD_LENGTH, frozen
from cdm_fast.evaluation.norms import project, random_step, steepest
from cdm_fast.host.distributed import rank_rows
from cdm_fast.model import CDM, DDM, evaluation_mode
from cdm_fast.model.classifier import Classifier

# Default weights of the cross-entropy over the classes of perturbed images. Beside a CDM's denoising error,
# which is below 1, a weight of 0.1 costs much more likelihood (docs/measurements/attacks.md).
OF_CDM, OF_CLASSIFIER = 0.01, 1.0


def adversarial_weight(config: TrainConfig) -> float:
    """The weight of the cross-entropy over the classes of perturbed images: the config's, or the default."""
    if config.adversarial_weight is not None:
        return config.adversarial_weight
    return OF_CLASSIFIER if config.objective == "classifier" else OF_CDM


def perturbed(
    model: CDM | DDM | Classifier,
    x0: Tensor,  # (B, C, H, W) clean images in [-1, 1]
    label: Tensor,  # (B,) int64, -1 for none
    config: RunConfig,
    generator: torch.Generator,
) -> Tensor:
    """Images like `x0`, within the budget of the config, that raise the odds against their labels.

    Projected gradient ascent from a random point, in steps of a total length of 2.5 budgets, without dropout
    and in the precision of training (arXiv 1706.06083, section 2). The batch is processed in the parts whose
    gradients are accumulated. Images without a label are perturbed too.

    Args:
        generator: on the device of the images; draws the random points of all processes together.
    """
    train, norm = config.train, config.train.adversarial
    assert isinstance(model, CDM | Classifier)
    budget = noise_of_inputs(train.budget, config.image.num_grey_levels, config.data.pixels)
    whole = x0.new_empty(train.batch_size, *x0.shape[1:])
    start = rank_rows(random_step(whole, norm, generator), train.accumulate).to(memory_format=_layout(x0))
    ascend = partial(_ascend, model, budget=budget, norm=norm, steps=train.adversarial_steps)
    parts = (tensor.chunk(train.accumulate) for tensor in (x0, start, label))
    with torch.autocast(x0.device.type, torch.bfloat16, enabled=train.precision == "bf16"):
        return torch.cat([ascend(*part) for part in zip(*parts, strict=True)])


@evaluation_mode
def _ascend(
    model: CDM | Classifier,
    x0: Tensor,  # (B, C, H, W)
    start: Tensor,  # like x0, steps of norm 1
    label: Tensor,  # (B,)
    *,
    budget: float,
    norm: str,
    steps: int,
) -> Tensor:
    """Projected gradient ascent of the odds against `label` in the ball around `x0`."""
    label, level = label.clamp(min=0), torch.zeros_like(label)

    def outputs(x: Tensor) -> Tensor:
        return model.logits(x) if isinstance(model, Classifier) else model.class_logits(x, level)

    x = project(x0 + budget * start, x0, budget, norm, -1.0, 1.0)
    with torch.enable_grad(), frozen(model):
        for _ in range(steps):
            x.requires_grad_(True)
            odds = log_odds_against(outputs(x).float(), label, label)
            (gradient,) = torch.autograd.grad(odds.sum(), x)
            step = PGD_LENGTH / steps * budget * steepest(gradient, norm)
            x = project(x.detach() + step, x0, budget, norm, -1.0, 1.0)
    return x.detach()


def _layout(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format
