"""Adversarial training: the perturbations, their part of the loss, and what it refuses."""

from dataclasses import replace

import pytest
import torch

from cdm_fast import CDM, MLP, NoiseSchedule, UserError
from cdm_fast.config import check
from cdm_fast.data import load_data
from cdm_fast.data.pixels import noise_of_inputs
from cdm_fast.evaluation.apgd import log_odds_against
from cdm_fast.model.classifier import Classifier
from cdm_fast.training.adversarial import perturbed
from cdm_fast.training.prepare import check_parallel, resolve
from cdm_fast.training.state import new_state
from cdm_fast.training.step import draw_batch, make_loss
from tests.tiny_run import tiny_config, write_images

CPU = torch.device("cpu")
BUDGET = 0.2


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images.npz")


def attacking(images, conditioning="joint", rank=0, **train):
    config = tiny_config(images, **{"adversarial": "linf", "budget": BUDGET, **train})
    network = replace(config.network, conditioning=conditioning, head_rank=rank, dropout=0.3)
    config = replace(config, network=network)
    return resolve(config, load_data(config.data.source), CPU)


def with_noise_in_its_head(config):
    """A model that tells classes apart at random."""
    model = new_state(config, CPU).model
    for parameter in model.network.linear_layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def generator():
    return torch.Generator().manual_seed(0)


