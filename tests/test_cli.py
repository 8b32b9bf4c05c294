"""The command line: help, flags, and every command on a small run, with and without --json."""

import io
import json
import os
import resource
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest
import torch
from PIL import Image

from cdm_fast.cli import main
from cdm_fast.cli.entry import parse
from cdm_fast.config import PRESETS
from cdm_fast.data import load_data
from cdm_fast.runs.load import load
from tests.tiny_run import CLASSES, FLAGS, GREY_LEVELS, with_settings, write_images

COMMANDS = (
    "train",
    "sample",
    "nll",
    "calibrate",
    "classify",
    "score",
    "denoise",
    "restore",
    "plot",
    "replay",
    "convert",
    "doctor",
)


def call(*arguments):
    """(exit status, stdout, stderr) of a command line."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
    return status, out.getvalue(), err.getvalue()


def call_json(*arguments):
    """The one JSON object that a successful command with --json prints."""
    status, out, err = call(*arguments, "--json")
    assert status == 0, err
    assert out.count("\n") == 1
    return json.loads(out)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(run directory, summary) of a class-conditional run."""
    folder = tmp_path_factory.mktemp("cli")
    data = write_images(folder / "images.npz")
    out = folder / "runs" / "tiny"
    flags = [*FLAGS, "--conditioning", "embedding", "--device", "cpu"]
    return out, call_json("train", "--data", data, "--out", out, *flags)


