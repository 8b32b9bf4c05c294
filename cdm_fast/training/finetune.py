"""Fine-tuning: a new run that starts from the averaged weights of another run, possibly with other classes.

# K classes, L = T+2 noise levels, D features
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from cdm_fast.config import RunConfig, ScheduleConfig
from cdm_fast.errors import UserError
from cdm_fast.runs.checkpoint import load_checkpoint, read_config
from cdm_fast.runs.weights import restore_weights
from cdm_fast.training.state import TrainingState

_NETWORK, _BASE = "network.", "network.base."


def begin_from_run(config: RunConfig, state: TrainingState) -> None:
    """Loads the averaged weights of the run `config.train.finetune`, if any, into the model and its average.

    If the number of classes differs, every new class starts as the mean of the old ones; the null class is
    kept. Raises UserError if the run has other noise levels, or a network that differs in more than its
    classes.
    """
    if config.train.finetune is None:
        return
    run = config.train.finetune
    source = read_config(run)
    if _levels(source.schedule) != _levels(config.schedule):
        raise UserError(
            f"--finetune {run} was trained with the levels of {_levels(source.schedule)}, not"
            f" {_levels(config.schedule)}; do not change the schedule"
        )
    averaged = load_checkpoint(run, parts=("ema",)).tensors["ema"]
    own = state.model.state_dict()
    wanted = {name: value for name, value in own.items() if name.startswith(_NETWORK)}
    weights = _fitted(averaged, wanted, source, config, run)
    for model in (state.model, state.ema.model):  # priors come from the new data
        restore_weights(model, {**own, **weights}, run)


def _levels(schedule: ScheduleConfig) -> str:
    """The settings that determine x_t at every level, as flags."""
    same = replace(schedule, level_distribution="uniform")
    betas = "" if same.beta_start is None else f", beta {same.beta_start:g} to {same.beta_end:g}"
    least = f", sigma_min {same.sigma_min:g}" if same.sigma_min else ""
    return f"--schedule {same.schedule} --T {same.T}{betas}{least}"


def _fitted(
    averaged: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    source: RunConfig,
    config: RunConfig,
    run: str,
) -> dict[str, Tensor]:
    """The source network's tensors in the shapes of the new network, (name -> tensor)."""
    before, now = source.image.num_classes, config.image.num_classes
    weights = {}
    for name, own in wanted.items():
        theirs = averaged.get(name)
        if theirs is not None and theirs.shape != own.shape and before and now and before != now:
            theirs = _other_classes(name, theirs, source, before, now)
        if theirs is None or theirs.shape != own.shape:
            if theirs is not None and name.startswith(_BASE) and before != now:
                raise UserError(
                    f"--finetune {run} has a base of {before} classes, and the data have {now}: give"
                    " images of the same classes, or begin from a run without a base"
                )
            shape = "absent" if theirs is None else tuple(theirs.shape)
            raise UserError(
                f"--finetune {run}: {name} is {shape} there and {tuple(own.shape)} here: give images of"
                f" {source.image.channels} channels at a size its network takes, and leave the network's"
                f" settings, --conditioning {source.network.conditioning} included, as they are"
            )
        weights[name] = theirs.to(own.dtype)
    if before and now and source.network.conditioning == "joint" and source.network.head_rank:
        bias = weights[
            "network.linear_layer.bias"
        ].clone()  # as for a full head, in the row that all classes share
        bias[-2 - source.network.head_rank] += math.log(now / before)
        weights["network.linear_layer.bias"] = bias
    if extra := sorted(name for name in averaged if name.startswith(_NETWORK) and name not in wanted):
        raise UserError(
            f"--finetune {run} has {extra[0]}, which this network does not have; leave its settings as they"
            " are"
        )
    return weights


def _other_classes(name: str, theirs: Tensor, source: RunConfig, before: int, now: int) -> Tensor:
    """A tensor that depends on K, for `now` classes instead of `before`; each is the mean of the old."""
    if name.endswith("label_emb.weight"):  # (K+1, C), the null class last
        return torch.cat([theirs[:-1].mean(0).expand(now, -1), theirs[-1:]])
    if name.endswith("linear_layer.classes"):  # (K, R)
        return theirs.mean(0).expand(now, -1).contiguous()
    full_head = source.network.conditioning == "joint" and not source.network.head_rank
    if full_head and name.startswith("network.linear_layer."):  # ((L-1) K + 1, ...)
        each = theirs[:-1].unflatten(0, (-1, before)).mean(1, keepdim=True)
        fitted = torch.cat([each.expand(-1, now, *each.shape[2:]).flatten(0, 1), theirs[-1:]])
        if name.endswith("bias"):  # keeps sum_c p(t, c | x) for another number of terms
            fitted[-1 - now : -1] += math.log(now / before)
        return fitted
    return theirs
