"""Every layer's adjoint against autograd, and the whole loss's parameter gradient against double backward."""

from functools import partial

import pytest
import torch
from torch import nn

from benchmarks.support.plain_unet import PlainUNet, double_backward_loss
from cdm_fast import CDM, MLP, Encoder, NoiseSchedule, Transformer, UNet, UserError, cdm_loss, use_backend
from cdm_fast.nn import blocks, layers, resample, tokens
from cdm_fast.nn.mlp import MLPBlock
from cdm_fast.nn.pool import ConvMeanPool, EnergyPool
from tests.accuracy import TOLERANCE, relative_error
from tests.opaque import Opaque

SHAPE = (3, 8, 6, 10)


def embedded_block() -> nn.Module:
    block = blocks.ResnetBlock(8, 16, num_groups=4, embedding_width=5)
    block.forward_with = {"embedding": torch.randn(3, 5, dtype=torch.float64)}
    return block


def embedded_transformer_block() -> nn.Module:
    block = tokens.TransformerBlock(16, 8, (3, 5), branches=2, dropout=0.3, embedding_width=5)
    embedding = torch.randn(3, 5, dtype=torch.float64)
    block.forward_with = {"embedding": embedding, "seed": torch.tensor([7, 11])}
    return block


def modulated_norm() -> nn.Module:
    norm = tokens.RMSNorm(8, multiplier=0.5)
    norm.forward_with = {"scale": torch.randn(3, 8, dtype=torch.float64)}
    return norm


def with_dropout(layer: nn.Module) -> nn.Module:
    layer.forward_with = {"seed": torch.tensor([7, 11])}
    return layer


LAYERS = {
    "conv3x3": (lambda: layers.Conv2d(8, 5), SHAPE),
    "conv1x1": (lambda: layers.Conv2d(8, 5, kernel_size=1), SHAPE),
    "conv-exact": (lambda: layers.Conv2d(8, 5, exact=True), SHAPE),
    "downsample": (lambda: resample.Downsample(8), SHAPE),
    "upsample": (lambda: resample.Upsample(8), SHAPE),
    "upsample-folded": (lambda: resample.Upsample(3), (6, 3, 12, 16)),
    "downsample-row": (lambda: resample.Downsample(8, (False, True)), (3, 8, 1, 10)),
    "downsample-column": (lambda: resample.Downsample(8, (True, False)), (3, 8, 6, 1)),
    "upsample-row": (lambda: resample.Upsample(8, (False, True)), (3, 8, 1, 10)),
    "upsample-column": (lambda: resample.Upsample(8, (True, False)), (3, 8, 6, 1)),
    "upsample-long-row": (lambda: resample.Upsample(3, (False, True)), (6, 3, 1, 256)),
    "group-norm": (lambda: layers.GroupNorm(8, 4, silu=False), SHAPE),
    "group-norm-silu": (lambda: layers.GroupNorm(8, 2), SHAPE),
    "group-norm-silu-dropout": (lambda: with_dropout(layers.GroupNorm(8, 2, dropout=0.3)), SHAPE),
    "attention": (lambda: blocks.AttentionBlock(8, 4), SHAPE),
    "attention-row": (lambda: blocks.AttentionBlock(8, 4), (3, 8, 1, 10)),
    "resnet": (lambda: blocks.ResnetBlock(8, 8, num_groups=4), SHAPE),
    "resnet-shortcut": (lambda: blocks.ResnetBlock(8, 12, num_groups=4), SHAPE),
    "resnet-embedding": (embedded_block, SHAPE),
    "resnet-dropout": (lambda: with_dropout(blocks.ResnetBlock(8, 8, 4, dropout=0.3)), SHAPE),
    "conv-mean-pool": (lambda: ConvMeanPool(8, 5), SHAPE),
    "conv-mean-pool-row": (lambda: ConvMeanPool(8, 5), (3, 8, 1, 10)),
    "energy-pool": (lambda: EnergyPool(8, num_groups=4, num_means=5, num_squares=3), SHAPE),
    "linear": (lambda: layers.Linear(7, 5), (4, 7)),
    "silu": (layers.SiLU, (4, 7)),
    "mlp-block": (lambda: MLPBlock(7), (4, 7)),
    "patches": (lambda: tokens.PatchEmbedding(8, 12, (2, 5)), SHAPE),
    "patches-exact": (lambda: tokens.PatchEmbedding(8, 12, (2, 2), exact=True), SHAPE),
    "rms-norm": (lambda: tokens.RMSNorm(8), (3, 7, 8)),
    "rms-norm-modulated": (modulated_norm, (3, 7, 8)),
    "self-attention": (lambda: tokens.SelfAttention(16, 8, (3, 5), branches=2), (3, 15, 16)),
    "gated-mlp": (lambda: tokens.GatedMLP(16, branches=2), (3, 7, 16)),
    "gated-mlp-dropout": (lambda: with_dropout(tokens.GatedMLP(16, 2, dropout=0.3)), (3, 7, 16)),
    "transformer-block": (lambda: tokens.TransformerBlock(16, 8, (3, 5), branches=2), (3, 16, 3, 5)),
    "transformer-block-embedding": (embedded_transformer_block, (3, 16, 3, 5)),
    "token-pool": (lambda: tokens.TokenPool(16, num_groups=4), (3, 16, 3, 5)),
    "squares-pool": (lambda: tokens.SquaresPool(8, 0.5), SHAPE),
}


