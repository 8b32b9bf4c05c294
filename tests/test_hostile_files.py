"""Hostile files: the regression cases found by fuzzing, and a small run of every fuzz target.

`python -m tests.fuzz all` is the large run; its generators of inputs are the ones used here.
"""

import io
import json
import os
import pickle
import random
import resource
import shutil
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cdm_fast.data import load_data
from cdm_fast.host.plain_pickle import load_plain
from cdm_fast.host.reading import MAX_DATA_BYTES, read_bytes
from cdm_fast.interop.convert import convert
from cdm_fast.runs.checkpoint import load_checkpoint, read_config
from cdm_fast.runs.load import load
from cdm_fast.training.state import from_checkpoint
from tests.fuzz import public
from tests.fuzz.campaign import rng_of, scratch
from tests.fuzz.containers import Entry, zip_file
from tests.fuzz.readers import READERS
from tests.fuzz.runs import make_right, sample_run
from tests.fuzz.watch import Watch
from tests.test_data_bad_input import idx_folder, refused  # noqa: F401  (a fixture)

SHARE = {"run": 8, "convert": 8}


@pytest.mark.parametrize("name", READERS)
def test_small_campaign(name):
    """A few inputs of every target, the first of the large run."""
    with scratch() as root:
        watch = Watch(READERS[name], root)
        for index in range(SHARE.get(name, 25)):
            found = watch.run(READERS[name].make(rng_of(0, index)))
            assert found is None, f"python -m tests.fuzz {name} --only {index}: {found}"


@pytest.mark.parametrize("name", ["idx", "npz", "folder"])
def test_inputs_that_hypothesis_draws(name):
    """The same generators with hypothesis to decide, which shrinks what fails."""
    with scratch() as root:
        watch = Watch(READERS[name], root)

        @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.randoms(use_true_random=False))
        def check(rng):
            assert watch.run(READERS[name].make(rng)) is None

        check()


# ---------------------------------------------------------------- images


def test_idx_file_that_is_a_link_out_of_the_folder(idx_folder):  # noqa: F811
    path = idx_folder / "train-labels-idx1-ubyte"
    target = shutil.move(path, idx_folder.parent / "elsewhere")
    path.symlink_to(target)
    refused(lambda: load_data(idx_folder), "link that leads out", name=path.name)


def test_folder_may_be_a_link_itself_and_hold_links_within(idx_folder, tmp_path_factory):  # noqa: F811
    path = idx_folder / "train-labels-idx1-ubyte"
    path.rename(idx_folder / "labels")
    path.symlink_to("labels")
    link = tmp_path_factory.mktemp("other") / "link"
    link.symlink_to(idx_folder)
    assert len(load_data(link, "test")) == 6


def test_cifar_file_that_is_a_device(tmp_path):
    (tmp_path / "data_batch_1.bin").write_bytes(bytes(3073))
    for index in range(2, 6):
        (tmp_path / f"data_batch_{index}.bin").symlink_to("/dev/zero")
    refused(lambda: load_data(tmp_path), "link that leads out", name="data_batch_2.bin")


def test_picture_that_is_a_link_to_itself(tmp_path):
    (tmp_path / "a.png").symlink_to("a.png")
    refused(lambda: load_data(tmp_path), name="a.png")


def test_zip_of_overlapping_members(tmp_path):
    """Many names for one picture, as the densest bombs have."""
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(buffer, "PNG")
    (tmp_path / "a.zip").write_bytes(zip_file(random.Random(0), [Entry(b"00.png", buffer.getvalue())], 0))
    content = (tmp_path / "a.zip").read_bytes()
    start = content.index(b"PK\1\2")
    record, end = content[start : content.index(b"PK\5\6")], content[content.index(b"PK\5\6") :]
    records = b"".join(record.replace(b"00.png", b"%02d.png" % i) for i in range(50))
    ending = end[:8] + struct.pack("<HHI", 50, 50, len(records)) + end[16:]
    (tmp_path / "a.zip").write_bytes(content[:start] + records + ending)
    refused(lambda: load_data(tmp_path / "a.zip"), "overlapping", name="a.zip")


