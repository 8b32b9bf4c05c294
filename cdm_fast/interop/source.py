"""Models named on the command line other than run directories: `diffusers:PATH` and `hf:OWNER/NAME`."""

from pathlib import Path

from cdm_fast.config import DataConfig, ImageShape, NetworkConfig, RunConfig
from cdm_fast.errors import UserError
from cdm_fast.interop.denoisers import Foreign
from cdm_fast.interop.from_diffusers import fetch, load_diffusers

PREFIXES = ("diffusers:", "hf:")


def is_foreign(run: Path) -> bool:
    """True if the argument `run` names another program's model."""
    return str(run).startswith(PREFIXES)


def require_data(run: Path, data: str | None) -> None:
    """UserError if another program's model is to be scored without --data."""
    if is_foreign(run) and data is None:
        raise UserError(f"{run} has no data of its own: give --data")


def open_foreign(run: Path) -> tuple[Foreign, RunConfig]:
    """The model, and a config whose image and pixels describe it; it names no data.

    Its pixels are 256 grey levels at the points 2u/255 - 1, on which such models are trained.
    Raises UserError as in `load_diffusers` and `fetch`, and for images of unknown size.
    """
    kind, _, place = str(run).partition(":")
    if not place:
        raise UserError(f"{run} names no model; give hf:OWNER/NAME or diffusers:PATH")
    model = load_diffusers(fetch(place) if kind == "hf" else Path(place).expanduser())
    if model.input_shape is None:
        raise UserError(f"{run}: its config.json has no sample_size, so the size of its images is unknown")
    channels, height, width = model.input_shape
    conditioning = "none" if model.num_classes is None else "embedding"
    return model, RunConfig(
        data=DataConfig(source="", pixels="points"),
        image=ImageShape(height, width, channels, 256, model.num_classes),
        network=NetworkConfig(conditioning=conditioning),  # type: ignore[arg-type]
    )


def output_folder(run: Path) -> Path:
    """runs/NAME, created if needed: the folder for pictures of another program's model."""
    folder = Path("runs") / "-".join(part for part in str(run).replace(":", "/").split("/") if part)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
