"""Scores of unusual images against closed forms, and `cdm-fast score` on a run that trains in a second."""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks.support.analytic import ExactImageNetwork, GaussianMixture
from cdm_fast import CDM, DDM, NoiseSchedule
from cdm_fast.cli.describe import describe_outliers
from cdm_fast.data import ImageData, quantize
from cdm_fast.errors import UserError
from cdm_fast.evaluation.outliers import SCORES, anomaly_map, evaluate_outliers, level_of
from cdm_fast.likelihood import calibrate_sigma
from cdm_fast.statistics import auroc, auroc_standard_error, conformal_p_value
from tests.test_cli import call, call_json
from tests.tiny_run import FLAGS, write_images

SCHEDULE = NoiseSchedule.uniform(30)
SIDE, VARIANCE, COUNT = 8, 0.04, 400
DIM = SIDE * SIDE


@pytest.fixture(scope="module")
def model():
    """The exact CDM of white Gaussian pixels."""
    density = GaussianMixture.gaussian(torch.zeros(DIM), VARIANCE * torch.eye(DIM))
    return CDM(ExactImageNetwork(density, SCHEDULE), SCHEDULE, input_shape=(1, SIDE, SIDE))


def gaussian_images(variance, seed, name="own", count=COUNT):
    """White Gaussian pixels on 256 grey levels, so fine that quantisation does not count."""
    generator = torch.Generator().manual_seed(seed)
    x = math.sqrt(variance) * torch.randn(count, 1, SIDE, SIDE, generator=generator)
    return ImageData(quantize(x, 256), None, 256, None, name, "test")


def scored(model, variance, **options):
    """Scores of images of the model's own law, with images of another variance against them."""
    own, reference = gaussian_images(VARIANCE, 0), gaussian_images(VARIANCE, 1)
    return evaluate_outliers(model, own, reference, gaussian_images(variance, 2, "others"), **options)


def test_scores_of_a_gaussian(model):
    """Likelihood, level posterior and typicality of every image in closed form."""
    report = scored(model, VARIANCE)
    entropy = 0.5 * math.log2(2 * math.pi * math.e * VARIANCE) + 7  # bits/dim of 256 grey levels
    assert report.bits_per_dim == pytest.approx(entropy, abs=4 * report.bits_per_dim_stderr)
    # log p_t(x) = -|x|^2 / (2 v_t) - d/2 log(2 pi v_t) with v_t = a^2 v + s^2: all of it follows from |x|^2.
    bits = report.scores["likelihood"]
    log2_prob = (7 - bits) * DIM
    square = -2 * VARIANCE * (log2_prob * math.log(2) + DIM / 2 * math.log(2 * math.pi * VARIANCE))
    v = SCHEDULE.a**2 * VARIANCE + SCHEDULE.s**2
    posterior = (-square[:, None] / (2 * v) - DIM / 2 * v.log()).softmax(1)
    expected = posterior @ torch.arange(len(v), dtype=torch.float64)
    torch.testing.assert_close(report.scores["level_posterior"], expected, rtol=1e-4, atol=1e-6)
    away = (bits - report.reference_bits_per_dim).abs()
    torch.testing.assert_close(report.scores["typicality"], away)
    assert report.order().tolist() == square.argsort().tolist()  # the mode is likeliest
    assert report.flagged == pytest.approx(0.05, abs=0.035)  # 3 standard errors
    assert all(abs(area - 0.5) < 0.07 for area in report.against.auroc.values())


def test_wider_data_are_told_apart_as_often_as_the_f_distribution_says(model):
    """|x|^2 of two Gaussians: the chance that one exceeds the other is that of an F-distributed ratio."""
    report = scored(model, 1.3 * VARIANCE)
    expected = stats.f(DIM, DIM).sf(1 / 1.3)
    got = report.against
    for name in ("likelihood", "level_posterior"):
        assert got.auroc[name] == pytest.approx(expected, abs=3.5 * got.auroc_stderr[name])
    assert 0 < got.auroc_stderr["likelihood"] < 0.03
    assert got.data == "others, test" and got.bits_per_dim > report.bits_per_dim


def test_typicality_sees_what_likelihood_takes_for_the_best_images(model):
    """Near the mode of a wide Gaussian everything is likelier than its draws, and unlike them."""
    got = scored(model, VARIANCE / 2).against
    assert got.auroc["likelihood"] == pytest.approx(stats.f(DIM, DIM).sf(2), abs=0.005)  # 0.003
    assert got.auroc["level_posterior"] < 0.05
    assert got.auroc["typicality"] > 0.98


