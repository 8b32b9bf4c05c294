"""Deformed training images: small, unbiased, in range, and only where and as long as a run asks for them."""

from dataclasses import replace

import pytest
import torch

from cdm_fast.config import check, preset
from cdm_fast.data import deform as module
from cdm_fast.data import load_data
from cdm_fast.data.deform import deform, deform_some
from cdm_fast.errors import UserError
from cdm_fast.runs.build import build_model
from cdm_fast.training.step import draw_batch
from tests.tiny_run import tiny_config, write_images


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def blob(size=8, num=1):
    """Grey images (num, 1, size, size) of 17 levels with a smooth bright spot in the middle."""
    place = torch.arange(size) - (size - 1) / 2
    spot = 16 * torch.exp(-(place[:, None] ** 2 + place**2) / 4)
    return spot.round().to(torch.uint8).expand(num, 1, size, size).contiguous()


@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (1, 3, 7, 5), (2, 2, 4, 9)])
def test_without_spread_nothing_moves(monkeypatch, shape):
    for name in ("ROTATION", "SHEAR", "SCALE", "SHIFT_X", "SHIFT_Y"):
        monkeypatch.setattr(module, name, 0.0)
    images = torch.randint(0, 17, shape, dtype=torch.uint8, generator=seeded())
    assert torch.equal(deform(images, 17, seeded()), images)


def test_a_rotation_turns_pixels_on_any_aspect(monkeypatch):
    """A quarter turn of a wide image moves a bright pixel from beside the centre to above or below it."""
    for name in ("SHEAR", "SCALE", "SHIFT_X", "SHIFT_Y"):
        monkeypatch.setattr(module, name, 0.0)
    monkeypatch.setattr(module, "ROTATION", torch.pi / 2)
    monkeypatch.setattr(torch, "randn", lambda *size, **options: torch.ones(size))
    images = torch.zeros(1, 1, 5, 9, dtype=torch.uint8)
    images[0, 0, 2, 6] = 16  # two to the right of the middle (2, 4)
    assert deform(images, 17, seeded())[0, 0].nonzero().tolist() in ([[0, 4]], [[4, 4]])


def test_deformed_images_keep_range_mean_and_place():
    images = blob(num=4000)
    moved = deform(images, 17, seeded())
    assert moved.dtype == torch.uint8 and moved.shape == images.shape and int(moved.max()) <= 16
    change = moved.float() - images.float()
    assert 0.2 < float(change.abs().mean()) < 2  # they move, by less than a pixel
    assert abs(float(change.mean())) < 0.1  # and grow no brighter
    weight = moved.float().mean((0, 1))
    centre = (weight * torch.arange(8)).sum() / weight.sum()
    assert abs(float(centre) - 3.5) < 0.05


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_of_images_that_change(share):
    images = blob(num=3000)
    changed = (deform_some(images, share, 17, seeded()) != images).flatten(1).any(1).double().mean()
    assert float(changed) == pytest.approx(share, abs=0.03)


@pytest.fixture
def config(tmp_path):
    return tiny_config(write_images(tmp_path / "images.npz"), steps=10)


def test_a_run_deforms_until_its_step_and_draws_everything_else_alike(config):
    """The last steps, and all steps of a run without the option, see the images as they are."""
    data = load_data(config.data.source)
    model = build_model(config)
    deforming = replace(config, train=replace(config.train, deform=1.0, deform_until=0.7))
    for step in range(10):
        plain, deformed = (draw_batch(data, model, each, step) for each in (config, deforming))
        assert torch.equal(plain.level, deformed.level) and torch.equal(plain.eps, deformed.eps)
        assert torch.equal(plain.x_t, deformed.x_t) == (step >= 7)
        assert torch.equal(deformed.x_t, draw_batch(data, model, deforming, step).x_t)


@pytest.mark.parametrize("flag", ["deform", "deform_until"])
def test_a_share_above_one_is_refused(flag):
    config = preset("digits")
    with pytest.raises(UserError, match=rf"--{flag.replace('_', '-')} is 1\.5; give a number from 0 to 1"):
        check(replace(config, train=replace(config.train, **{flag: 1.5})))
