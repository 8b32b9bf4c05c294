"""Run directories: exact round trips, damage of every kind, and disks that refuse to write."""

import errno
import hashlib
import json
import math
import os
import pickle
import resource
import shutil
import signal
from dataclasses import replace

import pytest
import torch

from cdm_fast.errors import UserError
from cdm_fast.runs import checkpoint as module
from cdm_fast.runs.build import build_model
from cdm_fast.runs.checkpoint import (
    Checkpoint,
    checkpoint_folders,
    create_run,
    load_checkpoint,
    prepare_to_resume,
    read_config,
    save_checkpoint,
    write_config,
)
from cdm_fast.runs.load import load
from cdm_fast.runs.weights import snapshot
from cdm_fast.training.state import from_checkpoint, new_state, to_checkpoint
from tests.tiny_run import tiny_config, write_images


@pytest.fixture
def config(tmp_path):
    return tiny_config(write_images(tmp_path / "images.npz"))


@pytest.fixture
def state(config):
    """A state after two optimizer steps on made-up gradients."""
    state = new_state(config, torch.device("cpu"))
    for _ in range(2):
        for parameter in state.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        state.optimizer.step()
        state.ema.update(state.step)
        state.step += 1
    return state


@pytest.fixture
def run(tmp_path, config, state):
    """A run with intact checkpoints of steps 2 and 3."""
    run = tmp_path / "run"
    create_run(run, config, to_checkpoint(state, config))
    state.step = 3
    save_checkpoint(run, to_checkpoint(state, config), keep=5)
    return run


