"""A training run is the same run on every backend: 20 steps of AdamW, loss by loss."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from cdm_fast import CDM, NoiseSchedule, Transformer, UNet, use_backend
from cdm_fast.config import RunConfig
from cdm_fast.data import ImageData
from cdm_fast.ops import backend as _backend
from cdm_fast.training.ema import Ema
from cdm_fast.training.step import draw_batch, make_loss, make_optimizer, training_step

STEPS = 20
SCHEDULE = NoiseSchedule.uniform(T=8)
GREY_LEVELS = 17
TRAINING = {"optimizer": "adamw", "weight_decay": 0.01, "lr": 2e-3, "batch_size": 2, "ce_weight": 0.1}


# Every fused op, and as few launches as can be: the interpreter of Triton takes tens of ms for each.
NETWORKS = {
    "unet": partial(
        UNet, base_channels=8, multipliers=(1,), blocks_per_level=0, attention_resolutions=(), num_groups=2
    ),
    "transformer": partial(
        Transformer, patch_size=2, width=8, depth=1, head_width=4, stem_channels=0, num_groups=2
    ),
}


def small_network(architecture):
    network = NETWORKS[architecture](4, 1, SCHEDULE.num_levels, dropout=0.2)
    return network.to(memory_format=torch.channels_last)


def losses(backend, architecture):
    """(STEPS, 3): loss, squared error and cross-entropy of each step; every backend gets the same draws."""
    torch.manual_seed(0)
    images = torch.randint(GREY_LEVELS, (10, 1, 4, 4), dtype=torch.uint8)
    data = ImageData(images, None, GREY_LEVELS, None, "made-up", "train")
    config = RunConfig()
    config = replace(config, data=replace(config.data, flip=True), train=replace(config.train, **TRAINING))
    model = CDM(small_network(architecture), SCHEDULE)
    optimizer, ema = make_optimizer(config.train, model), Ema(model, config.train.ema_decay)
    loss_function = make_loss(config.train)
    terms = []
    with use_backend(backend):
        for step in range(STEPS):
            batch = draw_batch(data, model, config, step)
            result = training_step(model, optimizer, ema, batch, loss_function, step=step)
            terms.append(torch.stack([result.loss, result.mse, result.ce]))
    return torch.stack(terms)


@pytest.mark.parametrize("backend", ["cpp", "triton"])
@pytest.mark.parametrize("architecture", NETWORKS)
def test_twenty_steps_have_the_losses_of_the_reference(backend, architecture):
    reason = _backend.missing(backend)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    expected, got = losses("reference", architecture), losses(backend, architecture)
    assert expected.shape == (STEPS, 3) and bool(expected.isfinite().all())
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