def test_help_is_quick_and_imports_no_torch():
    script = (
        "import sys, cdm_fast.cli as c\n"
        "try: c.main(['train', '--help'])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "--ce-weight FLOAT" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0  # CPU seconds


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--json" in text and f"cdm-fast {command}" in text


@pytest.mark.parametrize("name", PRESETS)
def test_preset_flag_chooses_the_defaults(name):
    assert parse(["train", "--preset", name]).config == PRESETS[name]
    assert parse(["train", f"--preset={name}"]).config == PRESETS[name]


def test_flags_override_the_preset():
    flags = (
        "--preset cifar10 --multipliers 1 2 --attention-resolutions --no-flip --T 50 --data here --lr 1e-5"
    )
    config = parse(["train", *flags.split()]).config
    assert config.network.multipliers == (1, 2)
    assert config.network.attention_resolutions == ()
    assert config.data.flip is False
    assert (config.schedule.T, config.data.source, config.train.lr) == (50, "here", 1e-5)
    assert config.network.base_channels == PRESETS["cifar10"].network.base_channels


def test_every_kind_of_flag_arrives():
    assert parse(["train", *FLAGS]).config == with_settings(PRESETS["digits-encoder"])


def test_train_summary(trained):
    out, summary = trained
    assert summary["run"] == str(out)
    assert (summary["stopped"], summary["step"], summary["steps"]) == ("finished", 6, 6)
    assert (summary["method"], summary["level"], summary["protocol"]) == ("single", 0, "dequantized")
    assert {
        "bits_per_dim",
        "bits_per_dim_stderr",
        "images_per_second",
        "seconds",
        "num_images",
    } <= summary.keys()
    assert summary["ratio_check"]["worst"] >= 0


def test_train_tells_a_person_that_the_figure_is_unaudited(trained):
    out, _ = trained
    status, told, progress = call("train", "--resume", out, "--steps", "8", "--device", "cpu")
    assert status == 0
    assert "finished, step 8 of 8" in told
    assert "bits/dim, unaudited" in told and "adjacent-level ratio check" in told
    assert "step 8/8  loss" in progress and "loss" not in told
    call_json("train", "--resume", out, "--steps", "8")


def test_sample_writes_a_sheet_that_the_seed_determines(trained, tmp_path):
    out, _ = trained
    flags = ["--num", "5", "--steps", "3", "--sampler", "ddpm"]
    for name, seed in (("a.png", 1), ("b.png", 1), ("c.png", 2)):
        result = call_json("sample", out, *flags, "--seed", seed, "--out", tmp_path / name)
        assert (result["num_images"], result["out"]) == (5, str(tmp_path / name))
    same, again, other = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png", "c.png"))
    assert same == again != other
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.width > 2 * 64 and sheet.height > CLASSES * 64  # a row for each class
    call_json("sample", out, *flags, "--label", 1, "--out", tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as sheet:
        assert sheet.width > 3 * 8 and sheet.mode == "L"


def test_the_way_between_two_classes_is_a_sheet(trained, tmp_path):
    out, _ = trained
    flags = ["--num", "2", "--steps", "2", "--label", "0", "--between"]
    found = call_json("sample", out, *flags, "2", "--out", tmp_path / "way.png")
    assert found["between"] == 2
    with Image.open(tmp_path / "way.png") as sheet:
        assert sheet.width > 9 * 64 and 2 * 64 < sheet.height < 4 * 64
    for wrong, told in ((["3"], "0 to 2"), (["2", "--out", tmp_path / "way.npz"], "ends in .png")):
        status, _, err = call("sample", out, *flags, *wrong)
        assert status == 2 and told in err


def test_samples_in_bf16_are_those_of_fp32_rounded(trained, tmp_path):
    out, _ = trained
    sheets = []
    for precision in ("fp32", "bf16"):
        path = tmp_path / f"{precision}.npz"
        flags = ["--num", "8", "--steps", "6", "--precision", precision, "--out", path]
        assert call_json("sample", out, *flags)["precision"] == precision
        sheets.append(np.load(path)["images"].astype(float) / (GREY_LEVELS - 1))
    difference = np.abs(sheets[0] - sheets[1])
    assert difference.mean() < 0.01


def test_sample_npz_is_a_data_source(trained, tmp_path):
    out, _ = trained
    call_json("sample", out, "--num", "30", "--steps", "2", "--label", "1", "--out", tmp_path / "s.npz")
    with np.load(tmp_path / "s.npz") as arrays:
        assert arrays["images"].shape == (30, 8, 8, 1) and arrays["images"].dtype == np.uint8
        assert set(arrays["labels"].tolist()) == {1}
    assert load_data(tmp_path / "s.npz").num_grey_levels == GREY_LEVELS


def test_sample_goes_into_the_run_directory_by_default(trained):
    out, _ = trained
    result = call_json("sample", out, "--num", "4", "--steps", "2")
    assert result["out"] == str(out / "samples-blind-2-0.png")
    assert (out / "samples-blind-2-0.png").exists()


def test_corrected_samples_tell_their_acceptance(trained, tmp_path):
    out, _ = trained
    flags = ["--num", "4", "--steps", "3", "--sampler", "mala", "--moves", "1", "--out", tmp_path / "m.png"]
    result = call_json("sample", out, *flags)
    assert len(result["acceptance"]) == len(result["levels"]) == 3 and result["moves"] == 1
    assert all(0 <= rate <= 1 for rate in result["acceptance"])
    assert result["acceptance_picture"] == str(tmp_path / "m-acceptance.png")
    assert (tmp_path / "m-acceptance.png").stat().st_size > 1000


def test_nll_agrees_with_training(trained):
    out, summary = trained
    result = call_json("nll", out, "--draws", "2")
    assert result["run"] == str(out)
    assert result["num_images"] == summary["num_images"]
    assert np.isfinite(result["bits_per_dim"]) and result["bits_per_dim_stderr"] > 0
    status, told, _ = call("nll", out, "--split", "validation", "--level", "3", "--draws", "1")
    assert status == 0 and "validation images" in told and "level 3" in told and "images/s" in told


def test_denoise_estimates_sigma_and_writes_images(trained, tmp_path):
    out, _ = trained
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8)).astype(np.uint8)
    for name in ("one.png", "two.png"):
        Image.fromarray(pixels).save(tmp_path / name)
    result = call_json(
        "denoise", out, tmp_path / "one.png", tmp_path / "two.png", "--out", tmp_path / "clean"
    )
    assert [row["out"] for row in result["images"]] == [
        str(tmp_path / "clean" / n) for n in ("one.png", "two.png")
    ]
    assert all(row["sigma"] >= 0 and 0 <= row["level"] <= 8 for row in result["images"])
    assert Image.open(tmp_path / "clean" / "two.png").size == (8, 8)


def test_plot_draws_every_picture(trained):
    out, _ = trained
    result = call_json("plot", out)
    names = {os.path.basename(path) for path in result["pictures"]}
    assert names == {"loss.png", "confusion.png", "mse.png", "calibration.png"}


def test_doctor_reports():
    assert {"version", "devices", "backends", "missing"} <= call_json("doctor").keys()


