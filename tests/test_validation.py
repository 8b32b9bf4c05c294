"""Checks on validation images against densities known in closed form, and the best checkpoint of a run."""

import json
import math
from dataclasses import replace

import pytest
import torch

from cdm_fast import CDM, UserError
from cdm_fast.cli import main
from cdm_fast.config import check
from cdm_fast.data import load_data
from cdm_fast.runs.checkpoint import load_checkpoint
from cdm_fast.runs.load import load
from cdm_fast.training.best import BestCheckpoint
from cdm_fast.training.state import new_state, to_checkpoint
from cdm_fast.training.train import resume, train
from cdm_fast.training.validation import check_classes, check_levels, validate
from tests.test_calibration import CLASSES, DIM, RAMP, SCHEDULE, GaussianPixels, T, pixels
from tests.tiny_run import tiny_config, write_images

LEVELS = torch.arange(T + 2)
PRIORS = {"uniform": torch.ones(T + 2), "uneven": 1 + (LEVELS % 3) + LEVELS / T}


def exact_model(shift, prior, conditioning="embedding"):
    """The exact classifier of levels drawn from `prior`, but for a constant per level."""
    log_prior = (prior / prior.sum()).log().double()
    network = GaussianPixels(shift + log_prior, conditioning)
    return CDM(network, SCHEDULE, level_prior=prior)


@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
def test_true_densities_are_calibrated(prior):
    checks = check_levels(exact_model(0 * RAMP, prior), pixels(2000), 20_000)
    error = torch.tensor(checks.log_mean_posterior_stderr)
    assert (torch.tensor(checks.log_mean_posterior).abs() < 4 * error + 0.05).all()  # pixels are clipped
    assert abs(checks.ratio_bits_per_dim) < 4 * checks.ratio_bits_per_dim_stderr + 0.02
    assert checks.miscalibrated == 0


@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS)
def test_ratios_find_a_planted_constant(prior):
    """`log E[p_t / p_{t+1}]` of densities that are off by c_t is c_t - c_{t+1}, and the sum c_0 - c_{T+1}."""
    true, off = (check_levels(exact_model(c, prior), pixels(500), 4000) for c in (0 * RAMP, RAMP))
    planted = float(RAMP[0] - RAMP[-1]) / (DIM * math.log(2))
    assert off.ratio_bits_per_dim - true.ratio_bits_per_dim == pytest.approx(planted, rel=1e-6)
    assert off.miscalibrated > 0.5 and off.worst > 0.5
    assert off.cross_entropy > true.cross_entropy


def test_posteriors_of_one_level_that_is_too_likely():
    """With one level's logit raised by log 2, its mean posterior p becomes E[2 q / (1 + q)]."""
    shift = torch.zeros(T + 2, dtype=torch.float64)
    shift[20] = math.log(2)
    data = pixels(500)
    true, off = (check_levels(exact_model(c, PRIORS["uniform"]), data, 4000) for c in (0 * shift, shift))
    rise = off.log_mean_posterior[20] - true.log_mean_posterior[20]
    mean = math.exp(true.log_mean_posterior[20]) / (T + 2)
    assert math.log(2 / (1 + 2 * mean)) - 0.2 < rise < math.log(2)
    assert off.log_mean_posterior[19] < true.log_mean_posterior[19]


def test_classes_that_are_alike_have_the_entropy_of_a_guess():
    model = exact_model(0 * RAMP, PRIORS["uniform"], "joint")
    ce, accuracy = check_classes(model, pixels(300))
    assert ce == pytest.approx(math.log(CLASSES), abs=1e-6) and accuracy == pytest.approx(1 / 3, abs=1e-9)
    assert check_classes(exact_model(0 * RAMP, PRIORS["uniform"]), pixels(30)) is None


@pytest.fixture
def config(tmp_path):
    return tiny_config(write_images(tmp_path / "images.npz"), steps=6)


def with_output(config, conditioning="none", objective="cdm", **output):
    return replace(
        config,
        network=replace(config.network, conditioning=conditioning),
        train=replace(config.train, objective=objective),
        output=replace(config.output, **output),
    )


