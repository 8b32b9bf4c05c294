"""Preparation before the first step: resolves and checks settings, loads data, builds the state.

# K classes
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from cdm_fast.config import ImageShape, RunConfig, check
from cdm_fast.config.choices import Parallel
from cdm_fast.config.json import differences
from cdm_fast.data import ImageData
from cdm_fast.data.load import data_digest
from cdm_fast.errors import UserError
from cdm_fast.host.distributed import broadcast_from_main
from cdm_fast.host.processes import is_main, launched, this_process
from cdm_fast.host.progress import to_stderr
from cdm_fast.runs.build import head_rank
from cdm_fast.runs.checkpoint import load_checkpoint, prepare_to_resume, read_config, write_config
from cdm_fast.runs.data import in_place, run_data
from cdm_fast.training.base import begin_from_base, restore_folds
from cdm_fast.training.finetune import begin_from_run
from cdm_fast.training.state import TrainingState, from_checkpoint, new_state, require_trained_here
from cdm_fast.training.tuning import pick_precision


@dataclass(frozen=True)
class Prepared:
    """A run that is ready for its next step.

    Fields:
        config: the config with everything resolved.
        state: the state, on its device.
        data: the training images, on the CPU.
        validation: the first `evaluate_images` of the validation split, on the CPU.
    """

    config: RunConfig
    state: TrainingState
    data: ImageData
    validation: ImageData


def prepare_new(config: RunConfig, device: torch.device) -> Prepared:
    """A new run, with weights drawn from the config's seed or taken from `--finetune`.

    Raises UserError for invalid data or settings. Writes nothing.
    """
    data = run_data(config, "train")
    config = broadcast_from_main(resolve(config, data, device))
    validation = run_data(config, "validation").take(slice(config.output.evaluate_images))
    state = new_state(config, device)
    begin_from_base(config, state, data)
    begin_from_run(config, state)
    state.data = data_digest(data)
    to_stderr(data.describe())
    return Prepared(config, state, data, validation)


def resumed_config(run: str | Path, config: RunConfig | None) -> tuple[RunConfig, RunConfig]:
    """The config with which to resume a run, by default its own; and the stored config.

    Raises UserError if `config` changes a setting that a resumed run must keep or has fewer steps than the
    run has taken, and for a run that was not trained here.
    """
    stored = read_config(run)
    config = in_place(config or stored)
    check(config)
    changed = differences(stored, config)
    if changed:
        raise UserError(f"--resume {run} cannot change {'; '.join(changed)}; train into another --out")
    newest = load_checkpoint(run, parts=())
    require_trained_here(newest, str(run))  # before its data are looked for
    if config.train.steps < newest.step:
        raise UserError(
            f"--steps is {config.train.steps}, and {run} has taken {newest.step} steps; give {newest.step} or"
            " more"
        )
    return config, stored


def prepare_resumed(run: Path, config: RunConfig, stored: RunConfig, device: torch.device) -> Prepared:
    """A run at its newest intact checkpoint; its folder is tidied, and its config replaced by `config`.

    Raises UserError when its data have changed, or when machines see different checkpoints.
    """
    data = run_data(config, "train")
    if broadcast_from_main(resolve(config, data, device)).image != config.image:
        raise UserError(f"--data {config.data.source} is not what {run} was trained on; give the same data")
    validation = run_data(config, "validation").take(slice(config.output.evaluate_images))
    state = from_checkpoint(load_checkpoint(run), config, device, str(run))
    if state.data != data_digest(data):
        raise UserError(f"{config.data.source} has changed since {run} began; restore those images")
    if broadcast_from_main(state.step) != state.step:
        raise UserError(f"{run} differs between machines; put it on a file system that all of them share")
    if state.step < config.train.steps:
        restore_folds(config, state, data)
    if is_main():
        prepare_to_resume(run, state.step)
    if config != stored:
        write_config(run, config)
    return Prepared(config, state, data, validation)


def config_to_resume(config: RunConfig, out: str | Path) -> RunConfig | None:
    """The config with which to resume `out`, if it holds an unfinished run of `config`; else None.

    torchrun restarts its command when a process has died, and a queue when a machine has failed.
    """
    if not (Path(out) / "config.json").is_file():
        return None
    stored = read_config(out)
    config = in_place(config)
    network, train = config.network, config.train
    resolved = replace(
        config,
        image=stored.image,
        network=replace(
            network, head_rank=stored.network.head_rank if network.head_rank is None else network.head_rank
        ),
        train=replace(
            train, precision=stored.train.precision if train.precision == "auto" else train.precision
        ),
    )
    return None if differences(stored, resolved) else resolved


def resolve(config: RunConfig, data: ImageData, device: torch.device) -> RunConfig:
    """The config with the settings that depend on data and device: image, rank of the head, precision.

    Raises UserError as `config.check` does.
    """
    _, channels, height, width = data.images.shape
    image = ImageShape(height, width, channels, data.num_grey_levels, data.num_classes, class_counts(data))
    config = replace(config, image=image)
    check(config)
    if config.network.conditioning == "joint":
        config = replace(config, network=replace(config.network, head_rank=head_rank(config)))
    return replace(
        config,
        train=replace(config.train, precision=pick_precision(config, device)),
    )


def check_parallel(config: RunConfig, parallel: Parallel) -> None:
    """Raises UserError for a batch that cannot be divided over the processes, or settings without FSDP2."""
    train, count = config.train, this_process().count
    if count > 1 and train.batch_size % (train.accumulate * count):
        parts = f" and {train.accumulate} parts each (--accumulate)" if train.accumulate > 1 else ""
        raise UserError(
            f"--batch-size {train.batch_size} counts all processes together, and {count}{parts} cannot"
            f" share it evenly; give a multiple of {count * train.accumulate}"
        )
    if parallel == "fsdp" and launched() is None:
        raise UserError(
            "--parallel fsdp splits a model over processes, and there is only one; start with torchrun"
        )
    if parallel == "fsdp" and train.checkpoint_blocks:
        raise UserError("--parallel fsdp does not go with --checkpoint-blocks; leave one of them out")
    if parallel == "fsdp" and train.adversarial != "none":
        raise UserError(
            f"--parallel fsdp does not go with --adversarial {train.adversarial}, whose attack needs all"
            " weights; give ddp"
        )
    if parallel == "fsdp" and train.compile not in ("auto", "off"):
        raise UserError(f"--parallel fsdp does not go with --compile {train.compile}; give off")


def class_counts(data: ImageData) -> tuple[int, ...] | None:
    """Number of images of each class, (K,); None for data without labels."""
    if data.labels is None:
        return None
    return tuple(torch.bincount(data.labels, minlength=data.num_classes or 0).tolist())


@contextlib.contextmanager
def preserved_rng(device: torch.device) -> Iterator[None]:
    """Restores the caller's global generators afterwards: training seeds them at each step, for dropout."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
