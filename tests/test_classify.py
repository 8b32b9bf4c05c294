"""Classification by likelihood: closed-form classes with a known Bayes accuracy, calibration, the command.

K classes of flat "images" (1, H, W); a class is a Gaussian with its own mean.
"""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.support.analytic import Density, ExactDenoiser, ExactNetwork, GaussianMixture
from cdm_fast import CDM, NoiseSchedule, UserError
from cdm_fast.cli.describe import describe_corruptions
from cdm_fast.data import ImageData, write_image
from cdm_fast.data.corruptions import KINDS
from cdm_fast.evaluation.classification import evaluate_classes
from cdm_fast.evaluation.robustness import evaluate_corruptions
from cdm_fast.model.classifier import Classifier
from cdm_fast.model.losses import Noised, noised_classifier_loss
from cdm_fast.statistics import confusion_matrix, reliability
from tests.test_cli import call, call_json
from tests.test_joint import ExactJoint
from tests.tiny_run import CLASSES, FLAGS, write_images

SCHEDULE = NoiseSchedule.uniform(T=40)
CLEAN = SCHEDULE.a[:1], SCHEDULE.s[:1]
SPREAD, DISTANCE = 0.25, 0.25  # two classes with means -+ DISTANCE / 2 along the diagonal
# One dequantised pixel stands for a coordinate; 256 grey levels add nothing to see to a spread of 0.25.
BAYES = 0.5 * (1 + math.erf(DISTANCE / 2 / SPREAD / math.sqrt(2)))


def classes(weights=(0.5, 0.5)) -> GaussianMixture:
    """Two round Gaussians on the plane, `DISTANCE` apart."""
    means = torch.tensor([[-1.0, -1.0], [1.0, 1.0]]) * DISTANCE / 2 / math.sqrt(2)
    return GaussianMixture(torch.tensor(weights), means, SPREAD**2 * torch.eye(2).expand(2, 2, 2))


