"""log Z of densities that integrate to one, or to a planted constant; and the whole audit."""

import csv
import inspect
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.support.analytic import ExactImageNetwork, GaussianMixture
from cdm_fast import CDM, DDM, NoiseSchedule, UserError
from cdm_fast.cli import arguments
from cdm_fast.cli.describe import describe_ode
from cdm_fast.cli.per_image import write_per_image
from cdm_fast.config.choices import PARTICLES
from cdm_fast.data import ImageData
from cdm_fast.likelihood import audit, evaluate, evaluate_elbo, evaluate_ode, measure_log_z
from cdm_fast.likelihood.ode_outliers import find_outliers
from cdm_fast.model import Denoiser
from cdm_fast.runs.calibrate import calibrate

SHAPE = (1, 2, 2)
T = 40
SCHEDULE = NoiseSchedule.uniform(T)
VARIANCE = 0.2


def gaussian_pixels(num=300, grey=256, seed=0):
    """Independent Gaussian pixels of variance `VARIANCE`, quantised so finely that it hardly shows."""
    generator = torch.Generator().manual_seed(seed)
    x = (VARIANCE**0.5 * torch.randn(num, *SHAPE, generator=generator)).clamp(-0.999, 0.999)
    images = ((x + 1) * grey / 2).floor().to(torch.uint8)
    return ImageData(images, torch.arange(num) % 3, grey, 3, name="gaussian", split="test")


def exact_model(shift=None):
    """The exact model of those pixels; `shift` (T+2,) nats puts a constant on every level."""
    density = GaussianMixture.gaussian(torch.zeros(4), VARIANCE * torch.eye(4))
    prior = None if shift is None else shift.exp()
    return CDM(ExactImageNetwork(density, SCHEDULE, prior), SCHEDULE, input_shape=SHAPE)


DATA = gaussian_pixels()
RAMP = torch.linspace(3, 0, T + 2, dtype=torch.float64)


@pytest.fixture(scope="module")
def report():
    """An audit of a model whose level t is off by the constant `RAMP[t]`."""
    return audit(exact_model(RAMP), DATA, draws=2, ode_images=16, elbo_images=300, particles=200, runs=3)


@pytest.mark.parametrize("shifted", [False, True], ids=["normalised", "shifted"])
def test_log_z_is_the_constant_within_a_tenth_of_a_nat(shifted):
    found = measure_log_z(exact_model(RAMP if shifted else None), DATA, particles=300, runs=3)
    wanted = (RAMP if shifted else 0 * RAMP)[found.levels].tolist()
    assert found.levels == [*range(T + 1, -1, -1)]
    assert found.log_z == pytest.approx(wanted, abs=0.1)
    assert found.log_z_up == pytest.approx(wanted, abs=0.1)
    assert found.log_z_half == pytest.approx(wanted, abs=0.15)
    assert found.log_z_bits_per_dim == pytest.approx(found.log_z[-1] / (4 * math.log(2)))
    assert max(found.log_z_stderr + found.log_z_up_stderr) < 0.08
    assert found.smallest_ess > 0.3 and 0.4 < found.acceptance < 0.75
    assert found.at(7) == (found.log_z[T + 1 - 7], found.log_z_stderr[T + 1 - 7])


def test_a_coarse_ladder_keeps_the_levels_that_are_asked_for():
    found = measure_log_z(exact_model(RAMP), DATA, particles=100, runs=2, rungs=9, through=(3, 0, T + 1))
    assert found.levels == [41, 36, 31, 26, 21, 16, 11, 6, 3, 1, 0]
    assert found.at(3)[0] == pytest.approx(float(RAMP[3]), abs=0.4)


def test_an_audit_finds_the_single_pass_out(report):
    """The single pass boasts 3 nats; ODE, bound and audited figure all tell the entropy of the pixels."""
    entropy = 0.5 * math.log2(2 * math.pi * math.e * VARIANCE) + 7
    boast = 3 / (4 * math.log(2))
    assert report.single.bits_per_dim == pytest.approx(entropy - boast, abs=0.06)
    assert report.log_z_bits_per_dim == pytest.approx(boast, abs=0.04)
    assert report.audited_bits_per_dim == pytest.approx(entropy, abs=0.07)
    assert report.ode.difference == pytest.approx(-boast, abs=0.01)
    assert report.elbo is not None
    assert report.elbo.bits_per_dim == pytest.approx(entropy, abs=0.07)
    assert abs(report.ode.tolerance_shift) < 1e-3 and report.ode.probe_stderr == 0


