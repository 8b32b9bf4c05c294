"""Randomized smoothing against classifiers whose exact radius is known; conformal sets; the command.

Pixels (n, 1, H, W), white being 1.
"""

import math
from dataclasses import replace

import pytest
import torch

from benchmarks.studies.certificates import attack_inside
from cdm_fast import NoiseSchedule, UserError, load
from cdm_fast.data import load_data
from cdm_fast.data.pixels import from_brightness, noise_of_inputs, to_brightness
from cdm_fast.evaluation.certification import (
    ABSTAIN,
    DenoisedPixelClassifier,
    NoisyPixelClassifier,
    certify,
    clopper_pearson,
    hoeffding,
)
from cdm_fast.evaluation.certification_report import evaluate_certificates
from cdm_fast.evaluation.outliers import evaluate_outliers
from cdm_fast.evaluation.selective import (
    conformal_threshold,
    evaluate_selection,
    reject_unusual,
    risk_coverage,
)
from tests.test_classify import classes, draw, joint_model
from tests.test_cli import call, call_json
from tests.tiny_run import FLAGS, write_images

SIGMA = 0.5


def normal_cdf(value):
    return torch.special.ndtr(torch.as_tensor(value, dtype=torch.float64))


class Linear:
    """Two classes on either side of the hyperplane whose signed distance from `pixels` is `distance`; `slope`
    softens the posterior to the probit of slope times distance."""

    def __init__(self, num, slope=None, seed=0):
        self.w = torch.nn.functional.normalize(
            torch.randn(num, generator=torch.Generator().manual_seed(seed)), dim=0
        )
        self.slope = slope

    def distance(self, pixels):
        return pixels.flatten(1) @ self.w.to(pixels.dtype) - 0.1

    def __call__(self, pixels):
        distance = self.distance(pixels).double()
        if self.slope is None:
            return torch.stack([distance, -distance], dim=1) * 1e6
        h = normal_cdf(self.slope * distance)
        return torch.stack([h, 1 - h], dim=1).log()


def images(num, seed=1):
    return torch.rand(num, 1, 2, 3, generator=torch.Generator().manual_seed(seed))


# Few draws and a large probability of failure, so that failures are often enough to count.
OFTEN_WRONG = {"draws": 200, "selection_draws": 20, "failure_probability": 0.01, "batch_size": 10**5}


def test_certified_radii_exceed_the_exact_ones_no_more_often_than_they_may():
    classifier, pixels = Linear(6), images(1000)
    votes, _ = certify(classifier, pixels, SIGMA, **OFTEN_WRONG)
    exact = classifier.distance(pixels).abs().double()
    right = (votes.predicted == 1) == (classifier.distance(pixels) < 0)
    wrong = (votes.radius > 0) & ((votes.radius > exact) | ~right)
    assert int(wrong.sum()) <= 18  # P(more | 1000 trials at 0.01) is 0.7 %
    assert float((votes.predicted == ABSTAIN).double().mean()) < 0.6


def test_many_draws_come_within_five_percent_of_the_exact_radius():
    classifier = Linear(6)
    pixels = images(200)
    pixels = pixels[classifier.distance(pixels).abs() > 0.3][:4]
    assert len(pixels) == 4
    votes, _ = certify(classifier, pixels, SIGMA, draws=200_000, batch_size=50_000)
    exact = classifier.distance(pixels).abs().double()
    assert bool((votes.radius <= exact).all())
    assert bool((votes.radius > 0.95 * exact).all())


def test_mean_posterior_certificates_hold_where_the_mean_is_known():
    classifier, pixels = Linear(6, slope=2.0), images(1000)
    _, mean = certify(classifier, pixels, SIGMA, **OFTEN_WRONG)
    distance = classifier.distance(pixels).double()
    # E Phi(k (d + sigma z)) = Phi(k d / sqrt(1 + k^2 sigma^2)), and its radius is sigma times the argument.
    argument = 2 * distance / math.sqrt(1 + (2 * SIGMA) ** 2)
    certified = mean.predicted != ABSTAIN
    of_predicted = torch.where(mean.predicted == 0, argument, -argument)
    assert int((certified & (mean.radius > SIGMA * of_predicted)).sum()) <= 18
    assert float(certified.double().mean()) > 0.1
    # The exact distance to the decision boundary is larger: the certificate is valid for it too.
    assert bool((mean.radius[certified] <= distance.abs()[certified] + 1e-9).double().mean() > 0.98)


