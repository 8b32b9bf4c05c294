"""Fits the base of a run's network to its training images.

# n images, d values of an image
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cdm_fast.config import RunConfig
from cdm_fast.data import ImageData
from cdm_fast.data.pixels import dequantize
from cdm_fast.host.distributed import broadcast_from_main
from cdm_fast.host.processes import is_main
from cdm_fast.host.progress import to_stderr
from cdm_fast.model import CDM
from cdm_fast.model.base import base_of, fit_base, fit_folds, start_at_base
from cdm_fast.training.folds import num_folds, random_order
from cdm_fast.training.state import TrainingState

MOST_VALUES = 2**27  # of the images that are read: half a gigabyte


def begin_from_base(config: RunConfig, state: TrainingState, data: ImageData) -> None:
    """Fits the base, if the config has one to fit, for the state's model and its average.

    The first process fits it for all. Raises UserError for too few images of a class.
    """
    if num_folds(config):
        _fit(config, state, data, fit_base)


def restore_folds(config: RunConfig, state: TrainingState, data: ImageData) -> None:
    """Fits the folds of the base again, which no checkpoint holds."""
    if num_folds(config):
        _fit(config, state, data, fit_folds)


def _fit(config: RunConfig, state: TrainingState, data: ImageData, fit: Callable[..., None]) -> None:
    """Calls `fit_base` or `fit_folds`."""
    assert isinstance(state.model, CDM)
    base = base_of(state.model)
    if is_main():
        rows, label = _rows(config, data)
        to_stderr(f"fitting the base to {len(rows):,} images")
        noise = (2 / data.num_grey_levels) ** 2 / 12  # the variance of dequantisation
        fit(state.model, rows, label, noise, config.train.seed, num_folds(config))
    base.folds, fitted = broadcast_from_main((base.folds, base.state_dict()))
    if fit is fit_base:
        for model in (state.model, state.ema.model):
            assert isinstance(model, CDM)
            base_of(model).set(**fitted)
            start_at_base(model)


def _rows(config: RunConfig, data: ImageData) -> tuple[Tensor, Tensor | None]:
    """Training images in random order, (n, d), as the model sees them without noise; and their labels."""
    levels = data.num_grey_levels
    chosen = random_order(len(data), config.train.seed)[: MOST_VALUES // data.images[0].numel()]
    images = data.images[chosen].cpu()
    if config.data.flip:
        images[::2] = images[::2].flip(-1)
    # The points of the grey levels, or the centres of their intervals.
    rows = dequantize(images, levels, torch.full(images.shape, 0.5), config.data.pixels)
    return rows.flatten(1), None if data.labels is None else data.labels[chosen].cpu()
