"""Tests that need a GPU: a captured graph draws new noise, and a step never waits for the host.

`tests/test_fake_cuda.py` looks for waits without one; here PyTorch itself raises at the first.
"""

from dataclasses import replace

import pytest
import torch

from cdm_fast import CDM, NoiseSchedule, UNet, cdm_loss, sample
from cdm_fast.config import PRESETS, NetworkConfig
from cdm_fast.data import ImageData
from cdm_fast.ops import use_backend
from cdm_fast.ops.noising import noising
from cdm_fast.ops.precision import ieee_fp32
from cdm_fast.training.loop import take_step
from cdm_fast.training.state import new_state
from cdm_fast.training.step import make_loss

pytestmark = pytest.mark.gpu
SCHEDULE = NoiseSchedule.uniform(T=10)


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch):
    """As users run it: no check of values, which would wait for the device."""
    monkeypatch.delenv("CDM_FAST_CHECKED", raising=False)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_replayed_graph_draws_the_noise_of_its_seed(backend):
    x0, level = torch.zeros(4, 1, 8, 8, device="cuda"), torch.full((4,), 5, device="cuda")
    tables = SCHEDULE.a.float().cuda(), SCHEDULE.s.float().cuda()
    seed = torch.tensor([3, 0], device="cuda")
    with use_backend(backend):
        expected = [
            noising(x0, level, *tables, torch.tensor([3, offset], device="cuda")).eps for offset in (0, 1)
        ]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            eps = noising(x0, level, *tables, seed).eps
    for wanted in expected:
        graph.replay()
        assert torch.equal(eps, wanted)
        seed[1] += 1


def _without_waits(run):
    """`run`, in which a wait for the device raises; once before, to compile kernels and find memory."""
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_loss_waits_for_nothing():
    network = UNet(
        8,
        1,
        SCHEDULE.num_levels,
        base_channels=8,
        multipliers=(1, 2),
        blocks_per_level=1,
        attention_resolutions=(4,),
        num_groups=4,
    )
    model = CDM(network, SCHEDULE).cuda()
    x0, level = torch.rand(4, 1, 8, 8, device="cuda"), torch.tensor([0, 3, 10, 11], device="cuda")
    eps = torch.randn_like(x0)
    _without_waits(lambda: cdm_loss(model, x0, level, eps).loss.backward())


def _small_run(conditioning, precision="fp32"):
    """(state, images, config) of a small run on the GPU, and its step."""
    network = NetworkConfig(base_channels=32, multipliers=(1, 2), conditioning=conditioning, head_rank=0)
    config = PRESETS["digits"]
    train = replace(config.train, precision=precision, batch_size=16, clip_norm=1.0)
    config = replace(config, network=network, train=train)
    state = new_state(config, torch.device("cuda"))
    images = torch.randint(17, (64, 1, 8, 8), dtype=torch.uint8, device="cuda")
    data = ImageData(images, torch.arange(64, device="cuda") % 10, 17, 10, "random", "train")
    return state, data, config


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("conditioning", ["none", "embedding", "joint"])
def test_a_whole_training_step_waits_for_nothing(conditioning, precision):
    """Batch, loss, gradient, clipping, update, average and the record of it, as `train` takes them."""
    state, data, config = _small_run(conditioning, precision)
    _without_waits(lambda: take_step(state, data, config, make_loss(config.train)))
    assert bool(torch.isfinite(state.sums).all()) and state.step == 2


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm_solver_pp_2m", "heun"])
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_a_sampler_waits_for_nothing(sampler, guidance):
    model = _small_run("joint")[0].ema.model
    images = _without_waits(
        lambda: sample(model, 8, sampler, 3, label=1, guidance=guidance, precision="bf16")
    )
    assert bool(torch.isfinite(images).all())


def test_measurements_are_those_of_ieee_fp32_whatever_the_settings():
    model = _small_run("none")[0].ema.model
    with torch.no_grad():
        for weight in model.parameters():  # a new network is nearly zero
            weight.normal_(std=0.1)
    x = torch.randn(4, 1, 8, 8, device="cuda")
    with torch.no_grad():
        exact = model.double().log_prob(x.double())
        model.float()
        with ieee_fp32():
            ieee = model.log_prob(x)
    assert torch.allclose(ieee.double(), exact, rtol=1e-5, atol=1e-3)  # TF32 is off by some 0.02
