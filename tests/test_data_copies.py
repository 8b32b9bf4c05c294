"""Prepared copies: the same images as without a copy, made once, completely or not at all, and shared."""

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cdm_fast.data import batch_indices, copies, load_data
from cdm_fast.data.copies import cached_in, find
from cdm_fast.data.load import Request, data_digest, ready_copy, source_digest
from cdm_fast.data.pictures import Fit
from cdm_fast.errors import UserError
from tests.test_cli import call
from tests.test_data import SPLITS, everything, picture_files, write_idx_folder, write_pictures
from tests.test_data_bad_input import refused

ROOT = Path(__file__).parents[1]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder, in which every source is worth a copy."""
    monkeypatch.setattr(copies, "_FEWEST_PICTURES", 0)
    monkeypatch.setenv("CDM_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    return write_pictures(tmp_path / "pictures", picture_files(count=20, side=(9, 8)))


def made(cache):
    """The folders in a cache that are or may become copies."""
    return sorted(path.name for path in cache.iterdir() if path.is_dir()) if cache.exists() else []


def same(one, other):
    for split in SPLITS:
        assert torch.equal(one[split].images, other[split].images), split
        assert (one[split].labels is None) == (other[split].labels is None)
        assert one[split].labels is None or torch.equal(one[split].labels, other[split].labels)
        assert one[split].num_classes == other[split].num_classes
        assert one[split].num_grey_levels == other[split].num_grey_levels
        assert (one[split].name, one[split].kind) == (other[split].name, other[split].kind)
        assert one[split].class_names == other[split].class_names


# Of batches and splits as they were before there were copies: a digest that changes means that runs of a seed
# see other images. Do not update one without saying so.
RECORDED = {
    "digits": "b4600b8597940d70",
    "idx": "abbd6522c57a783a",
    "cifar": "6726ba91180de302",
    "npz": "5e53e0f429569323",
    "folder": "5facbdb47a959e04",
    "zip": "5facbdb47a959e04",
    "resampled": "bb26a3e40022e653",
}


def recorded_source(name, root):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (60, 5, 4)), np.arange(60) % 5
    records = rng.integers(0, 256, (6, 10, 3073)).astype(np.uint8)
    records[:, :, 0] = np.arange(10)
    files = picture_files(count=20, side=(9, 8))
    if name == "idx":
        return write_idx_folder(root / "idx", (images, labels), (images[:9], labels[:9]), packed=True), {}
    if name == "cifar":
        batches = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
        for batch, content in zip(batches, records, strict=True):
            (root / f"{batch}.bin").write_bytes(content.tobytes())
        return root, {}
    if name == "npz":
        arrays = {
            "x_train": images / 255,
            "y_train": labels,
            "x_test": images[:7] / 255,
            "y_test": labels[:7],
        }
        np.savez(root / "a.npz", **arrays)
        return root / "a.npz", {"split_seed": 1}
    if name == "zip":
        return write_pictures(root / "a.zip", files), {}
    if name == "digits":
        return "digits", {}
    options = {"image_size": 6, "channels": 1} if name == "resampled" else {}
    return write_pictures(root / "folder", files), options


@pytest.mark.parametrize("copied", [False, True], ids=["in-memory", "mapped"])
@pytest.mark.parametrize("name", RECORDED)
def test_batches_are_bitwise_those_of_before(tmp_path, monkeypatch, name, copied):
    monkeypatch.setattr(copies, "_FEWEST_PICTURES", 0 if copied else 10**9)
    monkeypatch.setattr(copies, "_FEWEST_BYTES", 0 if copied else 10**18)
    monkeypatch.setenv("CDM_FAST_CACHE", str(tmp_path / "cache"))
    (tmp_path / "source").mkdir()
    source, options = recorded_source(name, tmp_path / "source")
    digest = hashlib.sha256()
    train = load_data(source, "train", **options)
    for step in (0, 1, 1000):
        index = batch_indices(len(train.images), 16, 7, step)
        digest.update(train.images[index].numpy().tobytes())
        digest.update(train.labels[index].numpy().astype("<i8").tobytes())
    for split in ("validation", "test"):
        data = load_data(source, split, **options)
        digest.update(data.images.numpy().tobytes() + data.labels.numpy().astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == RECORDED[name]
    assert bool(made(tmp_path / "cache")) == (copied and name != "digits")


@pytest.mark.parametrize("kind", ["folder", "a.zip", "a.csv"])
def test_a_copy_holds_the_same_and_is_read_once(tmp_path, cache, monkeypatch, kind):
    files = picture_files(count=20, side=(9, 8))
    source = write_pictures(tmp_path if kind == "a.csv" else tmp_path / kind, files)
    if kind == "a.csv":
        source = tmp_path / kind
        rows = "\n".join(f"{name},{name[:3]}" for name in files)
        source.write_text(f"file_name,label\n{rows}\n")
    with cached_in("off"):
        plain = everything(source, image_size=6)
    assert not made(cache)
    same(plain, everything(source, image_size=6))
    assert len(made(cache)) == 1
    monkeypatch.setattr(copies, "_write", None)
    if kind != "a.csv":  # of which the names are read, and its first picture
        monkeypatch.setattr("cdm_fast.data.folder.decode_quietly", None)
    same(plain, everything(source, image_size=6))
    assert source_digest(Request(source, Fit(6))) == data_digest(plain["train"])


def test_what_decides_the_content_makes_another_copy(cache, folder):
    load_data(folder)
    for number, options in enumerate(
        (
            {"image_size": 6},
            {"split_seed": 1},
            {"channels": 1},
            {"crop": "1,1,4,4"},
            {"image_size": 6, "resample": "box"},
        ),
        start=2,
    ):
        with cached_in("off"):
            plain = load_data(folder, **options)
        assert torch.equal(load_data(folder, **options).images, plain.images)
        assert len(made(cache)) == number


@pytest.mark.parametrize("change", ["time", "content", "added", "removed", "renamed"])
def test_a_source_that_changed_is_read_again(cache, folder, change):
    load_data(folder)
    path = folder / "cat/00.png"
    if change == "time":
        os.utime(path, (1, 1))
    elif change == "content":
        Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(path)
    elif change == "added":
        Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(folder / "cat/99.png")
    elif change == "removed":
        path.unlink()
    else:
        path.rename(folder / "cat/0.png")
    now = everything(folder)
    with cached_in("off"):
        same(everything(folder), now)
    assert len(made(cache)) == 2


@pytest.mark.parametrize("damage", ["short", "long", "no-rows", "no-about", "json", "version", "counts"])
def test_a_damaged_copy_is_not_used_but_made_again(cache, folder, damage):
    with cached_in("off"):
        before = everything(folder)
    load_data(folder)
    (name,) = made(cache)
    copy = cache / name
    about = copy / "about.json"
    if damage in ("short", "long"):
        content = (copy / "rows").read_bytes()
        (copy / "rows").write_bytes(content[:-1] if damage == "short" else content + b"\0")
    elif damage == "no-rows":
        (copy / "rows").unlink()
    elif damage == "no-about":
        about.unlink()
    elif damage == "json":
        about.write_text("{")
    else:
        changed = {"version": 0} if damage == "version" else {"train": 10**9}
        about.write_text(json.dumps(json.loads(about.read_text()) | changed))
    assert find(cache, name) is None
    same(before, everything(folder))
    assert made(cache) == [name] and find(cache, name).verify()


def test_writing_to_the_images_changes_no_copy(cache, folder):
    load_data(folder).images.zero_()
    assert int(load_data(folder).images.max()) > 0
    assert find(cache, made(cache)[0]).verify()


def test_small_sources_and_off_make_no_copy(tmp_path, folder, monkeypatch):
    monkeypatch.setenv("CDM_FAST_CACHE", str(tmp_path / "cache"))
    load_data(folder)
    monkeypatch.setattr(copies, "_FEWEST_PICTURES", 0)
    with cached_in("off"):
        load_data(folder)
    assert not (tmp_path / "cache").exists()
    with cached_in(str(tmp_path / "other")):
        load_data(folder)
    assert len(made(tmp_path / "other")) == 1


def test_a_source_that_changes_while_it_is_read_is_refused(cache, folder, monkeypatch):
    write = copies._write

    def write_and_change(*arguments):
        found = write(*arguments)
        os.utime(folder / "cat/00.png", (1, 1))
        return found

    monkeypatch.setattr(copies, "_write", write_and_change)
    refused(lambda: load_data(folder), "changed while it was read", name=str(folder))
    assert not [path for path in cache.rglob("*") if path.suffix != ".lock"]


def test_a_full_disk_is_told_and_the_data_are_read_into_memory(cache, folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.warns(UserWarning, match="No space left on device; make room.*into memory"):
        data = load_data(folder)
    with cached_in("off"):
        assert torch.equal(data.images, load_data(folder).images)
    assert not [path for path in cache.rglob("*") if path.suffix != ".lock"]


def test_damaged_pictures_leave_nothing_and_the_first_is_told(cache, folder):
    for name in ("dog/03.png", "cat/05.png"):
        (folder / name).write_bytes(b"no picture")
    told = refused(lambda: load_data(folder), "is not a PNG")
    assert not [path for path in cache.rglob("*") if path.suffix != ".lock"]
    assert told == refused(lambda: load_data(folder), "is not a PNG")


def test_warnings_are_heard_after_threads_have_decoded(cache, folder):
    import warnings

    before = list(warnings.filters)
    load_data(folder)
    assert list(warnings.filters) == before


PREPARE = """
import sys
from cdm_fast.data import copies, load_data
copies._FEWEST_PICTURES = 0
print("ready", flush=True)
sys.stdin.readline()
load_data(sys.argv[1])
print("done", flush=True)
"""


def preparing(folder, cache):
    """A process that is ready to prepare a copy."""
    environment = {
        **os.environ,
        "CDM_FAST_CACHE": str(cache),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-c", PREPARE, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout.readline() == "ready\n"
    return process


KILLS = int(os.environ.get("CDM_FAST_TEST_KILLS", 5))


def test_a_killed_preparation_leaves_no_damaged_copy(tmp_path, monkeypatch):
    folder = write_pictures(tmp_path / "pictures", picture_files(count=150, side=(64, 64)))
    cache, rng = tmp_path / "cache", random.Random(0)
    monkeypatch.setattr(copies, "_FEWEST_PICTURES", 0)
    with cached_in("off"):
        plain = load_data(folder)
    process = preparing(folder, tmp_path / "timed")
    began = time.monotonic()
    process.communicate("\n", timeout=300)
    length = time.monotonic() - began
    survived = 0
    for _ in range(KILLS):
        process = preparing(folder, cache)
        process.stdin.write("\n")
        process.stdin.flush()
        time.sleep(rng.random() * length)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        with cached_in(str(cache)):
            _, copy = ready_copy(Request(folder))
            if copy is not None:
                survived += 1
                assert copy.verify() and torch.equal(copy.split("train")[0], plain.images)
                copies.clear(cache)
    with cached_in(str(cache)):
        assert torch.equal(load_data(folder).images, plain.images)
    assert len(made(cache)) == 1, f"{survived} of {KILLS} were whole before the kill"


def test_processes_that_start_at_once_make_one_copy(tmp_path):
    folder = write_pictures(tmp_path / "pictures", picture_files(count=150, side=(64, 64)))
    cache = tmp_path / "cache"
    both = [preparing(folder, cache) for _ in range(2)]
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    told = [process.communicate(timeout=300) for process in both]
    assert [out for out, _ in told] == ["done\n", "done\n"], told
    assert len(made(cache)) == 1


# ---------------------------------------------------------------- the command


def test_data_command_tells_what_a_source_holds(tmp_path, cache, folder):
    status, out, err = call("data", str(folder), "--json")
    found = json.loads(out)
    assert (status, found["kind"]) == (0, "a folder of pictures in 2 class folders"), err
    assert found["splits"] == {"train": 28, "validation": 4, "test": 8} and found["shape"] == [3, 9, 8]
    assert found["class_names"] == ["cat", "dog"] and found["copy"] is None and found["bytes"] == 40 * 216
    assert not made(cache)


def test_data_command_prepares_verifies_and_clears(tmp_path, cache, folder):
    sheet = tmp_path / "sheet.png"
    status, out, _ = call("data", str(folder), "--prepare", "--image-size", "6", "--sheet", str(sheet))
    (name,) = made(cache)
    assert status == 0 and f"prepared copy: {cache / name}" in out and sheet.is_file()
    _, out, _ = call("data", str(folder), "--prepare", "--image-size", "6")
    assert ", verified" in out
    rows = cache / name / "rows"
    content = bytearray(rows.read_bytes())
    content[100] ^= 1
    rows.write_bytes(content)
    _, out, _ = call("data", str(folder), "--prepare", "--image-size", "6")
    assert "made anew" in out and find(cache, name).verify()
    call("data", str(folder), "--prepare")
    (cache / "mine").mkdir()
    assert len(made(cache)) == 3
    _, out, _ = call("data", str(folder), "--clear")
    assert "1 prepared copy removed" in out and len(made(cache)) == 2
    _, out, _ = call("data", "--clear", "--json")
    assert json.loads(out)["removed"] == 1 and made(cache) == ["mine"]


@pytest.mark.parametrize(
    "words, told",
    [
        ([], "empty"),
        (["digits", "--prepare"], "--prepare"),
        (["nowhere"], "cannot be found"),
        (["digits", "--clear", "--prepare"], "--clear"),
        (["--clear", "--cache", "off"], "are off"),
        (["digits", "--crop", "x"], "--crop"),
    ],
)
def test_data_command_refuses(tmp_path, cache, words, told):
    status, out, err = call("data", *words)
    assert (status, out) == (2, "") and told in err and err.count("\n") == 1


def test_a_user_error_of_the_source_is_none_of_the_disk(cache, tmp_path):
    with pytest.raises(UserError), contextlib.suppress(KeyError):
        load_data(tmp_path / "gone")
    assert not cache.exists()
