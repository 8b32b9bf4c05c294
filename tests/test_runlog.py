"""Logs: JSON lines that survive a crash, the optional services, and the progress display."""

import errno
import json
import math
import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from cdm_fast.config import OutputConfig, RunConfig
from cdm_fast.errors import DiskError
from cdm_fast.training.display import Display
from cdm_fast.training.log import JsonLines, open_sinks


def test_lines_beyond_the_checkpoint_and_torn_ones_are_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 2, "lo')
    log = JsonLines(path, last_step=2)
    log.write(3, {"loss": 0.5})
    log.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1},
        {"step": 2},
        {"step": 3, "loss": 0.5},
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_what_is_not_finite_is_null(tmp_path, value):
    log = JsonLines(tmp_path / "log.jsonl", last_step=0)
    log.write(1, {"loss": value, "split": "validation"})
    log.close()
    assert json.loads((tmp_path / "log.jsonl").read_text()) == {
        "step": 1,
        "loss": None,
        "split": "validation",
    }


class FullDisk:
    """A file that takes `room` more bytes, then refuses as a full disk does."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self.file.__enter__()

    def __exit__(self, *raised):
        return self.file.__exit__(*raised)

    def write(self, data):
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = self.file.write(data[: self.room])
        self.room -= taken
        return taken


def test_a_full_disk_is_told_once_and_costs_no_line(tmp_path):
    log = JsonLines(tmp_path / "log.jsonl", last_step=0)
    log._file = FullDisk(log._file, room=30)
    log.write(1, {"loss": 1.0})
    with pytest.warns(UserWarning, match="log.jsonl: No space left on device") as told:
        log.write(2, {"loss": 2.0})
        log.write(3, {"loss": 3.0})
    assert len(told) == 1
    log._file.room = 1000
    log.write(4, {"loss": 4.0})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [{"step": step, "loss": float(step)} for step in (1, 2, 3, 4)]


def test_a_disk_that_stays_full_is_an_error_in_the_end(tmp_path):
    with pytest.raises(DiskError, match="log.jsonl: No space left"), pytest.warns(UserWarning):
        with open_sinks(tmp_path, config(), 0) as (log,):
            log._file = FullDisk(log._file, room=0)
            log.write(1, {"loss": 1.0})
    with pytest.raises(KeyError), pytest.warns(UserWarning), open_sinks(tmp_path, config(), 0) as (log,):
        log._file = FullDisk(log._file, room=0)
        log.write(1, {"loss": 1.0})
        raise KeyError  # what went wrong first is what is told


class Recorder:
    """Stands for the writer of an optional service."""

    def __init__(self, *arguments, **options):
        self.arguments, self.options, self.calls = arguments, options, []

    def __getattr__(self, name):
        return lambda *arguments, **options: self.calls.append((name, arguments, options))


def config(**output):
    return replace(RunConfig(), output=OutputConfig(**output))


def test_tensorboard_gets_the_numbers(tmp_path, monkeypatch):
    module = SimpleNamespace(SummaryWriter=Recorder)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with open_sinks(tmp_path, config(tensorboard=True), 6) as (_, board):
        board.write(7, {"loss": 0.5, "split": "validation"})
    assert board._writer.arguments == (str(tmp_path / "tensorboard"),)
    assert board._writer.options == {"purge_step": 7}
    assert board._writer.calls == [("add_scalar", ("loss", 0.5, 7), {}), ("close", (), {})]


def test_wandb_gets_the_numbers_under_the_name_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=Recorder))
    with open_sinks(tmp_path / "digits", config(wandb=True), 0) as (_, service):
        service.write(7, {"loss": 0.5, "split": "validation"})
    assert service._run.options["name"] == "digits"
    assert service._run.options["config"]["train"]["lr"] == 1e-3
    assert service._run.calls == [("log", ({"loss": 0.5},), {"step": 7}), ("finish", (), {})]


NUMBERS = {"loss": 0.5, "ce": 3.0, "mse": 0.25, "images_per_second": 123.4, "lr": 1e-3}


def test_plain_lines_where_there_is_no_terminal(capsys):
    with Display(0, 10) as display:
        display.show(1, NUMBERS)
        display.line(5, NUMBERS)
        assert not display.due()
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "step 5/10  loss 0.5000  CE 3.000  MSE 0.2500  123 images/s\n"


def test_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    with Display(0, 10) as display:
        assert display.due()
        display.show(4, {**NUMBERS, "ce": None})
        display.line(4, NUMBERS)
        assert not display.due()
    err = capsys.readouterr().err
    assert "loss 0.5000  MSE 0.2500  123 images/s" in err and "ETA" in err
    assert "step 4/10" not in err
