"""`cdm-fast nll` by every method, on a run that trains in a second."""

import csv
import json
import sys

import numpy as np
import pytest
import torch

from cdm_fast import load
from cdm_fast.data.draws import batches, draw_generator
from cdm_fast.likelihood.units import bits_per_dim
from cdm_fast.plots.evaluation import write_audit
from cdm_fast.runs.checkpoint import read_config
from cdm_fast.runs.data import run_data
from tests.test_cli import call, call_json
from tests.tiny_run import FLAGS, write_images

AUDIT = ["--ode-images", "2", "--elbo-images", "4", "--particles", "4", "--runs", "2", "--tolerance", "0.01"]
AUDIT += ["--draws", "1", "--device", "cpu"]
FIGURES = ("bits_per_dim", "ode_bits_per_dim", "elbo_bits_per_dim", "log_z_bits_per_dim")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a run."""
    folder = tmp_path_factory.mktemp("nll")
    data = write_images(folder / "images.npz")
    call_json("train", "--data", data, "--out", folder / "run", *FLAGS, "--device", "cpu")
    return folder / "run"


def test_audit_prints_every_figure_and_draws_it(run, tmp_path):
    found = call_json("nll", run, "--method", "audit", *AUDIT, "--out", tmp_path / "images.csv")
    for key in FIGURES:
        assert np.isfinite(found[key]) and found[f"{key}_stderr"] >= 0
    assert found["audited_bits_per_dim"] == pytest.approx(found["bits_per_dim"] + found["log_z_bits_per_dim"])
    assert found["picture"] == str(run / "audit.png")
    assert (run / "audit.png").read_bytes().startswith(b"\x89PNG")
    kept = json.loads((run / "audit.json").read_text())
    assert kept["audited_bits_per_dim"] == found["audited_bits_per_dim"] and kept["ode"]["levels"]
    drawn = (run / "audit.png").read_bytes()
    other = call_json("nll", run, "--method", "audit", *AUDIT, "--level", "3")
    assert other["picture"] == str(run / "audit-other.png")
    assert json.loads((run / "audit.json").read_text()) == kept  # the audit of the data alone
    assert (run / "audit.png").read_bytes() == drawn
    with open(tmp_path / "images.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == found["num_images"]
    assert sum(row["ode_bits_per_dim"] != "nan" for row in rows) == 2
    assert sum(row["elbo_bits_per_dim"] != "nan" for row in rows) == 4
    mean = sum(float(row["bits_per_dim"]) for row in rows) / len(rows)
    assert mean == pytest.approx(found["bits_per_dim"])
    status, told, progress = call("nll", run, "--method", "audit", *AUDIT, "--level", "3")
    assert status == 0 and "variational" not in told and "audited: the single pass" in told
    for part in ("probability-flow ODE", "single pass minus ODE", "log Z", "ratio check", "+-"):
        assert part in told
    assert "log Z, run 2 of 2" in progress


def lists_of_numbers(value, name=""):
    """The names of the lists of numbers in a JSON value."""
    if isinstance(value, dict):
        return [found for key, item in value.items() for found in lists_of_numbers(item, f"{name}/{key}")]
    return [name] if isinstance(value, list) and value and not isinstance(value[0], str) else []


@pytest.mark.parametrize("method", ["single", "ode", "elbo", "audit"])
def test_standard_output_has_the_summary_and_out_the_arrays(run, tmp_path, method):
    flags = ["--method", method, *AUDIT, "--out", tmp_path / "values.csv"]
    found = call_json("nll", run, *flags)
    assert lists_of_numbers(found) == [] and found["report"] == str(tmp_path / "values.json")
    report = json.loads((tmp_path / "values.json").read_text())
    arrays = lists_of_numbers(report)
    wanted = {
        "single": ["/ratio_check/log_mean_ratio"],
        "ode": ["/ode/levels"],
        "elbo": ["/elbo/steps"],
        "audit": ["/ratio_check/log_mean_ratio", "/log_z/log_z", "/elbo/steps"],
    }[method]
    assert set(wanted) <= set(arrays)
    for key, value in found.items():
        if not isinstance(value, dict) and key != "images_per_second":
            assert report[key] == value


def test_train_and_calibrate_print_no_arrays(run, tmp_path):
    summary = call_json("train", "--resume", run, "--steps", "7", "--device", "cpu")
    assert lists_of_numbers(summary) == [] and summary["ratio_check"]["worst"] >= 0
    few = ["--particles", "4", "--runs", "2", "--device", "cpu"]
    assert lists_of_numbers(call_json("calibrate", run, *few)) == []
    call_json("calibrate", run, "--undo")


@pytest.mark.parametrize("method", ["ode", "elbo"])
def test_one_method_alone(run, tmp_path, method):
    out = tmp_path / "images.npz"
    found = call_json("nll", run, "--method", method, *AUDIT, "--out", out)
    assert found["method"] == method and found["out"] == str(out)
    assert np.isfinite(found[f"{method}_bits_per_dim"]) and found[f"{method}_bits_per_dim_stderr"] > 0
    with np.load(out) as arrays:
        values = arrays[f"{method}_bits_per_dim"]
        assert "bits_per_dim" not in arrays
    assert np.nanmean(values) == pytest.approx(found[f"{method}_bits_per_dim"])


def test_the_paper_protocol_says_that_it_is_not_comparable(run):
    status, told, _ = call("nll", run, "--protocol", "paper", "--draws", "1")
    assert status == 0 and "not comparable" in told and "without dequantisation" in told
    assert "not comparable" in call_json("nll", run, "--protocol", "paper", "--draws", "1")["warning"]
    assert call_json("nll", run, "--draws", "1")["warning"] is None


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--out", "values.txt"], ["values.txt", ".npz or .csv"]),
        (["--method", "ode", "--level", "9"], ["level 9", "T = 8"]),
        (["--method", "audit", "--level", "-1"], ["level -1"]),
        (["--method", "elbo", "--level", "2"], ["--level 2", "level 0"]),
        (["--method", "ode", "--precision", "bf16"], ["--precision bf16", "--method single"]),
        (["--method", "ode", "--protocol", "paper"], ["--protocol paper", "--method single"]),
        (["--method", "ode", "--tolerance", "0"], ["tolerance is 0"]),
        (["--method", "ode", "--probes", "1"], ["probes is 1"]),
        (["--method", "ode", "--ode-images", "1"], ["1 ODE images"]),
        (["--method", "elbo", "--elbo-images", "1"], ["1 ELBO images"]),
        (["--method", "audit", "--runs", "1"], ["runs is 1"]),
        (["--method", "audit", "--particles", "1"], ["particles is 1"]),
        (["--method", "audit", "--rungs", "1"], ["1 rungs"]),
        (["--method", "audit", "--draws", "0"], ["draws is 0"]),
        (["--method", "guess"], ["guess"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else None,
)
def test_bad_flags_are_one_line(run, flags, told):
    status, out, err = call("nll", run, *flags)
    error = [line for line in err.splitlines() if line.startswith("cdm-fast: error:")]
    assert status == 2 and out == "" and len(error) == 1 and err.splitlines()[-1] == error[0]
    assert all(part in error[0] for part in told), error


@pytest.mark.parametrize("method", ["ode", "audit"])
def test_a_missing_solver_is_one_line(run, monkeypatch, method):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    status, _, err = call("nll", run, "--method", method, *AUDIT)
    assert status == 2 and 'pip install "cdm_fast[audit]"' in err and err.count("\n") == 1


def test_a_plain_denoising_run_has_ode_and_bound_but_no_single_pass(tmp_path):
    data, out = write_images(tmp_path / "images.npz"), tmp_path / "run"
    flags = ["--objective", "ddm", "--architecture", "unet", "--steps", "1"]
    call_json("train", "--data", data, "--out", out, *FLAGS, *flags)
    status, _, err = call("nll", out)
    assert status == 2 and "--method ode, elbo or audit" in err and err.count("\n") == 1
    found = call_json("nll", out, "--method", "audit", *AUDIT)
    gap = found["elbo_bits_per_dim"] - found["ode_bits_per_dim"]
    assert np.isfinite(gap) and found["gap_bits_per_dim"] == pytest.approx(gap)
    assert found["ode"]["difference"] is None and "8 levels" in found["ode"]["path"]
    assert call_json("nll", out, "--method", "ode", *AUDIT)["ode_bits_per_dim"] == found["ode_bits_per_dim"]


@pytest.fixture(scope="module", params=["embedding", "joint"])
def conditional(request, tmp_path_factory):
    """The directory of a class-conditional run of either kind, trained without label dropout."""
    folder = tmp_path_factory.mktemp(request.param)
    data = write_images(folder / "images.npz")
    flags = [*FLAGS, "--conditioning", request.param, "--label-dropout", "0", "--device", "cpu"]
    call_json("train", "--data", data, "--out", folder / "run", *flags)
    return folder / "run"


def test_given_chooses_whose_likelihood_it_is(conditional):
    """Against the model's own log_prob, for one dequantisation draw of the test images."""
    config, model = read_config(conditional), load(conditional)
    data = run_data(config, "test")
    (_, x), *more = batches(data, 500, draw_generator(0, 0))
    assert not more
    with torch.no_grad():
        expected = {
            "none": model.log_prob(x),
            "label": model.log_prob(x, 0, label=data.labels),
            "all": (model.log_prob_classes(x) + model.log_class_prior).logsumexp(1),
        }
    for given, log_prob in expected.items():
        found = call_json("nll", conditional, "--given", given, "--draws", "1", "--device", "cpu")
        assert found["given"] == given
        assert found["bits_per_dim"] == pytest.approx(float(bits_per_dim(log_prob, data).mean()), abs=1e-4)