@pytest.mark.parametrize("failure", [0.1, 0.001])
def test_bounds_cover_at_their_rate_and_agree_with_closed_forms(failure):
    draws, p = 50, 0.8
    count = torch.distributions.Binomial(draws, torch.tensor(p)).sample((20_000,)).long()
    for bound in (clopper_pearson(count, draws, failure), hoeffding(count / draws, draws, failure)):
        missed = float((bound > p).double().mean())
        assert missed <= failure + 3 * math.sqrt(failure / 20_000)
    everything = failure ** (1 / draws)  # both are this where every draw agrees
    assert float(clopper_pearson(torch.tensor([draws]), draws, failure)) == pytest.approx(everything)
    assert float(hoeffding(torch.tensor([1.0]), draws, failure)) == pytest.approx(everything)
    assert float(clopper_pearson(torch.tensor([0]), draws, failure)) == 0
    assert float(hoeffding(torch.tensor([0.0]), draws, failure)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("pixel_map", ["intervals", "points"])
def test_pixels_and_inputs_are_inverse_and_noise_scales_alike(pixel_map):
    pixels = images(3).double() * 3 - 1  # outside [0, 1] too, where noise takes them
    x = from_brightness(pixels, 17, pixel_map)
    assert torch.allclose(to_brightness(x, 17, pixel_map), pixels)
    moved = from_brightness(pixels + SIGMA, 17, pixel_map) - x
    assert torch.allclose(moved, torch.full_like(moved, noise_of_inputs(SIGMA, 17, pixel_map)))
    levels = torch.arange(17) / 16
    middle = (2 * torch.arange(17) + 1) / 17 - 1 if pixel_map == "intervals" else 2 * levels - 1
    assert torch.allclose(from_brightness(levels, 17, pixel_map), middle)


def test_a_level_is_found_by_its_noise():
    schedule = NoiseSchedule.uniform(T=40)
    for level in (1, 7, 40):
        assert schedule.nearest_to_noise(float(schedule.sigma[level]) * 1.001) == level
    with pytest.raises(UserError, match="positive finite"):
        schedule.nearest_to_noise(0.0)


def test_an_exact_noise_level_classifier_votes_as_bayes_rule_does_at_that_noise():
    density = classes()
    model, data = joint_model(density), draw(density, 300)
    sigma = 0.06
    classifier = NoisyPixelClassifier(model, sigma, data.num_grey_levels)
    report = evaluate_certificates(classifier, data, 2, sigma, draws=400, batch_size=4000)
    # Between two round Gaussians the boundary is a plane at every noise: the radius is the distance to it.
    x = from_brightness(data.images.double().flatten(1) / 255, 256)
    distance = (x @ torch.ones(2, dtype=torch.float64) / math.sqrt(2)).abs() / noise_of_inputs(1.0, 256)
    certified = report.votes.predicted != ABSTAIN
    side = (x.sum(1) > 0).long()
    assert bool((report.votes.predicted == side)[certified].all())
    largest = sigma * float(torch.special.ndtri(torch.tensor(0.001 ** (1 / 400), dtype=torch.float64)))
    assert bool((report.votes.radius <= distance.clamp(max=largest) + 1e-6).double().mean() > 0.99)
    assert float(report.votes.radius[distance > 5 * sigma].min()) == pytest.approx(largest)
    assert report.smoothed_accuracy == pytest.approx(int((side == data.labels)[certified].sum()) / 300)
    assert report.certified_accuracy[0] == report.smoothed_accuracy
    assert all(a >= b for a, b in zip(report.certified_accuracy, report.certified_accuracy[1:], strict=False))


def test_certificates_in_bf16_are_those_of_fp32_but_for_votes_near_a_boundary(tmp_path):
    data, run = write_images(tmp_path / "images.npz"), tmp_path / "run"
    call_json("train", "--data", data, "--out", run, *FLAGS, "--conditioning", "joint", "--device", "cpu")
    model, images = load(run), load_data(str(data), "test")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    classifier = NoisyPixelClassifier(model, 0.25, images.num_grey_levels, images.pixels)
    full, half = (
        evaluate_certificates(
            classifier, images, images.num_classes, 0.25, num_images=4, draws=200, precision=precision
        )
        for precision in ("fp32", "bf16")
    )
    assert not torch.equal(full.mean.lower_bound, half.mean.lower_bound)
    assert float((full.mean.lower_bound - half.mean.lower_bound).abs().max()) < 0.02
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_denoised_classifier_sees_the_posterior_mean():
    density = classes()
    model, data = joint_model(density), draw(density, 64)
    seen = []

    def clean_classifier(pixels):
        seen.append(pixels)
        return torch.stack([-pixels.sum((1, 2, 3)), pixels.sum((1, 2, 3)) - 2], dim=1) * 50

    classifier = DenoisedPixelClassifier(model, clean_classifier, 0.06, data.num_grey_levels)
    noisy = data.images.double() / 255 + 0.06 * torch.randn(data.images.shape, dtype=torch.float64)
    classifier(noisy)
    a, s = float(model.a[classifier.level]), float(model.s[classifier.level])
    x = a * from_brightness(noisy, 256).flatten(1)
    expected = (x + s**2 * density.score(x, a, s)) / a  # Tweedie
    assert torch.allclose(seen[0].flatten(1), to_brightness(expected, 256).clamp(0, 1), atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"sigma": 0.0}, "sigma is 0.0"),
        ({"sigma": math.nan}, "sigma is nan"),
        ({"draws": 0}, "draws is 0"),
        ({"selection_draws": 0}, "selection draws is 0"),
        ({"failure_probability": 0.5}, "failure probability is 0.5"),
        ({"draws": 9}, "9 draws certify nothing at a failure probability of 0.001: give at least 11"),
    ],
)
def test_numbers_out_of_range_are_refused(wrong, said):
    arguments = {"sigma": SIGMA, "draws": 100, **wrong}
    with pytest.raises(UserError, match=said):
        certify(Linear(6), images(2), arguments.pop("sigma"), **arguments)


