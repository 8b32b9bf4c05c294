"""A run's own data: recorded by content and place, read the same way again, and refused when they changed."""

import io
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from cdm_fast.config import RunConfig, preset
from cdm_fast.config.json import differences
from cdm_fast.data import load_data, read_image
from cdm_fast.data.load import Request, data_digest, source_digest
from cdm_fast.data.pictures import Fit, decode, parse_crop
from cdm_fast.errors import UserError
from cdm_fast.runs.checkpoint import create_run, read_config
from cdm_fast.runs.data import evaluation_data, in_place, run_data
from cdm_fast.training.prepare import resolve
from cdm_fast.training.state import new_state, to_checkpoint
from tests.test_cli import call
from tests.test_data_bad_input import refused
from tests.tiny_run import tiny_config


def pictures(folder, count=40, first=0, colour=True, side=(8, 8)):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(first)
    for i in range(first, first + count):
        pixels = rng.integers(0, 256, (*side, 3) if colour else side, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch):
    """An untrained run on `pics` under the working directory."""
    monkeypatch.chdir(tmp_path)
    pictures(tmp_path / "pics")
    config = tiny_config("pics")
    return make_run(tmp_path / "run", config)


def make_run(path, config):
    config = in_place(config)
    data = run_data(config, "train")
    config = resolve(config, data, torch.device("cpu"))
    state = new_state(config, torch.device("cpu"))
    state.data = data_digest(data)
    create_run(path, config, to_checkpoint(state, config))
    return path


def test_a_relative_path_is_kept_as_absolute_with_the_name_as_given(run, tmp_path):
    data = read_config(run).data
    assert (data.source, data.given) == (str(tmp_path / "pics"), "pics")
    assert run_data(read_config(run), "test").name == "pics"


def test_places_that_are_none_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    found = {
        source: in_place(replace(RunConfig(), data=replace(RunConfig().data, source=source))).data.source
        for source in ("digits", "hf:me/set", "hf:set", "/a/b", "~/x", "")
    }
    home = os.path.expanduser("~")
    assert found == {
        "digits": "digits",
        "hf:me/set": "hf:me/set",
        "hf:set": f"hf:{tmp_path}/set",
        "/a/b": "/a/b",
        "~/x": f"{home}/x",
        "": "",
    }


def test_other_pictures_of_that_name_elsewhere_are_not_the_runs_own(run, tmp_path, monkeypatch):
    other = tmp_path / "other"
    pictures(other / "pics", first=500)
    monkeypatch.chdir(other)
    test = evaluation_data(run, read_config(run), "test")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(test.images, load_data("pics", "test").images)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_data_that_changed_are_refused(run, tmp_path, split):
    config = read_config(run)
    evaluation_data(run, config, split)
    pictures(tmp_path / "pics", 20, first=40)
    with pytest.raises(UserError, match="has changed since"):
        evaluation_data(run, config, split)
    assert len(evaluation_data(run, config, split, "pics"))  # named, they are data like any other


@pytest.mark.parametrize(
    "command",
    [["nll"], ["score"], ["calibrate"], ["plot"], ["replay", "--step", "0"]],
    ids=lambda words: words[0],
)
def test_every_command_checks_the_runs_own_data(run, tmp_path, command):
    pictures(tmp_path / "pics", 20, first=40)
    status, _, err = call(command[0], str(run), *command[1:])
    assert status == 2 and "has changed since" in err and err.count("\n") == 1


@pytest.mark.parametrize("flag", ["--data=", "--data=hf:"])
def test_empty_data_are_refused(run, flag):
    status, _, err = call("nll", str(run), flag)
    assert status == 2 and err.count("\n") == 1 and "give" in err


def test_the_digest_needs_few_images_and_is_that_of_all(tmp_path, monkeypatch):
    pictures(tmp_path / "pics", 60)
    labels = {"labels": np.arange(60) % 4}
    np.savez(tmp_path / "a.npz", images=np.zeros((60, 4, 4), np.uint8), **labels)
    for source in (tmp_path / "pics", tmp_path / "a.npz", "digits"):
        for seed in (0, 1):
            whole = data_digest(load_data(source, "train", split_seed=seed))
            assert source_digest(Request(source, split_seed=seed)) == whole


def test_moved_data_can_be_named_to_resume_but_not_other_settings(run):
    config = read_config(run)
    moved = replace(config, data=replace(config.data, source="/elsewhere", given=None))
    assert differences(config, moved) == []
    assert differences(config, replace(config, data=replace(config.data, crop="none")))
    assert differences(config, replace(config, data=replace(config.data, resample="box")))
    assert differences(config, replace(config, data=replace(config.data, channels=3)))


