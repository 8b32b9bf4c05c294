"""A training step of a class embedding that compares two classes of an image, against one that does not."""

from dataclasses import replace

import pytest

from benchmarks.support.cases import both_finite
from benchmarks.support.train_steps import one_step
from cdm_fast.config import preset


def test_step_against_no_class_weight(benchmark, compare, small, device):
    if device.type != "cpu":
        pytest.skip("one_step is for the CPU")
    config = preset("fashion-mnist-encoder")
    network = replace(config.network, conditioning="embedding", base_components=0)
    config = replace(config, network=network)
    without = replace(config, train=replace(config.train, class_weight=0.0))
    batch = 4 if small else config.train.batch_size
    compare(benchmark, one_step(config, batch), one_step(without, batch), both_finite, rounds=9)
    benchmark.extra_info["shape"] = [batch, *config.image.shape]
