"""Data-parallel training with DDP or FSDP2: every process computes the gradient of its rows of the batch.

DDP and FSDP2 hook into the `forward` of the module that they wrap, so the loss is computed inside a
`forward`. The explicit adjoint uses every weight a second time there. DDP needs no change for that; for
FSDP2, `adjoint` is registered as a second forward method.

# B global batch, W processes, P parts whose gradients are accumulated (--accumulate)
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
from cdm_fast.host.distributed import all_reduce_max
from cdm_fast.host.processes import is_main, this_process
from cdm_fast.model import CDM, DDM
from cdm_fast.model.classifier import Classifier
from cdm_fast.model.losses import LossTerms, Noised
from cdm_fast.nn.blocks import AttentionBlock, Block
from cdm_fast.nn.trunk import Trunk
from cdm_fast.runs.checkpoint import Checkpoint
from cdm_fast.training.ema import Ema, Model
from cdm_fast.training.saver import Saver
from cdm_fast.training.state import TrainingState
from cdm_fast.training.step import LossFunction, make_optimizer


class _Loss(nn.Module):
    """The module to wrap: its `forward` is the training loss of a model."""

    def __init__(self, model: CDM | DDM | Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: LossFunction, batch: Noised) -> LossTerms:
        return function(self.model, batch)


class Wrapped:
    """A model wrapped by DDP or FSDP2.

    sharded: True if its weights are split over the processes (FSDP2).
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.sharded = not isinstance(module, DistributedDataParallel)

    def loss(self, function: LossFunction) -> LossFunction:
        """`function` on this rank's rows, whose backward pass averages gradients over the processes."""

        def of_part(model: CDM | DDM | Classifier, batch: Noised) -> LossTerms:
            return self._module(function, batch)

        return of_part

    def keep_local(self) -> AbstractContextManager[None]:
        """Context in which DDP does not communicate gradients (`no_sync`): they accumulate locally.

        No effect with FSDP2, which never holds an unsharded gradient of all weights.
        """
        if isinstance(self._module, DistributedDataParallel):
            return self._module.no_sync()
        return nullcontext()


def wrap(state: TrainingState, config: RunConfig, parallel: Parallel) -> Wrapped:
    """Wraps the model of `state` for training by all processes; they must hold equal states.

    With "fsdp" the weights, optimizer moments and moving average in `state` are replaced by sharded ones.
    """
    network, count = state.model.network, this_process().count
    if isinstance(network, Trunk):
        part = config.train.batch_size // (config.train.accumulate * count)
        network.first_image = this_process().rank * part
    if parallel == "fsdp":
        return Wrapped(_shard(state, config))
    # For 1x1 kernels, whose strides along an axis of one pixel are arbitrary.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    with warnings.catch_warnings():
        # Buffers are the same in every process. torch 2.13 deprecates `broadcast_buffers`, for which 2.10 has
        # no substitute.
        warnings.simplefilter("ignore", FutureWarning)
        return Wrapped(
            DistributedDataParallel(_Loss(state.model), broadcast_buffers=False, gradient_as_bucket_view=True)
        )


def _shard(state: TrainingState, config: RunConfig) -> nn.Module:
    """Shards weights, moments and average of `state`, one unit for each block."""
    device = state.sums.device.type
    model = state.model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    before = {name: (weight, state.optimizer.state[weight]) for name, weight in model.named_parameters()}
    mesh = init_device_mesh(device, (this_process().count,))
    module = _Loss(model)
    # The warning concerns in-place writes to outputs that are views; there are none.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    blocks = [block for block in model.modules() if isinstance(block, Block | AttentionBlock)]
    for block in blocks:
        fully_shard(block, mesh=mesh)
        register_fsdp_forward_method(block, "adjoint")
    fully_shard(module, mesh=mesh)
    if device == "cpu":  # Gloo has no averaging reduction
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


def _split_like(weight: Tensor, full: Tensor) -> DTensor:
    """A tensor that every process holds in full, sharded as `weight` is."""
    assert isinstance(weight, DTensor)
    return distribute_tensor(full.contiguous(), weight.device_mesh, weight.placements, src_data_rank=None)


class ShardedEma(Ema[Model]):
    """A moving average of weights sharded by FSDP2; it is sharded in the same way.

    `model` is a collective operation: it gathers the average at each call.
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
        """The averaged model with full weights; every process must ask for it."""
        model = copy.deepcopy(self._frame).to(self._device)
        for parameter, part in zip(model.parameters(), self._parts, strict=True):
            parameter.copy_(part.full_tensor())
        return model


class JointSaver:
    """The saver of rank 0; with a sharded state, all processes take part in copying it.

    Args:
        saver: used in the process of rank 0 only.
        together: True if the state is sharded, so that copying it is a collective operation.
    """

    def __init__(self, saver: Saver, together: bool) -> None:
        self._saver, self._together = saver, together

    def after_step(self, step: int, copy: Callable[[], Checkpoint]) -> None:
        """As in `Saver.after_step`; called after the same step in every process."""
        self._jointly(partial(self._saver.after_step, step), copy)

    def finish(self, step: int, copy: Callable[[], Checkpoint]) -> None:
        """As in `Saver.finish`; called at the same step in every process."""
        self._jointly(partial(self._saver.finish, step), copy)

    def _jointly(
        self, save: Callable[[Callable[[], Checkpoint]], None], copy: Callable[[], Checkpoint]
    ) -> None:
        """Rank 0 decides whether to copy now, and broadcasts its decision."""
        if not self._together:
            if is_main():
                save(copy)
            return
        if not is_main():
            if all_reduce_max(0):
                copy()
            return
        asked = False

        def joint_copy() -> Checkpoint:
            nonlocal asked
            asked = True
            all_reduce_max(1)
            return copy()

        save(joint_copy)
        if not asked:
            all_reduce_max(0)
