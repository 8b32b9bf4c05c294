"""Auto-PGD against classifiers whose margins are known, and against a search of the whole ball.

Pixels (n, 1, H, W), white being 1.
"""

import pytest
import torch

from cdm_fast import UserError
from cdm_fast.evaluation.apgd import (
    AutoPGD,
    Undetected,
    log_odds_against,
    misclassified,
    targeted_dlr,
)
from cdm_fast.evaluation.attack_methods import AutoAttack
from cdm_fast.evaluation.attacks import ClassLogLikelihoods, evaluate_attack
from cdm_fast.model.classifier import Classifier
from tests.test_classify import MODELS, SCHEDULE, SPREAD, classes, draw

BUDGETS = [0.02, 0.05, 0.1]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Linear:
    """Five classes of 12 pixels; their images lie far enough inside [0, 1] for the budgets."""

    def __init__(self, scale=1.0):
        self.w = torch.randn(5, 12, dtype=torch.float64, generator=generator()) * scale
        self.pixels = 0.2 + 0.6 * torch.rand(60, 1, 3, 4, dtype=torch.float64, generator=generator(1))
        self.labels = self(self.pixels).argmax(1)

    def __call__(self, pixels):
        return (pixels - 0.5).flatten(1).to(self.w) @ self.w.T

    def distance(self, norm):
        """(n,) of each image from the nearest plane between its class and another."""
        normals = self.w - self.w[self.labels][:, None]  # (n, 5, 12)
        length = normals.norm(dim=2) if norm == "l2" else normals.abs().sum(2)
        outputs = self(self.pixels)
        gap = outputs.gather(1, self.labels[:, None]) - outputs
        return (gap / length).scatter(1, self.labels[:, None], torch.inf).amin(1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    ("goal", "targeted", "scale"), [(log_odds_against, False, 50.0), (targeted_dlr, True, 1.0)]
)
def test_it_reaches_the_planes_of_a_linear_classifier_and_no_farther(norm, goal, targeted, scale):
    classifier = Linear(scale)
    attack = AutoPGD(goal, norm, 100, targeted=targeted)
    _, attacked, succeeded = attack(classifier, classifier.pixels, classifier.labels, BUDGETS)
    distance = classifier.distance(norm)
    for budget, images, done in zip(BUDGETS, attacked, succeeded, strict=True):
        moved = (images - classifier.pixels).flatten(1)
        length = moved.norm(dim=1) if norm == "l2" else moved.abs().amax(1)
        assert float(length.max()) <= budget * (1 + 1e-9)
        assert torch.equal(misclassified(classifier(images), classifier.labels), done)
        assert not bool(done[distance > budget * 1.0001].any())
        reachable = distance < budget * 0.98
        # Without a target the ascent may settle at the plane of another class, a little too far away.
        assert float(done[reachable].double().mean()) >= (1.0 if targeted else 0.85)


def test_a_sure_classifier_is_attacked_as_well_as_a_doubtful_one():
    """With outputs thousands of nats apart, the fp32 cross-entropy and its gradient are exactly 0."""
    found = []
    for scale in (1.0, 1e4):
        classifier = Linear(scale)
        classifier.w = classifier.w.float()
        pixels = classifier.pixels.float()
        _, _, succeeded = AutoPGD(log_odds_against, "linf", 50)(
            classifier, pixels, classifier.labels, BUDGETS
        )
        found.append(succeeded.double().mean(1))
    assert bool((found[1] >= found[0] - 0.02).all()), found
    outputs = Linear(1e4)(Linear().pixels).float().requires_grad_()
    cross_entropy = torch.nn.functional.cross_entropy(outputs, Linear().labels)
    (gradient,) = torch.autograd.grad(cross_entropy, outputs)
    assert float(gradient.abs().max()) == 0


