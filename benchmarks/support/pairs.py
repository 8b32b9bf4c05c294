"""A preset's network beside our own plain diffusion model (DDM) on the U-Net of the same data.

One evaluation (forward pass and adjoint) is timed against one forward pass of the DDM, and one training step
against the DDM's.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.support.networks import without_gradients
from benchmarks.support.train_steps import autocast, gradient_step
from cdm_fast.config import RunConfig, preset
from cdm_fast.config.choices import Architecture
from cdm_fast.model.losses import cdm_loss, ddm_loss
from cdm_fast.ops import use_backend
from cdm_fast.runs.build import build_model

# Images of a batch on the CPU and on a GPU.
BATCH_SIZE = {"digits": (128, 1024), "fashion-mnist": (32, 512), "cifar10": (8, 128)}


class Pair:
    """The network of a preset, the DDM on the U-Net (both without classes), and a batch for them.

    Args:
        name: of the data, a key of `BATCH_SIZE`.
        architecture: "encoder" or "transformer".
        small: tiny networks and a batch of two.
        device: where they run.
    """

    def __init__(self, name: str, architecture: Architecture, small: bool, device: torch.device) -> None:
        self.device = device
        self.ours, self.ddm = (self._model(config, small) for config in _configs(name, architecture))
        batch = 2 if small else BATCH_SIZE[name][device.type == "cuda"]
        self.x = torch.randn(batch, *self.ddm.input_shape, generator=torch.Generator().manual_seed(1))
        self.x = self.x.to(device).contiguous(memory_format=torch.channels_last)
        self.level = torch.full((batch,), self.ddm.schedule.T // 2, device=device)

    def _model(self, config, small):
        torch.manual_seed(0)
        if small:
            sizes = {"blocks_per_level": 1, "base_channels": 32, "width": 64, "depth": 1, "stem_channels": 32}
            config = replace(config, network=replace(config.network, **sizes))
        return build_model(config).to(self.device, memory_format=torch.channels_last)

    def evaluations(self, dtype: torch.dtype) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        """One evaluation of ours and of the DDM."""

        def evaluation(model):
            def run():
                with autocast(self.device, dtype):
                    return model.denoise(self.x, self.level)

            return without_gradients(run)

        return evaluation(self.ours), evaluation(self.ddm)

    def steps(self, dtype: torch.dtype) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
        """Loss and gradient of ours and of the DDM."""

        def step(model, loss_function):
            def loss():
                with autocast(self.device, dtype):
                    return loss_function(model, self.x, self.level, self.x).loss

            return gradient_step(model.network, loss)

        return step(self.ours, cdm_loss), step(self.ddm, ddm_loss)

    def flops_ratio(self, dtype: torch.dtype) -> float:
        """Multiplications and additions of an evaluation over those of the DDM's."""
        ours, theirs = (flops(run) for run in self.evaluations(dtype))
        return ours / theirs


def _configs(name: str, architecture: Architecture) -> Iterator[RunConfig]:
    for config, objective in ((preset(f"{name}-{architecture}"), "cdm"), (preset(name), "ddm")):
        network = replace(config.network, conditioning="none", dropout=0.0)
        yield replace(config, network=network, train=replace(config.train, objective=objective))


def flops(run: Callable[[], object]) -> int:
    """Of the convolutions and matrix products of a call, by the references of the ops: PyTorch's counter
    knows no others."""
    with use_backend("reference"), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
