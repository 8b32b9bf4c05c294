"""Training from the data on: batches drawn, dequantised, flipped and noised, step, optimizer, average.

The baseline is the same step with its optimizer and average on one batch that lies ready, so the ratio is the
share of the time that is not the data's. Fashion-MNIST's shape (28x28, grey) with the preset's network, and
CIFAR-10's on a GPU; the images are random, their values change nothing here.
"""

from dataclasses import replace

import pytest
import torch

from benchmarks.cases import both_finite
from cdm_fast.config import PRESETS, ImageShape
from cdm_fast.data import ImageData
from cdm_fast.state import new_state
from cdm_fast.step import draw_batch, make_loss, training_step
from cdm_fast.tuning import compiled, pick_precision

PRESET = {"cpu": "fashion-mnist", "cuda": "cifar10"}


@pytest.fixture
def config(small, device):
    config = PRESETS[PRESET[device.type]]
    if small:
        config = replace(
            PRESETS["digits"],
            image=ImageShape(8, 1, 17, None),
            network=replace(PRESETS["digits"].network, conditioning="none"),
            train=replace(PRESETS["digits"].train, batch_size=8),
        )
    return replace(config, train=replace(config.train, precision=pick_precision(config, device)))


def test_images_per_second(benchmark, compare, config, device):
    image, train = config.image, config.train
    shape = (4096, image.channels, image.size, image.size)
    images = torch.randint(image.num_grey_levels, shape, dtype=torch.uint8, device=device)
    data = ImageData(images, None, image.num_grey_levels, None, "random", "train")
    state = new_state(config, device)
    loss_function = compiled(make_loss(train), train.compile, device)
    ready = draw_batch(data, state.model, config, 0)
    count = iter(range(10**9))

    def step(batch):
        return training_step(
            state.model,
            state.optimizer,
            state.ema,
            batch,
            loss_function,
            clip_norm=train.clip_norm,
            precision=train.precision,
        ).loss

    compare(
        benchmark,
        lambda: step(draw_batch(data, state.model, config, next(count))),
        lambda: step(ready),
        both_finite,
        rounds=9,
    )
    info = benchmark.extra_info
    info["shape"] = [train.batch_size, *shape[1:]]
    if "candidate_ms" in info:
        info["images_per_second"] = 1e3 * train.batch_size / info["candidate_ms"]
