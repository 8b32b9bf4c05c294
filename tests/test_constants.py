"""Refitted constants of logits: planted errors are found, for every head, and runs keep them."""

import json
import math

import pytest
import torch

from cdm_fast import CDM, UserError
from cdm_fast.data import ImageData
from cdm_fast.model.constants import (
    Compared,
    Rows,
    compare_classes,
    error_root,
    fit_shift,
    newton_step,
)
from cdm_fast.nn.heads import CumulativeHead, JointHead, LowRankHead, noise_head
from cdm_fast.runs.constants import put_constants
from cdm_fast.runs.load import load
from cdm_fast.training import constants as module
from cdm_fast.training.constants import class_basis, refit_constants, shift_rows
from tests.test_calibration import CLASSES, DIM, SCHEDULE, GaussianPixels, T, exact, pixels
from tests.test_cli import call_json
from tests.tiny_run import FLAGS, write_images

GENERATOR = torch.Generator().manual_seed(3)
PLANTED = torch.randn(T + 2, dtype=torch.float64, generator=GENERATOR).cumsum(0)
PLANTED -= PLANTED[-1].clone()
X = torch.randn(6, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
VARIANCES = torch.tensor([0.01, 0.05, 0.2, 0.2], dtype=torch.float64)  # of three classes; of the null class


class GaussianByClass(GaussianPixels):
    """The exact level classifier given each class of zero-mean Gaussian pixels, but for planted constants."""

    def __init__(self, planted):  # (K+1, L)
        super().__init__(torch.zeros(T + 2, dtype=torch.float64), "embedding")
        self.num_classes = CLASSES
        variance = SCHEDULE.a[:, None] ** 2 * VARIANCES + SCHEDULE.s[:, None] ** 2  # (L, K+1)
        weight = torch.cat([-0.5 / variance, -DIM / 2 * variance.log() + planted.T], dim=1)
        self.linear_layer = noise_head(2 * (CLASSES + 1), T + 2, None, "embedding").double()
        with torch.no_grad():
            self.linear_layer.weight.copy_(weight.diff(dim=0, prepend=torch.zeros(1, weight.shape[1])))
            self.linear_layer.bias.zero_()

    def features(self, x, label=None, keep_residuals=True):
        label = torch.full((len(x),), -1) if label is None else label
        one_hot = torch.nn.functional.one_hot(label % (CLASSES + 1), CLASSES + 1).to(x)
        return torch.cat([x.square().flatten(1).sum(1, keepdim=True) * one_hot, one_hot], dim=1), x


def images_by_class(num=3000, grey=256):
    label = torch.arange(num) % CLASSES
    scale = VARIANCES[label].sqrt().view(-1, 1, 1, 1)
    x = scale * torch.randn(num, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    images = ((x.clamp(-0.999, 0.999) + 1) * grey / 2).floor().to(torch.uint8)
    return ImageData(images, label, grey, CLASSES, name="gaussians", split="train")


def log_normal_of_class(x, c):
    variance = SCHEDULE.a**2 * VARIANCES[c] + SCHEDULE.s**2
    square = x.square().flatten(1).sum(1, keepdim=True)
    return -0.5 * (square / variance + DIM * (2 * math.pi * variance).log())


@pytest.mark.parametrize("conditioning", ["embedding", "joint"])
@pytest.mark.parametrize("uneven", [False, True], ids=["uniform", "uneven"])
def test_constants_of_levels_and_pairs_are_found(conditioning, uneven):
    prior = 1 + (torch.arange(T + 2) % 3) if uneven else torch.ones(T + 2)
    model = CDM(GaussianPixels(PLANTED + prior.double().log(), conditioning), SCHEDULE, level_prior=prior)
    if conditioning == "joint":
        spoiled = torch.randn(
            model.network.linear_layer.out_features, dtype=torch.float64, generator=GENERATOR
        )
        model.network.linear_layer.shift_each(torch.cat([spoiled[:-1], torch.zeros(1)]))
    before, weights = model.log_prob_levels(X) - exact(X), model.network.linear_layer.bias.clone()
    assert before.abs().max() > 1
    found = refit_constants(model, pixels(3000), 40_000)
    assert torch.equal(model.network.linear_layer.bias, weights)  # the model itself is unchanged
    score = model.score(X, torch.full((6,), 7)) if conditioning == "embedding" else None
    put_constants(model, found)
    assert torch.allclose(model.log_prob_levels(X), exact(X), atol=0.15)
    assert (model.log_prob_levels(X)[:, -1] - exact(X)[:, -1]).abs().max() < 1e-9  # pure noise is exact
    if conditioning == "joint":
        assert torch.allclose(model.log_prob_classes(X, 0), exact(X)[:, :1].expand(-1, CLASSES), atol=0.3)
    else:
        assert torch.equal(model.score(X, torch.full((6,), 7)), score)


def test_constants_given_each_class_of_an_embedding():
    planted = torch.randn(CLASSES + 1, T + 2, dtype=torch.float64, generator=GENERATOR).cumsum(1)
    planted -= planted[:, -1:].clone()
    data, model = images_by_class(), CDM(GaussianByClass(planted), SCHEDULE)
    test = images_by_class(600)
    x = (test.images + 0.5).double() * 2 / 256 - 1
    wrong = (model.classify(x) == test.labels).double().mean()
    found = refit_constants(model, data, 60_000, null_class=False)
    put_constants(model, found)
    for c in range(CLASSES):
        given = model.log_prob_levels(X, label=torch.full((6,), c))
        assert torch.allclose(given, log_normal_of_class(X, c), atol=0.2)
    bayes = torch.stack([log_normal_of_class(x, c)[:, 0] for c in range(CLASSES)], 1).argmax(1)
    best = (bayes == test.labels).double().mean()
    assert (model.classify(x) == test.labels).double().mean() > best - 0.02 and wrong < best - 0.1
    assert torch.allclose(model.log_prob_levels(X), log_normal_of_class(X, 3) + planted[3])  # left alone


@pytest.mark.parametrize(
    "head",
    [CumulativeHead(5, 7), JointHead(5, 7, 4), LowRankHead(5, 7, 4, rank=2), LowRankHead(5, 7, 4, rank=5)],
    ids=["levels", "joint", "rank 2", "rank 5"],
)
def test_the_equations_hold_after_the_fit(head):
    """Summed over rows, the posteriors of what each constant moves are the rows that belong to it."""
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    classes = getattr(head, "num_classes", 1)

    class Model:
        schedule, joint_classes = type("S", (), {"num_levels": 7}), classes

    basis, h = class_basis(head, Model), torch.randn(4000, 5, generator=GENERATOR)
    own = torch.distributions.Categorical(logits=0.3 * head(h).detach()).sample()
    shift = fit_shift(lambda num: iter([Rows(head(h).detach()[:num], own[:num])]), 4000, basis, 4000).shift
    before = head(h).detach()
    shift_rows(head, shift)
    added = torch.cat([(shift @ basis.T).flatten(), torch.zeros(1)])
    torch.testing.assert_close(head(h).detach() - before, added.float().expand_as(before), atol=1e-4, rtol=0)
    excess = torch.bincount(own, minlength=before.shape[1]) - head(h).detach().softmax(1).sum(0)
    assert ((excess[:-1].view(6, classes).double() @ basis).abs() < 0.1).all()


def test_a_newton_step_is_that_of_autograd():
    basis = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, -2.0]], dtype=torch.float64)
    logits = torch.randn(200, 4 * 3 + 1, dtype=torch.float64, generator=GENERATOR)
    own = torch.randint(13, (200,), generator=GENERATOR)

    def loss(shift):
        added = torch.cat([(shift.view(4, 2) @ basis.T).flatten(), torch.zeros(1, dtype=torch.float64)])
        return torch.nn.functional.cross_entropy(logits + added, own, reduction="sum")

    start = 0.1 * torch.randn(8, dtype=torch.float64, generator=GENERATOR)
    gradient = torch.func.grad(loss)(start)
    step = -torch.linalg.solve(torch.func.hessian(loss)(start), gradient).view(4, 2)
    found = newton_step([Rows(logits, own)], start.view(4, 2), basis)
    scale = float(found.norm() / step.norm())  # the step is shortened if it is long
    torch.testing.assert_close(found, scale * step)
    assert 0 < scale <= 1 + 1e-9


