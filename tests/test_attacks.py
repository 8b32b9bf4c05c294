"""Attacks on classes with a known margin: two isotropic Gaussians separated by a plane."""

import sys

import numpy as np
import pytest
import torch

from cdm_fast import CDM, MLP, NoiseSchedule, UserError
from cdm_fast.cli.describe import describe_attack
from cdm_fast.data import dequantize
from cdm_fast.data.pixels import from_brightness
from cdm_fast.evaluation.attacks import ClassLogLikelihoods, evaluate_attack
from cdm_fast.evaluation.square_attack import square_side
from cdm_fast.model.classifier import Classifier
from cdm_fast.statistics import auroc
from tests.test_classify import MODELS, SCHEDULE, SPREAD, classes, draw, train
from tests.test_cli import call, call_json

pytest.importorskip("foolbox")
GREY = 256


@pytest.fixture(scope="module")
def joint(tmp_path_factory):
    return train(tmp_path_factory.mktemp("joint"), "--conditioning", "joint")


def margins(data):
    """(n,) distance of each image from the plane, in units of white; negative on the wrong side."""
    x = (data.images.double().flatten(1) + 0.5) * (2 / GREY) - 1
    sign = 2.0 * data.labels - 1
    return sign * x.sum(1) / 2**0.5 * GREY / (2 * (GREY - 1))


@pytest.mark.parametrize("conditioning", MODELS)
def test_the_module_is_bayes_rule_and_its_gradient_exact(conditioning):
    density = classes((0.7, 0.3))
    data = draw(density, 20)
    classifier = ClassLogLikelihoods(MODELS[conditioning](density), GREY)
    pixels = (data.images.double() / (GREY - 1)).requires_grad_()
    got = classifier(pixels)
    x = ((pixels.detach() * (GREY - 1) + 0.5) * (2 / GREY) - 1).flatten(1)
    each = density.components_log_prob(x, SCHEDULE.a[:1], SCHEDULE.s[:1])[:, 0] + density.weights.log()
    torch.testing.assert_close(got, each)
    (gradient,) = torch.autograd.grad(got[:, 1].sum(), pixels)
    wanted = (density.means[1] - x) / SPREAD**2 * (2 * (GREY - 1) / GREY)
    torch.testing.assert_close(gradient.flatten(1), wanted)


@pytest.mark.parametrize("pixel_map", ["intervals", "points"])
@pytest.mark.parametrize("grey", [2, 17, 256])
def test_brightness_is_mapped_to_the_middle_of_its_grey_levels_interval(grey, pixel_map):
    levels = torch.arange(grey).to(torch.uint8).view(1, 1, 1, -1)
    brightness = levels.double() / (grey - 1)
    x = from_brightness(brightness, grey, pixel_map)
    middle = dequantize(levels, grey, torch.full(levels.shape, 0.5), pixel_map)
    torch.testing.assert_close(x, middle.double(), rtol=0, atol=1e-6)
    assert x.dtype == torch.float64
    torch.testing.assert_close(from_brightness(255 * brightness, grey, pixel_map, white=255), x)


