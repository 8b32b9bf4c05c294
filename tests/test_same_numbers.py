"""A model gives the same numbers however its weights are stored and whichever backend runs its ops."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import nn

from cdm_fast import CDM, cdm_loss, load, sample, use_backend
from cdm_fast.config import NetworkConfig, RunConfig
from cdm_fast.interop.convert import convert
from cdm_fast.ops.backend import missing
from cdm_fast.runs.build import build_model
from cdm_fast.runs.checkpoint import Checkpoint, create_run
from cdm_fast.runs.weights import snapshot
from tests.accuracy import TOLERANCE, relative_error
from tests.opaque import Opaque
from tests.tiny_run import with_settings

NETWORK = NetworkConfig(multipliers=(1, 2), blocks_per_level=1, attention_resolutions=(4,))
CONFIG = replace(with_settings(RunConfig()), network=NETWORK)


@pytest.fixture
def model():
    """A network with attention and two resolutions, no weight of which is left at 0 or 1."""
    model = build_model(CONFIG).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.1)
    return model


def numbers(model):
    """Everything that the model API gives, by name, in one dtype."""
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(5, 1, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    eps = torch.randn(5, 1, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
    level = torch.tensor([0, 1, 4, 8, 9])
    with torch.no_grad():
        found = {
            "logits": model.logits(x),
            "log_posterior": model.log_posterior(x),
            "denoise": model.denoise(x, level),
            "one image": model.denoise(x[:1], 4),
            "predict_x0": model.predict_x0(x, 8),
            "score": model.score(x, level),
            "log_prob": model.log_prob(x, level),
            "samples": sample(model, 3, steps=4),
        }
    terms = cdm_loss(model, x.tanh(), level, eps)
    gradients = torch.autograd.grad(terms.loss, [weight for _, weight in sorted(model.named_parameters())])
    found["loss"] = torch.stack(terms).detach()
    found["gradient"] = torch.cat([gradient.flatten() for gradient in gradients])
    return found


def through_run_directory(model, tmp_path):
    weights = snapshot(model)
    checkpoint = Checkpoint({"model": weights, "ema": weights, "optimizer": {}}, {"step": 0})
    create_run(tmp_path / "run", CONFIG, checkpoint)
    return load(tmp_path / "run")


def through_public_checkpoint(model, tmp_path):
    state = model.network.state_dict()
    torch.save({"model_state_dict": state, "ema_model_state_dict": state}, tmp_path / "public.pt")
    convert(tmp_path / "public.pt", tmp_path / "run", schedule="uniform", image_size=8)
    return load(tmp_path / "run")


@pytest.mark.parametrize(
    "way", [through_run_directory, through_public_checkpoint], ids=["safetensors", "convert"]
)
def test_saved_and_loaded_weights_give_the_same_bits(model, tmp_path, way):
    loaded = numbers(way(model, tmp_path))
    for name, value in numbers(model).items():
        assert torch.equal(loaded[name], value), name


def fast(model):
    return model, nullcontext()


def channels_last(model):
    return model.to(memory_format=torch.channels_last), nullcontext()


def cpp(model):
    if missing("cpp") is not None:
        pytest.skip(missing("cpp"))
    return model, use_backend("cpp")


def general(model):
    return CDM(Opaque(model.network), model.schedule, input_shape=model.input_shape), nullcontext()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("way", [fast, channels_last, cpp, general], ids=lambda way: way.__name__)
def test_every_path_agrees_with_the_reference_ops(model, way, dtype):
    model = model.to(dtype)
    with use_backend("reference"):
        expected = numbers(model)
    model, backend = way(model)
    with backend:
        got = numbers(model)
    for name, value in expected.items():
        assert relative_error(got[name], value) < TOLERANCE[dtype], name


def test_bf16_loses_no_more_by_the_fast_path_than_by_the_reference(model):
    def under_autocast(backend):
        with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
            return numbers(model)

    fast, plain = under_autocast("auto"), under_autocast("reference")
    with use_backend("reference"):
        truth = numbers(model.double())
    for name, exact in truth.items():
        error, plain_error = ((found[name].double() - exact).norm() for found in (fast, plain))
        assert error <= 2 * plain_error + 1e-5 * exact.norm(), name
