"""Working copies of weights: the numbers of autocast up to rounding, and no trace after the block."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch

from cdm_fast import CDM, Encoder, NoiseSchedule, Transformer, UNet, UNetDenoiser, cdm_loss, ddm_loss, sample
from cdm_fast.model import DDM
from cdm_fast.nn.layers import GroupNorm
from cdm_fast.nn.working import cast_weights, working_weights
from cdm_fast.ops import backend as _backend
from cdm_fast.ops import use_backend

SCHEDULE = NoiseSchedule.uniform(T=8)
SIZES = {"image_size": 16, "channels": 3, "base_channels": 32, "multipliers": (1, 2), "blocks_per_level": 1}
OPTIONS = {**SIZES, "attention_resolutions": (8,)}
PATCHES = {
    "image_size": 16,
    "channels": 3,
    "width": 64,
    "depth": 2,
    "head_width": 16,
    "stem_channels": 32,
}
NETWORKS = {
    "unet": partial(UNet, num_levels=10, **OPTIONS),
    "embedding": partial(UNet, num_levels=10, num_classes=3, **OPTIONS),
    "joint": partial(UNet, num_levels=10, num_classes=3, conditioning="joint", **OPTIONS),
    "encoder": partial(Encoder, num_levels=10, **OPTIONS),
    "transformer": partial(Transformer, num_levels=10, num_classes=3, **PATCHES),
    "denoiser": partial(UNetDenoiser, **OPTIONS),
}


@pytest.fixture(params=NETWORKS)
def model(request):
    network = NETWORKS[request.param]()
    for weight in network.parameters():
        torch.nn.init.normal_(weight, mean=float(weight.detach().mean()), std=0.05)
    kind = DDM if request.param == "denoiser" else CDM
    return kind(network, SCHEDULE).to(memory_format=torch.channels_last)


def gradient(model, lends, recompute=False, dtype=torch.bfloat16):
    """Gradients by name of a loss, in bf16 unless it is fp64; upsampling folds kernels at this batch size."""
    model.zero_grad()
    model.network.recompute = recompute
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(16, 3, 16, 16, generator=generator).to(model.network.conv_in.weight) for _ in "xe")
    level = torch.arange(16) % SCHEDULE.num_levels
    loss = ddm_loss if isinstance(model, DDM) else cdm_loss
    label = level % 3 if model.network.num_classes else None

    def backward():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            terms = loss(model, x0, level, eps, label)
        terms.loss.backward()

    if lends:
        with working_weights(model, torch.bfloat16):
            backward()
    else:
        backward()
    return {name: None if w.grad is None else w.grad.clone() for name, w in model.named_parameters()}


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_gradients_are_no_further_from_the_truth_than_autocasts(model, recompute):
    """The engine adds an activation's gradients in another order, so bf16 rounds otherwise."""
    plain = gradient(model, lends=False)
    lent = gradient(model, lends=True, recompute=recompute)
    truth = gradient(model.double(), lends=False, dtype=torch.float64)
    errors, plain_errors = (
        sum(
            float((found[name] - exact).double().square().sum())
            for name, exact in truth.items()
            if exact is not None
        )
        for found in (lent, plain)
    )
    assert plain_errors > 0 and errors <= 1.2 * plain_errors
    for name, exact in truth.items():
        assert (lent[name] is None) == (exact is None), name
        assert exact is None or lent[name].dtype == torch.float32, name


@pytest.mark.parametrize("kind", ["encoder", "denoiser"])
def test_gradients_are_bitwise_autocasts_where_nothing_is_added_thrice(kind):
    network = NETWORKS[kind]()
    model = (DDM if kind == "denoiser" else CDM)(network, SCHEDULE)
    expected = gradient(model, lends=False)
    for name, got in gradient(model, lends=True).items():
        assert torch.equal(got, expected[name]), name


def test_the_weights_come_back_even_after_an_error(model):
    before = dict(model.named_parameters())
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(ZeroDivisionError), working_weights(model, torch.bfloat16):
        assert any(weight.dtype == torch.bfloat16 for weight in model.parameters())
        raise ZeroDivisionError
    after = dict(model.named_parameters())
    assert all(after[name] is weight for name, weight in before.items())
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}


def test_samples_are_bitwise_those_of_autocast(model):
    frozen = model.requires_grad_(False)
    got = sample(frozen, 3, steps=3, precision="bf16")
    with torch.autocast("cpu", torch.bfloat16):
        expected = sample(frozen, 3, steps=3)
    assert torch.equal(got, expected)


def test_an_evaluation_sees_weights_that_have_changed_since_the_last(model):
    first = sample(model, 2, steps=2, precision="bf16")
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    assert not torch.equal(first, sample(model, 2, steps=2, precision="bf16"))


def test_a_compiled_network_keeps_its_weights(model):
    model.network.forward = torch.compile(model.network.forward, backend="eager")
    with cast_weights(model, torch.device("cpu"), "bf16"):
        assert all(isinstance(weight, torch.nn.Parameter) for weight in model.parameters())


@pytest.mark.parametrize("uses", [1, 2], ids=["one-batch", "two-batches"])
def test_gradients_of_norms_are_summed_over_images_once(uses, monkeypatch):
    """Triton's ops leave the sum over images to `working_weights`: the same gradients, no launch for each."""
    if (reason := _backend.missing("triton")) is not None:
        pytest.skip(reason)
    from cdm_fast.kernels import group_norm_silu as kernels

    norm = GroupNorm(8, 2)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    batches = [torch.randn(3 + n, 8, 2, 3, requires_grad=True) for n in range(uses)]

    def gradients(backend, lends):
        norm.zero_grad()
        with use_backend(backend), working_weights(norm, torch.bfloat16) if lends else nullcontext():
            loss = sum(_loss_with_adjoint(norm, x) for x in batches)
            loss.backward()
        return [parameter.grad for parameter in norm.parameters()]

    expected = gradients("reference", lends=False)
    monkeypatch.setattr(kernels, "sum_images", None)  # not called
    for got, exact in zip(gradients("triton", lends=True), expected, strict=True):
        torch.testing.assert_close(got, exact)


def _loss_with_adjoint(norm, x):
    y, residuals = norm(x)
    return y.square().sum() + norm.adjoint(residuals, y).square().sum()