def test_an_audit_compares_single_pass_and_ode_level_by_level(report):
    expected = [-float(RAMP[t]) / (4 * math.log(2)) for t in report.ode.levels]
    assert len(report.ode.levels) > 5 and report.ode.difference_at == pytest.approx(expected, abs=0.01)


def test_the_json_of_an_audit(report):
    found = json.loads(json.dumps(report.to_json()))
    for key in ("bits_per_dim", "ode_bits_per_dim", "elbo_bits_per_dim", "log_z_bits_per_dim"):
        assert math.isfinite(found[key]) and found[f"{key}_stderr"] >= 0
    assert found["audited_bits_per_dim"] == found["bits_per_dim"] + found["log_z_bits_per_dim"]
    assert found["method"] == "audit" and found["ratio_check"]["log_mean_ratio_stderr"][0] > 0


def test_an_audit_above_level_zero_is_of_that_level():
    level = 10
    found = audit(exact_model(RAMP), DATA, level, draws=1, ode_images=4, particles=60, runs=2, rungs=8)
    a, s = float(SCHEDULE.a[level]), float(SCHEDULE.s[level])
    entropy = 0.5 * math.log2(2 * math.pi * math.e * (a**2 * VARIANCE + s**2)) + 7
    assert found.elbo is None and found.to_json()["elbo_bits_per_dim"] is None
    assert found.single.bits_per_dim == pytest.approx(
        entropy - float(RAMP[level]) / (4 * math.log(2)), abs=0.1
    )
    assert found.ode.difference == pytest.approx(-float(RAMP[level]) / (4 * math.log(2)), abs=0.01)
    assert found.normalisation.at(level)[0] == pytest.approx(float(RAMP[level]), abs=0.4)


def test_the_pieces_stand_alone():
    model = exact_model()
    entropy = 0.5 * math.log2(2 * math.pi * math.e * VARIANCE) + 7
    ode = evaluate_ode(model, DATA, level=0, num_images=300, tolerance=1e-3, batch_size=300)
    elbo = evaluate_elbo(model, DATA, num_images=300)
    assert ode.bits_per_dim == pytest.approx(entropy, abs=4 * ode.bits_per_dim_stderr)
    assert elbo.bits_per_dim == pytest.approx(entropy, abs=4 * elbo.bits_per_dim_stderr)
    assert elbo.prior + sum(elbo.steps) + elbo.reconstruction == pytest.approx(elbo.bits_per_dim)
    assert ode.index.tolist() == list(range(300)) and ode.per_image.shape == (300,)


class RunsAway(CDM):
    """The exact model, but for a push outwards wherever the pixels' mean is far above the others'."""

    def denoise(self, x, level, label=None):
        eps_hat, level = super().denoise(x, level, label), self.schedule.levels(level, x)
        a, s = self.amplitudes(level, x)
        far = x.mean((1, 2, 3), keepdim=True) > 1.5 * (a**2 * VARIANCE + s**2).sqrt()
        return torch.where(far, eps_hat + x, eps_hat)


@pytest.mark.parametrize("single_pass", [True, False], ids=["cdm", "denoiser alone"])
def test_an_image_whose_ode_runs_away_is_named_and_does_not_move_the_median(single_pass):
    images = gaussian_pixels(12).images
    images[7] = 250
    data = replace(DATA, images=images, labels=DATA.labels[:12])
    calm, wild = (kind(exact_model().network, SCHEDULE, input_shape=SHAPE) for kind in (CDM, RunsAway))
    if not single_pass:
        calm, wild = (Denoises(model) for model in (calm, wild))
    options = {"num_images": 12, "tolerance": 1e-3}
    before, after = (evaluate_ode(model, data, level=1, **options) for model in (calm, wild))
    assert before.outliers == [] and before.warning is None
    assert after.outliers == [7] and "1 of 12 images" in after.warning and "image 7 (" in after.warning
    assert "nats off, trajectory outside the range of noise)" in after.warning
    assert abs(after.bits_per_dim - before.bits_per_dim) > 5
    assert after.median_bits_per_dim == pytest.approx(before.median_bits_per_dim, abs=0.2)
    if single_pass:
        assert abs(after.difference) > 5 and abs(after.median_difference) < 0.05
    lines = [line for line in describe_ode(after.to_json()) if line.startswith("warning: ")]
    assert len(lines) == 1 and len(describe_ode(before.to_json())) == len(describe_ode(after.to_json())) - 1