# ---------------------------------------------------------------- channels


def test_grey_first_and_colour_then_are_read_with_channels(tmp_path):
    pictures(tmp_path / "a", 10, colour=False)
    pictures(tmp_path / "a", 10, first=10)
    message = refused(lambda: load_data(tmp_path / "a"), "--channels 3")
    assert "grey" in message
    assert load_data(tmp_path / "a", channels=3).images.shape[1] == 3


def test_evaluation_data_are_brought_to_the_runs_channels_where_nothing_is_lost(run, tmp_path):
    pictures(tmp_path / "grey", colour=False)
    colour = run_data(read_config(run), "test", str(tmp_path / "grey"))
    assert torch.equal(colour.images, load_data(tmp_path / "grey", "test").images.expand(-1, 3, -1, -1))
    own = make_run(tmp_path / "grey_run", tiny_config(tmp_path / "grey"))
    config = read_config(own)
    (tmp_path / "as_colour").mkdir()
    for path in (tmp_path / "grey").iterdir():
        Image.open(path).convert("RGB").save(tmp_path / "as_colour" / path.name)
    back = run_data(config, "test", str(tmp_path / "as_colour"))
    assert torch.equal(back.images, load_data(tmp_path / "grey", "test").images)
    assert run_data(config, "test", str(tmp_path / "pics")).images.shape[1] == 3


# ---------------------------------------------------------------- crops and filters


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["bicubic", "bilinear", "lanczos", "box"])
def test_a_box_is_cut_out_before_it_is_resampled(kind):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    got = decode(png(pixels), "x", Fit(6, crop=(5, 2, 12, 12), resample=kind))
    cut = Image.fromarray(pixels[2:14, 5:17])
    want = np.asarray(cut.resize((6, 6), getattr(Image.Resampling, kind.upper())))
    assert np.array_equal(got, want.transpose(2, 0, 1))


def test_none_takes_the_whole_picture_and_no_size_only_crops():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
    whole = np.asarray(Image.fromarray(pixels).resize((6, 6), Image.Resampling.BICUBIC))
    assert np.array_equal(decode(png(pixels), "x", Fit(6, crop="none"))[0], whole)
    assert np.array_equal(decode(png(pixels), "x", Fit(crop=(1, 2, 7, 9)))[0], pixels[2:11, 1:8])


def test_the_celeba_preset_crops_as_the_public_code_does():
    pixels = np.random.default_rng(0).integers(0, 256, (218, 178, 3), dtype=np.uint8)
    for name in ("celeba64", "celeba64-paper"):
        data = preset(name).data
        got = decode(png(pixels), "x", Fit(data.image_size, None, parse_crop(data.crop), data.resample))
        rows, columns = slice(57, 185), slice(25, 153)
        want = Image.fromarray(pixels[rows, columns]).resize((64, 64), Image.Resampling.BILINEAR)
        assert np.array_equal(got, np.asarray(want).transpose(2, 0, 1))


def test_a_crop_goes_for_arrays_and_keeps_grey_levels(tmp_path):
    images = np.random.default_rng(0).integers(0, 17, (20, 9, 9), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images, num_grey_levels=17)
    data = load_data(tmp_path / "a.npz", crop="1,2,4,4")
    assert data.images.shape[1:] == (1, 4, 4)
    assert {bytes(x) for x in data.images.numpy()} <= {
        bytes(x) for x in np.ascontiguousarray(images[:, 2:6, 1:5])
    }


@pytest.mark.parametrize(
    "crop, options, word",
    [
        ("middle", {}, "'middle'"),
        ("1,2,3", {}, "LEFT,TOP"),
        ("0,0,0,4", {}, "LEFT,TOP"),
        ("-1,0,4,4", {}, "LEFT,TOP"),
        ("0,0,9,4", {}, "8 pixels high and 8 wide"),
        ("0,0,4,2", {"image_size": 4}, "proportions"),
    ],
)
def test_crops_that_do_not_fit(tmp_path, crop, options, word):
    pictures(tmp_path)
    refused(lambda: load_data(tmp_path, crop=crop, **options), word)


def test_a_picture_of_the_wanted_size_needs_no_crop(tmp_path):
    pictures(tmp_path)
    data = load_data(tmp_path, crop="25,57,128,128", image_size=8)
    assert torch.equal(data.images, load_data(tmp_path).images)
    assert read_image(tmp_path / "000.png").shape == (3, 8, 8)