def randomise(module: nn.Module) -> nn.Module:
    """fp64, and no parameter left at a value (0 or 1) that would hide a wrong term."""
    module = module.double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


def apply(layer, x):
    return layer(x, **getattr(layer, "forward_with", {}))


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels-last"])
@pytest.mark.parametrize("name", LAYERS)
def test_adjoint_is_the_vector_jacobian_product(name, channels_last):
    build, shape = LAYERS[name]
    layer = randomise(build())
    x = torch.randn(shape, dtype=torch.float64)
    if channels_last and len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    with use_backend("reference"):
        y, _ = apply(layer, x.requires_grad_())
        g = torch.randn_like(y)
        (expected,) = torch.autograd.grad(y, x, g)
    with torch.no_grad():
        y_fast, residuals = apply(layer, x.detach())
        got = layer.adjoint(residuals, g)
    assert relative_error(y_fast, y) < 1e-10
    assert relative_error(got, expected) < 1e-10


@pytest.mark.parametrize("name", LAYERS)
def test_forward_and_adjoint_differentiate_like_double_backward(name):
    build, shape = LAYERS[name]
    layer = randomise(build())
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    with use_backend("reference"):
        y, _ = apply(layer, x)
        g, v, w = torch.randn_like(y), torch.randn_like(x), torch.randn_like(y)
        (grad_x,) = torch.autograd.grad(y, x, g, create_graph=True)
        objective = (y * w).sum() + (grad_x * v).sum()
        wanted = torch.autograd.grad(objective, [x, *layer.parameters()], allow_unused=True)
    y, residuals = apply(layer, x)
    objective = (y * w).sum() + (layer.adjoint(residuals, g) * v).sum()
    got = torch.autograd.grad(objective, [x, *layer.parameters()], allow_unused=True)
    names = ["x", *(name for name, _ in layer.named_parameters())]
    size = max(grad.norm() for grad in wanted if grad is not None)  # some gradients are 0 in theory
    for parameter, a, b in zip(names, got, wanted, strict=True):
        a, b = (torch.zeros(()) if grad is None else grad for grad in (a, b))
        assert (a - b).norm() < 1e-10 * size, parameter


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels-last"])
def test_a_skip_connection_counts_as_further_channels(channels_last):
    """Output, adjoint and the derivative of both equal those of the same block on the concatenation."""
    block = randomise(with_dropout(blocks.ResnetBlock(8, 12, 4, dropout=0.3)))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    whole = torch.randn(3, 8, 4, 6, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    pieces = [piece.detach().clone(memory_format=layout).requires_grad_() for piece in whole.split([5, 3], 1)]
    g, v, w = (torch.randn(3, channels, 4, 6, dtype=torch.float64) for channels in (12, 8, 12))

    y, residuals = apply(block, whole)
    grad = block.adjoint(residuals, g)
    wanted = torch.autograd.grad((y * w).sum() + (grad * v).sum(), [whole, *block.parameters()])
    y_split, residuals = block(pieces[0], skip=pieces[1], **block.forward_with)
    grads = block.adjoint(residuals, g)
    objective = (y_split * w).sum() + (torch.cat(grads, 1) * v).sum()
    of_x, of_skip, *of_parameters = torch.autograd.grad(objective, [*pieces, *block.parameters()])
    assert relative_error(y_split, y) < 1e-12
    assert relative_error(torch.cat(grads, 1), grad) < 1e-12
    for got, expected in zip([torch.cat([of_x, of_skip], 1), *of_parameters], wanted, strict=True):
        assert relative_error(got, expected) < 1e-12


SMALL_TRUNK = {
    "base_channels": 8,
    "multipliers": (1, 2),
    "blocks_per_level": 1,
    "attention_resolutions": (8,),
    "num_groups": 4,
}
SMALL_TRANSFORMER = {
    "patch_size": 4,
    "width": 16,
    "depth": 3,
    "head_width": 8,
    "stem_channels": 8,
    "num_groups": 4,
}
RECOMPUTED = {
    "unet": (partial(UNet, **SMALL_TRUNK), 3.0),
    "encoder": (partial(Encoder, **SMALL_TRUNK), 2.5),
    "transformer": (partial(Transformer, **SMALL_TRANSFORMER | {"depth": 5}), 2.0),
}


@pytest.mark.parametrize(("build", "shrinks"), RECOMPUTED.values(), ids=RECOMPUTED.keys())
def test_recomputation_changes_memory_and_nothing_else(build, shrinks):
    """Loss and gradient, dropout included; and what autograd keeps of a step shrinks.

    Pools of energies are no stages: they keep what they read.
    """
    network = randomise(build(16, 3, 22, dropout=0.3, num_classes=3)).train()
    model = CDM(network, NoiseSchedule.uniform(T=20))
    x0, eps = torch.rand(4, 3, 16, 16, dtype=torch.float64), torch.randn(4, 3, 16, 16, dtype=torch.float64)
    level, label = torch.tensor([0, 4, 13, 21]), torch.tensor([0, 1, 2, 0])
    results, kept = [], []
    for recompute in (False, True):
        network.recompute = recompute
        torch.manual_seed(3)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t
        ):
            loss = cdm_loss(model, x0, level, eps, label).loss
        kept.append(sum(sizes))
        results.append((loss, whole_gradient(loss, network)))
    assert results[0][0] == results[1][0]
    assert relative_error(results[1][1], results[0][1]) < 1e-12
    assert kept[1] < kept[0] / shrinks