def test_a_noise_level_is_scored_as_such(model):
    """At level t the images are Gaussian of variance a^2 v + s^2, and the posterior is around t."""
    report = scored(model, 4 * VARIANCE, level=12, draws=2)
    v = float(SCHEDULE.a[12] ** 2 * VARIANCE + SCHEDULE.s[12] ** 2)
    entropy = 0.5 * math.log2(2 * math.pi * math.e * v) + 7
    assert report.bits_per_dim == pytest.approx(entropy, abs=4 * report.bits_per_dim_stderr)
    assert float(report.scores["level_posterior"].mean()) < 6
    other = float(SCHEDULE.a[12] ** 2 * 4 * VARIANCE + SCHEDULE.s[12] ** 2)
    alone = scored(model, 4 * VARIANCE, level=12)
    expected = stats.f(DIM, DIM).sf(v / other)
    assert alone.against.auroc["likelihood"] == pytest.approx(
        expected, abs=3.5 * alone.against.auroc_stderr["likelihood"]
    )


def test_standard_error_of_auroc():
    """Against the spread of the area over many pairs of sets, and by hand on the smallest."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(300, 100, generator=generator)
    sets = [(row[:60] + 1, row[60:]) for row in draws]
    spread = np.std([auroc(x, y) for x, y in sets])
    error = np.mean([auroc_standard_error(x, y) for x, y in sets])
    assert error == pytest.approx(spread, rel=0.12)  # 3 / sqrt(600)
    # Shares beaten: 1 and 1/2 of 2; 1 and 1/2 of 2; each of variance 1/8.
    by_hand = auroc_standard_error(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.0]))
    assert by_hand == pytest.approx(math.sqrt(1 / 8 / 2 + 1 / 8 / 2))
    assert math.isnan(auroc_standard_error(torch.zeros(1), torch.zeros(3)))


def test_conformal_p_value():
    reference = torch.tensor([1.0, 2.0, 3.0])
    score = torch.tensor([0.5, 2.0, 4.0])
    assert conformal_p_value(score, reference).tolist() == [1.0, 0.75, 0.25]


def test_anomaly_map_of_a_gaussian(model):
    """x0_hat = w x_t: the residual of a pixel is (w a - 1) x + w s eps."""
    x = gaussian_images(VARIANCE, 3, count=1).images.double() / 128 - 1
    x[0, 0, 2, 3] = 3.0  # a pixel out of the ordinary
    level = level_of(model, 0.5)
    assert abs(math.log(float(SCHEDULE.sigma[level]) / 0.5)) < 0.1
    a, s = float(SCHEDULE.a[level]), float(SCHEDULE.s[level])
    w = a * VARIANCE / (a**2 * VARIANCE + s**2)
    maps = anomaly_map(model, x, level, draws=600)
    expected = ((w * a - 1) ** 2 * x[:, 0] ** 2 + w**2 * s**2).sqrt()
    assert maps.shape == (1, SIDE, SIDE)
    torch.testing.assert_close(maps, expected, rtol=0.15, atol=0.005)
    assert int(maps[0].argmax()) == 2 * SIDE + 3
    for options, told in (((0,), "level 0"), ((31,), "level 31"), ((3, 0), "draws is 0")):
        with pytest.raises(UserError, match=told):
            anomaly_map(model, x, *options)


def test_known_noise_is_found_again(model):
    """The median estimate is within one level of what was added, where levels are told apart."""
    found = calibrate_sigma(model, gaussian_images(VARIANCE, 4), num_images=8, points=4)
    assert found.num_images == 8 and len(found.sigma) == 4
    assert found.sigma == pytest.approx(np.geomspace(found.sigma[0], found.sigma[-1], 4))
    for sigma, median, low, high in zip(found.sigma, found.median, found.low, found.high, strict=True):
        assert low <= median <= high
        # |y|^2 / d estimates v + sigma^2 with a relative error of sqrt(2/d) an image.
        error = 4 * math.sqrt(2 / DIM / 8) * 1.25 * (VARIANCE + sigma**2)
        step = float(SCHEDULE.sigma[1:-1].diff().min()) + 0.1 * sigma
        assert abs(median**2 - sigma**2) < error + 2 * sigma * step + step**2


def test_refusals(model):
    own = gaussian_images(VARIANCE, 0, count=4)
    with pytest.raises(UserError, match="draws is 0"):
        evaluate_outliers(model, own, own, draws=0)
    with pytest.raises(UserError, match="batch_size is 0"):
        evaluate_outliers(model, own, own, batch_size=0)
    with pytest.raises(UserError, match="false alarms is 1"):
        evaluate_outliers(model, own, own, false_alarms=1)
    with pytest.raises(UserError, match="level"):
        evaluate_outliers(model, own, own, level=99)
    with pytest.raises(UserError, match="no likelihood"):
        evaluate_outliers(DDM(torch.nn.Identity(), SCHEDULE, input_shape=(1, 8, 8)), own, own)


def test_a_diverged_model_is_told():
    class Diverged(torch.nn.Module):
        def forward(self, x):
            return torch.full((len(x), SCHEDULE.num_levels), torch.nan)

    own = gaussian_images(VARIANCE, 0, count=4)
    with pytest.raises(UserError, match="4 of 4 images .* diverged"):
        evaluate_outliers(CDM(Diverged(), SCHEDULE, input_shape=(1, SIDE, SIDE)), own, own)


@pytest.fixture(scope="module", params=["joint", "embedding"])
def run(request, tmp_path_factory):
    """The directory of a class-conditional run."""
    folder = tmp_path_factory.mktemp(request.param)
    data = write_images(folder / "images.npz")
    flags = [*FLAGS, "--conditioning", request.param, "--device", "cpu"]
    call_json("train", "--data", data, "--out", folder / "run", *flags)
    return folder / "run"


JOINT = pytest.mark.parametrize("run", ["joint"], indirect=True)  # one kind of run is enough


def test_score_against_other_data(run, tmp_path):
    """Data of another size and number of grey levels are brought to the run's; everything is written."""
    dark = np.random.default_rng(0).integers(0, 40, (30, 16, 16)).astype(np.uint8)
    other = write_images(
        tmp_path / "dark.npz", images=dark, labels=np.zeros(30, int), num_grey_levels=np.array(256)
    )
    out = tmp_path / "scores.csv"
    found = call_json("score", run, "--against", other, "--noise", "--out", out, "--device", "cpu")
    assert set(found["against"]["auroc"]) == set(SCORES)
    assert all(0 <= area <= 1 for area in found["against"]["auroc"].values())
    for key in ("picture", "anomaly_picture", "sigma_picture"):
        assert open(found[key], "rb").read(4) == b"\x89PNG"
    names = [str(run / f"{name}.png") for name in ("score", "anomaly", "sigma")]
    assert [found["picture"], found["anomaly_picture"], found["sigma_picture"]] == names
    rows = list(csv.DictReader(open(out)))
    assert list(rows[0]) == ["index", "label", "bits_per_dim", "typicality", "level_posterior", "p_value"]
    assert len(rows) == found["num_images"]
    assert np.mean([float(row["bits_per_dim"]) for row in rows]) == pytest.approx(found["bits_per_dim"])
    worst = max(rows, key=lambda row: float(row["bits_per_dim"]))
    assert found["least_likely"][0] == int(worst["index"])
    others = list(csv.DictReader(open(found["against_out"])))
    mean = np.mean([float(row["bits_per_dim"]) for row in others])
    assert mean == pytest.approx(found["against"]["bits_per_dim"])
    one_pass = call_json("nll", run, "--draws", "1", "--device", "cpu")
    assert found["bits_per_dim"] == pytest.approx(one_pass["bits_per_dim"])


