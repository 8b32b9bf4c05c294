"""The images of a run: its own, which must be unchanged since training, or others read the same way."""

from dataclasses import replace
from pathlib import Path

from cdm_fast.config import RunConfig
from cdm_fast.data import ImageData, load_data
from cdm_fast.data.load import Request, source_digest
from cdm_fast.data.pictures import Fit, parse_crop
from cdm_fast.errors import UserError
from cdm_fast.runs.checkpoint import load_checkpoint


def in_place(config: RunConfig) -> RunConfig:
    """The config with the path of its data made absolute; the name as given is kept beside it."""
    source = config.data.source
    prefix = "hf:" if source.startswith("hf:") else ""
    if not source.removeprefix(prefix).strip():
        return config  # an empty path would become the working folder; reading refuses it
    try:
        path = Path(source.removeprefix(prefix)).expanduser()
    except RuntimeError:
        raise UserError(f"--data {source}: there is no such home folder; give a path") from None
    if source == "digits" or path.is_absolute() and not source.startswith("~"):
        return config
    if prefix and not path.is_dir():
        return config
    return replace(config, data=replace(config.data, source=f"{prefix}{path.absolute()}", given=source))


def run_data(config: RunConfig, split: str, source: str | None = None) -> ImageData:
    """A split of the run's own data, or of `source` read the same way.

    Other data are converted to the run's channels if that loses nothing: grey to colour, and colour images
    that are entirely grey to grey.
    """
    own, channels = config.data, config.data.channels
    if source is not None and channels is None and config.image.channels == 3:
        channels = 3
    data = load_data(
        own.source if source is None else source,
        split,
        own.image_size,
        own.split_seed,
        channels,
        crop=own.crop,
        resample=own.resample,
        hf_column=own.hf_column if source is None else None,
        hf_split=own.hf_split if source is None else None,
    )
    if source is None:
        data = replace(data, name=own.given or data.name)
    elif config.image.channels == 1 and data.images.shape[1] == 3:
        grey = data.images[:, :1]
        if bool((data.images == grey).all()):
            data = replace(data, images=grey.contiguous())
    return replace(data, pixels=own.pixels)


def evaluation_data(run: Path, config: RunConfig, split: str, source: str | None = None) -> ImageData:
    """`run_data` for a command that scores; the run's own data must be unchanged since training.

    Raises UserError if they have changed: a different split could put training images into the test split.
    """
    if source is None:
        require_own_data(run, config)
    return run_data(config, split, source)


def require_own_data(run: Path, config: RunConfig) -> None:
    """UserError unless the run's source still holds the images that the run was trained on."""
    trained_on = load_checkpoint(run, parts=()).state.get("data_digest")
    if not trained_on:
        return  # a converted run: its training data are not known
    data = config.data
    fit = Fit(data.image_size, data.channels, parse_crop(data.crop), data.resample)
    request = Request(data.source, fit, data.split_seed, data.hf_column, data.hf_split)
    if source_digest(request) != trained_on:
        raise UserError(
            f"{data.source} has changed since {run} was trained on it, so its test split may hold training"
            " images; restore it, or name other data by --data"
        )
