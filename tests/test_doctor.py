"""`doctor` reports versions, devices and backends correctly, and how to install what is missing."""

import json
from importlib.metadata import version

import pytest
import torch

from cdm_fast.cli import doctor
from cdm_fast.ops import backend

OPS = {
    "attention",
    "denoise",
    "from_noise_down",
    "group_norm_silu",
    "noise_level_ce",
    "noising",
    "rms_norm",
    "swiglu",
}


def test_the_report_is_json_and_names_versions_and_devices():
    report = json.loads(json.dumps(doctor.report()))
    assert report["version"] == version("cdm_fast")
    assert report["packages"]["torch"] == version("torch")
    assert report["devices"][0]["device"] == "cpu"
    assert len(report["devices"]) == 1 + torch.cuda.device_count()
    assert f"torch uses {torch.get_num_threads()} threads" in report["devices"][0]["detail"]


def test_every_op_has_a_backend_and_a_reason_on_every_device():
    rows = doctor.report()["backends"]
    kinds = {"cpu", "cuda"} if torch.cuda.is_available() else {"cpu"}
    for device in kinds:
        assert {row["op"] for row in rows if row["device"] == device} >= OPS
    assert all(row["backend"] in backend.BACKENDS and row["reason"] for row in rows)


def test_without_the_extension_every_op_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(backend, "_loaded", ImportError("no such file"))
    report = doctor.report()
    assert report["extension"] is None
    assert {row["backend"] for row in report["backends"] if row["device"] == "cpu"} == {"reference"}
    remedy = next(row["remedy"] for row in report["missing"] if row["what"] == "C++ kernels")
    assert "no such file" in remedy and "install a C++ compiler" in remedy
    assert "no C++ kernels" in report["devices"][0]["detail"]


@pytest.mark.parametrize("extra", sorted(doctor.EXTRAS))
def test_a_missing_extra_comes_with_the_command_that_installs_it(monkeypatch, extra):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    missing = doctor.report()["missing"]
    assert any(row["remedy"] == f"pip install 'cdm_fast[{extra}]'" for row in missing)


def test_a_missing_package_is_reported_not_raised(monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-distribution"))
    report = doctor.report()
    assert report["packages"]["no-such-distribution"] is None
    assert "no-such-distribution (missing)" in doctor.render(report)


def test_the_text_tells_all_that_the_report_does():
    report = doctor.report()
    text = doctor.render(report)
    for row in report["backends"]:
        assert row["op"] in text and row["reason"] in text
    for row in report["missing"]:
        assert row["remedy"] in text
    assert "Nothing is missing." in doctor.render({**report, "missing": []})
