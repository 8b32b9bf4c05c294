"""What happens before step 0: settings resolved and checked, data counted and placed, randomness set apart.

# K classes
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from cdm_fast.config import ImageShape, RunConfig, check
from cdm_fast.config.choices import Parallel
from cdm_fast.config.json import differences
from cdm_fast.data import ImageData
from cdm_fast.errors import UserError
from cdm_fast.host.processes import launched, this_process
from cdm_fast.runs.build import head_rank
from cdm_fast.runs.checkpoint import read_config
from cdm_fast.runs.data import in_place
from cdm_fast.training.tuning import pick_precision


def begun(config: RunConfig, out: str | Path) -> RunConfig | None:
    """The config with which to resume `out`, if it holds the beginning of this very run; else None.

    torchrun starts its command again when a process has died, and so does a queue when a machine has.
    """
    if not (Path(out) / "config.json").is_file():
        return None
    stored = read_config(out)
    config = in_place(config)
    network, train = config.network, config.train
    told_by_machine = replace(
        config,
        image=stored.image,
        network=replace(
            network, head_rank=stored.network.head_rank if network.head_rank is None else network.head_rank
        ),
        train=replace(
            train, precision=stored.train.precision if train.precision == "auto" else train.precision
        ),
    )
    return None if differences(stored, told_by_machine) else told_by_machine


def resolve(config: RunConfig, data: ImageData, device: torch.device) -> RunConfig:
    """The config with what only data and device tell: image shape, classes, rank of the head, precision."""
    _, channels, height, width = data.images.shape
    if height != width:
        raise UserError(f"{data.name} holds {height}x{width} images; give --image-size to crop them square")
    image = ImageShape(height, channels, data.num_grey_levels, data.num_classes, class_counts(data))
    config = replace(config, image=image)
    check(config)
    if config.network.conditioning == "joint":
        config = replace(config, network=replace(config.network, head_rank=head_rank(config)))
    return replace(
        config,
        train=replace(config.train, precision=pick_precision(config, device)),
    )


def check_parallel(config: RunConfig, parallel: Parallel) -> None:
    """UserError for a batch that the processes cannot share evenly, or settings that FSDP2 cannot serve."""
    train, count = config.train, this_process().count
    if count > 1 and train.batch_size % (train.accumulate * count):
        parts = f" and {train.accumulate} parts each (--accumulate)" if train.accumulate > 1 else ""
        raise UserError(
            f"--batch-size {train.batch_size} is that of all processes together, and {count}{parts} cannot"
            f" share it evenly; give a multiple of {count * train.accumulate}"
        )
    if parallel == "fsdp" and launched() is None:
        raise UserError(
            "--parallel fsdp splits a model over processes, and there is one; start with torchrun"
        )
    if parallel == "fsdp" and train.checkpoint_blocks:
        raise UserError("--parallel fsdp does not go with --checkpoint-blocks; leave one of them out")
    if parallel == "fsdp" and train.compile not in ("auto", "off"):
        raise UserError(f"--parallel fsdp does not go with --compile {train.compile}; give off")


def class_counts(data: ImageData) -> tuple[int, ...] | None:
    """Images of each class, (K,); None without labels."""
    if data.labels is None:
        return None
    return tuple(torch.bincount(data.labels, minlength=data.num_classes or 0).tolist())


@contextlib.contextmanager
def own_randomness(device: torch.device) -> Iterator[None]:
    """Keeps the caller's global generator, which dropout draws from and training seeds at each step."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
