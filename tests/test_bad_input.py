"""Every user error gives one clear line that names it and exit status 2, and leaves nothing half-written."""

import gzip
import pickle
import struct
import subprocess
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from cdm_fast.runs.checkpoint import create_run, read_config, write_config
from cdm_fast.training.state import new_state, to_checkpoint
from tests.test_cli import call
from tests.tiny_run import FLAGS, tiny_config, write_images


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images.npz")


@pytest.fixture
def run(tmp_path, images):
    """An untrained run without classes."""
    config = tiny_config(images)
    create_run(tmp_path / "run", config, to_checkpoint(new_state(config, torch.device("cpu")), config))
    return tmp_path / "run"


def everything(folder):
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def refused(tmp_path, arguments, *told):
    """Asserts that the command line fails with one line that holds all of `told`, and changes no file."""
    before = everything(tmp_path)
    status, out, err = call(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("cdm-fast: error: ") and err.count("\n") == 1, err
    for words in told:
        assert words in err, err
    assert everything(tmp_path) == before


# Data sources. Each function makes a bad one in a folder and returns it with what the line must say.


def no_such_file(folder):
    return folder / "nowhere", "nowhere", "give digits"


def not_an_npz(folder):
    (folder / "bad.npz").write_bytes(b"not a zip")
    return folder / "bad.npz", "bad.npz"


def truncated_npz(folder):
    content = write_images(folder / "whole.npz").read_bytes()
    (folder / "bad.npz").write_bytes(content[: len(content) // 2])
    return folder / "bad.npz", "bad.npz"


def pickle_in_npz(folder):
    np.savez(folder / "bad.npz", images=np.array([{"code": 1}], dtype=object))
    return folder / "bad.npz", "bad.npz", "pickle"


def nan_in_data(folder):
    pixels = np.zeros((20, 8, 8), np.float32)
    pixels[3, 2, 1] = np.nan
    return write_images(folder / "bad.npz", images=pixels), "bad.npz", "NaN"


def value_out_of_range(folder):
    return write_images(folder / "bad.npz", images=np.full((48, 8, 8), 40, np.uint8)), "bad.npz", "40"


def wrong_dtype(folder):
    return write_images(folder / "bad.npz", images=np.zeros((48, 8, 8), np.complex64)), "bad.npz"


def wrong_shape(folder):
    return write_images(folder / "bad.npz", images=np.zeros((48, 64), np.uint8)), "bad.npz", "(48, 64)"


def negative_label(folder):
    return write_images(folder / "bad.npz", labels=np.full(48, -1)), "bad.npz", "-1"


def labels_of_another_length(folder):
    return write_images(folder / "bad.npz", labels=np.zeros(3, np.int64)), "bad.npz", "3"


def idx(values, rank):
    return struct.pack(f">BBBB{rank}I", 0, 0, 8, rank, *values.shape) + values.astype(np.uint8).tobytes()


def idx_folder(folder):
    place = folder / "mnist"
    place.mkdir()
    for stem in ("train", "t10k"):
        (place / f"{stem}-images-idx3-ubyte").write_bytes(idx(np.zeros((20, 8, 8)), 3))
        (place / f"{stem}-labels-idx1-ubyte").write_bytes(idx(np.zeros(20), 1))
    return place


def truncated_idx(folder):
    place = idx_folder(folder)
    path = place / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-7])
    return place, "train-images-idx3-ubyte", "truncated"


def truncated_gzip_idx(folder):
    place = idx_folder(folder)
    path = place / "train-images-idx3-ubyte"
    (place / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(path.read_bytes())[:-9])
    path.unlink()
    return place, "train-images-idx3-ubyte.gz"


def idx_without_labels(folder):
    place = idx_folder(folder)
    (place / "train-labels-idx1-ubyte").unlink()
    return place, "train-labels-idx1-ubyte"


def truncated_cifar(folder):
    (folder / "cifar").mkdir()
    for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        (folder / "cifar" / name).write_bytes(bytes(3073 + 11))
    return folder / "cifar", "data_batch_1.bin", "truncated"


def corrupt_picture(folder):
    place = folder / "pictures"
    for name in ("cats", "dogs"):
        (place / name).mkdir(parents=True)
        for i in range(12):
            Image.new("L", (8, 8), i).save(place / name / f"{i}.png")
    path = place / "cats" / "0.png"
    path.write_bytes(path.read_bytes()[:40])
    return place, "0.png"


def corrupt_zip(folder):
    with zipfile.ZipFile(folder / "whole.zip", "w") as archive:
        archive.writestr("a/0.png", b"x" * 500)
    (folder / "bad.zip").write_bytes((folder / "whole.zip").read_bytes()[:-30])
    return folder / "bad.zip", "bad.zip"


def indivisible_size(folder):
    return write_images(folder / "odd.npz", images=np.zeros((48, 9, 9), np.uint8)), "9x9", "cannot be halved"


def indivisible_width(folder):
    return write_images(folder / "odd.npz", images=np.zeros((48, 8, 7), np.uint8)), "8x7", "--image-size 8x6"


BAD_DATA = [
    no_such_file,
    not_an_npz,
    truncated_npz,
    pickle_in_npz,
    nan_in_data,
    value_out_of_range,
    wrong_dtype,
    wrong_shape,
    negative_label,
    labels_of_another_length,
    truncated_idx,
    truncated_gzip_idx,
    idx_without_labels,
    truncated_cifar,
    corrupt_picture,
    corrupt_zip,
    indivisible_size,
    indivisible_width,
]


@pytest.mark.parametrize("make", BAD_DATA, ids=lambda make: make.__name__)
def test_bad_data(tmp_path, make):
    data, *told = make(tmp_path)
    refused(
        tmp_path,
        ["train", "--data", data, "--out", tmp_path / "new", *FLAGS, "--multipliers", "1", "1"],
        *told,
    )


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            ["--preset", "cifar100"],
            ["'cifar100'", "digits, fashion-mnist, cifar10, celeba64, digits-encoder"],
        ),
        (["--steps", "many"], ["--steps", "'many'"]),
        (["--steps", "0"], ["--steps is 0"]),
        (["--step", "5"], ["--step"]),
        (["--schedule", "sine"], ["'sine'", "'uniform'"]),
        (["--lr", "nan"], ["--lr is nan"]),
        (["--dropout", "1.5"], ["--dropout is 1.5"]),
        (["--base-channels", "36", "--num-groups", "32"], ["base_channels 36", "num_groups 32"]),
        (["--attention-resolutions", "5"], ["--attention-resolutions 5"]),
        (["--sampling-steps", "100", "--T", "50"], ["--sampling-steps is 100", "--T 50"]),
        (["--batch-size", "10", "--accumulate", "3"], ["--accumulate 3"]),
        (["--image-size", "-3"], ["-3"]),
        (["--max-time", "-1"], ["--max-time is -1"]),
        (["--device", "abacus"], ["--device abacus"]),
        (["--resume", "run", "--preset", "digits"], ["--preset", "--resume run"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else None,
)
def test_bad_training_flags(tmp_path, flags, told):
    new = [] if "--resume" in flags else [*FLAGS, "--out", tmp_path / "new"]
    refused(tmp_path, ["train", *new, *flags], *told)


def test_unknown_command(tmp_path):
    refused(tmp_path, ["trian"], "trian", "train, sample, nll")


def test_no_command(tmp_path):
    refused(tmp_path, [], "train, sample, nll")


def test_json_keeps_to_one_object(tmp_path):
    status, out, err = call("nll", tmp_path / "none", "--json")
    assert status == 2
    assert out.count("\n") == 1 and out.startswith('{"error": "no run directory')
    assert err.count("\n") == 1


def test_existing_directory_is_not_overwritten(tmp_path, run, images):
    refused(tmp_path, ["train", "--data", images, "--out", run, *FLAGS], f"{run} exists already", "--resume")


def test_output_under_a_file(tmp_path, images):
    refused(tmp_path, ["train", "--data", images, "--out", images / "run", *FLAGS], "images.npz")


def test_resume_of_nothing(tmp_path):
    refused(tmp_path, ["train", "--resume", tmp_path / "gone"], "no run directory", "gone")


def test_resume_with_another_network(tmp_path, run):
    refused(tmp_path, ["train", "--resume", run, "--base-channels", "64"], "base_channels: 32 -> 64")


def test_run_of_another_architecture(tmp_path, run):
    config = read_config(run)
    write_config(run, replace(config, schedule=replace(config.schedule, T=9)))
    refused(tmp_path, ["sample", run, "--steps", "2"], str(run), "another architecture")


def test_config_that_is_no_json(tmp_path, run):
    (run / "config.json").write_text("{")
    refused(tmp_path, ["sample", run], "config.json")


def test_weights_that_are_a_pickle(tmp_path, run):
    for path in run.rglob("ema.safetensors"):
        path.write_bytes(pickle.dumps(print))
    status, _, err = call("sample", run, "--steps", "2")
    assert status == 2
    assert "ema.safetensors" in err and "no intact checkpoint" in err


def test_checkpoint_that_wants_to_run_code(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"model_state_dict": Payload()}, tmp_path / "evil.pt")
    refused(tmp_path, ["convert", tmp_path / "evil.pt", "--out", tmp_path / "new"], "evil.pt", "refused")


