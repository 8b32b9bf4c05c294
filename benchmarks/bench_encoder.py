"""The encoder presets against our own plain diffusion model (DDM) on the U-Net of the same preset.

One evaluation (forward pass and adjoint) is timed against one forward pass of the DDM, and one training step
against the DDM's. `flops_ratio` holds the multiplications and additions of the evaluation over those of the
DDM's.
"""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.support.cases import DTYPES, both_finite
from benchmarks.support.networks import without_gradients
from benchmarks.support.train_steps import autocast, gradient_step
from cdm_fast.config import preset
from cdm_fast.model.losses import cdm_loss, ddm_loss
from cdm_fast.runs.build import build_model

# Images of a batch on the CPU and on a GPU.
BATCH_SIZE = {"digits": (128, 1024), "fashion-mnist": (32, 512), "cifar10": (8, 128)}
PRESETS = pytest.mark.parametrize("name", BATCH_SIZE)


class Pair:
    """The encoder of a preset, the DDM on its U-Net (both without classes), and a batch for them."""

    def __init__(self, name, small, device):
        self.device = device
        self.encoder, self.ddm = (self._model(config, small) for config in _configs(name))
        batch = 2 if small else BATCH_SIZE[name][device.type == "cuda"]
        self.x = torch.randn(batch, *self.ddm.input_shape, generator=torch.Generator().manual_seed(1))
        self.x = self.x.to(device).contiguous(memory_format=torch.channels_last)
        self.level = torch.full((batch,), self.ddm.schedule.T // 2, device=device)

    def _model(self, config, small):
        torch.manual_seed(0)
        if small:
            config = replace(config, network=replace(config.network, blocks_per_level=1, base_channels=32))
        return build_model(config).to(self.device, memory_format=torch.channels_last)

    def evaluations(self, dtype):
        def evaluation(model):
            def run():
                with autocast(self.device, dtype):
                    return model.denoise(self.x, self.level)

            return without_gradients(run)

        return evaluation(self.encoder), evaluation(self.ddm)

    def steps(self, dtype):
        def step(model, loss_function):
            def loss():
                with autocast(self.device, dtype):
                    return loss_function(model, self.x, self.level, self.x).loss

            return gradient_step(model.network, loss)

        return step(self.encoder, cdm_loss), step(self.ddm, ddm_loss)


def _configs(name):
    for config in (preset(f"{name}-encoder"), preset(name)):
        network = replace(config.network, conditioning="none", dropout=0.0)
        objective = "cdm" if network.architecture == "encoder" else "ddm"
        yield replace(config, network=network, train=replace(config.train, objective=objective))


def _flops(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@DTYPES
@PRESETS
def test_evaluation_against_unet_ddm(benchmark, compare, small, device, name, dtype):
    pair = Pair(name, small, device)
    ours, theirs = pair.evaluations(dtype)
    compare(benchmark, ours, theirs, both_finite, rounds=9)
    benchmark.extra_info.update(shape=list(pair.x.shape), flops_ratio=_flops(ours) / _flops(theirs))


@DTYPES
@PRESETS
def test_step_against_unet_ddm(benchmark, compare, small, device, name, dtype):
    pair = Pair(name, small, device)
    compare(benchmark, *pair.steps(dtype), both_finite, rounds=7)
    benchmark.extra_info["shape"] = list(pair.x.shape)