@pytest.mark.parametrize("conditioning", ["joint", "embedding"])
def test_gradients_of_a_network_are_those_of_finite_differences(conditioning):
    schedule = NoiseSchedule.uniform(T=10)
    network = MLP(4, 12, hidden=8, depth=1, num_classes=3, conditioning=conditioning).double()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    classifier = ClassLogLikelihoods(CDM(network, schedule), 17).eval()
    pixels = torch.rand(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(classifier, pixels)


@pytest.mark.parametrize(
    ("attack", "norm"),
    [
        ("fgsm", "linf"),
        ("fgsm", "l2"),
        ("pgd", "linf"),
        ("pgd", "l2"),
        ("deepfool", "linf"),
        ("deepfool", "l2"),
        ("cw", "l2"),
        ("square", "linf"),
        ("apgd-ce", "linf"),
        ("apgd-ce", "l2"),
        ("apgd-t", "linf"),
        ("apgd-t", "l2"),
        ("auto", "linf"),
    ],
)
def test_accuracy_falls_as_the_margins_say(attack, norm):
    """A budget e moves an image by e towards the plane in l2, and by e sqrt(2) in L-inf."""
    density = classes()
    data, budgets = draw(density, 60), (0.02, 0.05, 0.1)
    report = evaluate_attack(
        MODELS["joint"](density),
        data,
        attack,
        norm,
        budgets,
        num_images=60,
        steps={"cw": 40, "square": 60, "auto": 20}.get(attack),
    )
    reach = torch.tensor(budgets) * (2**0.5 if norm == "linf" else 1)
    wanted = (margins(data) > reach[:, None]).double().mean(1)
    # An image whose margin is within a hundredth of the reach may fall on either side.
    near = (margins(data) / reach[:, None] - 1).abs().lt(0.01).sum(1) / 60
    # C&W searches for a constant: it may stay a few per cent short of the least perturbation.
    slack = 0.04 if attack == "cw" else 1e-6
    assert report.clean_accuracy == pytest.approx(float((margins(data) > 0).double().mean()))
    for got, expected, either in zip(report.accuracy, wanted.tolist(), near.tolist(), strict=True):
        assert abs(got - expected) <= either + slack, report
    assert report.accuracy[0] > report.accuracy[-1]


def test_attack_leaves_model_and_random_numbers_alone():
    schedule = NoiseSchedule.uniform(T=10)
    network = MLP(2, 12, hidden=8, depth=1, num_classes=2, conditioning="joint")
    model = CDM(
        torch.nn.Sequential(torch.nn.Flatten(), network),
        schedule,
        (torch.ones(12)),
        (1, 1, 2),
        class_prior=torch.ones(2),
        conditioning="joint",
    ).train()
    before = torch.get_rng_state()
    first = evaluate_attack(model, draw(classes(), 8), "pgd", budgets=(0.1,), num_images=8, steps=3)
    assert torch.equal(before, torch.get_rng_state()) and model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    again = evaluate_attack(model, draw(classes(), 8), "pgd", budgets=(0.1,), num_images=8, steps=3)
    assert first.accuracy == again.accuracy and first.detection_auroc == again.detection_auroc


# The second is so sure that in fp32 a class has probability 1; nothing but its logit has a gradient.
@pytest.mark.parametrize("weight", [[[-9.0, -9.0], [9.0, 9.0]], [[-400.0, -400.0], [0.0, 0.0]]])
def test_a_classifier_is_attacked_and_detects_nothing(weight):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(2, 2))
    network.num_classes = 2
    with torch.no_grad():  # the plane that parts the classes
        network[1].weight.copy_(torch.tensor(weight))
        network[1].bias.zero_()
    data, budgets = draw(classes(), 40), (0.02, 0.1)
    report = evaluate_attack(Classifier(network, SCHEDULE), data, "pgd", budgets=budgets, num_images=40)
    wanted = (margins(data) > torch.tensor(budgets)[:, None] * 2**0.5).double().mean(1)
    torch.testing.assert_close(torch.tensor(report.accuracy).double(), wanted, rtol=0, atol=1 / 40 + 1e-9)
    assert report.detection_auroc is None and "AUROC" not in "".join(describe_attack(report))


def test_an_attack_carried_over_is_judged_by_the_model_it_meets():
    """Images that cross the surrogate's plane by a lot cross this one too; a blind surrogate's do nothing."""
    model, data = MODELS["joint"](classes()), draw(classes(), 40)
    own = evaluate_attack(model, data, "pgd", budgets=(0.05,), num_images=40)
    same = evaluate_attack(model, data, "pgd", budgets=(0.05,), num_images=40, surrogate=model)
    assert same.transferred and not own.transferred and same.accuracy == own.accuracy
    blind = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(2, 2).double())
    blind.num_classes = 2
    torch.nn.init.zeros_(blind[1].weight)
    nothing = Classifier(blind, SCHEDULE)
    spared = evaluate_attack(model, data, "fgsm", budgets=(0.05,), num_images=40, surrogate=nothing)
    assert spared.accuracy[0] == spared.clean_accuracy > own.accuracy[0]