def test_missing_checkpoint_to_convert(tmp_path):
    refused(tmp_path, ["convert", tmp_path / "gone.pt", "--out", tmp_path / "new"], "gone.pt")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--steps", "9"], ["9", "T = 8"]),
        (["--num", "0"], ["--num is 0"]),
        (["--eta", "2"], ["eta", "2"]),
        (["--eta", "1", "--sampler", "heun"], ["eta is 1.0", "'heun' takes none"]),
        (["--leapfrog", "2"], ["leapfrog is 2", "makes no moves"]),
        (["--sampler", "mala", "--moves", "0"], ["moves is 0"]),
        (["--label", "1"], ["--label 1", "without classes"]),
        (["--sampler", "euler_ot", "--steps", "2"], ["euler_ot"]),
        (["--out", "picture.gif", "--steps", "2"], ["picture.gif", ".png or .npz"]),
        (["--seed", "-1", "--steps", "2"], ["-1"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else None,
)
def test_bad_sampling_flags(tmp_path, run, flags, told):
    refused(tmp_path, ["sample", run, *flags], *told)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--level", "10"], ["level 10", "0"]),
        (["--draws", "0"], ["draws is 0"]),
        (["--batch-size", "0"], ["--batch-size is 0"]),
        (["--data", "digits", "--split", "trial"], ["'trial'", "'test'"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else None,
)
def test_bad_scoring_flags(tmp_path, run, flags, told):
    refused(tmp_path, ["nll", run, *flags], *told)


def test_scoring_data_of_another_kind(tmp_path, run):
    other = write_images(tmp_path / "other.npz", images=np.zeros((48, 6, 6), np.uint8))
    refused(tmp_path, ["nll", run, "--data", other], "6x6", "8x8")


def test_denoising_nothing(tmp_path, run):
    refused(tmp_path, ["denoise", run], "no image to denoise")


def test_denoising_a_missing_image(tmp_path, run):
    refused(tmp_path, ["denoise", run, tmp_path / "gone.png"], "gone.png")


def test_denoising_what_is_no_image(tmp_path, run):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    refused(tmp_path, ["denoise", run, tmp_path / "bad.png"], "bad.png")


def test_denoising_an_image_of_another_size(tmp_path, run):
    Image.new("L", (9, 7)).save(tmp_path / "odd.png")
    refused(tmp_path, ["denoise", run, tmp_path / "odd.png"], "odd.png", "7x9", "8x8")


def test_denoising_two_images_of_one_name(tmp_path, run):
    (tmp_path / "a").mkdir()
    for path in (tmp_path / "x.png", tmp_path / "a" / "x.png"):
        Image.new("L", (8, 8)).save(path)
    refused(tmp_path, ["denoise", run, tmp_path / "x.png", tmp_path / "a" / "x.png"], "same name")


def test_process_ends_with_status_2_and_no_traceback(tmp_path):
    command = [sys.executable, "-m", "cdm_fast.cli", "train", "--data", str(tmp_path / "gone")]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "new")], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
