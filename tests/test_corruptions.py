"""The fifteen corruptions: shape and range at every size, determinism, effects that grow with severity."""

from itertools import pairwise

import pytest
import torch

from cdm_fast import UserError
from cdm_fast.data.corruptions import (
    KINDS,
    SEVERITIES,
    _disk,
    _gaussian,
    _plasma,
    _shift,
    corrupt,
    defocus_blur,
)

SIZES = [(8, 1), (28, 1), (32, 3), (64, 3)]


def pictures(num, channels, size, grey_levels=256, seed=0):
    """Smooth random blobs, an eighth of the side in extent, from black to white."""
    generator = torch.Generator().manual_seed(seed)
    field = _gaussian(torch.randn(num, channels, size, size, generator=generator), size / 16)
    field = 0.45 + 0.25 * field / field.std()
    return (field.clamp(0, 1) * (grey_levels - 1)).round().to(torch.uint8)


def squared_change(images, kind, severity):
    corrupted = corrupt(images, kind, severity)
    return float((corrupted.double() - images.double()).square().mean())


def test_there_are_fifteen():
    assert len(KINDS) == 15


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "channels"), SIZES)
def test_shape_range_and_determinism(kind, size, channels):
    images = pictures(4, channels, size, grey_levels=17)
    for severity in (1, 5):
        got = corrupt(images, kind, severity, num_grey_levels=17, seed=3)
        assert got.shape == images.shape and got.dtype == torch.uint8 and int(got.max()) <= 16
        assert torch.equal(got, corrupt(images, kind, severity, num_grey_levels=17, seed=3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "channels"), SIZES)
def test_each_severity_changes_more_than_the_one_before(kind, size, channels):
    images = pictures(24, channels, size)
    changes = [squared_change(images, kind, severity) for severity in SEVERITIES]
    assert changes[0] > 0
    assert all(weaker < stronger for weaker, stronger in pairwise(changes)), changes
    assert changes[-1] > 1.3 * changes[0]


RANDOM = set(KINDS) - {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_matters_where_there_is_chance(kind):
    images = pictures(6, 3, 32)
    same = torch.equal(corrupt(images, kind, 5, seed=0), corrupt(images, kind, 5, seed=1))
    assert same == (kind not in RANDOM)


@pytest.mark.parametrize("kind", KINDS)
def test_images_do_not_touch_each_other(kind):
    images = pictures(3, 1, 28)
    altered = images.clone()
    altered[2] = 255 - altered[2]
    assert torch.equal(corrupt(images, kind, 4)[:2], corrupt(altered, kind, 4)[:2])


def test_noise_has_the_published_strength():
    grey = torch.full((40, 1, 32, 32), 128, dtype=torch.uint8)
    for severity, std in zip(SEVERITIES, (0.04, 0.06, 0.08, 0.09, 0.10), strict=True):
        noisy = corrupt(grey, "gaussian_noise", severity).double() / 255
        assert float(noisy.std()) == pytest.approx(std, rel=0.02)
    for severity, photons in zip(SEVERITIES, (500, 250, 100, 75, 50), strict=True):
        noisy = corrupt(grey, "shot_noise", severity).double() / 255
        assert float(noisy.std()) == pytest.approx((128 / 255 / photons) ** 0.5, rel=0.03)
    for severity, share in zip(SEVERITIES, (0.01, 0.02, 0.03, 0.05, 0.07), strict=True):
        changed = corrupt(grey, "impulse_noise", severity) != 128
        assert float(changed.double().mean()) == pytest.approx(share, rel=0.1)


def test_contrast_and_brightness_are_their_formulas():
    images = pictures(3, 3, 16)
    x = images.double() / 255
    mean = x.mean((2, 3), keepdim=True)
    wanted = (255 * (mean + 0.4 * (x - mean))).round()
    assert int((corrupt(images, "contrast", 3) - wanted).abs().max()) <= 1
    brighter = corrupt(images, "brightness", 2).double() / 255
    value = x.amax(1)
    torch.testing.assert_close(brighter.amax(1), (value + 0.1).clamp(max=1), rtol=0, atol=2 / 255)
    hue = x / value[:, None]  # the ratios of the channels stay
    torch.testing.assert_close(brighter / brighter.amax(1, keepdim=True), hue, rtol=0, atol=0.04)


@pytest.mark.parametrize("kind", ["defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "pixelate"])
def test_blurs_leave_an_even_picture_alone(kind):
    even = torch.full((2, 3, 32, 32), 77, dtype=torch.uint8)
    assert torch.equal(corrupt(even, kind, 5), even)


def test_the_spread_of_a_point_scales_with_the_picture():
    """A disk of radius r spreads a point by r / 2 along each axis."""
    for size in (32, 64):
        x = torch.zeros(1, 1, size, size)
        x[..., size // 2, size // 2] = 1.0
        place = torch.arange(size) - size // 2
        for severity, radius in enumerate((0.8, 1.0, 1.2, 1.3, 1.6)):
            blurred = defocus_blur(x, severity, torch.Generator())[0, 0]
            assert float(blurred.sum()) == pytest.approx(1, abs=1e-5)
            variance = float((blurred.sum(0) * place.square()).sum())
            of_disk = (radius / 2 * size / 32) ** 2
            assert of_disk < variance < of_disk + 0.25  # bilinear reading adds at most 1/4


def test_shift_moves_by_whole_and_by_half_pixels():
    x = torch.zeros(1, 1, 5, 5)
    x[0, 0, 2, 2] = 1
    assert _shift(x, 1.0, 0.0)[0, 0, 2, 3] == pytest.approx(1)
    assert _shift(x, 0.0, -0.5)[0, 0, 1:3, 2].tolist() == pytest.approx([0.5, 0.5])


def test_gaussian_has_its_width():
    x = torch.zeros(1, 1, 41, 41)
    x[..., 20, 20] = 1
    place = torch.arange(41) - 20
    blurred = _gaussian(x, 2.5)[0, 0]
    assert float((blurred.sum(1) * place.square()).sum()) == pytest.approx(2.5**2, rel=1e-3)


def test_disk_is_covered_evenly():
    points = torch.tensor(_disk(rings=3))
    assert len(points) == 37
    assert float(points.square().sum(1).mean()) == pytest.approx(0.5, rel=0.05)  # E r^2 on the unit disk
    assert points.mean(0).abs().max() < 1e-6


def test_plasma_fills_its_range_and_is_smoother_with_faster_decay():
    rough, smooth = (_plasma(8, decay, torch.Generator().manual_seed(0)) for decay in (1.2, 3.0))
    for field in (rough, smooth):
        assert field.amin() == 0 and field.amax() == 1 and field.shape == (8, 1, 32, 32)
    assert rough.diff(dim=3).square().mean() > 2 * smooth.diff(dim=3).square().mean()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((pictures(1, 1, 8), "rain", 1), "unknown corruption"),
        ((pictures(1, 1, 8), "snow", 0), "severity is 0"),
        ((pictures(1, 1, 8), "snow", 6), "severity is 6"),
        ((pictures(1, 1, 8).float(), "snow", 1), "torch.float32"),
        ((pictures(1, 1, 8)[0], "snow", 1), "give uint8"),
    ],
)
def test_wrong_use_is_told(arguments, told):
    with pytest.raises(UserError, match=told):
        corrupt(*arguments)
