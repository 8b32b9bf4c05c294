"""Training with checkpoints that another thread writes, against training without any.

The digits preset on its own data, at batch 32, for 100 steps with `--save-every 100`, which writes at steps
50 and 100, and the 33.4 M CIFAR-10 network, batch 8, for 10 steps with `--save-every 10`. The preset's batch
is four times as large, and nobody saves every 10 steps: these choices make the cost of saving visible. A call
ends when its last checkpoint is on the disk.
"""

from dataclasses import replace

import pytest
import torch

from benchmarks.support.cases import both_finite
from cdm_fast.config import PRESETS, RunConfig
from cdm_fast.data import ImageData, load_data
from cdm_fast.runs.checkpoint import create_run
from cdm_fast.training.feed import on_device
from cdm_fast.training.loop import take_step
from cdm_fast.training.prepare import resolve
from cdm_fast.training.saver import Saver
from cdm_fast.training.state import new_state, to_checkpoint
from cdm_fast.training.step import make_loss
from cdm_fast.training.tuning import compiled


def digits() -> tuple[RunConfig, ImageData]:
    """The preset on its data, a quarter of its batch."""
    config = PRESETS["digits"]
    return replace(config, train=replace(config.train, batch_size=32)), load_data("digits")


def cifar10() -> tuple[RunConfig, ImageData]:
    """The 33.4 M network at batch 8, on random images."""
    config = PRESETS["cifar10"]
    images = torch.randint(256, (64, 3, 32, 32), dtype=torch.uint8)
    config = replace(config, train=replace(config.train, batch_size=8))
    return config, ImageData(images, None, 256, None, "random", "train")


@pytest.mark.parametrize(
    ("case", "steps", "rounds"),
    [(digits, 100, 4), (cifar10, 10, 3)],
    ids=["digits-100-steps", "33M-10-steps"],
)
def test_training_with_a_checkpoint(benchmark, compare, device, small, tmp_path, case, steps, rounds):
    config, data = (digits if small else case)()
    config = resolve(config, data, device)
    steps = 3 if small else steps
    data, state = on_device(data, device), new_state(config, device)
    loss_function = compiled(make_loss(config.train), config.train.compile, device)
    create_run(tmp_path / "run", config, to_checkpoint(state, config))
    waits: list[float] = []

    def train(saver: Saver | None) -> torch.Tensor:
        for _ in range(steps):
            take_step(state, data, config, loss_function)
            if saver is not None:
                saver.after_step(state.step, lambda: to_checkpoint(state, config))
        return next(state.model.parameters()).detach()

    def with_checkpoint() -> torch.Tensor:
        with Saver(tmp_path / "run", every=steps, keep=1, saved=state.step) as saver:
            weights = train(saver)
        waits.append(saver.waited)
        return weights

    compare(benchmark, with_checkpoint, lambda: train(None), both_finite, rounds=rounds)
    benchmark.extra_info["most_seconds_waited_for_the_disk"] = max(waits)
    benchmark.extra_info["shape"] = [config.train.batch_size, *data.images.shape[1:]]
