"""The readers under test: how to make an input for each, and how to read it and judge what comes out."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import torch

from cdm_fast.data import load_data
from cdm_fast.interop.convert import convert
from cdm_fast.runs.checkpoint import load_checkpoint, read_config
from cdm_fast.runs.load import load
from cdm_fast.training.state import from_checkpoint
from tests.fuzz.arrays import cifar, idx, npz, pickled_cifar
from tests.fuzz.case import Case
from tests.fuzz.folders import image_folder, image_zip
from tests.fuzz.public import public_checkpoint
from tests.fuzz.runs import run_directory


@dataclass(frozen=True)
class Reader:
    """`make(rng)` draws an input; `read(root, case)` reads it where it was written, and checks the result."""

    make: Callable[[Random], Case]
    read: Callable[[Path, Case], None]


def _read_images(name: str, root: Path, case: Case) -> None:
    data = load_data(root / name, **case.options)
    assert data.images.dtype == torch.uint8 and data.images.dim() == 4 and len(data) > 0
    assert int(data.images.max()) < data.num_grey_levels <= 256
    if data.labels is not None:
        assert data.labels.shape == (len(data),) and data.num_classes is not None
        assert 0 <= int(data.labels.min()) and int(data.labels.max()) < data.num_classes


def _read_run(root: Path, case: Case) -> None:
    if not case.options["resume"]:
        model = load(root / "run")
        assert all(torch.isfinite(value).all() for value in model.state_dict().values())
        return
    config = read_config(root / "run")
    state = from_checkpoint(load_checkpoint(root / "run"), config, torch.device("cpu"), str(root / "run"))
    for parameter in state.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    state.ema.update(state.step)
    state.numbers(config)


def _convert(root: Path, case: Case) -> None:
    convert(root / "cdm.pt", root / "out", **case.options)
    load(root / "out")


READERS = {
    "idx": Reader(partial(idx, packed=False), partial(_read_images, "")),
    "idx.gz": Reader(partial(idx, packed=True), partial(_read_images, "")),
    "cifar": Reader(cifar, partial(_read_images, "")),
    "cifar-py": Reader(pickled_cifar, partial(_read_images, "")),
    "npz": Reader(npz, partial(_read_images, "data.npz")),
    "zip": Reader(image_zip, partial(_read_images, "data.zip")),
    "folder": Reader(image_folder, partial(_read_images, "")),
    "run": Reader(run_directory, _read_run),
    "convert": Reader(public_checkpoint, _convert),
}
