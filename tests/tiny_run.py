"""A run that trains in a second: 48 made-up 8x8 images, the smallest U-Net, 8 noise levels."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cdm_fast.config import (
    DataConfig,
    ImageShape,
    NetworkConfig,
    OutputConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)

GREY_LEVELS = 17
CLASSES = 3

# The same settings as flags, for the command line.
FLAGS = (
    "--T 8 --base-channels 32 --multipliers 1 --blocks-per-level 1 --attention-resolutions --steps 6 "
    "--batch-size 8 --warmup 2 --log-every 2 --save-every 3 --sample-every 0 --evaluate-every 0 "
    "--evaluate-images 8 --draws 2 --num-samples 4 --sampling-steps 4"
).split()


def write_images(path: Path, count: int = 48, **arrays: Any) -> Path:
    """An .npz of bright squares whose place tells the class; `arrays` replaces or adds members."""
    generator = np.random.default_rng(0)
    labels = np.arange(count) % CLASSES
    images = generator.integers(0, 4, (count, 8, 8))
    for image, label in zip(images, labels, strict=True):
        image[2 * label : 2 * label + 3, 2:6] = GREY_LEVELS - 1
    members = {
        "images": images.astype(np.uint8),
        "labels": labels,
        "num_grey_levels": np.array(GREY_LEVELS),
        **arrays,
    }
    np.savez(path, **members)
    return path


def tiny_config(data: Path, **train: Any) -> RunConfig:
    """The run of `FLAGS` on the images in `data`; `train` replaces fields of its TrainConfig."""
    return RunConfig(
        data=DataConfig(source=str(data)),
        image=ImageShape(8, 1, GREY_LEVELS, CLASSES),
        schedule=ScheduleConfig(T=8),
        network=NetworkConfig(
            base_channels=32, multipliers=(1,), blocks_per_level=1, attention_resolutions=()
        ),
        train=replace(TrainConfig(steps=6, batch_size=8, warmup=2), **train),
        output=OutputConfig(
            log_every=2,
            save_every=3,
            sample_every=0,
            evaluate_every=0,
            evaluate_images=8,
            draws=2,
            num_samples=4,
            sampling_steps=4,
        ),
    )
