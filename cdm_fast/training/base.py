"""Fits the base of a run's network to its training images.

# n images, d values of an image
"""

import torch
from torch import Tensor

from cdm_fast.config import RunConfig
from cdm_fast.data import ImageData
from cdm_fast.data.pixels import dequantize
from cdm_fast.host.distributed import broadcast_from_main
from cdm_fast.host.processes import is_main
from cdm_fast.host.progress import to_stderr
from cdm_fast.model import CDM
from cdm_fast.model.base import fit_base, start_at_base
from cdm_fast.nn import AdjointNetwork, MixtureBase
from cdm_fast.training.state import TrainingState

MOST_VALUES = 2**27  # of the images that are read: half a gigabyte


def begin_from_base(config: RunConfig, state: TrainingState, data: ImageData) -> None:
    """Fits the base, if the config has one, for the state's model and its average.

    A fine-tuned run takes the base of the run that it begins from. The first process fits it for all.
    Raises UserError for too few images of a class.
    """
    if not config.network.base_components or config.train.objective != "cdm" or config.train.finetune:
        return
    noise = (2 / data.num_grey_levels) ** 2 / 12  # the variance of dequantisation
    if is_main():
        assert isinstance(state.model, CDM)
        rows, label = _rows(config, data)
        to_stderr(f"fitting the base to {len(rows):,} images")
        fit_base(state.model, rows, label, noise, config.train.seed)
    fitted = broadcast_from_main(_base_of(state.model).state_dict())
    for model in (state.model, state.ema.model):
        assert isinstance(model, CDM)
        _base_of(model).set(**fitted)
        start_at_base(model)


def _base_of(model: torch.nn.Module) -> MixtureBase:
    assert isinstance(model, CDM) and isinstance(model.network, AdjointNetwork)
    base = model.network.base
    assert base is not None
    return base


def _rows(config: RunConfig, data: ImageData) -> tuple[Tensor, Tensor | None]:
    """Training images in random order, (n, d), as the model sees them without noise; and their labels."""
    generator = torch.Generator().manual_seed(config.train.seed)
    chosen = torch.randperm(len(data), generator=generator)[: MOST_VALUES // data.images[0].numel()]
    images, levels = data.images[chosen].cpu(), data.num_grey_levels
    if config.data.flip:
        images[::2] = images[::2].flip(-1)
    # The points of the grey levels, or the centres of their intervals.
    rows = dequantize(images, levels, torch.full(images.shape, 0.5), config.data.pixels)
    return rows.flatten(1), None if data.labels is None else data.labels[chosen].cpu()
