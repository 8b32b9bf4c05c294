"""New runs from the weights of old ones."""

import math

import numpy as np
import pytest
import torch

from cdm_fast import UNet, load
from cdm_fast.runs.checkpoint import load_checkpoint, read_config
from cdm_fast.training.ema import Ema
from tests.test_cli import call, call_json
from tests.test_convert import CHANNELS, SIZE, make_state, save_public
from tests.tiny_run import FLAGS, write_images

CLASS_FLAGS = ["--conditioning", "embedding", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("finetune")
    write_images(path / "three.npz")
    write_images(path / "two.npz", labels=np.arange(48) % 2)
    for kind in ("embedding", "joint"):
        flags = [*FLAGS, "--conditioning", kind, "--device", "cpu"]
        call_json("train", "--data", path / "three.npz", "--out", path / kind, *flags)
    return path


def begin(folder, source, out, *flags):
    """A run of no step that changes anything: its learning rate is 0."""
    return call_json(
        *("train", "--finetune", source, "--out", out, "--steps", "2", "--lr", "0", "--device", "cpu"), *flags
    )


def test_it_begins_from_the_average_and_so_does_its_own(folder, tmp_path):
    begin(folder, folder / "embedding", tmp_path / "new", "--data", folder / "three.npz")
    config = read_config(tmp_path / "new")
    assert config.train.finetune == str(folder / "embedding") and config.train.steps == 2
    old = load_checkpoint(folder / "embedding", parts=("model", "ema")).tensors
    new = load_checkpoint(tmp_path / "new", parts=("model", "ema")).tensors
    assert any(not torch.equal(old["model"][name], old["ema"][name]) for name in old["ema"])
    for part in ("model", "ema"):
        for name, value in new[part].items():
            torch.testing.assert_close(value, old["ema"][name], rtol=0, atol=1e-6)


def test_the_average_is_not_forgotten_in_its_first_steps():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    kept, rising, copied = Ema(model, 0.999, 0), Ema(model, 0.999), Ema(model, 0.999, 2)
    torch.nn.init.ones_(model.weight)
    for ema in (kept, rising, copied):
        ema.update(0)
    assert float(kept.model.weight) == pytest.approx(0.001, rel=1e-4)
    assert float(rising.model.weight) == pytest.approx(0.9, rel=1e-4)
    assert float(copied.model.weight) == 1.0
    torch.nn.init.zeros_(model.weight)
    for step in (1, 2):  # a copy until step 2, then the full decay at once
        copied.update(step)
        torch.nn.init.ones_(model.weight)
    assert float(copied.model.weight) == pytest.approx(0.001, rel=1e-4)


@pytest.mark.parametrize("kind", ["embedding", "joint"])
def test_other_classes_begin_alike(folder, tmp_path, kind):
    begin(folder, folder / kind, tmp_path / "new", "--data", folder / "two.npz")
    old, new = load(folder / kind), load(tmp_path / "new")
    assert new.num_classes == 2
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second = (new.log_prob(x, 0, label=torch.full((3,), c)) for c in (0, 1))
        if kind == "embedding":
            torch.testing.assert_close(first, second)
            torch.testing.assert_close(new.log_prob(x), old.log_prob(x))  # the null class stays
        else:
            levels = old.log_posterior(x), new.log_posterior(x)
            torch.testing.assert_close(levels[0], levels[1], rtol=0.05, atol=0.05)
            mean = torch.stack([old.logits(x)[:, :-1].unflatten(1, (-1, 3)).mean(2)])
            here = new.logits(x)
            torch.testing.assert_close(
                here[:, :-1].unflatten(1, (-1, 2))[..., 0] - here[:, -1:],
                mean[0] - old.logits(x)[:, -1:] - math.log(2 / 3),
                rtol=1e-4,
                atol=1e-4,
            )


def test_a_converted_run_goes_on_with_other_data(tmp_path):
    file = save_public(tmp_path / "cdm.pt", make_state(num_classes=4))
    flags = ("--schedule", "linear", "--image-size", SIZE)
    call_json("convert", file, "--out", tmp_path / "public", *flags)
    pixels = np.random.default_rng(0).integers(256, size=(40, SIZE, SIZE, 3), dtype=np.uint8)
    np.savez(tmp_path / "rgb.npz", images=pixels, labels=np.arange(40) % 4)
    status, _, error = call("train", "--resume", tmp_path / "public", "--device", "cpu")
    assert status == 2 and "not trained here" in error and "train --finetune" in error
    assert CHANNELS == 2  # which no picture has: the first convolution is named
    command = ("train", "--finetune", tmp_path / "public", "--data", tmp_path / "rgb.npz", "--device", "cpu")
    status, _, error = call(*command, "--out", tmp_path / "new")
    assert status == 2 and "network.conv_in.weight" in error and "2 channels" in error
    assert not (tmp_path / "new").exists()


def test_a_converted_run_trains_on_pictures_of_its_kind(tmp_path):
    torch.manual_seed(0)
    network = UNet(
        SIZE,
        3,
        7,
        base_channels=32,
        multipliers=(1, 2),
        blocks_per_level=1,
        attention_resolutions=(SIZE // 2,),
        dropout=0.0,
        num_classes=4,
    )
    file = save_public(tmp_path / "cdm.pt", network.state_dict())
    flags = ("--schedule", "linear", "--image-size", SIZE)
    call_json("convert", file, "--out", tmp_path / "public", *flags)
    pixels = np.random.default_rng(0).integers(256, size=(60, SIZE, SIZE, 3), dtype=np.uint8)
    np.savez(tmp_path / "rgb.npz", images=pixels, labels=np.arange(60) % 3)
    few = ("--steps", "2", "--batch-size", "8", "--num-samples", "3", "--sampling-steps", "2")
    begun = call_json(
        *("train", "--finetune", tmp_path / "public", "--data", tmp_path / "rgb.npz", "--out"),
        *(tmp_path / "new", *few, "--label-dropout", "0.1", "--device", "cpu"),
    )
    config = read_config(tmp_path / "new")
    assert begun["step"] == 2 and config.image.num_classes == 3 and config.data.pixels == "points"
    assert (config.schedule.beta_end, config.schedule.T) == (0.02, 5)
    null = load(tmp_path / "new").network.state_dict()["label_emb.weight"][-1]
    torch.testing.assert_close(null, network.state_dict()["label_emb.weight"][-1], rtol=0.1, atol=0.01)
    assert call_json("nll", tmp_path / "new", "--draws", "1")["given"] == "none"  # it is trained now


def test_a_finetuned_run_is_resumed_as_any_other(folder, tmp_path):
    source, out = folder / "embedding", tmp_path / "new"
    flags = ["--data", folder / "three.npz", "--device", "cpu"]
    call_json("train", "--finetune", source, "--out", out, "--steps", "2", *flags)
    call_json("train", "--resume", out, "--steps", "4", "--device", "cpu")
    call_json("train", "--finetune", source, "--out", tmp_path / "whole", "--steps", "4", *flags)
    # The cosine of the learning rate ends elsewhere, so the two differ; both have gone on.
    assert load_checkpoint(out).step == load_checkpoint(tmp_path / "whole").step == 4


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--preset", "digits"], "--preset digits"),
        (["--T", "9"], "was trained with the levels of"),
        (["--schedule", "cosine"], "was trained with the levels of"),
        (["--base-channels", "64"], "leave the network's settings"),
        (["--conditioning", "none"], "leave"),
        (["--resume", "RUN"], "give only one"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(folder, tmp_path, flags, told):
    flags = [str(folder / "joint") if flag == "RUN" else flag for flag in flags]
    command = ("train", "--finetune", folder / "embedding", "--data", folder / "three.npz", "--device", "cpu")
    out = [] if "--resume" in flags else ["--out", tmp_path / "new"]
    status, _, error = call(*command, *out, *flags)
    assert status == 2 and told in error
    assert not (tmp_path / "new").exists()