def test_everything_but_the_result_goes_to_stderr(trained, monkeypatch):
    out, _ = trained
    monkeypatch.setattr("cdm_fast.cli.sample.sample", lambda *_, **__: print("a library speaks") or 1 / 0)
    streams = io.StringIO(), io.StringIO()
    with redirect_stdout(streams[0]), redirect_stderr(streams[1]), pytest.raises(ZeroDivisionError):
        main(["sample", str(out), "--steps", "2", "--json"])
    assert [stream.getvalue() for stream in streams] == ["", "a library speaks\n"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 9 GiB"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
    ids=["python", "accelerator", "processor"],
)
def test_memory_that_is_not_enough_is_one_line(trained, monkeypatch, error):
    def fail(command):
        raise error

    monkeypatch.setattr("cdm_fast.cli.commands.run", fail)
    status, out, err = call("sample", trained[0], "--json")
    assert status == 2 and err.startswith("cdm-fast: error: out of memory (") and err.count("\n") == 1
    assert str(error) in json.loads(out)["error"]


def test_another_failure_of_ours_is_not_hidden(trained, monkeypatch):
    def fail(command):
        raise RuntimeError("a mistake")

    monkeypatch.setattr("cdm_fast.cli.commands.run", fail)
    with pytest.raises(RuntimeError, match="a mistake"):
        call("sample", trained[0])


def test_second_interrupt_exits_130(trained, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("cdm_fast.cli.sample.sample", interrupted)
    assert call("sample", trained[0], "--steps", "2")[0] == 130


def test_warnings_are_one_line_each(trained):
    out, _ = trained
    newest = sorted((out / "checkpoints").iterdir())[-1]
    content = (newest / "ema.safetensors").read_bytes()
    (newest / "ema.safetensors").write_bytes(content[:-1])
    try:
        status, _, err = call("sample", out, "--num", "1", "--steps", "1")
    finally:
        (newest / "ema.safetensors").write_bytes(content)
    assert status == 0
    assert err.startswith("cdm-fast: warning: checkpoint ") and err.count("\n") == 1


def test_classes_in_turn(trained, tmp_path):
    call_json("sample", trained[0], "--num", "6", "--steps", "1", "--out", tmp_path / "s.npz")
    with np.load(tmp_path / "s.npz") as arrays:
        assert arrays["labels"].tolist() == [i % CLASSES for i in range(6)]


def test_guidance_changes_the_samples(trained, tmp_path):
    for name, guidance in (("plain", 0), ("guided", 2.5)):
        flags = ["--num", "3", "--steps", "2", "--out", tmp_path / f"{name}.npz"]
        assert call_json("sample", trained[0], *flags, "--guidance", guidance)["guidance"] == guidance
    plain, guided = (np.load(tmp_path / f"{name}.npz")["images"] for name in ("plain", "guided"))
    assert (plain != guided).any()


def test_joint_run_holds_its_class_prior_and_scores_the_marginal(tmp_path):
    labels = np.repeat([0, 1, 2], [30, 12, 6])
    data, out = write_images(tmp_path / "images.npz", labels=labels), tmp_path / "run"
    flags = [*FLAGS, "--conditioning", "joint", "--device", "cpu"]
    summary = call_json("train", "--data", data, "--out", out, *flags)
    score = call_json("nll", out, "--draws", 2)
    assert score["bits_per_dim"] == pytest.approx(summary["bits_per_dim"])
    call_json("sample", out, "--num", "6", "--steps", "2", "--guidance", "1", "--out", tmp_path / "s.npz")
    with np.load(tmp_path / "s.npz") as arrays:
        assert arrays["labels"].tolist() == [0, 1, 2, 0, 1, 2]
    model, counts = load(out), np.bincount(load_data(str(data), "train").labels)
    np.testing.assert_allclose(model.log_class_prior.exp(), counts / counts.sum())
    x = torch.rand(4, 1, 8, 8) * 2 - 1
    with torch.no_grad():
        joint = model.log_prob_classes(x) + model.log_class_prior
        torch.testing.assert_close(joint.logsumexp(1).float(), model.log_prob(x), rtol=1e-4, atol=1e-3)


def test_guidance_without_classes_is_refused(tmp_path):
    data, out = write_images(tmp_path / "images.npz"), tmp_path / "run"
    call_json("train", "--data", data, "--out", out, *FLAGS, "--device", "cpu")
    status, _, err = call("sample", out, "--guidance", "1")
    assert status == 2 and "was trained without classes" in err
