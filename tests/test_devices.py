"""fp32 is IEEE fp32 where documented, PyTorch's settings are restored, training time includes device work."""

import time
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from cdm_fast import CDM, NoiseSchedule, UNet, ieee_fp32, sample
from cdm_fast.data import ImageData
from cdm_fast.host.device import upload
from cdm_fast.likelihood import evaluate
from cdm_fast.model.losses import Noised
from cdm_fast.training.step import accumulate_gradient, make_loss
from cdm_fast.training.train import train
from tests.tiny_run import tiny_config, write_images


def settings():
    """How convolutions and matrix products of fp32 tensors round on a GPU: "tf32", or "none" or "ieee"."""
    return torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision


@pytest.fixture
def tf32():
    """Both in TF32, as a user may set it; PyTorch's own settings afterwards."""
    before = settings()
    torch.backends.cudnn.conv.fp32_precision = torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision = before


@pytest.fixture
def convolutions(monkeypatch, tf32):
    """The settings under which each convolution ran, and its transposed."""
    seen: list[tuple[str, str]] = []

    def watched(function, *args, **kwargs):
        seen.append(settings())
        return function(*args, **kwargs)

    for name in ("conv2d", "conv_transpose2d"):
        monkeypatch.setattr(F, name, partial(watched, getattr(F, name)))
    return seen


@pytest.fixture
def model():
    network = UNet(
        8,
        1,
        10,
        base_channels=8,
        multipliers=(1, 2),
        blocks_per_level=1,
        attention_resolutions=(4,),
        num_groups=4,
    )
    return CDM(network, NoiseSchedule.uniform(T=8))


IEEE, TF32 = ("ieee", "ieee"), ("tf32", "tf32")
IMAGES = ImageData(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), None, 17, None, "zeros", "test")


@pytest.mark.parametrize(
    "measure",
    [
        lambda model: sample(model, 2, steps=2),
        lambda model: sample(model, 2, steps=2, precision="bf16"),
        lambda model: sample(model, 2, "mala", steps=2),
        lambda model: evaluate(model, IMAGES, draws=1, check_levels=2),
    ],
    ids=["ddim", "bf16", "mala", "evaluate"],
)
def test_measurements_are_in_ieee_fp32(model, convolutions, measure):
    measure(model)
    assert set(convolutions) == {IEEE}
    assert settings() == TF32


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_step_is_in_ieee_fp32(model, convolutions, precision, tmp_path):
    x = torch.randn(4, 1, 8, 8)
    loss = make_loss(tiny_config(tmp_path).train)
    accumulate_gradient(model, Noised(x, x, torch.arange(4)), loss, precision=precision)
    assert set(convolutions) == {IEEE}
    assert settings() == TF32


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_exact_layers_are_exact_in_a_call_that_follows_pytorch(model, convolutions, bf16):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        model.denoise(torch.randn(2, 1, 8, 8), 3)
    assert convolutions[0] == convolutions[-1] == IEEE  # where the image comes in and its gradient goes out
    assert set(convolutions[1:-1]) == {TF32}


def test_ieee_fp32_puts_back_what_the_older_switches_say():
    before = torch.backends.cudnn.allow_tf32
    try:
        for allowed in (False, True):
            torch.backends.cudnn.allow_tf32 = allowed
            with pytest.raises(ZeroDivisionError), ieee_fp32():
                assert settings() == IEEE
                raise ZeroDivisionError
            assert torch.backends.cudnn.allow_tf32 is allowed
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_upload_leaves_host_tensors_alone():
    x = torch.arange(3)
    assert upload(x, torch.device("cpu")) is x


def test_the_time_of_training_is_that_of_the_device(tmp_path, monkeypatch):
    """Steps of a GPU are only enqueued; waiting for them takes what they take."""
    waits: list[int] = []

    def device_works(device):
        waits.append(1)
        time.sleep(0.3)

    monkeypatch.setattr("cdm_fast.training.loop.wait_for", device_works)
    config = tiny_config(write_images(tmp_path / "images.npz"), steps=4)
    config = replace(config, output=replace(config.output, log_every=2, sample_every=3))
    summary = train(config, tmp_path / "run", device="cpu")
    assert len(waits) == 3  # at the log lines of steps 2 and 4, and before the pictures of step 3
    assert summary["seconds"] >= 0.9
    assert summary["images_per_second"] <= 4 * 8 / 0.9
