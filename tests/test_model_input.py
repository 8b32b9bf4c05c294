"""Wrong arguments of the model API give a one-line error, and classes reach the network unchanged."""

from dataclasses import MISSING, fields

import pytest
import torch

from cdm_fast import MLP, MLPDenoiser, Transformer, UNet, UNetDenoiser, UserError
from cdm_fast.data import dequantize
from cdm_fast.data.pixels import displayable, from_display
from cdm_fast.nn.trunk import TrunkOptions, TrunkShape

K = 3
LEVEL = torch.tensor([1, 2])

# name -> (build(num_classes), call(network, x, label), x)
NETWORKS = {
    "unet": (
        lambda k: UNet(
            8,
            1,
            12,
            base_channels=8,
            multipliers=(1,),
            blocks_per_level=1,
            attention_resolutions=(),
            num_classes=k,
            num_groups=2,
        ),
        lambda network, x, label: network(x, label),
        torch.ones(2, 1, 8, 8),
    ),
    "unet-denoiser": (
        lambda k: UNetDenoiser(
            8,
            1,
            base_channels=8,
            multipliers=(1,),
            blocks_per_level=1,
            attention_resolutions=(),
            num_classes=k,
            num_groups=2,
        ),
        lambda network, x, label: network(x, LEVEL, label),
        torch.ones(2, 1, 8, 8),
    ),
    "transformer": (
        lambda k: Transformer(
            8,
            1,
            12,
            width=16,
            depth=1,
            head_width=8,
            stem_channels=4,
            num_classes=k,
            num_groups=2,
        ),
        lambda network, x, label: network(x, label),
        torch.ones(2, 1, 8, 8),
    ),
    "mlp": (
        lambda k: MLP(5, 12, hidden=8, depth=1, num_classes=k),
        lambda network, x, label: network(x, label),
        torch.ones(2, 5),
    ),
    "mlp-denoiser": (
        lambda k: MLPDenoiser(5, hidden=8, depth=1, num_classes=k),
        lambda network, x, label: network(x, LEVEL, label),
        torch.ones(2, 5),
    ),
}


@pytest.fixture(params=NETWORKS.values(), ids=NETWORKS.keys())
def network(request):
    return request.param


@pytest.mark.parametrize(
    ("label", "told"),
    [
        (torch.tensor([0, K]), f"label {K} does not exist"),
        (torch.tensor([-2, 0]), "label -2 does not exist"),
        (torch.tensor([0]), r"shape \(1,\): pass int64 \(2,\)"),
        (torch.tensor([0.0, 1.0]), "torch.float32"),
    ],
    ids=["too-high", "negative", "too-few", "float"],
)
def test_bad_labels(network, label, told):
    build, call, x = network
    with pytest.raises(UserError, match=told):
        call(build(K), x, label)


def test_labels_for_a_network_without_classes(network):
    build, call, x = network
    with pytest.raises(UserError, match="without num_classes"):
        call(build(None), x, torch.tensor([0, 1]))


def test_no_label_is_the_null_class(network):
    build, call, x = network
    conditional = build(K)
    null = call(conditional, x, torch.full((2,), -1))
    assert torch.equal(call(conditional, x, None), null)
    assert not torch.equal(call(conditional, x, torch.tensor([0, -1]))[0], null[0])


def test_input_of_another_shape(network):
    build, call, x = network
    with pytest.raises(UserError, match="the network takes .* of shape"):
        call(build(None), x[:, :, 1:] if x.dim() == 4 else x[:, 1:], None)


@pytest.mark.parametrize("num_grey_levels", [2, 17, 256])
def test_a_picture_on_disk_and_back_is_the_middle_of_each_grey_level(num_grey_levels):
    grey = torch.arange(num_grey_levels, dtype=torch.uint8).view(1, 1, 1, -1)
    middle = dequantize(grey, num_grey_levels, torch.full(grey.shape, 0.5))
    shown = displayable(middle, num_grey_levels)
    assert (shown.min(), shown.max()) == (0, 255)
    # What a picture can hold of it: grey levels are rounded to 1/255.
    assert (from_display(shown, num_grey_levels) - middle).abs().max() < 1.01 / 255
    assert torch.equal(displayable(from_display(shown, num_grey_levels), num_grey_levels), shown)


def test_networks_take_every_optional_size_by_keyword():
    """`TrunkOptions`, which types the keywords, has the fields of `TrunkShape` that have a default."""
    optional = {field.name: field.type for field in fields(TrunkShape) if field.default is not MISSING}
    assert optional == TrunkOptions.__annotations__
    with pytest.raises(TypeError, match="base_chanels"):
        UNet(8, 1, 12, base_chanels=8)
    with pytest.raises(TypeError):
        UNet(8, 1, 12, 8)
