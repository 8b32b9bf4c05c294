"""`replay` repeats a step exactly as training took it, and reports what was wrong with it."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from cdm_fast.cli import main
from cdm_fast.data import batch_indices
from cdm_fast.errors import UserError
from cdm_fast.training import finish, loop
from cdm_fast.training import replay as replay_module
from cdm_fast.training.replay import replay
from cdm_fast.training.step import draw_batch
from cdm_fast.training.train import train
from tests.tiny_run import tiny_config, write_images

BAD_STEP, BAD_IMAGE = 4, 5


@pytest.fixture
def config(tmp_path):
    config = tiny_config(write_images(tmp_path / "images.npz"), accumulate=2)
    config = replace(config, network=replace(config.network, conditioning="joint"))
    return replace(config, output=replace(config.output, log_every=1))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(finish, "write_final", lambda *_: {})


def poisoned(data, model, config, step):
    """The batch, one of whose images is not finite at one step."""
    batch = draw_batch(data, model, config, step)
    if step == BAD_STEP:
        batch.x_t[BAD_IMAGE] = math.nan
    return batch


def test_replayed_step_is_the_one_that_was_trained(quick, tmp_path, config):
    train(config, tmp_path / "run", device="cpu")
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    found = replay(tmp_path / "run", 5, device="cpu")  # the last of six, two after a checkpoint
    assert (found["from_step"], found["seed"], found["finite"]) == (3, 0, True)
    for name in ("loss", "ce", "mse"):
        assert found[name] == lines[5][name]
    assert found["grad_norm"] == pytest.approx(lines[5]["grad_norm"], rel=1e-5)
    norms = [row["grad_norm"] for row in found["parameters"]]
    assert norms == sorted(norms, reverse=True) and norms[0] < found["grad_norm"]


def test_images_alone_make_up_the_loss_of_the_batch(quick, tmp_path, config):
    config = replace(config, network=replace(config.network, dropout=0.0))
    train(config, tmp_path / "run", device="cpu")
    found = replay(tmp_path / "run", 4, device="cpu", out=tmp_path / "batch.npz")
    with np.load(tmp_path / "batch.npz") as batch:
        assert batch["loss"].mean() == pytest.approx(found["loss"], rel=1e-5)
        assert batch["x_t"].shape == batch["eps"].shape == (8, 1, 8, 8)
        assert batch["index"].tolist() == batch_indices(35, 8, 0, 4).tolist()
        worst = int(batch["loss"].argmax())
        assert found["images"][0] == {
            "index": batch["index"][worst],
            "level": batch["level"][worst],
            "label": batch["label"][worst],
            "loss": float(batch["loss"][worst]),
        }


def test_what_was_not_finite_is_named(quick, tmp_path, config, monkeypatch):
    for module in (loop, replay_module):
        monkeypatch.setattr(module, "draw_batch", poisoned)
    config = replace(config, train=replace(config.train, max_bad_steps=1))
    run = tmp_path / "run"
    with pytest.raises(UserError, match=rf"cdm-fast replay {run} --step {BAD_STEP} shows the first"):
        train(config, run, device="cpu")
    found = replay(run, BAD_STEP, device="cpu")
    assert not found["finite"] and math.isnan(found["loss"])
    assert found["images"][0]["index"] == batch_indices(35, 8, 0, BAD_STEP)[BAD_IMAGE]
    assert math.isnan(found["images"][0]["loss"]) and math.isfinite(found["images"][1]["loss"])
    assert not math.isfinite(found["parameters"][0]["grad_norm"])


def test_command_line(quick, tmp_path, config, capsys):
    run = tmp_path / "run"
    train(config, run, device="cpu")
    assert main(["replay", str(run), "--step", "5", "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("step 5 (seed 0), from the checkpoint of step 3: loss ") and "level" in told
    for flags, message in (
        (["--step", "2"], "no intact checkpoint of step 2 or before"),
        (["--step", "-1"], "--step is -1"),
        (["--step", "5", "--out", "batch.png"], "ends in .npz"),
    ):
        assert main(["replay", str(run), *flags]) == 2
        assert message in capsys.readouterr().err
