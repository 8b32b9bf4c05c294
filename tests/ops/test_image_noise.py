"""Noise of single images: fixed reference numbers, and the same from every backend."""

import pytest
import torch

from cdm_fast.ops import use_backend
from cdm_fast.ops.image_noise import image_normals, image_words
from cdm_fast.ops.philox import Stream, box_muller, philox4x32_10

CASES = [(3, 64, 0, 0), (1, 1, 5, 1), (4, 1027, 2**64 - 1, 2**32 - 1), (2, 3072, 2**63 + 12345, 7)]


@pytest.fixture(params=["reference", "triton"])
def kernel(request):
    with use_backend(request.param):
        yield request.param


def written_out(image, size, seed, draw):
    """Words (B, size), number by number as `philox4x32_10` defines them."""
    key = torch.tensor(seed & 0xFFFFFFFF), torch.tensor(seed >> 32)
    rows = []
    for number in image.tolist():
        blocks = [
            philox4x32_10(tuple(map(torch.tensor, (block, int(Stream.SAMPLING), number, draw))), key)
            for block in range((size + 3) // 4)
        ]
        rows.append(torch.stack([word for block in blocks for word in block])[:size])
    return torch.stack(rows)


@pytest.mark.parametrize("batch, size, seed, draw", CASES)
def test_words_are_those_of_the_cipher(kernel, batch, size, seed, draw):
    image = torch.arange(batch) + 2**32 - batch
    assert torch.equal(
        image_words(image, size, seed, draw), written_out(image.cpu(), size, seed, draw).to(image)
    )


@pytest.mark.parametrize("batch, size, seed, draw", CASES)
def test_normals_are_bitwise_those_of_the_reference(kernel, batch, size, seed, draw):
    image = torch.arange(batch) + 11
    with use_backend("reference"):
        expected = image_normals(image, size, seed, draw)
    got = image_normals(image, size, seed, draw)
    assert got.dtype == torch.float32 and got.shape == (batch, size)
    assert torch.equal(got, expected)


def test_normals_are_box_muller_of_the_words(kernel):
    image = torch.tensor([0, 9])
    words = image_words(image, 16, 3, 2).unflatten(1, (-1, 4))
    pairs = *box_muller(words[..., 0], words[..., 1]), *box_muller(words[..., 2], words[..., 3])
    assert torch.equal(image_normals(image, 16, 3, 2), torch.stack(pairs, dim=-1).flatten(1))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((torch.zeros(2), 4, 0, 0), TypeError, "image: expected dtype int64"),
        ((torch.zeros(2, 2, dtype=torch.int64), 4, 0, 0), ValueError, "image: expected shape"),
        ((torch.zeros(2, dtype=torch.int64), -1, 0, 0), ValueError, "size: expected an integer in 0..2"),
        ((torch.zeros(2, dtype=torch.int64), 4, 2**64, 0), ValueError, "seed: expected an integer in 0..2"),
        ((torch.zeros(2, dtype=torch.int64), 4, 0, -1), ValueError, "draw: expected an integer in 0..2"),
    ],
)
def test_wrong_arguments_are_named(kernel, arguments, error, message):
    with pytest.raises(error, match=message):
        image_normals(*arguments)