def test_many_pictures_that_expand(tmp_path, monkeypatch):
    """Each alone is small; together they are a bomb."""
    for index in range(40):
        Image.fromarray(np.zeros((1000, 1000), np.uint8)).save(tmp_path / f"{index}.png")
    monkeypatch.setattr("cdm_fast.host.reading.FREE_EXPANSION_BYTES", 2**24)
    refused(lambda: load_data(tmp_path), "decompression bomb", name=str(tmp_path))
    assert load_data(tmp_path, image_size=8).images.shape[1:] == (1, 8, 8)


def test_long_name_of_a_member_is_shortened(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("/".join("a" * 2000) + ".png", b"no picture")
    assert len(refused(lambda: load_data(tmp_path / "a.zip"), " ... ", name="a.zip")) < 1000


def test_names_of_members_stay_on_one_line(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("\x1b[31m\u202e" + "x" * 5000, b"")
    message = refused(lambda: load_data(tmp_path / "a.npz"), "no such array", name="a.npz")
    assert len(message) < 1000


# ---------------------------------------------------------------- run directories


@pytest.fixture
def run(tmp_path):
    for name, content in sample_run().items():
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_bytes(content)
    return tmp_path / "run"


def rewrite(run, name, change):
    """Changes a file of a run, and its checksum with it."""
    files = {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file()}
    files[name] = change(files[name])
    make_right(files)
    for key, content in files.items():
        (run / key).write_bytes(content)


def resume(run):
    return from_checkpoint(load_checkpoint(run), read_config(run), torch.device("cpu"), str(run))


STEP = "checkpoints/step-00000001"


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('"lr": 0.001', '"lr": 1' + "0" * 400, "a huge number"),
        ('"lr": 0.001', '"lr": NaN', "NaN"),
        ('"lr": 0.001', '"lr": 1e999', "beyond floating point"),
        ('"lr": 0.001', '"lr": 0.001, "lr": 0.002', "twice"),
        ('"steps": 6', '"steps": 1' + "0" * 5000, "cannot be read"),
        ('"T": 8', '"T": 1000000000000', "--T is 1000000000000"),
        ('"base_channels": 4', '"base_channels": 1000000000', "--base-channels"),
        ('"base_channels": 4', '"base_channels": 16000', "conv_in.bias is 4 in the file"),
        ('"base_channels": 4', '"base_channels": 5', "num_groups 2; change one"),
        ('"num_classes": 3', '"num_classes": 0', "--num-classes is 0"),
        ('"height": 8', '"height": 1048576', "--image-size"),
        ('"source"', '"\\u001b[31m"', "missing"),
    ],
    ids=str.split("huge-float nan infinite twice digits T overflow too-wide groups no-class size escape"),
)
def test_config_that_asks_for_too_much(run, old, new, told):
    text = (run / "config.json").read_text()
    assert old in text
    (run / "config.json").write_text(text.replace(old, new, 1))
    began = time.process_time()
    refused(lambda: load(run), told, name=str(run))
    assert time.process_time() - began < 2


@pytest.mark.parametrize("name", ["config.json", f"{STEP}/manifest.json", f"{STEP}/ema.safetensors"])
@pytest.mark.parametrize("kind", ["device", "pipe", "outside"])
@pytest.mark.filterwarnings("ignore:checkpoint")
def test_run_file_that_is_none(run, name, kind):
    (run / name).unlink()
    if kind == "pipe":
        os.mkfifo(run / name)
    else:
        (run / name).symlink_to("/dev/zero" if kind == "device" else "/etc/passwd")
    refused(lambda: load(run), name=str(run))


def edit_tensors(content, change):
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def test_weights_that_are_not_finite(run):
    rewrite(run, f"{STEP}/ema.safetensors", lambda content: content[:-4] + struct.pack("<f", np.nan))
    refused(lambda: load(run), "holds NaN", name=str(run))


