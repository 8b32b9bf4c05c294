"""The folds of the training images of a run with a base.

The images of a step are all of one fold, and the network is trained beside the base that was fitted without
this fold (`cdm_fast.model.base.fit_folds`).

# n images, B batch
"""

import torch
from torch import Tensor

from cdm_fast.config import RunConfig
from cdm_fast.data import batch_indices
from cdm_fast.data.order import random_order
from cdm_fast.model import CDM, DDM
from cdm_fast.model.base import find_base
from cdm_fast.model.classifier import Classifier

FOLDS = 4


def num_folds(config: RunConfig, num: int) -> int:
    """The number of folds of `num` images, at least 2; 0 for a run that fits no base.

    A fine-tuned run has the base of the run that it begins from.
    """
    train = config.train
    fits = config.network.base_components and train.objective == "cdm" and not train.finetune
    return min(FOLDS, num) if fits and num > 1 else 0


def step_indices(num: int, config: RunConfig, step: int) -> Tensor:
    """Indices of the images of a step (from 0), (B,) int64, out of `num`."""
    train, folds = config.train, num_folds(config, num)
    if not folds:
        return batch_indices(num, train.batch_size, train.seed, step)
    of_fold = random_order(num, train.seed)[step % folds :: folds]
    position = batch_indices(len(of_fold), train.batch_size, train.seed, step // folds)
    return torch.from_numpy(of_fold[position.numpy()])


def use_base_of_step(model: CDM | DDM | Classifier, step: int) -> None:
    """Lets the network's base, if it has folds, be that of the images of a step (from 0)."""
    base = find_base(model.network)
    if base is not None and base.folds:
        base.use_fold(step % len(base.folds))
