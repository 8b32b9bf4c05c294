"""Fits the base of a run's network to its training images.

# n images, d values of an image
"""

import torch
from torch import Tensor

from cdm_fast.config import RunConfig
from cdm_fast.data import ImageData
from cdm_fast.data.order import random_order
from cdm_fast.data.pixels import dequantize
from cdm_fast.host.distributed import broadcast_from_main
from cdm_fast.host.processes import is_main
from cdm_fast.host.progress import to_stderr
from cdm_fast.model import CDM
from cdm_fast.model.base import base_of, fit_base, fit_folds, start_at_base
from cdm_fast.nn.base import MixtureBase, Tables
from cdm_fast.training.folds import num_folds
from cdm_fast.training.state import TrainingState

MOST_VALUES = 2**27  # of the images that are read: half a gigabyte


def begin_from_base(config: RunConfig, state: TrainingState, data: ImageData) -> None:
    """Fits the base and its folds, if the config has them, for the state's model and its average.

    The first process fits them for all. Raises UserError for too few images of a class.
    """
    if not num_folds(config, len(data)):
        return
    model, averaged = state.model, state.ema.model
    assert isinstance(model, CDM) and isinstance(averaged, CDM)
    base = base_of(model)
    if is_main():
        fit_base(model, *_fitted_to(config, data))
    fitted = broadcast_from_main({name: value.cpu() for name, value in base.state_dict().items()})
    for each in (model, averaged):
        base_of(each).set(**fitted)
        start_at_base(each)
    _share_folds(base)


def restore_folds(config: RunConfig, state: TrainingState, data: ImageData) -> None:
    """Fits the folds of the base again, which no checkpoint holds."""
    if not num_folds(config, len(data)):
        return
    assert isinstance(state.model, CDM)
    if is_main():
        fit_folds(state.model, *_fitted_to(config, data))
    _share_folds(base_of(state.model))


def _share_folds(base: MixtureBase) -> None:
    """Gives the first process's folds to all."""
    device = base.means.device
    folds = broadcast_from_main([[table.cpu() for table in tables] for tables in base.folds])
    base.folds = tuple(Tables(*(table.to(device) for table in tables)) for tables in folds)


def _fitted_to(config: RunConfig, data: ImageData) -> tuple[Tensor, Tensor | None, float, int, int]:
    """The arguments of `fit_folds`: images without noise in random order, (n, d), labels, ..."""
    levels, folds = data.num_grey_levels, num_folds(config, len(data))
    most = MOST_VALUES // data.images[0].numel()
    chosen = torch.from_numpy(random_order(len(data), config.train.seed)[:most].copy())
    to_stderr(f"fitting the base to {len(chosen):,} images")
    images = data.images[chosen].cpu()
    if config.data.flip:
        mirrored = torch.arange(len(images)) // folds % 2 == 1  # half of each fold
        images[mirrored] = images[mirrored].flip(-1)
    # The points of the grey levels, or the centres of their intervals.
    rows = dequantize(images, levels, torch.full(images.shape, 0.5), config.data.pixels)
    label = None if data.labels is None else data.labels[chosen].cpu()
    noise = (2 / levels) ** 2 / 12  # the variance of dequantisation
    return rows.flatten(1), label, noise, config.train.seed, folds
