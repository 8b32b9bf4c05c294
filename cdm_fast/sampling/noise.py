"""Gaussian noise for each image as a function of (seed, image, draw).

# B batch
"""

from math import prod

import torch
from torch import Tensor

from cdm_fast.ops.image_noise import image_normals, image_words


class ImageNoise:
    """Standard normal noise for a batch of images, determined by (seed, image, draw).

    Each call returns the next draw, (B, *shape) in the dtype and on the device of `like`. The counter of a
    Philox block is (block within the image, stream, image, draw), so the noise of an image depends neither on
    its batch nor on the device.

    Args:
        seed: 0..2^64 - 1.
        batch: the indices of the images, a slice with start and stop.
        shape: shape of one image.
        like: any tensor of the wanted dtype and device.

    >>> noise = ImageNoise(0, slice(0, 4), (2,), torch.zeros(1))
    >>> torch.equal(noise()[2:], ImageNoise(0, slice(2, 4), (2,), torch.zeros(1))())
    True
    """

    def __init__(self, seed: int, batch: slice, shape: tuple[int, ...], like: Tensor) -> None:
        self.seed, self.first = seed, batch.start
        self.image = torch.arange(batch.start, batch.stop, device=like.device)
        self.shape, self.dtype, self.draws = shape, like.dtype, 0

    def __call__(self) -> Tensor:
        normals = image_normals(self.image, prod(self.shape), self.seed, self._next())
        return normals.view(-1, *self.shape).to(self.dtype)

    def uniform(self) -> Tensor:
        """The next draw: one uniform number in (0, 1) for each image, (B,) float64."""
        return (image_words(self.image, 1, self.seed, self._next())[:, 0].double() + 0.5) * 2.0**-32

    def generator(self) -> torch.Generator:
        """A generator for draws that concern the whole batch, such as resampling."""
        first = torch.tensor([self.first])  # on the host, so that nothing waits for a device
        low, high = image_words(first, 2, self.seed, self._next())[0].tolist()
        return torch.Generator().manual_seed(low | high << 32)

    def _next(self) -> int:
        self.draws += 1
        return self.draws - 1