def test_a_null_class_that_was_never_trained_is_told_of(conditional):
    embedding = read_config(conditional).network.conditioning == "embedding"
    found = call_json("nll", conditional, "--draws", "1")
    assert found["given"] == ("label" if embedding else "none")
    asked = call_json("nll", conditional, "--draws", "1", "--given", "none")
    assert any("never saw" in note for note in asked["notes"]) == embedding


def test_ode_and_bound_of_labels_and_of_all_classes(conditional):
    """The ODE of all classes is the mixture of the ODEs of each."""
    flags = ["--method", "ode", *AUDIT, "--out", conditional / "values.npz"]
    values = {}
    for given in ("label", "all", "none"):
        call_json("nll", conditional, *flags, "--given", given)
        with np.load(conditional / "values.npz") as arrays:
            values[given] = arrays["ode_bits_per_dim"][~np.isnan(arrays["ode_bits_per_dim"])]
    bits = np.log2(3) / 64  # a third of one class's density is the least that the mixture has
    assert (values["all"] <= values["label"] + bits + 1e-3).all()
    assert (np.abs(values["all"] - values["label"]) > 0).any()
    found = call_json("nll", conditional, "--method", "elbo", *AUDIT, "--given", "label")
    assert np.isfinite(found["elbo_bits_per_dim"]) and found["elbo"]["given"] == "label"
    for method, told in (("elbo", "--given all works with"), ("audit", "log Z")):
        status, _, err = call("nll", conditional, "--method", method, *AUDIT, "--given", "all")
        assert status == 2 and told in err and err.count("\n") == 1


def test_an_interrupt_leaves_at_once(run, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("cdm_fast.likelihood.ode_report.flow_log_prob", interrupted)
    assert call("nll", run, "--method", "ode", *AUDIT)[0] == 130


def test_the_picture_needs_no_bound(run, tmp_path):
    flags = ["--level", "2", "--rungs", "4", "--out", tmp_path / "values.npz"]
    found = call_json("nll", run, "--method", "audit", *AUDIT, *flags)
    assert found["elbo_bits_per_dim"] is None
    found = json.loads((tmp_path / "values.json").read_text())
    assert write_audit(found, tmp_path / "again.png").stat().st_size > 10_000
