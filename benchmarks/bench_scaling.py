"""Cost of a training step against batch size (1 to 512) and resolution (8 to 64), beside our own DDM.

    pytest benchmarks/bench_scaling.py --benchmark-only --results scaling.jsonl
    python -m benchmarks.support.plot_scaling scaling.jsonl scaling.png

A network of two resolutions and 32 (GPU: 128) channels, in the precision that `--precision auto` picks.
"""

from dataclasses import replace

import pytest
import torch

from benchmarks.support.cases import both_finite
from benchmarks.support.limit import share
from benchmarks.support.train_steps import Steps
from cdm_fast.config import PRESETS, ImageShape
from cdm_fast.training.tuning import pick_precision

BATCHES, RESOLUTIONS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512), (8, 16, 32, 64)
CHANNELS = {"cpu": 32, "cuda": 128}
MOST_PIXELS = {"cpu": 2**16, "cuda": 2**20}  # of a batch: a larger one takes long and shows nothing new


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_step(benchmark, compare, small, device, resolution, batch):
    if batch * resolution**2 > MOST_PIXELS[device.type] or (small and batch * resolution**2 > 512):
        pytest.skip("beyond what is worth its time on this device")
    sizes = (resolution, 3, 202, CHANNELS[device.type], (1, 2), 2, ())
    steps = Steps(small, device, sizes=sizes, batch_size=batch)
    digits = PRESETS["digits"]
    config = replace(
        digits,
        image=ImageShape(resolution, resolution, 3, 256, None),
        network=replace(digits.network, base_channels=sizes[3]),
        train=replace(digits.train, batch_size=batch),
    )
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[pick_precision(config, device)]

    compare(benchmark, steps.adjoint(dtype), steps.ddm(dtype), both_finite, rounds=3)
    info = benchmark.extra_info
    info.update(shape=list(steps.batch.x0.shape), precision=str(dtype).removeprefix("torch."))
    share(info, 6, batch, sizes, dtype, device)