def test_log_odds_rise_along_the_gradient_of_the_cross_entropy():
    outputs = torch.randn(20, 4, dtype=torch.float64, generator=generator(), requires_grad=True)
    label = torch.arange(20) % 4
    cross_entropy = torch.nn.functional.cross_entropy(outputs, label, reduction="none")
    odds = log_odds_against(outputs, label, label)
    assert torch.allclose(torch.nn.functional.softplus(odds), cross_entropy)
    (of_ce,) = torch.autograd.grad(cross_entropy.sum(), outputs, retain_graph=True)
    (of_odds,) = torch.autograd.grad(odds.sum(), outputs)
    torch.testing.assert_close(
        of_ce / of_ce.norm(dim=1, keepdim=True), of_odds / of_odds.norm(dim=1, keepdim=True)
    )


def test_dlr_by_hand_and_blind_to_shift_and_scale():
    outputs = torch.tensor([[4.0, 3.0, 1.0, 0.0]], dtype=torch.float64)
    label, target = torch.tensor([0]), torch.tensor([2])
    assert float(targeted_dlr(outputs, label, target)) == pytest.approx((1 - 4) / (4 - 0.5))
    assert torch.allclose(
        targeted_dlr(100 * outputs + 7, label, target), targeted_dlr(outputs, label, target)
    )
    assert float(targeted_dlr(outputs[:, :3], label, target)) == pytest.approx(1 - 4)


def test_it_ends_at_the_maximum_inside_the_ball():
    """A goal that is largest at a point of the ball: halved steps come to rest there, fixed ones cannot."""
    target = torch.full((20, 1, 3, 4), 0.51, dtype=torch.float64)
    start = target + 0.04 * (2 * torch.rand(target.shape, dtype=torch.float64, generator=generator()) - 1)

    def outputs(pixels):
        return torch.stack([torch.zeros(len(pixels)), -(pixels - 0.51).abs().flatten(1).sum(1)], dim=1)

    nearest = []
    for steps in (10, 100):
        attack = AutoPGD(lambda outputs, label, target: outputs[:, 1], "linf", steps, success=never)
        _, attacked, _ = attack(outputs, start, torch.zeros(20, dtype=torch.int64), [0.05])
        nearest.append(float((attacked[0] - target).abs().mean()))
    assert nearest[1] < 0.002 < nearest[0]


def never(outputs, label):
    return torch.zeros(len(label), dtype=torch.bool)


def test_attacks_in_turn_see_only_those_that_withstood_the_ones_before():
    seen = []

    def part(first):
        def attack(classifier, x, label, epsilons):
            seen.append(len(x))
            wrong = torch.arange(len(x)) < first
            return None, [x + 1], wrong[None]

        return attack

    x, label = torch.zeros(10, 1, 1, 1), torch.zeros(10, dtype=torch.int64)
    both = AutoAttack({"one": part(3), "other": part(4)})
    after, attacked, fooled = both(lambda pixels: pixels, x, label, [0.1, 0.2])
    assert seen == [10, 7, 10, 7]
    assert after.shape == (2, 2, 10) and after.double().sum(2).tolist() == [[3, 3], [7, 7]]
    assert torch.equal(fooled, after[-1])
    assert attacked[0].flatten().tolist() == [1] * 10


def test_the_strongest_attack_is_never_weaker_than_its_parts():
    data, budgets = draw(classes(), 40), (0.02, 0.05)
    model = MODELS["joint"](classes())
    options = {"num_images": 40, "steps": 20}
    auto = evaluate_attack(model, data, "auto", "linf", budgets, **options)
    assert list(auto.accuracy_after) == ["apgd-ce", "apgd-t", "square"]
    assert auto.accuracy_after["square"] == auto.accuracy
    for part in ("apgd-ce", "apgd-t"):
        alone = evaluate_attack(model, data, part, "linf", budgets, **options)
        assert alone.accuracy_after is None
        assert all(a <= b for a, b in zip(auto.accuracy, alone.accuracy, strict=True))
    in_l2 = evaluate_attack(model, data, "auto", "l2", budgets, **options)
    assert list(in_l2.accuracy_after) == ["apgd-ce", "apgd-t"]