def test_risk_coverage_by_hand_and_ties_share():
    wrong = torch.tensor([False, True, False, True])
    assert risk_coverage(wrong, torch.tensor([4.0, 3.0, 2.0, 1.0])).tolist() == [0, 1 / 2, 1 / 3, 1 / 2]
    assert risk_coverage(wrong, torch.zeros(4)).tolist() == [0.5] * 4


def test_conformal_sets_cover_at_their_rate_in_two_models_one_of_them_wrong():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 5, dtype=torch.float64, generator=generator)
    label = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    for scale in (1.0, 3.0):  # the second is too sure of itself: sets hold all the same
        report = evaluate_selection(logits * scale, label, has_likelihood=False, set_coverage=0.8)
        assert report.splits == 10
        assert abs(report.set_coverage_found - 0.8) < 2 * report.set_coverage_stderr < 0.02
        assert report.aurc_oracle < report.aurc_by_posterior < 0.6
        assert report.accuracy_by_posterior[-1] > report.accuracy_by_posterior[0]
        assert report.aurc_by_likelihood is None
    assert conformal_threshold(torch.tensor([1.0, 2.0, 3.0]), 0.75) == 3
    assert conformal_threshold(torch.tensor([1.0, 2.0, 3.0]), 0.76) == math.inf