def draw(density: GaussianMixture, num: int, seed: int = 0) -> ImageData:
    """Images (1, 1, 2) drawn from the classes, on 256 grey levels."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.multinomial(density.weights, num, replacement=True, generator=generator)
    noise = torch.randn(num, 2, dtype=torch.float64, generator=generator)
    x = density.means[label] + SPREAD * noise
    images = ((x + 1) * 128).floor().clamp(0, 255).to(torch.uint8).view(num, 1, 1, 2)
    return ImageData(images, label, 256, 2, "gaussians", "test")


class Flattened(torch.nn.Module):
    """A network of vectors, fed images."""

    def __init__(self, network, **attributes):
        super().__init__()
        self.inner = network
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x, *label):
        return self.inner(x.flatten(1), *label)


class FlatDenoiser(ExactDenoiser):
    """The exact denoiser of a mixture whose label asks for a component, fed images."""

    def __init__(self, density: Density, schedule: NoiseSchedule) -> None:
        super().__init__(density, schedule)
        self.network.num_classes = len(density.weights)

    def denoise(self, x, level, label=None):
        flat, levels = x.flatten(1), self.schedule.levels(level, x)
        result = torch.zeros_like(flat)
        for t in levels.unique().tolist():
            for c in label.unique().tolist():
                chosen = (levels == t) & (label == c)
                component = self.network.component(c)
                score = component.score(flat, float(self.a[t]), float(self.s[t]))
                result = torch.where(chosen[:, None], -float(self.s[t]) * score, result)
        return result.view(x.shape)


def joint_model(density):
    network = Flattened(
        ExactJoint(density, torch.ones(SCHEDULE.num_levels), SCHEDULE), conditioning="joint", num_classes=None
    )
    return CDM(network, SCHEDULE, input_shape=(1, 1, 2), class_prior=density.weights)


def embedding_model(density):
    network = Flattened(ExactNetwork(density, SCHEDULE), num_classes=2)
    return CDM(network, SCHEDULE, input_shape=(1, 1, 2), class_prior=density.weights)


MODELS = {"joint": joint_model, "embedding": embedding_model}


@pytest.mark.parametrize("method", MODELS)
def test_exact_likelihoods_reach_the_bayes_accuracy_and_are_calibrated(method):
    density = classes()
    report = evaluate_classes(MODELS[method](density), draw(density, 4000))
    assert report.method == method and report.num_images == 4000
    assert abs(report.accuracy - BAYES) < 3 * report.accuracy_stderr
    assert report.accuracy_stderr == pytest.approx(math.sqrt(BAYES * (1 - BAYES) / 4000), rel=0.05)
    assert report.ece < 0.03
    confusion = torch.tensor(report.confusion)
    assert confusion.sum() == 4000 and confusion.trace() == round(4000 * report.accuracy)


def test_an_exact_classifier_reaches_the_bayes_accuracy_and_is_calibrated():
    density = classes((0.8, 0.2))
    data = draw(density, 4000)
    posterior = Flattened(lambda x: density.components_log_prob(x, *CLEAN)[:, 0] + density.weights.log())
    posterior.num_classes = 2
    model = Classifier(posterior, SCHEDULE)
    report = evaluate_classes(model, data)
    bayes = evaluate_classes(joint_model(density), data)
    assert report.method == "discriminative" and report.bits_per_dim is None
    assert report.accuracy == bayes.accuracy and report.ece == pytest.approx(bayes.ece, abs=1e-6)
    assert bool((model.draw_levels(5) == 0).all())
    loss = noised_classifier_loss(
        model, Noised(torch.zeros(2, 1, 1, 2).double(), None, None, data.labels[:2])
    )
    at_zero = posterior(torch.zeros(1, 2).double()).log_softmax(1)[0]
    assert float(loss.loss) == pytest.approx(-float(at_zero[data.labels[:2]].mean()))


@pytest.mark.parametrize("method", MODELS)
def test_a_noisy_level_has_its_own_bayes_accuracy_and_draws_bring_back_the_clean_one(method):
    density, level = classes(), 12
    model, data = MODELS[method](density), draw(density, 4000)
    a, s = float(SCHEDULE.a[level]), float(SCHEDULE.s[level])
    spread = math.hypot(a * SPREAD, s)
    bayes = 0.5 * (1 + math.erf(a * DISTANCE / 2 / spread / math.sqrt(2)))
    one, many = (evaluate_classes(model, data, draws=draws, level=level) for draws in (1, 25))
    assert BAYES - bayes > 8 * one.accuracy_stderr
    assert abs(one.accuracy - bayes) < 3 * one.accuracy_stderr
    assert many.accuracy - one.accuracy > 4 * one.accuracy_stderr
    entropy = math.log2(2 * math.pi * math.e * spread**2) / 2  # of a coordinate, were there one class
    assert one.bits_per_dim == pytest.approx(entropy + 7, abs=0.03)


@pytest.mark.parametrize("method", MODELS)
def test_scores_and_marginal_are_the_closed_forms(method):
    density = classes((0.8, 0.2))
    data = draw(density, 50)
    report = evaluate_classes(MODELS[method](density), data, draws=4, batch_size=20)
    # The draws move a pixel by less than one grey level; their mean log-density is near the middle's.
    middle = ((data.images + 0.5) / 128 - 1).double().flatten(1)
    each = density.components_log_prob(middle, SCHEDULE.a[:1], SCHEDULE.s[:1])[:, 0]
    torch.testing.assert_close(report.class_scores, each, rtol=0, atol=0.15)
    marginal = (each + density.weights.log()).logsumexp(1)
    wanted = float(-marginal.mean() / (2 * math.log(2)) + 7)
    assert report.bits_per_dim == pytest.approx(wanted, abs=0.01)
    posterior = (report.class_scores + density.weights.log()).softmax(1)
    torch.testing.assert_close(report.posterior, posterior)


def test_draws_are_averaged_as_log_probabilities():
    density = classes()
    data, model = draw(density, 30), joint_model(density)
    several = evaluate_classes(model, data, draws=2, seed=5)
    generators = [torch.Generator().manual_seed(5 * 1_000_003 + i) for i in range(2)]
    noisy = [(data.images + torch.rand(data.images.shape, generator=g)) / 128 - 1 for g in generators]
    each = torch.stack([model.log_prob_classes(x.double()) for x in noisy])
    torch.testing.assert_close(several.class_scores, each.mean(0), rtol=1e-6, atol=1e-5)


def test_ode_per_class_agrees_with_the_densities():
    """The ODE holds level 1's score below it: close to, not equal to, the density at level 0."""
    density = classes((0.7, 0.3))
    model, data = FlatDenoiser(density, SCHEDULE), draw(density, 40)
    prior = density.weights
    ode = evaluate_classes(model, data, "ode", num_images=12, probes=0, class_prior=prior)
    exact = evaluate_classes(joint_model(density), data, num_images=12, draws=1)
    assert ode.num_images == 12 and torch.equal(ode.index, exact.index)
    torch.testing.assert_close(ode.class_scores, exact.class_scores, rtol=0, atol=0.02)
    assert ode.bits_per_dim == pytest.approx(exact.bits_per_dim, abs=0.01)
    assert ode.confusion == exact.confusion