def test_an_attack_on_class_and_detector_finds_what_a_search_of_the_ball_finds():
    """Two pixels: every point of the L-inf ball on a fine grid tells whether an undetected change exists."""
    density = classes()
    data, budget = draw(density, 40), 0.08
    classifier = ClassLogLikelihoods(MODELS["joint"](density), 256)
    pixels = data.images.double() / 255
    threshold = float(classifier(pixels).logsumexp(1).median()) - 4
    both = Undetected(threshold)
    attack = AutoPGD(both.goal, "linf", 100, targeted=True, success=both.success)
    _, attacked, succeeded = attack(classifier, pixels, data.labels, [budget])
    assert bool(both.success(classifier(attacked[0]), data.labels)[succeeded[0]].all())
    axis = torch.linspace(-budget, budget, 81, dtype=torch.float64)
    offsets = torch.cartesian_prod(axis, axis).view(-1, 1, 1, 2)
    exists = []
    for image, label in zip(pixels, data.labels, strict=True):
        points = (image + offsets).clamp(0, 1)
        exists.append(bool(both.success(classifier(points), label.expand(len(points))).any()))
    exists = torch.tensor(exists)
    assert 0.1 < float(exists.double().mean()) < 0.9
    assert int((exists != succeeded[0]).sum()) <= 2, (exists, succeeded)


def test_an_undetected_attack_evades_the_detector_that_catches_others():
    """A large budget takes other attacks off the data; this one stays on it."""
    data, model = draw(classes(), 60), MODELS["joint"](classes())
    options = {"num_images": 60, "steps": 50}
    plain = evaluate_attack(model, data, "fgsm", "linf", (0.4,), **options)
    evading = evaluate_attack(model, data, "apgd-undetected", "linf", (0.4,), **options)
    assert evading.undetected[0] > plain.undetected[0] + 0.2
    assert evading.detection_auroc[0] < plain.detection_auroc[0]
    assert evading.false_alarms == 0.05


def test_a_classifier_has_no_detector_to_evade():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(2, 2))
    network.num_classes = 2
    model = Classifier(network, SCHEDULE)
    with pytest.raises(UserError, match="apgd-undetected evades a detector"):
        evaluate_attack(model, draw(classes(), 8), "apgd-undetected", num_images=8)
    report = evaluate_attack(model, draw(classes(), 8), "apgd-ce", num_images=8, steps=3)
    assert report.undetected is report.false_alarms is report.detection_auroc is None


def test_outputs_averaged_over_dequantisation_draws_have_their_closed_form():
    """`E log p(x + u | c) = log p(x | c) - d w^2 / (24 s^2)` for u uniform of width w in each of d pixels."""
    density = classes()
    data, model = draw(density, 6), MODELS["joint"](density)
    pixels = data.images.double() / 255
    centre = ClassLogLikelihoods(model, 256)(pixels)
    coarse = 16  # wide intervals, so that the noise matters
    fixed = ClassLogLikelihoods(model, coarse)(pixels)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mean = ClassLogLikelihoods(model, coarse, draws=40_000)(pixels)
    width = 2 / coarse
    expected = fixed - 2 * width**2 / (24 * SPREAD**2)
    torch.testing.assert_close(mean, expected, rtol=0.01, atol=0.02)
    assert not torch.allclose(centre, mean)


def test_an_attack_over_draws_is_judged_by_new_ones():
    data, model = draw(classes(), 30), MODELS["joint"](classes())
    report = evaluate_attack(model, data, "auto", "linf", (0.05,), num_images=30, steps=10, draws=2)
    without = evaluate_attack(model, data, "auto", "linf", (0.05,), num_images=30, steps=10)
    assert report.draws == 2 and report.accuracy_after is None
    assert report.accuracy[0] == pytest.approx(without.accuracy[0], abs=0.1)  # 1/256 of noise hardly matters
    with pytest.raises(UserError, match="attack draws"):
        evaluate_attack(model, data, "pgd", draws=-1)
