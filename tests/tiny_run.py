"""A run that trains in a second: 48 made-up 8x8 images, the smallest networks, 8 noise levels."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cdm_fast.config import ImageShape, RunConfig

GREY_LEVELS = 17
CLASSES = 3

SETTINGS: dict[str, dict[str, Any]] = {
    "schedule": {"T": 8},
    "network": {
        "base_channels": 32,
        "multipliers": (1,),
        "blocks_per_level": 1,
        "attention_resolutions": (),
        "patch_size": 2,
        "width": 32,
        "depth": 2,
        "head_width": 8,
        "conditioning": "none",
    },
    "train": {"steps": 6, "batch_size": 8, "warmup": 2, "precision": "fp32"},
    "output": {
        "log_every": 2,
        "save_every": 6,
        "sample_every": 0,
        "evaluate_every": 0,
        "evaluate_images": 8,
        "draws": 2,
        "num_samples": 4,
        "sampler": "ddim",
        "sampling_steps": 4,
    },
}


def with_settings(config: RunConfig) -> RunConfig:
    """A config with `SETTINGS` in place of its own."""
    sections = {name: replace(getattr(config, name), **values) for name, values in SETTINGS.items()}
    return replace(config, **sections)


def as_flags(settings: dict[str, dict[str, Any]]) -> list[str]:
    """Settings as they are written on the command line."""
    flags: list[str] = []
    for values in settings.values():
        for name, value in values.items():
            words = value if isinstance(value, tuple) else (value,)
            flags += [f"--{name.replace('_', '-')}", *map(str, words)]
    return flags


FLAGS = as_flags(SETTINGS)


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
    """The run of `SETTINGS` on the images in `data`; `train` replaces fields of its TrainConfig."""
    config = with_settings(RunConfig())
    return replace(
        config,
        data=replace(config.data, source=str(data)),
        image=ImageShape(8, 8, 1, GREY_LEVELS, CLASSES),
        train=replace(config.train, **train),
    )