@pytest.mark.parametrize(
    ("conditioning", "objective", "keys"),
    [
        ("none", "cdm", {"bits_per_dim", "level_ce"}),
        ("joint", "cdm", {"bits_per_dim", "level_ce", "class_ce", "accuracy"}),
        ("embedding", "cdm", {"bits_per_dim", "level_ce", "class_ce", "accuracy"}),
        ("none", "ddm", set()),
        ("none", "classifier", {"class_ce", "accuracy"}),
    ],
)
def test_every_kind_of_model_is_validated(config, conditioning, objective, keys):
    config = with_output(config, conditioning, objective)
    data = load_data(config.data.source, "validation")
    model, before = new_state(config, torch.device("cpu")).model, torch.get_rng_state()
    numbers = validate(model, data)
    assert keys <= numbers.keys() and bool(numbers) == bool(keys)
    assert all(math.isfinite(value) for value in numbers.values())
    assert numbers == validate(model, data) and model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_best_checkpoint_is_a_run_of_its_own(tmp_path, config, monkeypatch):
    monkeypatch.setattr("cdm_fast.training.finish.write_final", lambda *_: {})
    figures = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(
        "cdm_fast.training.loop.validate",
        lambda *_: {
            "bits_per_dim": next(figures),
            "ratio_bits_per_dim": 0.0,
            "ratio_bits_per_dim_stderr": 0.0,
        },
    )
    summary = train(
        with_output(config, evaluate_every=2, keep_best="bits_per_dim"), tmp_path / "run", device="cpu"
    )
    best = tmp_path / "run" / "best"
    assert summary["best"] == str(best) and load_checkpoint(best).step == 4
    assert json.loads((best / "score.json").read_text()) == {
        "criterion": "bits_per_dim",
        "value": 1.0,
        "step": 4,
    }
    assert [path.name for path in (best / "checkpoints").iterdir()] == ["step-00000004"]
    assert load(best).schedule.T == load(tmp_path / "run").schedule.T


def test_a_later_best_of_a_repeated_part_is_replaced(tmp_path, config):
    config = with_output(config, evaluate_every=2, keep_best="level_ce")
    state = new_state(config, torch.device("cpu"))
    best = BestCheckpoint(tmp_path, config)
    for step, value, kept in ((6, 2.0, True), (2, 3.0, False), (4, 1.0, True), (5, math.nan, False)):
        state.step = step
        assert best.offer({"level_ce": value}, lambda: to_checkpoint(state, config)) is kept
    assert load_checkpoint(tmp_path / "best").step == 4
    assert BestCheckpoint(tmp_path, config).value == 1.0
    other = with_output(config, evaluate_every=2, keep_best="bits_per_dim")
    assert BestCheckpoint(tmp_path, other).value == math.inf


def test_validation_and_best_change_no_step(tmp_path, config, monkeypatch):
    monkeypatch.setattr("cdm_fast.training.finish.write_final", lambda *_: {})
    train(config, tmp_path / "plain", device="cpu")
    train(with_output(config, evaluate_every=2, keep_best="level_ce"), tmp_path / "watched", device="cpu")
    plain, watched = (load_checkpoint(tmp_path / name).tensors["model"] for name in ("plain", "watched"))
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    resume(tmp_path / "watched" / "best", device="cpu")


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"keep_best": "level_ce", "evaluate_every": 0}, "--evaluate-every"),
        ({"keep_best": "class_ce", "evaluate_every": 2}, "--conditioning"),
        ({"keep_best": "level_ce", "evaluate_every": 2, "objective": "ddm"}, "--objective"),
    ],
)
def test_a_criterion_that_is_not_measured_is_refused(config, settings, flag):
    with pytest.raises(UserError, match=flag):
        check(with_output(config, **settings))


def test_the_picture_of_calibration_is_drawn(tmp_path, config):
    config = with_output(config, sample_every=3)
    config = replace(config, train=replace(config.train, steps=4))
    train(config, tmp_path / "run", device="cpu")
    assert (tmp_path / "run" / "calibration.png").stat().st_size > 1000
    assert main(["plot", str(tmp_path / "run")]) == 0