def distance(moved, x0, norm):
    flat = (moved - x0).flatten(1)
    return flat.abs().amax(1) if norm == "linf" else flat.norm(dim=1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_on_a_linear_classifier_the_perturbation_is_the_worst_one(images, norm):
    config = attacking(images, adversarial=norm, adversarial_steps=10)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2, bias=False))
    network.num_classes = 2
    weight = torch.randn(64, generator=generator())
    with torch.no_grad():
        network[1].weight.copy_(torch.stack([-weight, weight]))
    x0 = 0.5 * (2 * torch.rand(8, 1, 8, 8, generator=generator()) - 1)
    label = torch.arange(8) % 2
    moved = perturbed(Classifier(network, NoiseSchedule.uniform(8)), x0, label, config, generator())
    budget = noise_of_inputs(BUDGET, 17)
    sign = (1.0 - 2 * label)[:, None]  # away from the label
    worst = sign * (weight.sign() if norm == "linf" else weight / weight.norm())
    towards = ((moved - x0).flatten(1) * worst).sum(1) / worst.square().sum(1)
    assert float(distance(moved, x0, norm).max()) <= budget * 1.0001
    assert float(towards.min()) > 0.95 * budget


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("objective", ["cdm", "classifier"])
def test_perturbed_images_stay_in_the_ball_and_are_worse(images, norm, objective):
    conditioning = "joint" if objective == "cdm" else "none"
    config = attacking(images, conditioning, adversarial=norm, objective=objective, adversarial_steps=8)
    model = new_state(config, CPU).model
    torch.nn.init.normal_(model.network.linear_layer.weight, std=0.3)
    batch = draw_batch(load_data(config.data.source), model, config, 0)
    without = replace(config, train=replace(config.train, adversarial="none", budget=0.0))
    plain = draw_batch(load_data(config.data.source), model, without, 0)
    assert plain.attacked is None and torch.equal(plain.x_t, batch.x_t)
    a, s = (table[batch.level].view(-1, 1, 1, 1) for table in (model.a, model.s))
    with_data = a.flatten() > 0.1
    x0 = ((batch.x_t - s * batch.eps) / a)[with_data]
    attacked, label = batch.attacked[with_data], batch.label.clamp(min=0)[with_data]
    budget = noise_of_inputs(BUDGET, 17)
    length = distance(attacked, x0, norm)
    assert float(length.max()) <= budget * 1.0001 and float(length.min()) > 0.3 * budget
    assert float(batch.attacked.abs().max()) <= 1
    assert batch.attacked.stride() == batch.x_t.stride()
    model.eval()
    before, after = (log_odds_against(model.log_class_posterior(x), label, label) for x in (x0, attacked))
    assert bool((after > before).all())
    again = draw_batch(load_data(config.data.source), model.train(), config, 0)
    assert torch.equal(again.attacked, batch.attacked) and model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_parts_are_attacked_one_by_one_and_alike(images):
    config = attacking(images)
    model = with_noise_in_its_head(config)
    data = load_data(config.data.source)
    whole = draw_batch(data, model, config, 0).attacked
    parts = replace(config, train=replace(config.train, accumulate=4))
    torch.testing.assert_close(draw_batch(data, model, parts, 0).attacked, whole)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_loss_adds_the_cross_entropy_of_the_attacked(images, rank):
    config = attacking(images, rank=rank, label_dropout=0.4)
    model = with_noise_in_its_head(config).eval()
    batch = draw_batch(load_data(config.data.source), model, config, 0)
    known = batch.label >= 0
    assert 0 < int(known.sum()) < len(known)
    log_posterior = model.log_class_posterior(batch.attacked)
    ce = -log_posterior.gather(1, batch.label.clamp(min=0)[:, None])[known].sum() / len(known)
    plain, weighted, default = (
        make_loss(replace(config.train, adversarial_weight=weight))(model, batch)
        for weight in (0.0, 0.7, None)
    )
    assert float(ce.detach()) > 0.1
    torch.testing.assert_close(weighted.loss - plain.loss, 0.7 * ce, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(default.loss - plain.loss, 0.01 * ce, rtol=1e-3, atol=1e-6)
    assert torch.equal(weighted.ce, plain.ce) and torch.equal(weighted.mse, plain.mse)


def test_a_classifier_learns_from_the_attacked_too(images):
    config = attacking(images, "none", objective="classifier")
    model = new_state(config, CPU).model.eval()
    batch = draw_batch(load_data(config.data.source), model, config, 0)
    ce = torch.nn.functional.cross_entropy(model.logits(batch.attacked), batch.label)
    for given, weight in ((0.5, 0.5), (None, 1.0)):
        terms = make_loss(replace(config.train, adversarial_weight=given))(model, batch)
        torch.testing.assert_close(terms.loss, terms.ce + weight * ce)


@pytest.mark.parametrize("own", [True, False])
def test_class_logits_are_the_posterior_up_to_a_constant(own):
    network = MLP(4, 12, hidden=8, depth=1, num_classes=3, conditioning="joint").double()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    schedule = NoiseSchedule.uniform(T=10)
    model = CDM(network, schedule)
    if not own:
        model = CDM(torch.nn.Sequential(network), schedule, None, (4,), torch.ones(3), "joint")
    x, level = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 0, 3, 7, 10])
    torch.testing.assert_close(
        model.class_logits(x, level).log_softmax(1), model.log_class_posterior(x, level)
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budget": 0.0}, "--adversarial linf needs --budget"),
        ({"adversarial": "none"}, "--budget 0.2 belongs to --adversarial"),
        ({"adversarial_steps": 0}, "--adversarial-steps is 0"),
        ({"budget": float("nan")}, "--budget is nan"),
        ({"adversarial_weight": -1.0}, "--adversarial-weight is -1.0"),
        (
            {"objective": "classifier", "classifier_noise": 0.5, "conditioning": "none"},
            "perturbs clean images",
        ),
        ({"conditioning": "embedding"}, "needs the classes of an image from one pass"),
    ],
)
def test_settings_that_do_not_fit_are_refused(images, changes, said):
    config = attacking(images)
    conditioning = changes.pop("conditioning", "joint")
    network = replace(config.network, conditioning=conditioning)
    with pytest.raises(UserError, match=said):
        check(replace(config, network=network, train=replace(config.train, **changes)))


def test_sharded_weights_cannot_be_attacked(images, monkeypatch):
    monkeypatch.setattr("cdm_fast.training.prepare.launched", lambda: object())
    with pytest.raises(UserError, match="--parallel fsdp does not go with --adversarial linf"):
        check_parallel(attacking(images), "fsdp")