def test_the_errors_of_a_fit_are_those_of_fits_to_other_rows():
    """Levels of a Gaussian in 30 dimensions, which hardly overlap, so that the errors add up."""
    sigma, num, dim = torch.tensor([1.0, 1.3, 1.7, 2.2, 2.9], dtype=torch.float64), 500, 30
    one = torch.ones(1, 1, dtype=torch.float64)

    def fit():
        own = torch.arange(num) % 5
        x = sigma[own, None] * torch.randn(num, dim, dtype=torch.float64, generator=GENERATOR)
        square = x.square().sum(1, keepdim=True)
        logits = -0.5 * (square / sigma**2 + dim * (sigma**2).log())
        return fit_shift(lambda _: iter([Rows(logits, own)]), num, one, num)

    fits = [fit() for _ in range(400)]
    found = torch.cat([each.shift for each in fits], 1)  # (4, 400), zero but for errors
    expected = sum(error_root(each, num) @ error_root(each, num).T for each in fits[:50]) / 50
    assert expected[0, 0] > 2 * expected[3, 3] > 0
    scale = expected.diagonal().sqrt()
    assert ((found @ found.T / 400 - expected) / scale.outer(scale)).abs().max() < 0.25
    root, ((logits, own),) = error_root(fits[0], num), fits[0].stored

    def loss(shift):
        return torch.nn.functional.cross_entropy(
            logits + torch.cat([shift, shift.new_zeros(1)]), own, reduction="sum"
        )

    curvature = torch.func.hessian(loss)(fits[0].shift[:, 0])
    posterior = (logits + torch.cat([fits[0].shift[:, 0], torch.zeros(1)])).softmax(1)[:, :-1]
    gradient = sum(99 * posterior[own == t].T.cov() for t in range(5))
    torch.testing.assert_close(curvature @ root @ root.T @ curvature, gradient)
    torch.testing.assert_close(error_root(fits[0], 4 * num), root / 2)