def test_the_error_bar_of_the_coverage_is_that_of_ten_splits():
    """Over other splits the coverage scatters by its own standard error around ceil((m+1) q) / (m+1)."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(200, 4, dtype=torch.float64, generator=generator)
    label = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    expected = math.ceil(101 * 0.8) / 101
    scaled = []
    for seed in range(60):
        report = evaluate_selection(logits, label, has_likelihood=False, set_coverage=0.8, seed=seed)
        scaled.append((report.set_coverage_found - expected) / report.set_coverage_stderr)
    scaled = torch.tensor(scaled)
    assert abs(float(scaled.mean())) < 3 * math.sqrt(9 / 7 / 60)  # Student's t with 9 degrees of freedom
    assert 0.8 < float(scaled.std()) < 1.6


def test_unusual_images_are_rejected_at_the_rate_of_false_alarms():
    density = classes()
    model, usual, reference = joint_model(density), draw(density, 400), draw(density, 400, seed=5)
    odd = replace(usual, images=torch.full_like(usual.images, 255))
    both = replace(usual, images=torch.cat([usual.images, odd.images]))
    outliers = evaluate_outliers(model, both, reference, false_alarms=0.1)
    right = torch.cat([torch.ones(400), torch.zeros(400)]).bool()
    rejection = reject_unusual(outliers, right)
    assert bool((outliers.p_value[400:] <= 0.1).all())
    kept = 2 * (1 - rejection.rejected)  # share of the usual ones
    assert abs(kept - 0.9) < 3 * math.sqrt(2 * 0.09 / 400)
    assert rejection.accuracy == 1.0
    assert rejection.accuracy_of_rejected == pytest.approx((1 - kept) / (2 - kept))


def test_no_attack_inside_the_certified_radius_changes_the_class():
    """200 images at a failure probability of 1e-5, near the curved boundary of an untrained network."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(6, 64), torch.nn.Tanh(), torch.nn.Linear(64, 3)
    )
    with torch.no_grad():
        network[1].weight *= 4
        network[3].weight *= 10
    network.requires_grad_(False)
    pixels = images(600)
    before, _ = certify(network, pixels, SIGMA, failure_probability=1e-5, batch_size=100_000)
    chosen = (before.predicted != ABSTAIN).nonzero()[:200, 0]
    assert len(chosen) == 200
    predicted, radius = before.predicted[chosen], before.radius[chosen]
    moved = attack_inside(network, pixels[chosen], predicted, radius, SIGMA)
    assert bool(((moved - pixels[chosen]).flatten(1).norm(dim=1) < radius).all())
    after, _ = certify(network, moved, SIGMA, failure_probability=0.01, batch_size=100_000, seed=1)
    changed = (after.predicted != predicted) & (after.predicted != ABSTAIN)
    assert int(changed.sum()) == 0
    assert bool((after.lower_bound < before.lower_bound[chosen]).double().mean() > 0.8)  # it does attack
    # Three times as far the same attack changes many: the radius is what protects.
    far = attack_inside(network, pixels[chosen], predicted, 3 * radius, SIGMA)
    beyond, _ = certify(network, far, SIGMA, failure_probability=0.01, batch_size=100_000, seed=1)
    assert int(((beyond.predicted != predicted) & (beyond.predicted != ABSTAIN)).sum()) > 20


def test_classify_certifies_and_abstains_on_a_tiny_run(tmp_path):
    data, run, out = write_images(tmp_path / "images.npz"), tmp_path / "run", tmp_path / "each.csv"
    call_json("train", "--data", data, "--out", run, *FLAGS, "--conditioning", "joint", "--device", "cpu")
    flags = ("--certify", "--sigma", "0.25", "0.5", "--certify-images", "3", "--certify-draws", "20")
    result = call_json("classify", run, *flags, "--selective", "--denoiser", run, "--out", out)
    assert [row["sigma"] for row in result["certified"]["by_sigma"]] == [0.25, 0.5]
    assert (run / "certified.png").exists() and (run / "selective.png").exists()
    assert result["selective"]["splits"] == 10
    rejection = result["selective"]["rejection"]
    assert rejection["false_alarms"] == 0.05 and rejection["reference"].endswith("validation")
    header = out.read_text().splitlines()[0]
    assert "certified_radius_sigma_0.25" in header and "p_value" in header
    half = call_json("classify", run, *flags, "--certify-precision", "bf16")["certified"]["by_sigma"]
    assert [row["precision"] for row in half] == ["bf16", "bf16"]
    for wrong in (
        ["--denoiser", run],
        ["--certify-precision", "bf16"],
        ["--certify", "--method", "denoising"],
        ["--certify", "--sigma"],
    ):
        status, _, err = call("classify", run, *wrong)
        assert status == 2 and len(err.splitlines()) == 1


def test_a_classifier_trained_under_noise_reads_images_at_its_own_scale(tmp_path):
    data, run = write_images(tmp_path / "images.npz"), tmp_path / "run"
    flags = ("--objective", "classifier", "--classifier-noise", "0.25", "--architecture", "unet")
    call_json("train", "--data", data, "--out", run, *FLAGS, *flags, "--device", "cpu")
    model = load(run)
    assert model.level == model.schedule.nearest_to_noise(noise_of_inputs(0.25, 17)) > 0
    assert model.draw_levels(3).tolist() == [model.level] * 3
    x = torch.rand(2, 1, 8, 8) * 2 - 1
    a = float(model.a[model.level])
    assert torch.allclose(model.log_class_posterior(x), model.logits(a * x).log_softmax(1))
    noisy = NoisyPixelClassifier(model, 0.25, 17)
    assert torch.allclose(noisy(to_brightness(x, 17)), model.log_class_posterior(x), atol=1e-5)
    status, _, err = call(
        "train", "--data", data, "--out", tmp_path / "b", *FLAGS, "--classifier-noise", "0.5"
    )
    assert status == 2 and "--objective classifier" in err
