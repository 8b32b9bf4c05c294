"""Saving in a background thread: what training waits for, and how failed saves are handled."""

import errno
import os
import subprocess
import threading
import time
from dataclasses import replace

import pytest
import torch

from cdm_fast.errors import DiskError, UserError
from cdm_fast.host.files import exclusive_lock
from cdm_fast.runs.checkpoint import checkpoint_folders, create_run, load_checkpoint
from cdm_fast.training import saver as module
from cdm_fast.training.saver import Saver
from cdm_fast.training.state import new_state, to_checkpoint
from cdm_fast.training.step import draw_batch
from cdm_fast.training.train import resume, train
from tests.tiny_run import tiny_config, write_images

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def config(tmp_path):
    return tiny_config(write_images(tmp_path / "images.npz"))


@pytest.fixture
def state(config):
    return new_state(config, torch.device("cpu"))


@pytest.fixture
def run(tmp_path, config, state):
    """A run with a checkpoint of step 0."""
    create_run(tmp_path / "run", config, to_checkpoint(state, config))
    return tmp_path / "run"


@pytest.fixture
def at(config, state):
    """at(step) copies the state as it would be at `step`, and counts."""

    def copy(step):
        def made():
            copy.steps.append(step)
            state.step = step
            return to_checkpoint(state, config)

        return made

    copy.steps = []
    return copy


class Gate:
    """save_checkpoint behind a door."""

    def __init__(self):
        self.door, self.save = threading.Event(), module.save_checkpoint

    def __call__(self, *arguments):
        assert self.door.wait(30)
        return self.save(*arguments)


@pytest.fixture
def gate(monkeypatch):
    gate = Gate()
    monkeypatch.setattr(module, "save_checkpoint", gate)
    return gate


def steps_on_disk(run):
    return [int(folder.name.split("-")[1]) for folder in checkpoint_folders(run)]


def test_training_goes_on_until_a_step_too_many_could_be_lost(run, at, gate):
    """Every 8: a save begins at step 4 and has until step 8 to reach the disk; then training waits for it."""
    with Saver(run, every=8, keep=5, saved=0) as saver:
        for step in range(1, 8):
            saver.after_step(step, at(step))
        assert at.steps == [4] and steps_on_disk(run) == [0]
        waiting = threading.Thread(target=saver.after_step, args=[8, at(8)])
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        gate.door.set()
        waiting.join()
        assert saver.waited >= 0.2 and steps_on_disk(run)[-2:] == [4, 0]
        saver.finish(9, at(9))
    assert at.steps == [4, 8, 9]
    assert steps_on_disk(run) == [9, 8, 4, 0]


def test_a_save_that_was_due_while_another_was_written_follows_it(run, at, gate):
    with Saver(run, every=4, keep=5, saved=0) as saver:
        saver.after_step(2, at(2))
        saver.after_step(3, at(3))
        gate.door.set()
        saver.after_step(4, at(4))  # the first may still be in flight; step 5 must not begin before it ended
        saver.after_step(5, at(5))
    assert at.steps == [2, 4]


def test_with_every_step_to_be_kept_each_is_waited_for(run, at):
    with Saver(run, every=1, keep=9, saved=0) as saver:
        for step in range(1, 4):
            saver.after_step(step, at(step))
            assert steps_on_disk(run)[0] == step


def test_a_disk_too_slow_for_the_interval_is_told_once(run, at, monkeypatch):
    monkeypatch.setattr(Saver, "_SLOW", 0.0001)
    with Saver(run, every=1, keep=2, saved=0) as saver:
        with pytest.warns(
            UserWarning, match="has waited .* longer than half of --save-every 1; give a larger"
        ):
            saver.after_step(1, at(1))
        saver.after_step(2, at(2))  # a warning is an error here


def test_finish_does_not_write_the_same_step_twice(run, at):
    with Saver(run, every=2, keep=5, saved=0) as saver:
        saver.finish(0, at(0))
        saver.after_step(1, at(1))
        saver.finish(1, at(1))
    assert at.steps == [1] and steps_on_disk(run) == [1, 0]


def test_a_copy_does_not_change_while_it_is_written(run, at, gate, state):
    before = state.model.network.conv_in.weight.detach().clone()
    with Saver(run, every=2, keep=2, saved=0) as saver:
        saver.after_step(1, at(1))
        with torch.no_grad():
            state.model.network.conv_in.weight.add_(1)
        gate.door.set()
    assert torch.equal(load_checkpoint(run).tensors["model"]["network.conv_in.weight"], before)