def test_weights_of_another_type(run):
    def as_integers(header):
        next(entry for entry in header.values() if entry["dtype"] == "F32")["dtype"] = "I32"

    rewrite(run, f"{STEP}/ema.safetensors", lambda content: edit_tensors(content, as_integers))
    refused(lambda: load(run), "torch.int32", name=str(run))


@pytest.mark.parametrize("what", ["missing", "shape"])
def test_optimizer_moments_that_would_break_a_step(run, what):
    """Without the check, the fused optimizer would be given a tensor of another size than its parameter."""
    name = "network.conv_in.weight.exp_avg_sq"

    def change(header):
        if what == "missing":
            header["network.conv_in.weight.surprise"] = header.pop(name)
        else:
            header[name]["shape"] = [36]

    rewrite(run, f"{STEP}/optimizer.safetensors", lambda content: edit_tensors(content, change))
    refused(lambda: resume(run), "network.conv_in.weight", name=str(run))


@pytest.mark.parametrize("key", ["sums", "bad_steps", "seconds", "logged_step"])
@pytest.mark.parametrize("value", ["[]", "[1]", '"\\u001b"', "1e999", "-1" + "0" * 400, "{}"])
@pytest.mark.filterwarnings("ignore:checkpoint")
def test_counters_that_are_none(run, key, value):
    def change(content):
        state = {**json.loads(content), key: "HERE"}
        return json.dumps(state).replace('"HERE"', value).encode()

    rewrite(run, f"{STEP}/state.json", change)
    refused(lambda: resume(run), name=str(run))


# ---------------------------------------------------------------- checkpoints to convert


def torch_file(path, program, **records):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {"data.pkl": program, "version": b"3\n", **records}.items():
            archive.writestr(f"archive/{name}", content)
    return path


@pytest.mark.parametrize(
    ("program", "told"),
    [
        (b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\1\x85R.", "builtins bytearray"),
        (b"\x80\x02)q\0" + b"h\0h\0\x86q\0" * 60 + b"}h\0K\1s.", "tuples without end"),
        (b"\x80\x02cos\nsystem\nX\4\0\0\0true\x85R.", "os system"),
        (b"\x80\x04\x8c\2os\x8c\6system\x93.", "STACK_GLOBAL"),
        (pickle.dumps(print, 5), "execute code"),
        (b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", ""),
        (b"\x80\x02h\5.", "damaged"),
        (b"\x80\x02a.", "damaged"),
        (b"", "damaged"),
    ],
    ids=str.split("bytearray tuples system stack-global print nested memo underflow empty"),
)
def test_pickle_that_gives_orders(tmp_path, program, told):
    path = torch_file(tmp_path / "a.pt", program)
    began = time.process_time()
    if told:
        refused(lambda: load_plain(path), told, name="a.pt")
    else:
        refused(lambda: convert(path, tmp_path / "out"), name="a.pt")
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(1).expand(2**40),
        torch.ones(3).to_sparse(),
        torch.ones(2, device="meta"),
        torch.ones(2, dtype=torch.complex64),
        torch.ones(2, dtype=torch.float8_e5m2),
        None,
    ],
    ids=str.split("view sparse meta complex float8 none"),
)
def test_tensor_that_is_no_plain_one(tmp_path, value):
    torch.save({"model_state_dict": {"a": value}, "ema_model_state_dict": {}}, tmp_path / "a.pt")
    refused(lambda: convert(tmp_path / "a.pt", tmp_path / "out"), name="a.pt")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "shape", "told"),
    [
        ("conv_in.weight", (32,), "no tensor conv_in.weight of 4 axes"),
        ("conv_in.weight", (0, 1, 3, 3), "no tensor conv_in.weight of 4 axes"),
        ("linear_layer.weight", (), "no tensor linear_layer.weight of 2 axes"),
        ("down.0.block.0.conv1.weight", (32,), "conv1.weight of 4 axes"),
    ],
    ids=str.split("one-axis empty scalar width"),
)
def test_network_of_odd_shapes(tmp_path, name, shape, told):
    state = {**public.tiny_state(), name: torch.ones(shape)}
    torch.save({"model_state_dict": state, "ema_model_state_dict": state}, tmp_path / "a.pt")
    refused(lambda: convert(tmp_path / "a.pt", tmp_path / "out", image_size=4), told, name="a.pt")