@pytest.mark.parametrize(("progress", "side"), [(0.0, 7), (0.5, 1), (0.03, 3), (0.9, 1)])
def test_squares_shrink(progress, side):
    """sqrt(0.8 x 64), sqrt(0.8 / 2^7 x 64) < 1, sqrt(0.1 x 64): the paper's halvings."""
    assert square_side(progress, 8, 8) == side


def test_auroc_counts_pairs():
    assert auroc(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.0])) == pytest.approx(3 / 4)
    assert auroc(torch.tensor([1.0]), torch.tensor([1.0])) == pytest.approx(0.5)


def test_log_p_tells_images_pushed_off_the_data():
    """A budget that reaches far outside both classes lowers log p(x) of nearly every image."""
    report = evaluate_attack(
        MODELS["joint"](classes()), draw(classes(), 40), "fgsm", budgets=(0.01, 0.45), num_images=40
    )
    assert abs(report.detection_auroc[0] - 0.5) < 0.05 and report.detection_auroc[1] > 0.8
    told = describe_attack(report)
    assert "fgsm in linf" in told[0] and "AUROC" in told[1] and "5 % of the clean" in told[3]


def test_json_of_an_attacked_run(joint):
    found = call_json(
        "classify", joint, "--attack", "fgsm", "--attack-images", "6", "--budgets", "0.1", "0.3"
    )
    attack = found["attack"]
    assert attack["attack"] == "fgsm" and attack["budgets"] == [0.1, 0.3] and attack["num_images"] == 6
    assert len(attack["accuracy"]) == len(attack["detection_auroc"]) == 2
    assert np.isfinite(attack["accuracy_stderr"]).all()
    assert (joint / "attack.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--attack", "cw"], "--attack-norm l2"),
        (["--attack", "square", "--attack-norm", "l2"], "--attack-norm linf"),
        (["--attack", "auto", "--attack-draws", "-1"], "--attack-draws is -1"),
        (["--attack", "pgd", "--budgets", "0"], "budget 0.0"),
        (["--attack", "pgd", "--attack-steps", "0"], "attack steps is 0"),
        (["--attack", "pgd", "--attack-images", "1"], "1 images to attack"),
        (["--attack", "pgd", "--method", "ode"], "--attack needs the gradient of logits"),
    ],
)
def test_bad_flags_are_one_line(joint, flags, told):
    status, out, err = call("classify", joint, *flags)
    assert status == 2 and out == "" and told in err.splitlines()[-1]


def test_missing_foolbox_is_one_line(joint, monkeypatch):
    monkeypatch.setitem(sys.modules, "foolbox", None)
    status, _, err = call("classify", joint, "--attack", "pgd")
    assert status == 2 and 'pip install "cdm_fast[attacks]"' in err and err.count("\n") == 1
    # Those written here need nothing.
    found = call_json("classify", joint, "--attack", "auto", "--attack-images", "4", "--attack-steps", "2")
    assert list(found["attack"]["accuracy_after"]) == ["apgd-ce", "apgd-t", "square"]


@pytest.mark.parametrize(("attack", "norm"), [("guess", "linf"), ("pgd", "l1")])
def test_unknown_names_are_refused(attack, norm):
    with pytest.raises(UserError, match="unknown"):
        evaluate_attack(MODELS["joint"](classes()), draw(classes(), 4), attack, norm)


def test_an_empty_batch_is_refused():
    with pytest.raises(UserError, match="batch_size is 0"):
        evaluate_attack(MODELS["joint"](classes()), draw(classes(), 4), "fgsm", num_images=4, batch_size=0)
