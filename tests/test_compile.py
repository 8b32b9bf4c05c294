"""The training loss, the denoiser and the likelihood compile as one graph each and keep their numbers."""

import pytest
import torch

from cdm_fast import CDM, MLP, NoiseSchedule, Transformer, UNet, cdm_loss
from cdm_fast.model.losses import Noised, noised_cdm_loss
from tests.accuracy import TOLERANCE, relative_error
from tests.opaque import Opaque

SCHEDULE = NoiseSchedule.uniform(T=10)
NETWORKS = {
    "unet": lambda: UNet(
        8,
        1,
        SCHEDULE.num_levels,
        base_channels=8,
        multipliers=(1, 2),
        blocks_per_level=1,
        attention_resolutions=(4,),
        num_groups=4,
    ),
    "transformer": lambda: Transformer(
        8,
        1,
        SCHEDULE.num_levels,
        patch_size=2,
        width=16,
        depth=2,
        head_width=8,
        stem_channels=8,
        num_groups=4,
    ),
    "mlp": lambda: MLP(6, SCHEDULE.num_levels, hidden=16, depth=1),
    "general": lambda: Opaque(MLP(6, SCHEDULE.num_levels, hidden=16, depth=1)),
}


@pytest.fixture(params=NETWORKS)
def model(request):
    torch.compiler.reset()
    return CDM(NETWORKS[request.param](), SCHEDULE)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def test_training_loss_is_one_graph(model):
    x0 = torch.rand(4, *model.input_shape)
    level, eps = torch.tensor([0, 3, 10, 11]), torch.randn_like(x0)
    expected = gradients(model, cdm_loss(model, x0, level, eps).loss)
    compiled = torch.compile(
        lambda x0, level, eps: cdm_loss(model, x0, level, eps).loss, fullgraph=True, backend="aot_eager"
    )
    assert relative_error(gradients(model, compiled(x0, level, eps)), expected) < TOLERANCE[torch.float32]


def test_training_loss_that_compares_two_classes_is_one_graph():
    torch.compiler.reset()
    model = CDM(MLP(6, SCHEDULE.num_levels, hidden=16, depth=1, num_classes=3), SCHEDULE)
    label, other = torch.tensor([0, -1, 2, 1]), torch.tensor([1, -1, 0, 2])

    def loss(x_t, eps, level):
        return noised_cdm_loss(model, Noised(x_t, eps, level, label, other=other), class_weight=0.3).loss

    batch = torch.randn(4, 6), torch.randn(4, 6), torch.tensor([0, 3, 10, 11])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = gradients(model, loss(*batch))
    assert relative_error(gradients(model, compiled(*batch)), expected) < TOLERANCE[torch.float32]


@torch.no_grad()
def test_denoiser_and_likelihood_are_one_graph(model):
    x, level = torch.randn(4, *model.input_shape), torch.tensor([1, 3, 10, 11])
    for function in (model.denoise, model.log_prob):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert relative_error(compiled(x, level), function(x, level)) < TOLERANCE[torch.float32]