@JOINT
def test_score_against_corruptions(run):
    flags = ["--against", "corrupted", "--images", "6", "--device", "cpu"]
    status, out, progress = call("score", run, *flags, "--json")
    found = json.loads(out)
    assert status == 0 and "corruption 15 of 15" in progress
    assert found["against"] is None and found["num_images"] == 6 and len(found["corruptions"]) == 15
    means = np.mean([kind["likelihood"] for kind in found["corruptions"].values()], axis=0)
    assert found["corruptions_mean"]["likelihood"] == pytest.approx(means)


def test_what_a_person_is_told(model):
    areas = {"fog": {name: [0.5, 0.75] for name in SCORES}, "snow": {name: [0.75, 1.0] for name in SCORES}}
    told = "\n".join(describe_outliers(replace(scored(model, VARIANCE), corruptions=areas)))
    for part in ("bits/dim at level 0", "flagged at 5 % false alarms", "against others, test", "AUROC 0."):
        assert part in told
    assert "level posterior  0.6250  0.8750" in told


@JOINT
@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--against", "/nowhere"], "/nowhere"),
        (["--map-level", "0"], "level 0"),
        (["--images", "0"], "--images is 0"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--false-alarms", "0"], "false alarms"),
        (["--level", "10"], "10"),
        (["--out", "scores.txt"], ".npz or .csv"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_flags(run, flags, told):
    status, out, err = call("score", run, *flags, "--device", "cpu")
    assert status == 2 and out == "" and err.count("\n") == 1 and told in err


@JOINT
def test_images_of_another_size_are_refused(run, tmp_path):
    other = write_images(tmp_path / "large.npz", images=np.zeros((48, 9, 9), np.uint8))
    status, _, err = call("score", run, "--data", other, "--device", "cpu")
    assert status == 2 and "9x9" in err and "8x8" in err and err.count("\n") == 1
