"""Several processes give the results of one, and they stop, fail and restart together."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cdm_fast.cli import main
from cdm_fast.config import NetworkConfig
from cdm_fast.errors import UserError
from cdm_fast.host import distributed as module
from cdm_fast.host.device import pick_device
from cdm_fast.host.distributed import gather_rows, rank_range, rank_rows
from cdm_fast.host.processes import Process, join
from cdm_fast.runs import build
from cdm_fast.runs.checkpoint import load_checkpoint
from cdm_fast.training.prepare import config_to_resume
from cdm_fast.training.train import resume, train
from tests import workers
from tests.accuracy import relative_error
from tests.tiny_run import FLAGS, tiny_config, write_images

LOSSES = 50


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Everything that could tell processes apart: dropout, flips, classes, parts, clipping, attention."""
    images = write_images(tmp_path_factory.mktemp("data") / "images.npz")
    settings = {
        "accumulate": 2,
        "clip_norm": 0.5,
        "optimizer": "adamw",
        "weight_decay": 0.01,
        "class_weight": 0.3,
    }
    config = tiny_config(images, **settings)
    network = replace(config.network, conditioning="embedding", dropout=0.3, attention_resolutions=(8,))
    return replace(config, data=replace(config.data, flip=True), network=network)


@contextmanager
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def alone(config):
    """What one process computes, with one thread."""
    with one_thread():
        yield workers.steps_taken(config, None, LOSSES)


@pytest.fixture
def several():
    """Lets this process be one of three."""
    yield lambda rank: join(Process(rank, 3, rank, 3))
    join(Process())


@pytest.mark.parametrize(
    ("count", "parallel", "steps"), [(2, "ddp", LOSSES), (4, "ddp", LOSSES), (2, "fsdp", 5), (4, "fsdp", 2)]
)
def test_processes_take_the_steps_of_one(tmp_path, config, alone, count, parallel, steps):
    found = workers.start(count, workers.joint_steps, tmp_path, config, parallel, steps)
    for dtype, tolerance in (("torch.float32", 1e-5), ("torch.float64", 1e-10)):
        for name, expected in alone[dtype].items():
            assert relative_error(found[0][dtype][name], expected) < tolerance, (dtype, name)
    many, expected = found[0]["losses"], alone["losses"]
    assert (many["loss"] - expected["loss"][:steps]).abs().max() < 1e-4
    assert all(torch.equal(other["losses"]["ema"], many["ema"]) for other in found)


def test_processes_attack_the_images_that_one_attacks(tmp_path, config):
    train = replace(config.train, adversarial="l2", budget=0.5)
    network = replace(config.network, conditioning="joint", head_rank=0)
    attacking = replace(config, network=network, train=train)
    with one_thread():
        expected = workers.many_steps(attacking, None, 4)
    for found in workers.start(2, workers.joint_losses, tmp_path, attacking, "ddp", 4):
        torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize(
    "network",
    [{"architecture": "transformer"}, {"conditioning": "joint", "head_rank": 0, "base_components": 2}],
    ids=["transformer", "base"],
)
def test_processes_with_other_networks_take_the_steps_of_one(tmp_path, config, network, parallel):
    config = replace(config, network=replace(config.network, **network))
    with one_thread():
        alone = workers.steps_taken(config, None, 3)
    found = workers.start(2, workers.joint_steps, tmp_path, config, parallel, 3)
    for name, expected in alone["torch.float64"].items():
        assert relative_error(found[0]["torch.float64"][name], expected) < 1e-10, name
    assert (found[0]["losses"]["loss"] - alone["losses"]["loss"]).abs().max() < 1e-4


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_step_that_is_bad_in_one_process_is_skipped_by_all(tmp_path, config, parallel):
    for found in workers.start(2, workers.joint_bad_step, tmp_path, config, parallel):
        assert found["bad"].tolist() == [1, 0, 2]
        assert found["loss"].isfinite().tolist() == [True, True, False, True]
        assert found["ema"].isfinite().all()