def of_size(build, image_size, **trunk):
    """A builder of networks for images of this size, with three resolutions."""
    options = {"base_channels": 8, "multipliers": (1, 2, 2), "blocks_per_level": 1, "num_groups": 4, **trunk}
    return lambda classes=None: build(image_size, 3, 22, num_classes=classes, **options)


def transformer_of_size(image_size, **sizes):
    """A builder of transformers for images of this size."""
    options = SMALL_TRANSFORMER | sizes
    return lambda classes=None: Transformer(image_size, 3, 22, num_classes=classes, **options)


NETWORKS = {
    "unet-oblong": of_size(UNet, (12, 16), attention_resolutions=(0.5,)),
    "unet-upright": of_size(UNet, (40, 24), attention_resolutions=(10,)),
    "unet-signal": of_size(UNet, (1, 16), attention_resolutions=(8,)),
    "unet-column": of_size(UNet, (16, 1), attention_resolutions=(0.25,)),
    "unet-thin": of_size(UNet, (2, 8), attention_resolutions=()),
    "encoder-oblong": of_size(Encoder, (12, 16), attention_resolutions=(0.5,)),
    "encoder-signal": of_size(Encoder, (1, 16), attention_resolutions=(8,)),
    "encoder-thin": of_size(Encoder, (2, 8), attention_resolutions=()),
    "unet": lambda classes=None: UNet(
        16,
        3,
        22,
        base_channels=8,
        multipliers=(1, 2, 2),
        blocks_per_level=2,
        attention_resolutions=(8,),
        num_groups=4,
        num_classes=classes,
    ),
    "unet-one-resolution": lambda classes=None: UNet(
        8,
        1,
        22,
        base_channels=8,
        multipliers=(1,),
        blocks_per_level=1,
        attention_resolutions=(),
        num_groups=2,
        num_classes=classes,
    ),
    "encoder": lambda classes=None: Encoder(
        16,
        3,
        22,
        base_channels=8,
        multipliers=(1, 2, 2),
        blocks_per_level=2,
        attention_resolutions=(8,),
        num_groups=4,
        num_classes=classes,
    ),
    "transformer": transformer_of_size(16),
    "transformer-oblong": transformer_of_size((12, 16)),
    "transformer-signal": transformer_of_size((1, 16)),
    "transformer-thin": transformer_of_size((4, 8), depth=1, patch_size=2),
    "transformer-two-stems": transformer_of_size(16, stem_resolutions=2, stem_blocks=2),
    "transformer-signal-two-stems": transformer_of_size((1, 16), stem_resolutions=3),
    "transformer-without-stem": transformer_of_size(16, stem_channels=0),
    "mlp": lambda classes=None: MLP(5, 22, hidden=16, depth=2, num_classes=classes),
}


