"""The refitted constants of a run, kept in RUN/constants.json: a bias of the head, or constants by class.

`cdm_fast.load` puts them into the averaged model; the checkpoints stay as they were trained.
`cdm_fast.training.constants` fits them.

# L = T+2 noise levels, K classes
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from cdm_fast.errors import UserError
from cdm_fast.host.files import write_atomically
from cdm_fast.model import CDM, Denoiser
from cdm_fast.runs.calibration import is_of, read_kept, require_head

FILE = "constants.json"


@dataclass(frozen=True)
class Constants:
    """The constants of a model's logits, and how they were fitted.

    Fields:
        bias: all entries of `head.bias`.
        by_class: for a class embedding, nats to add to the level logits given each class, (K+1) L numbers,
            the null class last; empty for other models.
        weights: `fingerprint` of the trained weights.
        data, split: the images that were noised.
        rows: number of noised images.
        seed: seed of their draw.
    """

    bias: tuple[float, ...]
    by_class: tuple[float, ...]
    weights: str
    data: str
    split: str
    rows: int
    seed: int


@torch.no_grad()
def put_constants(model: CDM, constants: Constants) -> None:
    """Sets the bias of the model's head, and its constants by class; UserError if they do not fit."""
    bias, classes = require_head(model).bias, (model.num_classes or 0) + 1
    shape = (classes, model.schedule.num_levels)
    if len(constants.bias) != len(bias) or len(constants.by_class) not in (0, math.prod(shape)):
        raise UserError(f"{len(constants.bias)} constants do not fit the {len(bias)} of this model's head")
    bias.copy_(torch.tensor(constants.bias, dtype=torch.float64))
    if constants.by_class:
        by_class = torch.tensor(constants.by_class, dtype=torch.float64).view(shape)
        model.class_constants = by_class.to(bias)


def write_constants(run: Path, constants: Constants) -> Path:
    """Writes RUN/constants.json, or replaces it, and returns its path; DiskError if the disk refuses."""
    return write_atomically(run / FILE, json.dumps(asdict(constants)).encode())


def remove_constants(run: Path) -> None:
    """Removes the constants of a run; UserError if it has none."""
    if not (run / FILE).exists():
        raise UserError(f"{run} has no refitted constants: there is no {FILE}")
    (run / FILE).unlink()


def apply_constants(model: Denoiser, run: str | Path) -> Constants | None:
    """Applies the constants of a run to its averaged model, and returns them; None if there are none.

    Constants of other weights are ignored with a warning. Raises UserError for a file that `write_constants`
    did not write.
    """
    path, remedy = Path(run) / FILE, "fit the constants again"
    constants = read_kept(Constants, path, remedy)
    if constants is None:
        return None
    if not all(map(math.isfinite, (*constants.bias, *constants.by_class))):
        raise UserError(f"{path} holds numbers that are not finite; fit the constants again")
    if not is_of(model, constants.weights, path, remedy) or not isinstance(model, CDM):
        return None
    put_constants(model, constants)
    return constants