def test_measurements_that_processes_share_are_those_of_one(tmp_path, config):
    config = replace(config, network=replace(config.network, conditioning="joint"))
    expected = workers.measurements(config)
    for found in workers.start(2, workers.joint_measurements, tmp_path, config):
        for name, value in expected.items():
            assert relative_error(found[name], value) < 1e-5, name


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_run_of_processes_is_continued_by_one(tmp_path, config, monkeypatch, parallel):
    monkeypatch.setattr("cdm_fast.training.finish.write_final", lambda *_: {})
    train(config, tmp_path / "alone", device="cpu")
    stopped = workers.start(2, workers.joint_run, tmp_path, config, tmp_path / "run", parallel, 3)
    assert [(summary["stopped"], summary["step"]) for summary in stopped] == [("signal", 4)] * 2
    assert resume(tmp_path / "run", device="cpu")["stopped"] == "finished"
    got, expected = (load_checkpoint(tmp_path / name).tensors for name in ("run", "alone"))
    for part, tensors in expected.items():
        assert tensors.keys() == got[part].keys()
        vectors = (torch.cat([t[name].flatten() for name in tensors]) for t in (got[part], tensors))
        assert relative_error(*vectors) < 1e-4, part
    lines = [json.loads(line)["step"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert lines == [2, 4, 6]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_processes_keep_the_best_checkpoint_of_one(tmp_path, config, monkeypatch, parallel):
    monkeypatch.setattr("cdm_fast.training.finish.write_final", lambda *_: {})
    output = replace(config.output, evaluate_every=2, keep_best="level_ce")
    config = replace(config, output=output, train=replace(config.train, level_draws="stratified"))
    train(config, tmp_path / "alone", device="cpu")
    workers.start(2, workers.joint_run, tmp_path, config, tmp_path / "run", parallel)
    got, expected = (tmp_path / name / "best" for name in ("run", "alone"))
    scores = [json.loads((best / "score.json").read_text()) for best in (got, expected)]
    assert scores[0]["step"] == scores[1]["step"]
    assert scores[0]["value"] == pytest.approx(scores[1]["value"], rel=1e-4)
    weights = [load_checkpoint(best).tensors["ema"] for best in (got, expected)]
    vectors = (torch.cat([tensors[name].flatten() for name in sorted(tensors)]) for tensors in weights)
    assert relative_error(*vectors) < 1e-4


def test_failure_of_one_ends_all_with_its_reason(tmp_path, config):
    began = time.monotonic()
    said = workers.start(2, workers.joint_failure, tmp_path, config, tmp_path / "run")
    assert said == ["process 1: its disk is on fire; put it out", "its disk is on fire; put it out"]
    assert time.monotonic() - began < 30


def test_batch_that_cannot_be_shared_is_told(tmp_path, config):
    (said, _) = workers.start(2, workers.uneven, tmp_path, config, tmp_path / "run")
    assert "--batch-size 9" in said or "--accumulate" in said
    assert not (tmp_path / "run").exists()


def test_shares_and_rows_cover_everything_in_order(several):
    rows, shares = [], []
    batch = torch.arange(24).reshape(12, 2)
    for rank in range(3):
        several(rank)
        shares += rank_range(7)
        rows.append(rank_rows(batch, parts=2))
    assert shares == list(range(7))
    assert [row[:, 0].tolist() for row in rows] == [[0, 2, 12, 14], [4, 6, 16, 18], [8, 10, 20, 22]]


def test_alone_nothing_is_copied():
    batch = torch.arange(4)
    assert rank_rows(batch, 2) is batch and gather_rows(batch, 4) is batch
    assert module.all_reduce_mean(batch) is batch and module.broadcast_from_main(batch) is batch


def test_more_processes_than_gpus_are_told(several, monkeypatch):
    monkeypatch.setattr(build.torch.cuda, "device_count", lambda: 2)
    several(1)
    with pytest.raises(UserError, match=r"3 processes on a machine of 2 GPUs.*--nproc-per-node"):
        pick_device("cuda")
    with pytest.raises(UserError, match="--device cuda:1.*give cuda"):
        pick_device("cuda:1")


def test_the_beginning_of_a_run_is_recognised(tmp_path, config, monkeypatch):
    monkeypatch.setattr("cdm_fast.training.finish.write_final", lambda *_: {})
    auto = replace(config, train=replace(config.train, precision="auto"))
    assert config_to_resume(auto, tmp_path / "run") is None
    train(auto, tmp_path / "run", device="cpu")
    again = config_to_resume(auto, tmp_path / "run")
    assert again is not None and resume(tmp_path / "run", again, device="cpu")["step"] == 6
    other = replace(auto, network=NetworkConfig(base_channels=64))
    assert config_to_resume(other, tmp_path / "run") is None


def test_a_head_rank_that_no_head_takes_changes_no_run(tmp_path, config, monkeypatch):
    monkeypatch.setattr("cdm_fast.training.finish.write_final", lambda *_: {})
    config = replace(config, network=replace(config.network, conditioning="none", head_rank=10))
    train(config, tmp_path / "run", device="cpu")
    assert config_to_resume(config, tmp_path / "run") is not None


@pytest.mark.parametrize(("restarts", "objects"), [("0", 0), ("1", 0), ("2", 1)])
def test_only_the_last_start_prints_its_error_as_json(restarts, objects, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    assert main(["train", "--steps", "0", "--json"]) == 2
    out, errors = capsys.readouterr()
    assert "--steps is 0" in errors
    assert [list(json.loads(line)) for line in out.splitlines()] == [["error"]] * objects


def worker_of(launcher: int, rank: int) -> int:
    """The process of that rank among the children of torchrun."""
    for child in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"RANK={rank}".encode() in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            return int(child)
    raise AssertionError(f"torchrun runs no process of rank {rank}")


def test_torchrun_restarts_a_run_after_one_worker_was_killed(tmp_path, config):
    run = tmp_path / "run"
    settings = [
        "--preset",
        "digits",
        "--objective",
        "ddm",
        "--steps",
        "60",
        "--save-every",
        "10",
        "--out",
        str(run),
        "--json",
    ]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    launch += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "cdm_fast.cli", "train", *FLAGS]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*launch, *settings, "--data", config.data.source],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as torchrun:
        deadline = time.monotonic() + 120
        while not (run / "checkpoints" / "step-00000010").exists():
            assert torchrun.poll() is None and time.monotonic() < deadline, torchrun.communicate()
            time.sleep(0.02)
        os.kill(worker_of(torchrun.pid, 1), signal.SIGKILL)
        out, errors = torchrun.communicate(timeout=120)
    assert torchrun.returncode == 0, errors
    summary = json.loads(out)
    assert (summary["stopped"], summary["step"]) == ("finished", 60)
    assert "holds the beginning of this run: continuing it" in errors
    steps = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(2, 61, 2))