@pytest.mark.parametrize("labelled", [False, True], ids=["unlabelled", "labelled"])
@pytest.mark.parametrize("name", NETWORKS)
def test_network_ratio_gradient(name, labelled):
    network = randomise(NETWORKS[name](3 if labelled else None))
    x = torch.randn(4, *network.input_shape, dtype=torch.float64, requires_grad=True)
    level, label = torch.tensor([0, 3, 20, 21]), torch.tensor([0, 1, 2, -1]) if labelled else None
    with use_backend("reference"):
        logits = network(x, label)
        ratio = logits[:, -1] - logits.gather(1, level[:, None])[:, 0]
        (expected,) = torch.autograd.grad(ratio.sum(), x)
    with torch.no_grad():
        fast_logits, got = network.logits_and_ratio_gradient(x.detach(), level, label)
    assert relative_error(fast_logits, logits) < 1e-10
    assert relative_error(got, expected) < 1e-10
    assert got[3].abs().max() == 0  # F(x, T+1) = 0


def whole_gradient(loss, network):
    parameters = [parameter for _, parameter in sorted(network.named_parameters())]
    grads = torch.autograd.grad(loss, parameters)
    return torch.cat([grad.flatten() for grad in grads])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("classes", [None, 3], ids=["unconditional", "conditional"])
def test_loss_gradient_equals_plain_double_backward(dtype, classes):
    sizes = {
        "base_channels": 32,
        "multipliers": (1, 2),
        "attention_resolutions": (8,),
        "num_classes": classes,
    }
    schedule = NoiseSchedule.uniform(T=20)
    torch.manual_seed(1)
    plain = PlainUNet(16, 3, 22, **sizes).to(dtype)
    network = UNet(16, 3, 22, **sizes).to(dtype)
    network.load_state_dict(plain.state_dict())
    model = CDM(network, schedule)
    x0 = torch.rand(6, 3, 16, 16, dtype=dtype) * 2 - 1
    eps, level = torch.randn_like(x0), torch.tensor([0, 1, 5, 11, 20, 21])
    label = torch.arange(6) % 4 - 1 if classes else None
    s = schedule.amplitudes(level, x0)[1]
    row = None if label is None else label % 4  # of the plain network's table: its null class is the last
    expected = whole_gradient(
        double_backward_loss(plain, schedule.noise(x0, level, eps), eps, s, level, row), plain
    )
    terms = cdm_loss(model, x0, level, eps, label)
    assert relative_error(whole_gradient(terms.loss, network), expected) < TOLERANCE[dtype]


def test_loss_never_calls_autograd(monkeypatch):
    """The forward pass of the loss, and the sampler's step, contain no gradient call of any kind."""

    def refuse(*args, **kwargs):
        raise AssertionError("autograd was called inside the loss")

    model = CDM(
        UNet(
            8,
            1,
            12,
            base_channels=8,
            multipliers=(1, 2),
            blocks_per_level=1,
            attention_resolutions=(4,),
            num_groups=4,
        ),
        NoiseSchedule.uniform(T=10),
    )
    for module, name in ((torch.autograd, "grad"), (torch.autograd, "backward"), (torch.func, "grad")):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(torch.func, "vjp", refuse)
    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    terms = cdm_loss(model, torch.zeros(2, 1, 8, 8))
    assert terms.loss.requires_grad
    with torch.no_grad():
        assert model.denoise(torch.zeros(2, 1, 8, 8), 3).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("name", ["unet", "encoder", "transformer"])