def test_compared_classes_are_at_the_maximum():
    shift, root = torch.randn(3, 6, generator=GENERATOR).double(), torch.randn(3, 6, 6, generator=GENERATOR)
    root = root.double() + 2 * torch.eye(6)
    level, own = torch.arange(600) % 6, torch.randint(3, (600,), generator=GENERATOR)
    score = 2 * torch.randn(600, 3, generator=GENERATOR)
    found = compare_classes(shift, root, Compared(score, level, own)).requires_grad_()
    joined = score + found[:, level].T
    error = torch.linalg.solve(root, (found - shift)[:, :, None])
    loss = torch.nn.functional.cross_entropy(joined, own, reduction="sum") + error.square().sum() / 2
    (gradient,) = torch.autograd.grad(loss, found)
    assert gradient.abs().max() < 1e-2 and (found - shift).abs().max() > 0.1
    with torch.inference_mode():
        again = compare_classes(shift.clone(), root.clone(), Compared(score, level, own))
    torch.testing.assert_close(again, found.detach())


def test_many_pairs_share_the_constant_of_their_level(monkeypatch):
    monkeypatch.setattr(module, "MOST_CONSTANTS", 50)
    model = CDM(GaussianPixels(PLANTED, "joint"), SCHEDULE)
    put_constants(model, refit_constants(model, pixels(2000), 20_000))
    assert torch.allclose(model.log_prob_levels(X), exact(X), atol=0.2)


def test_rows_beyond_the_store_take_part_in_a_last_step(monkeypatch):
    monkeypatch.setattr(module, "STORED", 4000 * (T + 2))
    model = CDM(GaussianPixels(PLANTED, "embedding"), SCHEDULE)
    put_constants(model, refit_constants(model, pixels(3000), 40_000))
    assert torch.allclose(model.log_prob_levels(X), exact(X), atol=0.15)


def test_too_few_rows_are_refused():
    model = CDM(GaussianPixels(PLANTED, "embedding"), SCHEDULE)
    with pytest.raises(UserError, match="400 rows for 41 constants: give 10 or more"):
        refit_constants(model, pixels(), 400)


@pytest.mark.parametrize("conditioning", ["none", "joint", "embedding"])
def test_a_run_keeps_its_constants_and_gives_them_up(tmp_path, conditioning):
    data, run = write_images(tmp_path / "images.npz"), tmp_path / "run"
    flags = [*FLAGS, "--conditioning", conditioning, "--constants-rows", "2000", "--device", "cpu"]
    call_json("train", "--data", data, "--out", run, *flags)
    x, label = torch.rand(2, 1, 8, 8) * 2 - 1, torch.tensor([0, 2]) if conditioning != "none" else None
    fitted, plain = load(run), load(run, constants=False)
    assert not torch.allclose(
        fitted.log_prob_levels(x, label=label), plain.log_prob_levels(x, label=label), atol=1e-3
    )
    assert torch.equal(load(run, weights="raw").log_prob_levels(x), load(run, "raw").log_prob_levels(x))
    call_json("calibrate", run, "--method", "constants", "--undo")
    assert torch.equal(load(run).log_prob_levels(x, label=label), plain.log_prob_levels(x, label=label))
    found = call_json("calibrate", run, "--method", "constants", "--rows", "2000", "--device", "cpu")
    assert found["after"]["level_ce"] < found["before"]["level_ce"] or conditioning == "embedding"
    torch.testing.assert_close(
        load(run).log_prob_levels(x, label=label), fitted.log_prob_levels(x, label=label)
    )
    stored = json.loads((run / "constants.json").read_text())
    (run / "constants.json").write_text(json.dumps({**stored, "weights": "0" * 64}))
    with pytest.warns(UserWarning, match="other weights"):
        assert torch.equal(load(run).log_prob_levels(x, label=label), plain.log_prob_levels(x, label=label))
    (run / "constants.json").write_text("{")
    with pytest.raises(UserError, match=r"constants.json cannot be read"):
        load(run)