def test_denoising_error_classifies_well_and_has_no_likelihood():
    density = classes()
    data = draw(density, 400)
    report = evaluate_classes(FlatDenoiser(density, SCHEDULE), data, trials=80)
    assert report.method == "denoising" and report.bits_per_dim is None
    assert 0.55 < report.accuracy < BAYES + 3 * report.accuracy_stderr
    assert bool((report.class_scores < 0).all())
    again = evaluate_classes(FlatDenoiser(density, SCHEDULE), data, trials=80)
    assert torch.equal(again.class_scores, report.class_scores)


def test_all_classes_meet_the_same_noise():
    """Two classes with one law get one score, however few the trials."""
    one = classes().component(0)
    same = GaussianMixture(torch.ones(2) / 2, one.means.expand(2, 2), one.covariances.expand(2, 2, 2))
    report = evaluate_classes(FlatDenoiser(same, SCHEDULE), draw(classes(), 20), trials=3)
    torch.testing.assert_close(report.class_scores[:, 0], report.class_scores[:, 1])
    assert len(report.class_scores[:, 0].unique()) == 20


def test_calibration_error_of_a_hand_made_case():
    """Four images at confidence 0.7 with one right, six at 0.95 with all right: 0.4 x 0.45 + 0.6 x 0.05."""
    confidence = torch.tensor([0.7] * 4 + [0.95] * 6, dtype=torch.float64)
    label = torch.tensor([0, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    found = reliability(torch.stack([confidence, 1 - confidence], dim=1), label)
    assert found.ece == pytest.approx(0.4 * 0.45 + 0.6 * 0.05)
    assert found.count[10] == 4 and found.count[14] == 6 and sum(found.count) == 10
    assert found.accuracy[10] == pytest.approx(0.25) and found.confidence[14] == pytest.approx(0.95)
    assert math.isnan(found.accuracy[0])


def test_bins_hold_their_upper_edge():
    posterior = torch.tensor([[0.6, 0.4], [1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    count = reliability(posterior, torch.zeros(3, dtype=torch.int64)).count
    assert count[8] == 1 and count[14] == 1 and count[7] == 1  # (8/15, 9/15], (14/15, 1], (7/15, 8/15]


def test_confusion_counts_rows_of_true_classes():
    label, predicted = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 2, 1, 2, 2])
    assert confusion_matrix(predicted, label, 3).tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 2]]


@pytest.mark.parametrize(
    ("model", "change", "options", "told"),
    [
        ("joint", {"labels": None}, {}, "no labels"),
        ("joint", {"num_classes": 5}, {}, "5 classes, and the model was trained on 2"),
        ("joint", {"labels": torch.full((9,), 2)}, {}, "label 2, out of range"),
        ("joint", {"labels": torch.full((9,), -1)}, {}, "label -1, out of range"),
        ("joint", {}, {"method": "embedding"}, "does not fit a run of --conditioning joint"),
        ("embedding", {}, {"method": "joint"}, "does not fit a run of --conditioning embedding"),
        ("joint", {}, {"method": "guess"}, "unknown method"),
        ("joint", {}, {"draws": 0}, "draws is 0"),
        ("joint", {}, {"num_images": 0}, "images is 0"),
        ("joint", {}, {"batch_size": 0}, "batch_size is 0"),
        ("joint", {}, {"level": -1}, "level -1: joint and embedding"),
        ("embedding", {}, {"level": SCHEDULE.T + 1}, "level .*: joint and embedding"),
        ("embedding", {}, {"level": 3, "method": "denoising"}, "level 3: joint and embedding"),
        ("joint", {}, {"class_prior": torch.tensor([1.0, 0.0])}, "must be positive and finite"),
    ],
)
def test_wrong_use_is_told(model, change, options, told):
    density = classes()
    data = replace(draw(density, 9), **change)
    with pytest.raises(UserError, match=told):
        evaluate_classes(MODELS[model](density), data, **options)


def train(folder, *flags):
    data = write_images(folder / "images.npz")
    call_json("train", "--data", data, "--out", folder / "run", *FLAGS, *flags, "--device", "cpu")
    return folder / "run"


@pytest.fixture(scope="module")
def joint(tmp_path_factory):
    return train(tmp_path_factory.mktemp("joint"), "--conditioning", "joint")


@pytest.fixture(scope="module")
def embedding(tmp_path_factory):
    return train(tmp_path_factory.mktemp("embedding"), "--conditioning", "embedding")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return train(
        tmp_path_factory.mktemp("ddm"),
        "--conditioning",
        "embedding",
        "--objective",
        "ddm",
        "--architecture",
        "unet",
    )


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return train(tmp_path_factory.mktemp("classifier"), "--objective", "classifier")


def test_a_classifier_serves_classify_and_nothing_else(classifier, tmp_path):
    found = call_json("classify", classifier, "--out", tmp_path / "classes.csv")
    assert found["method"] == "discriminative" and found["bits_per_dim"] is None
    assert json.loads((classifier / "classes.json").read_text())["accuracy"] == found["accuracy"]
    with open(tmp_path / "classes.csv") as file:
        each = [[float(row[f"log_posterior_{c}"]) for c in range(CLASSES)] for row in csv.DictReader(file)]
    assert np.exp(each).sum(1) == pytest.approx(1.0, abs=1e-3)
    write_image(torch.zeros(1, 8, 8, dtype=torch.uint8), tmp_path / "image.png")
    assert "--objective classifier" in _error(call("sample", classifier, "--num", "1", "--steps", "2"))
    assert "classifier, which has no likelihood" in _error(call("nll", classifier))
    assert "classifier, which has no likelihood" in _error(
        call("denoise", classifier, tmp_path / "image.png")
    )
    assert "takes discriminative" in _error(call("classify", classifier, "--method", "ode"))
    assert (classifier / "loss.png").exists() and not (classifier / "samples.png").exists()


def test_json_of_a_joint_run(joint, tmp_path):
    found = call_json("classify", joint, "--out", tmp_path / "classes.csv")
    assert found["method"] == "joint" and found["num_classes"] == CLASSES
    assert 0 <= found["accuracy"] <= 1 and 0 <= found["ece"] <= 1 and found["images_per_second"] > 0
    assert np.array(found["confusion"]).sum() == found["num_images"]
    assert found["bits_per_dim"] == pytest.approx(call_json("nll", joint)["bits_per_dim"], rel=1e-5)
    assert (joint / "classes.png").read_bytes().startswith(b"\x89PNG")
    with open(tmp_path / "classes.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == found["num_images"]
    right = [float(row["predicted"]) == float(row["label"]) for row in rows]
    assert np.mean(right) == pytest.approx(found["accuracy"])
    log_prob = np.array([[float(row[f"log_prob_{c}"]) for c in range(CLASSES)] for row in rows])
    assert np.isfinite(log_prob).all() and len(np.unique(log_prob)) == log_prob.size


def test_lines_of_an_embedding_run(embedding):
    status, told, _ = call("classify", embedding, "--draws", "2")
    assert status == 0
    for part in ("accuracy", "+-", "embedding", "2 draws, their log-probabilities averaged", "ECE, 15 bins"):
        assert part in told
    assert "bits/dim of the marginal, unaudited" in told and "images/s" in told and "classes.png" in told


@pytest.mark.parametrize(
    ("run", "method"),
    [("joint", "denoising"), ("embedding", "denoising"), ("joint", "ode"), ("plain", "ode")],
)
def test_every_conditional_run_serves_denoiser_and_ode(run, method, request, tmp_path):
    out = tmp_path / "classes.npz"
    options = ["--method", method, "--images", "2", "--trials", "4", "--out", out]
    options += ["--tolerance", "0.3", "--probes", "2"]
    found = call_json("classify", request.getfixturevalue(run), *options)
    assert found["method"] == method and found["num_images"] == 2
    assert (found["bits_per_dim"] is None) == (method == "denoising")
    with np.load(out) as arrays:
        name = "log_prob_1" if method == "ode" else "denoising_score_1"
        assert np.isfinite(arrays[name]).sum() == 2


def test_a_plain_denoiser_uses_its_denoising_error(plain):
    assert call_json("classify", plain, "--images", "2", "--trials", "2")["method"] == "denoising"


def test_corruptions_of_a_run(joint):
    found = call_json("classify", joint, "--corruptions", "--images", "6", "--draws", "1")
    assert list(found["corruptions"]) == list(KINDS)
    accuracy = np.array(list(found["corruptions"].values()))
    assert accuracy.shape == (15, 5) and found["corrupted_accuracy"] == pytest.approx(accuracy.mean())
    assert found["corrupted_accuracy_stderr"] >= 0
    assert (joint / "corruptions.png").read_bytes().startswith(b"\x89PNG")


def test_corruptions_lower_the_accuracy_of_exact_classes():
    """On two pixels blurs and contrast mix what tells the classes apart; noise hides it."""
    density = classes()
    model, data = joint_model(density), draw(density, 600)
    report = evaluate_corruptions(lambda images: evaluate_classes(model, images, draws=1), data, print)
    clean = evaluate_classes(model, data, draws=1).accuracy
    assert report.mean < clean
    assert report.accuracy["gaussian_noise"][0] == pytest.approx(clean, abs=0.05)
    assert report.mean == pytest.approx(np.mean(list(report.accuracy.values())))
    told = describe_corruptions(report)
    assert len(told) == 16 and "15 kinds at 5 severities" in told[0]


def _error(status_out_err):
    status, out, err = status_out_err
    error = [line for line in err.splitlines() if line.startswith("cdm-fast: error:")]
    assert status == 2 and out == "" and len(error) == 1 and err.splitlines()[-1] == error[0]
    return error[0]


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (np.arange(48) % 5, "5 classes, and the model was trained on 3"),
        (np.arange(48) % 3 - 1, "label -1"),
        (None, "has no labels"),
    ],
    ids=["more", "negative", "none"],
)
def test_labels_that_do_not_fit_are_one_line(joint, tmp_path, labels, told):
    data = tmp_path / "other.npz"
    with np.load(write_images(tmp_path / "images.npz")) as arrays:
        members = {**arrays, "labels": labels}
    np.savez(data, **{name: member for name, member in members.items() if member is not None})
    assert told in _error(call("classify", joint, "--data", data))


def test_flags_that_do_not_fit_are_one_line(joint, embedding, plain):
    assert "--method embedding" in _error(call("classify", joint, "--method", "embedding"))
    assert "--method joint" in _error(call("classify", embedding, "--method", "joint"))
    assert "DDM" in _error(call("classify", plain, "--method", "joint"))
    assert ".npz or .csv" in _error(call("classify", joint, "--out", "classes.txt"))
    assert "batch-size" in _error(call("classify", joint, "--batch-size", "0"))
    assert "--level 2" in _error(call("classify", joint, "--level", "2", "--attack", "fgsm"))
    assert "trials is 0" in _error(call("classify", joint, "--method", "denoising", "--trials", "0"))


def test_a_run_without_classes_is_one_line(tmp_path):
    run = train(tmp_path, "--steps", "1")
    assert "without classes" in _error(call("classify", run))