def test_head_of_an_odd_shape_whose_levels_are_turned_round(tmp_path):
    state = {**public.tiny_state(), "linear_layer.bias": torch.tensor(1.0)}
    torch.save({"model_state_dict": state, "ema_model_state_dict": state}, tmp_path / "a.pt")
    refused(
        lambda: convert(tmp_path / "a.pt", tmp_path / "out", schedule="ot", image_size=4),
        "linear_layer.bias is ()",
        name="a.pt",
    )


def test_network_that_cannot_be_built(tmp_path):
    state = {**public.tiny_state(), "conv_in.weight": torch.ones(1, 1, 3, 3)}
    torch.save({"model_state_dict": state, "ema_model_state_dict": state}, tmp_path / "a.pt")
    refused(lambda: convert(tmp_path / "a.pt", tmp_path / "out", image_size=4), "num_groups", name="a.pt")


def test_few_small_tensors_that_describe_a_giant(tmp_path):
    """16,384 channels in two thin tensors: 9 GB for each convolution of the network that they tell of."""
    state = {
        **public.tiny_state(),
        "conv_in.weight": torch.ones(2**14, 1, 1, 1),
        "down.0.block.0.conv1.weight": torch.ones(2**14, 1, 1, 1),
    }
    torch.save({"model_state_dict": state, "ema_model_state_dict": state}, tmp_path / "a.pt")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(lambda: convert(tmp_path / "a.pt", tmp_path / "out", image_size=4), "(32,)", name="a.pt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB


def test_pickle_that_makes_its_reader_warn(tmp_path, recwarn):
    refused(lambda: load_plain(torch_file(tmp_path / "a.pt", b"\x80\x02S'\\K'\n.")), name="a.pt")
    assert not recwarn.list


@pytest.mark.parametrize("name", [3, None, ("a",), "\x1b[31m\n"], ids=str.split("number none tuple escape"))
def test_tensor_of_an_odd_name(tmp_path, name):
    state = {name: torch.ones(1)}
    torch.save({"model_state_dict": state, "ema_model_state_dict": state}, tmp_path / "a.pt")
    refused(lambda: convert(tmp_path / "a.pt", tmp_path / "out"), "dict of names", name="a.pt")


def test_a_high_limit_takes_no_memory(tmp_path):
    """A small file read with a limit of 16 GiB, which Python would take at once if it were asked for them."""
    (tmp_path / "a").write_bytes(b"{}")
    tracemalloc.start()
    assert read_bytes(tmp_path / "a", MAX_DATA_BYTES) == b"{}"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


def test_storage_larger_than_its_record(tmp_path):
    """The pickle says how many numbers a storage has; the file must hold as many."""
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        records = {info.filename.partition("/")[2]: archive.read(info) for info in archive.infolist()}
    program = records.pop("data.pkl").replace(b"K\3", b"J\xff\xff\xff\x0f")
    refused(lambda: load_plain(torch_file(tmp_path / "b.pt", program, **records)), "damaged", name="b.pt")


def test_compressed_checkpoint(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
        archive.writestr("archive/data/0", bytes(10**7))
    refused(lambda: load_plain(tmp_path / "a.pt"), "compressed", name="a.pt")


@pytest.mark.parametrize("target", ["/dev/zero", "/", "gone"])
def test_checkpoint_that_is_no_file(tmp_path, target):
    (tmp_path / "a.pt").symlink_to(target)
    refused(lambda: load_plain(tmp_path / "a.pt"), name="a.pt")


def test_plain_checkpoint_is_read_whole(tmp_path):
    case = public.Case({"cdm.pt": public.sample()})
    case.write(tmp_path / "case")
    content = load_plain(Path(tmp_path / "case" / "cdm.pt"))
    expected = torch.load(io.BytesIO(public.sample()), weights_only=True)
    assert content.keys() == expected.keys()
    for name, value in expected["model_state_dict"].items():
        assert torch.equal(content["model_state_dict"][name], value)
