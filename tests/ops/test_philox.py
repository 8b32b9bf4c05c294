"""Philox against its published vectors; numbers drawn from it against their distributions."""

import math

import pytest
import torch

from cdm_fast.ops.philox import (
    MAX_ELEMENTS,
    Stream,
    box_muller,
    check_seed,
    philox4x32_10,
    philox_flip,
    philox_normal,
    philox_uniform,
    philox_words,
)

# Random123, tests/kat_vectors, the lines "philox4x32 10": counter, key, expected words.
PUBLISHED = {
    "zeros": ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}


def _seed(seed: int, offset: int = 0) -> torch.Tensor:
    return torch.tensor([seed, offset])


@pytest.mark.parametrize("vector", PUBLISHED.values(), ids=PUBLISHED.keys())
def test_words_equal_the_published_vectors(vector):
    counter, key, expected = vector
    counter, key = (tuple(torch.tensor(word) for word in words) for words in (counter, key))
    assert tuple(int(word) for word in philox4x32_10(counter, key)) == expected


def test_counter_and_key_are_laid_out_as_documented():
    seed, offset, block = 0x299F31D0A4093822, 0x0370734413198A2E, 7
    counter = [torch.tensor(word) for word in (block, Stream.FLIP, 0x13198A2E, 0x03707344)]
    key = [torch.tensor(word) for word in (0xA4093822, 0x299F31D0)]
    words = philox_words(_seed(seed, offset), 4 * block + 4, Stream.FLIP)
    assert words[-4:].tolist() == [int(word) for word in philox4x32_10(tuple(counter), tuple(key))]


def test_draws_of_any_length_share_their_beginning():
    seed = _seed(-5, 2**40)
    assert torch.equal(philox_words(seed, 4097, Stream.NOISE)[:13], philox_words(seed, 13, Stream.NOISE))


@pytest.mark.parametrize(
    "other", [(4, 9, Stream.NOISE), (3, 10, Stream.NOISE), (3, 9, Stream.DEQUANTISATION)], ids=str
)
def test_another_seed_offset_or_stream_gives_other_words(other):
    words = philox_words(_seed(3, 9), 1000, Stream.NOISE)
    seed, offset, stream = other
    assert int((words == philox_words(_seed(seed, offset), 1000, stream)).sum()) == 0


def test_normals_have_the_moments_and_tails_of_a_normal():
    z = philox_normal(_seed(1), (400_000,)).double()
    count = z.numel()
    assert abs(float(z.mean())) < 5 / math.sqrt(count)
    assert abs(float(z.var()) - 1) < 5 * math.sqrt(2 / count)
    assert abs(float((z**4).mean()) - 3) < 5 * math.sqrt(96 / count)
    for threshold in (1.0, 2.0, 3.0):
        p = math.erfc(threshold / math.sqrt(2))
        assert abs(float((z.abs() > threshold).double().mean()) - p) < 5 * math.sqrt(p / count)


def test_neighbouring_normals_are_uncorrelated():
    z = philox_normal(_seed(2), (400_000,)).double()
    for lag in (1, 2, 3, 4):
        assert abs(float((z[lag:] * z[:-lag]).mean())) < 5 / math.sqrt(z.numel())


def test_box_muller_equals_its_formula_in_fp64():
    word_u = torch.randint(0, 2**32, (20_000,))
    word_v = torch.randint(0, 2**32, (20_000,))
    u = (word_u.float() * 2.0**-32 + 2.0**-33).double()  # of 24 bits: part of the definition
    v = word_v.double() * 2.0**-32
    radius = (-2 * u.log()).sqrt()
    for got, wave in zip(box_muller(word_u, word_v), (torch.cos, torch.sin), strict=True):
        torch.testing.assert_close(got.double(), radius * wave(2 * math.pi * v), rtol=0, atol=1e-6)


def test_box_muller_is_finite_at_the_ends():
    ends = torch.tensor([0, 1, 2**31, 2**32 - 1])
    for z in box_muller(*torch.meshgrid(ends, ends, indexing="ij")):
        assert bool(torch.isfinite(z).all()) and float(z.abs().max()) < 6.77


def test_uniforms_fill_the_unit_interval():
    u = philox_uniform(_seed(3), (200_000,))
    assert float(u.min()) >= 0.0 and float(u.max()) < 1.0
    counts = torch.histc(u, bins=20, min=0.0, max=1.0)
    chi_squared = float(((counts - 10_000) ** 2 / 10_000).sum())
    assert chi_squared < 43.8  # 19 degrees of freedom: exceeded once in a thousand


def test_flips_are_fair():
    flips = philox_flip(_seed(4), 10_000)
    assert flips.dtype == torch.bool and abs(int(flips.sum()) - 5000) < 250


@pytest.mark.parametrize(
    ("seed", "error", "says"),
    [
        ((1, 2), TypeError, "seed: expected an int64 tensor"),
        (torch.tensor([1.0, 2.0]), TypeError, "seed: expected an int64 tensor .* got torch.float32"),
        (torch.tensor([1, 2, 3]), ValueError, r"seed: expected shape \(2,\).* got \(3,\)"),
    ],
    ids=["tuple", "float", "three"],
)
def test_a_wrong_seed_is_named(seed, error, says):
    with pytest.raises(error, match=says):
        check_seed(seed, torch.device("cpu"))


def test_more_elements_than_counters_are_refused():
    with pytest.raises(ValueError, match="at most 17179869184 elements"):
        philox_words(_seed(0), MAX_ELEMENTS + 1, Stream.NOISE)
