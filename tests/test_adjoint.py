"""Every layer's adjoint against autograd, and the whole loss's parameter gradient against double backward."""

import pytest
import torch
from torch import nn

from benchmarks.plain_unet import PlainUNet, double_backward_loss
from cdm_fast import CDM, MLP, NoiseSchedule, UNet, cdm_loss, use_backend
from cdm_fast.nn import layers
from cdm_fast.nn.mlp import MLPBlock

SHAPE = (3, 8, 6, 10)


def embedded_block() -> nn.Module:
    block = layers.ResnetBlock(8, 16, num_groups=4, embedding_width=5)
    block.forward_with = torch.randn(3, 5, dtype=torch.float64)
    return block


LAYERS = {
    "conv3x3": (lambda: layers.Conv2d(8, 5), SHAPE),
    "conv1x1": (lambda: layers.Conv2d(8, 5, kernel_size=1), SHAPE),
    "conv-exact": (lambda: layers.Conv2d(8, 5, exact=True), SHAPE),
    "downsample": (lambda: layers.Downsample(8), SHAPE),
    "upsample": (lambda: layers.Upsample(8), SHAPE),
    "group-norm": (lambda: layers.GroupNorm(8, 4, silu=False), SHAPE),
    "group-norm-silu": (lambda: layers.GroupNorm(8, 2), SHAPE),
    "group-norm-silu-dropout": (lambda: layers.GroupNorm(8, 2, dropout=0.3), SHAPE),
    "attention": (lambda: layers.AttentionBlock(8, 4), SHAPE),
    "resnet": (lambda: layers.ResnetBlock(8, 8, num_groups=4), SHAPE),
    "resnet-shortcut": (lambda: layers.ResnetBlock(8, 12, num_groups=4), SHAPE),
    "resnet-embedding": (embedded_block, SHAPE),
    "conv-mean-pool": (lambda: layers.ConvMeanPool(8, 5), SHAPE),
    "linear": (lambda: layers.Linear(7, 5), (4, 7)),
    "silu": (layers.SiLU, (4, 7)),
    "mlp-block": (lambda: MLPBlock(7), (4, 7)),
}


def randomise(module: nn.Module) -> nn.Module:
    """fp64, and no parameter left at a value (0 or 1) that would hide a wrong term."""
    module = module.double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


def apply(layer, x):
    extra = (layer.forward_with,) if hasattr(layer, "forward_with") else ()
    torch.manual_seed(7)  # the same dropout mask every time
    return layer(x, *extra)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels-last"])
@pytest.mark.parametrize("name", LAYERS)
def test_adjoint_is_the_vector_jacobian_product(name, channels_last, relative_error):
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
def test_forward_and_adjoint_differentiate_like_double_backward(name, relative_error):
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


NETWORKS = {
    "unet": lambda classes=None: UNet(16, 3, 22, 8, (1, 2, 2), 2, (8,), num_groups=4, num_classes=classes),
    "unet-one-resolution": lambda classes=None: UNet(
        8, 1, 22, 8, (1,), 1, (), num_groups=2, num_classes=classes
    ),
    "mlp": lambda classes=None: MLP(5, 22, hidden=16, depth=2, num_classes=classes),
}


@pytest.mark.parametrize("labelled", [False, True], ids=["unlabelled", "labelled"])
@pytest.mark.parametrize("name", NETWORKS)
def test_network_ratio_gradient(name, labelled, relative_error):
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
def test_loss_gradient_equals_plain_double_backward(dtype, classes, relative_error, tolerance):
    sizes = (16, 3, 22, 32, (1, 2), 2, (8,))
    schedule = NoiseSchedule.uniform(T=20)
    torch.manual_seed(1)
    plain = PlainUNet(*sizes, num_classes=classes).to(dtype)
    network = UNet(*sizes, num_classes=classes).to(dtype)
    network.load_state_dict(plain.state_dict())
    model = CDM(network, schedule)
    x0 = torch.rand(6, 3, 16, 16, dtype=dtype) * 2 - 1
    eps, level = torch.randn_like(x0), torch.tensor([0, 1, 5, 11, 20, 21])
    label = torch.arange(6) % 4 - 1 if classes else None
    a, s = schedule.gather(level, x0)
    row = None if label is None else label % 4  # of the plain network's table: its null class is the last
    expected = whole_gradient(double_backward_loss(plain, a * x0 + s * eps, eps, s, level, row), plain)
    terms = cdm_loss(model, x0, level, eps, label)
    assert relative_error(whole_gradient(terms.loss, network), expected) < tolerance[dtype]


def test_loss_never_calls_autograd(monkeypatch):
    """The forward pass of the loss, and the sampler's step, contain no gradient call of any kind."""

    def refuse(*args, **kwargs):
        raise AssertionError("autograd was called inside the loss")

    model = CDM(UNet(8, 1, 12, 8, (1, 2), 1, (4,), num_groups=4), NoiseSchedule.uniform(T=10))
    for module, name in ((torch.autograd, "grad"), (torch.autograd, "backward"), (torch.func, "grad")):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(torch.func, "vjp", refuse)
    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    terms = cdm_loss(model, torch.zeros(2, 1, 8, 8))
    assert terms.loss.requires_grad
    with torch.no_grad():
        assert model.denoise(torch.zeros(2, 1, 8, 8), 3).shape == (2, 1, 8, 8)


def test_general_path_agrees_with_the_fast_one(relative_error):
    network = randomise(NETWORKS["unet"]())
    schedule = NoiseSchedule.linear(T=20)
    fast, general = CDM(network, schedule), CDM(Opaque(network), schedule, input_shape=network.input_shape)
    x0, eps = torch.rand(4, 3, 16, 16, dtype=torch.float64), torch.randn(4, 3, 16, 16, dtype=torch.float64)
    level = torch.tensor([0, 4, 13, 21])
    losses = [cdm_loss(model, x0, level, eps) for model in (fast, general)]
    gradients = [whole_gradient(terms.loss, network) for terms in losses]
    assert relative_error(gradients[0], gradients[1]) < 1e-10
    with torch.no_grad():
        assert relative_error(fast.denoise(x0, 7), general.denoise(x0, 7)) < 1e-10


class Opaque(nn.Module):
    """Hides the adjoint, so that CDM must take the general path."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x)


def test_the_papers_cifar10_network_has_its_size_and_names():
    with torch.device("meta"):
        network = UNet(32, 3, 1002, 128, (1, 2, 2, 2), 2, (16,), dropout=0.1)
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
