"""Shared by the commands: their outcome, the loaded model, and data that fit the run."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from cdm_fast.cli import arguments
from cdm_fast.cli.per_image import check_name, write_per_image
from cdm_fast.config import RunConfig
from cdm_fast.data import ImageData
from cdm_fast.errors import UserError, require_at_least
from cdm_fast.host.device import pick_device
from cdm_fast.interop.source import is_foreign, open_foreign, output_folder, require_data
from cdm_fast.model import CDM, DDM, Denoiser
from cdm_fast.model.classifier import Classifier
from cdm_fast.runs.checkpoint import read_config
from cdm_fast.runs.data import require_own_data, run_data
from cdm_fast.runs.load import load


class Outcome(NamedTuple):
    """The output of a command: JSON values for `--json`, or lines of text."""

    result: dict[str, Any]
    lines: list[str]


def without_arrays(report: dict[str, Any]) -> dict[str, Any]:
    """A report without its lists of numbers, such as one value for every level, at any depth."""
    return {
        key: without_arrays(value) if isinstance(value, dict) else value
        for key, value in report.items()
        if not (isinstance(value, list | tuple) and any(isinstance(each, int | float) for each in value))
    }


class Opened(NamedTuple):
    """The model that a command's `run` names, its config, and the folder for pictures."""

    model: Denoiser
    config: RunConfig
    folder: Path


def open_model(run: Path, device: str) -> Opened:
    """A run's model, or another program's, on the device."""
    if is_foreign(run):
        model, config = open_foreign(run)
        return Opened(model.to(pick_device(device)), config, output_folder(run))
    config = read_config(run)
    return Opened(load(run).to(pick_device(device)), config, run)


UNTRAINED_NULL = (
    "this run was trained without label dropout, as in the paper's public code, so its figures without a"
    " label, and guidance, use an embedding that it never saw in training"
)


def null_is_untrained(config: RunConfig) -> bool:
    """True if the run has an embedding for "no class" that was never trained."""
    return config.network.conditioning == "embedding" and config.train.label_dropout == 0


def load_on(run: Path, device: str) -> CDM | DDM | Classifier:
    """A run's model on the device."""
    return load(run).to(pick_device(device))


ImageScoring = TypeVar("ImageScoring", arguments.Classify, arguments.Score)
Scored = tuple[dict[str, Any], list[str], dict[str, tuple[Tensor, Tensor]]]  # JSON, lines, columns per image


def scored_by(
    scoring: Callable[[ImageScoring, RunConfig, Denoiser, ImageData], Scored], command: ImageScoring
) -> Outcome:
    """Opens the model and the data, scores the images, and writes the per-image file of `--out`."""
    foreign = None
    if is_foreign(command.run):
        if not isinstance(command, arguments.Classify):
            raise UserError(
                f"{command.run} only denoises, and score needs single-pass likelihoods; give a run"
            )
        require_data(command.run, command.data)
        foreign = open_model(command.run, command.device)
    config = read_config(command.run) if foreign is None else foreign.config
    require_at_least("--batch-size", command.batch_size, 1)
    if command.out is not None:
        check_name(command.out)
    # Unusual images are told by comparison with the run's own validation split.
    own_too = isinstance(command, arguments.Score) or (command.selective and foreign is None)
    data = data_for(command.run, config, command.split, command.data, own_too)
    model = load_on(command.run, command.device) if foreign is None else foreign.model
    into = command if foreign is None else replace(command, run=foreign.folder)
    result, lines, columns = scoring(into, config, model, data)
    found = {"run": str(command.run), **result}
    if command.out is not None:
        found["out"] = str(write_per_image(command.out, data, columns))
    return Outcome(found, lines)


def data_for(
    run: Path, config: RunConfig, split: str, source: str | None = None, own_too: bool = False
) -> ImageData:
    """A split of the run's own data, or of `source`, checked against the run.

    own_too: the run's own data are used in addition to `source`. Raises UserError for images of another size
    or kind, and if the run's own data have changed since training.
    """
    if source is None or own_too:
        require_own_data(run, config)
    data = run_data(config, split, source)
    require_fit(data, config, run)
    return data


def require_fit(data: ImageData, config: RunConfig, run: Path) -> None:
    """UserError unless the images have the run's size, channels and grey levels."""
    image = config.image
    found = (*data.images.shape[1:], data.num_grey_levels)
    wanted = (*image.shape, image.num_grey_levels)
    if found != wanted:
        raise UserError(
            f"{data.name} holds {_kind(found)}, and {run} was trained on {_kind(wanted)};"
            " give data of the same kind"
        )


def _kind(shape: tuple[int, ...]) -> str:
    channels, height, width, grey = shape
    return f"{height}x{width} images of {channels} channel{'s' * (channels > 1)} and {grey} grey levels"