def test_general_path_agrees_with_the_fast_one(name):
    network = randomise(NETWORKS[name]())
    schedule = NoiseSchedule.linear(T=20)
    fast, general = CDM(network, schedule), CDM(Opaque(network), schedule, input_shape=network.input_shape)
    x0, eps = torch.rand(4, 3, 16, 16, dtype=torch.float64), torch.randn(4, 3, 16, 16, dtype=torch.float64)
    level = torch.tensor([0, 4, 13, 21])
    losses = [cdm_loss(model, x0, level, eps) for model in (fast, general)]
    gradients = [whole_gradient(terms.loss, network) for terms in losses]
    assert relative_error(gradients[0], gradients[1]) < 1e-10
    with torch.no_grad():
        assert relative_error(fast.denoise(x0, 7), general.denoise(x0, 7)) < 1e-10


def test_the_papers_cifar10_network_has_its_size_and_names():
    with torch.device("meta"):
        network = UNet(
            32,
            3,
            1002,
            base_channels=128,
            multipliers=(1, 2, 2, 2),
            blocks_per_level=2,
            attention_resolutions=(16,),
            dropout=0.1,
        )
        plain = PlainUNet(32, 3, 1002, 128, (1, 2, 2, 2), 2, (16,), dropout=0.1)
    assert sum(p.numel() for p in network.parameters()) == sum(p.numel() for p in plain.parameters())
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == 33.4
    assert network.state_dict().keys() == plain.state_dict().keys()
    for name in (
        "conv_in.weight",
        "down.1.block.0.nin_shortcut.weight",
        "down.1.attn.1.proj_out.bias",
        "down.0.downsample.conv.weight",
        "mid.attn_1.q.weight",
        "up.3.block.2.norm2.bias",
        "up.1.upsample.conv.bias",
        "linear_layer.weight",
    ):
        assert name in network.state_dict()


ONE_RESOLUTION = SMALL_TRUNK | {"multipliers": (1,), "attention_resolutions": ()}
WITH_DROPOUT = {
    "unet": partial(UNet, **ONE_RESOLUTION),
    "encoder": partial(Encoder, **ONE_RESOLUTION),
    "transformer": partial(Transformer, **SMALL_TRANSFORMER),
}


@pytest.mark.parametrize("kind", WITH_DROPOUT.values(), ids=WITH_DROPOUT.keys())
def test_the_rate_of_dropout_can_be_changed(kind):
    """A new rate reaches every block: the same masks and outputs as in a network built with it."""
    torch.manual_seed(0)
    network = randomise(kind(4, 1, 12, dropout=0.5)).train()
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64)

    def logits(network):
        torch.manual_seed(1)
        return network(x)

    outputs = {}
    for rate in (0.0, 0.1, 0.9):
        other = kind(4, 1, 12, dropout=rate).double()
        other.load_state_dict(network.state_dict())
        network.dropout = rate
        outputs[rate] = logits(network)
        assert torch.equal(outputs[rate], logits(other))
    assert not torch.equal(outputs[0.1], outputs[0.9]) and not torch.equal(outputs[0.0], outputs[0.1])
    with pytest.raises(UserError, match="dropout is 1"):
        network.dropout = 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
@pytest.mark.parametrize("in_one", [False, True], ids=["by-parity", "at-once"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_parities_are_interleaved(dtype, in_one, memory_format, monkeypatch):
    """Both ways of copying, against the definition."""
    monkeypatch.setattr(resample, "copies_in_one_launch", lambda tensor: in_one)
    y = torch.randn(2, 4 * 3, 3, 4).to(dtype).to(memory_format=memory_format)
    expected = y.new_empty(2, 3, 4, 6)
    for p in (0, 1):
        for q in (0, 1):
            parity = y[:, 3 * (2 * p + q) : 3 * (2 * p + q + 1)]
            expected[:, :, p::2, q::2] = parity[:, :, p : p + 2, q : q + 3]
    assert torch.equal(resample.interleave_parities(y), expected)
