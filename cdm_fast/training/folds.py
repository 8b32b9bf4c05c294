"""The images of each step, and the base beside which the network is trained on them.

A run with a base has K folds of images. The images of a step are all of one fold, and the network is trained
beside the base that was fitted without this fold (`cdm_fast.model.base.fit_folds`).

# n images, B batch
"""

from functools import lru_cache

import torch
from torch import Tensor

from cdm_fast.config import RunConfig
from cdm_fast.data import batch_indices
from cdm_fast.model import CDM, DDM
from cdm_fast.model.classifier import Classifier
from cdm_fast.nn import AdjointNetwork

FOLDS = 4


def num_folds(config: RunConfig) -> int:
    """K; 0 for a run that fits no base.

    A fine-tuned run has the base of the run that it begins from.
    """
    train = config.train
    fits = config.network.base_components and train.objective == "cdm" and not train.finetune
    return FOLDS if fits else 0


@lru_cache(maxsize=1)
def random_order(num: int, seed: int) -> Tensor:
    """The images 0..num-1 in random order, (num,) int64; the fold of each is its position modulo K."""
    return torch.randperm(num, generator=torch.Generator().manual_seed(seed))


def step_indices(num: int, config: RunConfig, step: int) -> Tensor:
    """Indices of the images of a step (from 0), (B,) int64, out of `num`."""
    train, folds = config.train, num_folds(config)
    if not folds:
        return batch_indices(num, train.batch_size, train.seed, step)
    of_fold = random_order(num, train.seed)[step % folds :: folds]
    return of_fold[batch_indices(len(of_fold), train.batch_size, train.seed, step // folds)]


def set_base(model: CDM | DDM | Classifier, step: int) -> None:
    """Lets the model's base, if it has folds, be that of the images of a step (from 0)."""
    base = model.network.base if isinstance(model.network, AdjointNetwork) else None
    if base is not None and base.folds:
        base.use_fold(step % len(base.folds))
