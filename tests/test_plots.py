"""Plots show the data they were given, and are never half-written."""

import errno
import json
import os

import numpy as np
import pytest
from PIL import Image

from cdm_fast.errors import UserError
from cdm_fast.host.files import write_atomically
from cdm_fast.plots.training import series, write_confusion, write_level_mse, write_losses
from cdm_fast.training.log import read_log

RECORDS = [{"step": step, "loss": 1.0 / step, "ce": 5.0 - step, "mse": 0.5 / step} for step in (1, 2, 3)]


def pixels(path):
    with Image.open(path) as image:
        image.load()
        return np.asarray(image.convert("RGB"), dtype=np.int64)


def test_read_log_leaves_out_a_torn_last_line(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(record) + "\n" for record in RECORDS) + '{"step": 4, "lo')
    assert read_log(log) == RECORDS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param('{"step": 1}\nnonsense\n{"step": 2}\n', "line 2: not JSON", id="not-json"),
        pytest.param('[1, 2]\n{"step": 2}\n', "line 1: not a JSON object", id="not-an-object"),
        pytest.param(None, "cannot read", id="missing"),
    ],
)
def test_read_log_names_the_bad_line(tmp_path, content, message):
    log = tmp_path / "log.jsonl"
    if content is not None:
        log.write_text(content)
    with pytest.raises(UserError, match=message):
        read_log(log)


def test_series_skips_what_is_absent_or_not_finite():
    records = [
        {"step": 1, "loss": 2},
        {"step": 2},
        {"step": 3, "loss": float("nan")},
        {"step": 4, "loss": 0.5},
    ]
    assert series(records, "loss") == ([1.0, 4.0], [2.0, 0.5])


def test_losses_draw_one_panel_per_logged_quantity(tmp_path):
    three = pixels(write_losses(RECORDS, tmp_path / "three.png"))
    one = pixels(write_losses([{"step": 1, "loss": 1.0}], tmp_path / "one.png"))
    assert three.shape[1] == pytest.approx(3 * one.shape[1], abs=3)
    assert three.std() > 0


def test_losses_without_any_curve_say_so(tmp_path):
    with pytest.raises(UserError, match="train first"):
        write_losses([{"step": 1}], tmp_path / "loss.png")
    assert list(tmp_path.iterdir()) == []


def test_confusion_puts_level_zero_at_the_lower_left(tmp_path):
    corner = np.zeros((4, 4))
    corner[0, 0] = 1.0
    picture = pixels(write_confusion(corner, tmp_path / "confusion.png", num_levels=12))
    bright = (picture[..., 0] > 200) & (picture[..., 1] > 200) & (picture[..., 2] < 100)  # viridis' yellow
    rows, columns = np.nonzero(bright[:, : picture.shape[1] // 2])
    assert rows.size and rows.min() > picture.shape[0] / 2
    assert columns.max() < picture.shape[1] / 2


@pytest.mark.parametrize("shape", [(3,), (2, 3)], ids=str)
def test_confusion_refuses_what_is_not_square(tmp_path, shape):
    with pytest.raises(ValueError, match="square"):
        write_confusion(np.ones(shape), tmp_path / "confusion.png")


def test_level_mse_is_drawn_and_checks_lengths(tmp_path):
    assert pixels(write_level_mse([1, 2, 3], [0.9, 0.3, 0.1], tmp_path / "mse.png")).std() > 0
    with pytest.raises(ValueError, match="two \\(N,\\) vectors"):
        write_level_mse([1, 2], [1.0], tmp_path / "mse.png")


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_beside_it(tmp_path, monkeypatch):
    target = tmp_path / "picture.png"
    target.write_bytes(b"old")

    def no_space(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(UserError, match="cannot write .*picture.png: No space left on device; make room"):
        write_atomically(target, b"new")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_in_the_place_of_a_folder_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*picture.png"):
        write_atomically(tmp_path / "file" / "picture.png", b"new")


def test_missing_folders_are_made(tmp_path):
    assert write_atomically(tmp_path / "a" / "b.bin", b"new").read_bytes() == b"new"