class Denoises(Denoiser):
    """The denoiser of a model, without its likelihood."""

    def __init__(self, model):
        super().__init__(model, model.schedule, SHAPE)

    def denoise(self, x, level, label=None):
        return self.network.denoise(x, level, label)


def test_outliers_are_counted_from_the_median_whatever_log_z_is():
    """A constant of 500 nats in the single pass makes no outliers, and NaN is one."""
    generator = torch.Generator().manual_seed(0)
    ode = 5 * torch.randn(100, generator=generator).double()
    norm = torch.randn(100, 64, generator=generator).square().sum(1)
    assert find_outliers(ode, ode + 500 + torch.randn(100, generator=generator), norm, 64) == {}
    ode[3], ode[5], norm[9] = ode[3] - 60, torch.nan, 300
    assert list(find_outliers(ode, torch.zeros(100).double(), norm, 64)) == [3, 5, 9]
    assert list(find_outliers(ode, None, norm, 64)) == [5, 9]
    ode[3] -= 500  # further than images differ from each other
    assert list(find_outliers(ode, None, norm, 64)) == [3, 5, 9]


@pytest.mark.parametrize(
    ("measure", "told"),
    [
        (lambda m: measure_log_z(m, DATA, particles=2), "particles is 2"),
        (lambda m: measure_log_z(m, DATA, runs=1), "runs is 1"),
        (lambda m: measure_log_z(m, DATA, moves=0), "moves is 0"),
        (lambda m: measure_log_z(m, DATA, rungs=1), "1 rungs"),
        (lambda m: evaluate_ode(m, DATA, num_images=1), "1 ODE images"),
        (lambda m: evaluate_ode(m, DATA, level=T + 1), f"level {T + 1}"),
        (lambda m: evaluate_ode(m, DATA, batch_size=0), "batch_size is 0"),
        (lambda m: evaluate(m, DATA, batch_size=0), "batch_size is 0"),
        (lambda m: evaluate_elbo(m, DATA, batch_size=0), "batch_size is 0"),
        (lambda m: evaluate_elbo(m, DATA, num_images=0), "0 ELBO images"),
        (lambda m: audit(m, DATA, level=T + 1), f"level {T + 1}"),
        (lambda m: audit(m, DATA, draws=0), "draws is 0"),
    ],
)
def test_bad_requests_are_named(measure, told):
    with pytest.raises(UserError, match=told):
        measure(exact_model())


def test_particles_have_one_default():
    defaults = {
        inspect.signature(f).parameters["particles"].default for f in (measure_log_z, audit, calibrate)
    }
    assert defaults == {arguments.Nll.particles, arguments.Calibrate.particles} == {PARTICLES}


@pytest.mark.parametrize("measure", [measure_log_z, audit])
def test_a_plain_denoiser_has_no_likelihood_in_one_pass(measure):
    with pytest.raises(UserError, match="DDM"):
        measure(DDM(nn.Identity(), SCHEDULE), DATA)


def test_per_image_values_as_npz_and_csv(tmp_path):
    index, value = torch.tensor([5, 2]), torch.tensor([0.1, -3.0])
    columns = {"bits_per_dim": (torch.arange(300), torch.arange(300.0)), "ode_bits_per_dim": (index, value)}
    with np.load(write_per_image(tmp_path / "a.npz", DATA, columns)) as arrays:
        assert arrays["index"].tolist() == list(range(300))
        assert arrays["label"].tolist() == DATA.labels.tolist()
        assert arrays["bits_per_dim"].tolist() == list(range(300))
        ode = arrays["ode_bits_per_dim"]
    assert ode[2] == -3 and ode[5] == pytest.approx(0.1) and np.isnan(ode).sum() == 298
    with open(write_per_image(tmp_path / "a.csv", DATA, columns)) as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 300 and float(rows[2]["ode_bits_per_dim"]) == -3
    assert (rows[4]["label"], rows[4]["bits_per_dim"], rows[4]["ode_bits_per_dim"]) == ("1", "4.0", "nan")
    with pytest.raises(UserError, match="a.txt: give a name that ends in .npz or .csv"):
        write_per_image(tmp_path / "a.txt", DATA, columns)