def tree(folder):
    """Every file under a folder with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_round_trip_is_exact(run, config, state):
    back = from_checkpoint(load_checkpoint(run), config, torch.device("cpu"), "run")
    assert back.step == 3
    for ours, theirs in ((state.model, back.model), (state.ema.model, back.ema.model)):
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[name]), name
    for before, after in zip(state.model.parameters(), back.model.parameters(), strict=True):
        for moment, value in state.optimizer.state[before].items():
            restored = back.optimizer.state[after][moment]
            assert torch.equal(value, restored)
            assert value.stride() == restored.stride()


def test_load_gives_average_or_raw_weights_in_evaluation_mode(run, state):
    average, raw = load(run), load(run, weights="raw")
    assert not average.training
    for name, parameter in state.ema.model.named_parameters():
        assert torch.equal(parameter, average.get_parameter(name))
    for name, parameter in state.model.named_parameters():
        assert torch.equal(parameter, raw.get_parameter(name))
    with pytest.raises(UserError, match="'best'; give 'ema' or 'raw'"):
        load(run, weights="best")


def test_only_the_newest_are_kept(run, config, state):
    for step in (4, 5):
        state.step = step
        save_checkpoint(run, to_checkpoint(state, config), keep=2)
    assert [folder.name for folder in checkpoint_folders(run)] == ["step-00000005", "step-00000004"]


def test_no_file_is_a_pickle(run):
    assert {p.suffix for p in run.rglob("*") if p.is_file()} == {".json", ".safetensors"}


def truncate(folder):
    path = folder / "ema.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def flip_a_bit(folder):
    content = bytearray((folder / "ema.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "ema.safetensors").write_bytes(content)


def plant_a_pickle(folder):
    """A pickle with a manifest that vouches for it."""
    data = pickle.dumps({"x": 1})
    (folder / "ema.safetensors").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["ema.safetensors"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


DAMAGE = {
    "truncated-file": truncate,
    "flipped-bit": flip_a_bit,
    "pickle-instead": plant_a_pickle,
    "missing-file": lambda folder: (folder / "ema.safetensors").unlink(),
    "missing-manifest": lambda folder: (folder / "manifest.json").unlink(),
    "manifest-no-json": lambda folder: (folder / "manifest.json").write_text("{"),
    "manifest-a-list": lambda folder: (folder / "manifest.json").write_text("[1]"),
    "manifest-empty": lambda folder: (folder / "manifest.json").write_text("{}"),
    "manifest-deep": lambda folder: (folder / "manifest.json").write_text("[" * 100_000),
    "manifest-huge": lambda folder: (folder / "manifest.json").write_text(" " * 2_000_000),
    "state-changed": lambda folder: (folder / "state.json").write_text('{"step": 9}'),
    "empty-folder": lambda folder: [p.unlink() for p in folder.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_newest_is_named_and_the_one_before_used(run, damage):
    newest = checkpoint_folders(run)[0]
    damage(newest)
    with pytest.warns(UserWarning, match=f"{newest} is damaged"):
        assert load_checkpoint(run).step == 2


def test_nothing_intact_is_an_error(run):
    for folder in checkpoint_folders(run):
        truncate(folder)
    with pytest.warns(UserWarning), pytest.raises(UserError, match="no intact checkpoint"):
        load(run)


def test_run_without_checkpoints(run):
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="no checkpoint"):
        load(run)


def test_non_finite_weights_are_never_saved(run, config, state):
    before = tree(run)
    with torch.no_grad():
        next(state.ema.model.parameters()).view(-1)[0] = float("nan")
    state.step = 4
    with pytest.raises(UserError, match="network.conv_in.weight is not finite at step 4"):
        save_checkpoint(run, to_checkpoint(state, config), keep=5)
    assert tree(run) == before


def test_another_architecture_is_refused_by_name(run, config):
    wider = replace(config, network=replace(config.network, base_channels=64))
    write_config(run, wider)
    with pytest.raises(UserError, match="another architecture: network.conv_in.bias is 32 .* and 64 in"):
        load(run)


def test_checkpoint_of_another_config_is_refused(run, config):
    other = replace(config, train=replace(config.train, lr=0.5))
    with pytest.raises(UserError, match="trained with another lr; restore its config.json"):
        from_checkpoint(load_checkpoint(run), other, torch.device("cpu"), "run")


def test_run_that_is_older_than_a_setting_continues(run, config):
    tree, stored = json.loads((run / "config.json").read_text()), load_checkpoint(run)
    del tree["train"]["clip_norm"]
    (run / "config.json").write_text(json.dumps(tree))
    older = {**stored.state["config"], "train": tree["train"]}
    assert read_config(run) == config
    state = from_checkpoint(
        Checkpoint(stored.tensors, {**stored.state, "config": older}), config, torch.device("cpu"), "run"
    )
    assert state.step == stored.step


def test_weights_that_were_not_trained_here_cannot_be_continued(run, config):
    converted = Checkpoint(load_checkpoint(run).tensors, {"step": 0})
    with pytest.raises(UserError, match="run was not trained here, so there is nothing to continue"):
        from_checkpoint(converted, config, torch.device("cpu"), "run")


def test_optimizer_state_of_another_network_is_refused(run, config):
    stored = load_checkpoint(run)
    foreign = {"network.elsewhere.weight.exp_avg": torch.zeros(1)}
    mixed = Checkpoint({**stored.tensors, "optimizer": foreign}, stored.state)
    with pytest.raises(UserError, match=r"another network \(network.elsewhere.weight\)"):
        from_checkpoint(mixed, config, torch.device("cpu"), "run")


@pytest.mark.parametrize("key", ["sums", "bad_steps", "seconds"])
def test_garbled_state_is_refused(run, config, key):
    stored = load_checkpoint(run)
    garbled = Checkpoint(stored.tensors, {**stored.state, key: "?"})
    with pytest.raises(UserError, match="state.json"):
        from_checkpoint(garbled, config, torch.device("cpu"), "run")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ('{"more": 1}', "unexpected or missing more"),
        (" " * 2_000_000, "above the limit"),
    ],
    ids=["torn", "deep", "unknown", "huge"],
)
def test_hostile_config_is_refused(run, content, message):
    (run / "config.json").write_text(content)
    with pytest.raises(UserError, match=f"config.json.*{message}"):
        read_config(run)


def test_create_run_takes_an_empty_folder_and_no_other(tmp_path, config, state):
    empty, full = tmp_path / "empty", tmp_path / "full"
    empty.mkdir()
    create_run(empty, config, to_checkpoint(state, config))
    assert read_config(empty) == config
    full.mkdir()
    (full / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="full exists already"):
        create_run(full, config, to_checkpoint(state, config))
    assert tree(full) == {"thesis.tex": b"x"}


class DiskFull:
    """os.fsync that fails at its n-th call, with what a full disk says, or by an interrupt."""

    def __init__(self, fail_at, error):
        self.calls, self.fail_at, self.error = 0, fail_at, error

    def __call__(self, descriptor):
        self.calls += 1
        if self.calls == self.fail_at:
            raise self.error


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("fail_at", range(1, 8))
def test_full_disk_loses_nothing_and_says_so(run, config, state, monkeypatch, fail_at):
    before = tree(run)
    monkeypatch.setattr(os, "fsync", DiskFull(fail_at, FULL))
    state.step = 4
    with pytest.raises(UserError, match=r"No space left on device.*\(what was saved before is intact\)"):
        save_checkpoint(run, to_checkpoint(state, config), keep=1)
    kept = {name: data for name, data in tree(run).items() if "step-00000004" not in name}
    assert kept == before
    assert not list(run.rglob(".*"))
    assert load_checkpoint(run).step in (3, 4)  # 4 when only the last flush, after the rename, failed


@pytest.mark.parametrize("fail_at", range(1, 10))
def test_a_run_begins_whole_or_not_at_all(tmp_path, config, state, monkeypatch, fail_at):
    monkeypatch.setattr(os, "fsync", DiskFull(fail_at, FULL))
    with pytest.raises(UserError, match="No space left on device"):
        create_run(tmp_path / "runs" / "new", config, to_checkpoint(state, config))
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize("fail_at", range(1, 8))
def test_interrupt_while_saving_leaves_a_run_that_loads(run, config, state, monkeypatch, fail_at):
    monkeypatch.setattr(os, "fsync", DiskFull(fail_at, KeyboardInterrupt()))
    state.step = 4
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(run, to_checkpoint(state, config), keep=1)
    assert load_checkpoint(run).step in (3, 4)


def test_a_write_that_the_kernel_refuses(run, config, state):
    """A real refusal: files may not grow beyond 4 KiB."""
    before = tree(run)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        state.step = 4
        with pytest.raises(UserError, match="File too large"):
            save_checkpoint(run, to_checkpoint(state, config), keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert tree(run) == before


def test_remains_of_a_killed_process_are_removed(run, config, state):
    remains = run / "checkpoints" / ".step-00000002.unfinished-99999"
    remains.mkdir()
    (remains / "model.safetensors").write_bytes(b"half")
    assert load_checkpoint(run).step == 3
    state.step = 4
    save_checkpoint(run, to_checkpoint(state, config), keep=2)
    assert not remains.exists()


def test_damaged_checkpoint_of_the_same_step_is_replaced(run, config, state):
    truncate(checkpoint_folders(run)[0])
    save_checkpoint(run, to_checkpoint(state, config), keep=2)
    assert load_checkpoint(run).step == 3


@pytest.mark.parametrize("part", ["model", "ema", "optimizer"])
def test_every_part_must_be_finite(run, config, state, part):
    copied = to_checkpoint(state, config)
    next(iter(copied.tensors[part].values())).view(-1)[0] = math.inf
    with pytest.raises(UserError, match=f"{part}: .* is not finite at step 3, so nothing was saved"):
        save_checkpoint(run, copied, keep=5)
    assert load_checkpoint(run).step == 3


def test_a_sum_that_overflows_is_no_reason_to_refuse(run, config, state):
    copied = to_checkpoint(state, config)
    next(iter(copied.tensors["model"].values())).fill_(3e38)
    save_checkpoint(run, copied, keep=5)


def test_damaged_newer_ones_are_set_aside_and_never_counted(run, config, state):
    """Else, with keep=1, the damaged one would be kept and the next good one removed."""
    truncate(checkpoint_folders(run)[0])
    (run / ".log.jsonl.unfinished-1").write_bytes(b"half")
    prepare_to_resume(run, step=2)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"step-00000002", "damaged-00000003"}
    assert not (run / ".log.jsonl.unfinished-1").exists()
    assert load_checkpoint(run).step == 2


def test_the_checkpoint_just_written_is_never_removed(run, config, state):
    state.step = 1
    save_checkpoint(run, to_checkpoint(state, config), keep=1)
    assert {folder.name for folder in checkpoint_folders(run)} == {"step-00000001", "step-00000003"}


def test_folders_that_are_no_checkpoints_are_passed_over(run):
    newest = checkpoint_folders(run)[0]
    for name in ("step-00000003.bak", "step-x", "step-9"):
        shutil.copytree(newest, newest.with_name(name))
    assert checkpoint_folders(run)[0] == newest
    newest.rename(newest.with_name("step-00000007"))
    with pytest.warns(UserWarning, match="step-00000007 is damaged .it holds step 3"):
        assert load_checkpoint(run).step == 2


def test_steps_are_ordered_as_numbers(run):
    newest = checkpoint_folders(run)[0]
    shutil.copytree(newest, newest.with_name("step-100000000"))
    assert checkpoint_folders(run)[0].name == "step-100000000"


def test_a_run_that_is_trained_on_can_be_read(run, config, state, monkeypatch):
    """The newest checkpoint is replaced by a newer one while it is read."""
    read, state.step = module._read_parts, 4

    def overtaken(folder, parts):
        if folder.name == "step-00000003":
            save_checkpoint(run, to_checkpoint(state, config), keep=1)
        return read(folder, parts)

    monkeypatch.setattr(module, "_read_parts", overtaken)
    assert load_checkpoint(run).step == 4


def test_snapshot_does_not_follow_the_model(config):
    model = build_model(config)
    taken = snapshot(model)
    before = taken["network.conv_in.weight"].clone()
    with torch.no_grad():
        model.network.conv_in.weight.add_(1)
    assert torch.equal(taken["network.conv_in.weight"], before)