def test_leaving_at_once_gives_up_the_save_in_flight(run, at, monkeypatch):
    """Ctrl-C for the second time while a save has written a part of its files."""
    begun, save = threading.Event(), module.save_checkpoint

    def slow(run, checkpoint, keep, proceed):
        def slowly():
            begun.set()
            time.sleep(0.05)
            proceed()

        return save(run, checkpoint, keep, slowly)

    monkeypatch.setattr(module, "save_checkpoint", slow)
    with pytest.raises(KeyboardInterrupt), Saver(run, every=2, keep=2, saved=0) as saver:
        saver.after_step(1, at(1))
        assert begun.wait(10)
        raise KeyboardInterrupt
    assert not saver._thread.is_alive()
    assert steps_on_disk(run) == [0]
    assert not list(run.rglob(".*"))


def test_other_exceptions_complete_the_save_in_flight(run, at):
    with pytest.raises(ZeroDivisionError), Saver(run, every=2, keep=2, saved=0) as saver:
        saver.after_step(1, at(1))
        raise ZeroDivisionError
    assert load_checkpoint(run).step == 1


def test_a_full_disk_is_told_and_saved_to_once_there_is_room(run, at, monkeypatch):
    monkeypatch.setattr(Saver, "_PAUSE", 0.2)
    with Saver(run, every=2, keep=2, saved=0) as saver:
        with monkeypatch.context() as full:
            full.setattr(os, "fsync", refuse)
            saver.after_step(1, at(1))
            saver._thread.join()
        with pytest.warns(UserWarning, match="No space left on device.*training goes on"):
            saver.after_step(2, at(2))  # too early for another attempt
        saver.after_step(3, at(3))  # nor does training wait for what cannot be
        assert steps_on_disk(run) == [0] and not list(run.rglob(".*"))
        time.sleep(0.2)
        saver.after_step(4, at(4))  # too many could be lost: waited for
        assert steps_on_disk(run) == [4, 0]
    assert at.steps == [1, 4]


def refuse(descriptor):
    raise FULL


def test_a_disk_full_in_the_end_is_an_error_that_names_what_is_left(run, at, monkeypatch):
    monkeypatch.setattr(os, "fsync", refuse)
    message = "No space left on device.*--resume .*run continues from step 0"
    with pytest.raises(DiskError, match=message), Saver(run, every=2, keep=2, saved=0) as saver:
        saver.finish(1, at(1))


def test_weights_that_are_not_finite_stop_the_training(run, at, state):
    with torch.no_grad():
        state.model.network.conv_in.weight.view(-1)[0] = float("inf")
    with pytest.raises(UserError, match="model: network.conv_in.weight is not finite at step 1"):
        with Saver(run, every=2, keep=2, saved=0) as saver:
            saver.after_step(1, at(1))
            saver._thread.join()
            saver.after_step(2, at(2))
    assert steps_on_disk(run) == [0]


def test_two_processes_cannot_train_one_run(run):
    with exclusive_lock(run):
        with pytest.raises(UserError, match="run is being trained by another process"):
            resume(run, device="cpu")
    with exclusive_lock(run):
        pass


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount a small disk here: {error}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder):
    with pytest.raises(OSError, match="No space left"), open(folder / "ballast", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def test_a_disk_that_fills_loses_nothing_and_says_so(tmp_path, config, small_disk, monkeypatch):
    """It fills before the fourth step: training goes on, the last save fails, --resume repeats the rest."""
    monkeypatch.setattr("cdm_fast.training.finish.write_final", lambda *_: {})
    config = replace(config, output=replace(config.output, save_every=1, log_every=1))
    train(config, tmp_path / "whole", device="cpu")
    run = small_disk / "run"

    def draw(data, model, config, step):
        if step == 3:
            fill(small_disk)
        return draw_batch(data, model, config, step)

    with monkeypatch.context() as filling, pytest.warns(UserWarning) as told:
        filling.setattr("cdm_fast.training.loop.draw_batch", draw)
        with pytest.raises(DiskError, match=r"No space left on device.*continues from step \d") as refused:
            train(config, run, device="cpu")
    assert any("run: No space left on device" in str(warning.message) for warning in told)
    left = load_checkpoint(run).step
    assert str(refused.value).endswith(f"step {left}") and left <= 3
    assert not list((run / "checkpoints").glob(".*"))
    (small_disk / "ballast").unlink()
    assert resume(run, device="cpu")["step"] == 6
    expected, found = load_checkpoint(tmp_path / "whole"), load_checkpoint(run)
    for part, tensors in expected.tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, found.tensors[part][name]), (part, name)
