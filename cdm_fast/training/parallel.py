"""Training on many processes: each takes a part of every batch, and all take the same step.

The loss is computed inside the `forward` of one module that DDP or FSDP2 wraps, as both need: they act where
the wrapped module is entered and left. An explicit adjoint reads every weight twice in it, which is nothing
special for DDP; FSDP2 is told that `adjoint` is entered like `forward`.

# B global batch, W processes, P parts whose gradients add up (--accumulate)
"""

import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from cdm_fast.config import RunConfig
from cdm_fast.config.choices import Parallel
from cdm_fast.host.distributed import largest
from cdm_fast.host.processes import is_main, this_process
from cdm_fast.model import CDM, DDM
from cdm_fast.model.classifier import Classifier
from cdm_fast.model.losses import LossTerms, Noised
from cdm_fast.nn.blocks import AttentionBlock, ResnetBlock
from cdm_fast.nn.trunk import DownTrunk
from cdm_fast.runs.checkpoint import Checkpoint
from cdm_fast.training.ema import Ema, Model
from cdm_fast.training.saver import Saver
from cdm_fast.training.state import TrainingState
from cdm_fast.training.step import LossFunction, make_optimizer


class _Loss(nn.Module):
    """The module that is wrapped: a model whose `forward` is its training loss."""

    def __init__(self, model: CDM | DDM | Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: LossFunction, batch: Noised) -> LossTerms:
        return function(self.model, batch)


class Wrapped:
    """A model wrapped by DDP or FSDP2, and the loss functions that it turns into distributed ones."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.sharded = not isinstance(module, DistributedDataParallel)

    def loss(self, function: LossFunction) -> LossFunction:
        """`function(model, batch)` of this process's part, whose gradient is that of the whole batch."""

        def of_part(model: CDM | DDM | Classifier, batch: Noised) -> LossTerms:
            return self._module(function, batch)

        return of_part

    def keep_local(self) -> AbstractContextManager[None]:
        """Gradients of what runs inside stay in this process, until one from outside takes them along.

        With FSDP2 they do not: a gradient of all weights is what it is there to avoid.
        """
        if isinstance(self._module, DistributedDataParallel):
            return self._module.no_sync()
        return nullcontext()


def wrap(state: TrainingState, config: RunConfig, parallel: Parallel) -> Wrapped:
    """Makes the training of `state` a joint one of all processes; they must hold equal states.

    With "fsdp" the weights, their moments and their average are split over the processes in `state`.
    """
    network, count = state.model.network, this_process().count
    if isinstance(network, DownTrunk):
        part = config.train.batch_size // (config.train.accumulate * count)
        network.first_image = this_process().rank * part
    if parallel == "fsdp":
        return Wrapped(_shard(state, config))
    # Of a 1x1 kernel the strides along its only pixel, which mean nothing.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    with warnings.catch_warnings():
        # Buffers are constants. What torch 2.13 says instead of `broadcast_buffers`, 2.10 does not know.
        warnings.simplefilter("ignore", FutureWarning)
        return Wrapped(
            DistributedDataParallel(_Loss(state.model), broadcast_buffers=False, gradient_as_bucket_view=True)
        )


def _shard(state: TrainingState, config: RunConfig) -> nn.Module:
    """Splits everything in `state` that is as large as the weights; block by block, as they are needed."""
    device = state.sums.device.type
    model = state.model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    before = {name: (weight, state.optimizer.state[weight]) for name, weight in model.named_parameters()}
    mesh = init_device_mesh(device, (this_process().count,))
    module = _Loss(model)
    # Outputs that are views must not be written to in place; here nothing is.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    blocks = [block for block in model.modules() if isinstance(block, ResnetBlock | AttentionBlock)]
    for block in blocks:
        fully_shard(block, mesh=mesh)
        register_fsdp_forward_method(block, "adjoint")
    fully_shard(module, mesh=mesh)
    if device == "cpu":  # Gloo cannot average
        for part in (module, *blocks):
            cast(FSDPModule, part).set_force_sum_reduction_for_comms(True)
    optimizer = make_optimizer(config.train, model)
    for name, weight in model.named_parameters():
        optimizer.state[weight].update(
            {
                moment: _split_like(weight, value) if value.shape == weight.shape else value
                for moment, value in before[name][1].items()
            }
        )
    state.optimizer, state.ema = optimizer, ShardedEma(state.ema, model)
    return module


def _split_like(weight: Tensor, whole: Tensor) -> DTensor:
    """This process's part of a tensor that every process holds, split as `weight` is."""
    assert isinstance(weight, DTensor)
    return distribute_tensor(whole.contiguous(), weight.device_mesh, weight.placements, src_data_rank=None)


class ShardedEma(Ema[Model]):
    """A moving average of weights that FSDP2 has split, split like them.

    Every process must ask for `model` at the same time: it is put together then, and not kept.
    """

    def __init__(self, ema: Ema[Model], model: nn.Module) -> None:
        self.decay, self.start = ema.decay, ema.start
        self._device = next(model.parameters()).device
        weights = list(model.parameters())
        self._parts = [
            _split_like(weight, average.detach())
            for weight, average in zip(weights, ema.model.parameters(), strict=True)
        ]
        self._averages = [part.to_local() for part in self._parts]
        self._weights = [cast(DTensor, weight.detach()).to_local() for weight in weights]
        self._frame = ema.model.cpu()

    @property
    def model(self) -> Model:
        """The averaged model in one piece."""
        model = copy.deepcopy(self._frame).to(self._device)
        for parameter, part in zip(model.parameters(), self._parts, strict=True):
            parameter.copy_(part.full_tensor())
        return model


class JointSaver:
    """The saver of rank 0, for copies that may take all processes to make.

    Args:
        saver: writes in the process of rank 0, and does nothing in the others.
        together: the state is split over the processes, and its copy must be asked for by all of them.
    """

    def __init__(self, saver: Saver, together: bool) -> None:
        self._saver, self._together = saver, together

    def after_step(self, step: int, copy: Callable[[], Checkpoint]) -> None:
        """As `Saver.after_step`, after the same step in every process."""
        self._jointly(partial(self._saver.after_step, step), copy)

    def finish(self, step: int, copy: Callable[[], Checkpoint]) -> None:
        """As `Saver.finish`, at the same step in every process."""
        self._jointly(partial(self._saver.finish, step), copy)

    def _jointly(
        self, save: Callable[[Callable[[], Checkpoint]], None], copy: Callable[[], Checkpoint]
    ) -> None:
        """Rank 0 alone knows whether a copy is wanted now, and tells the others."""
        if not self._together:
            if is_main():
                save(copy)
            return
        if not is_main():
            if largest(0):
                copy()
            return
        asked = False

        def joint_copy() -> Checkpoint:
            nonlocal asked
            asked = True
            largest(1)
            return copy()

        save(joint_copy)
        if not asked:
            largest(0)
