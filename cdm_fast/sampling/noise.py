"""Normal noise of each image, a function of (seed, image, draw).

# B batch
"""

from math import prod

import torch
from torch import Tensor

from cdm_fast.ops.image_noise import image_normals, image_words


class ImageNoise:
    """Standard normal noise keyed by (seed, image, draw): each call is the next draw for images `batch`.

    A call returns (B, *shape) in `like`'s dtype, on its device. The counter of a Philox block is
    (block within the image, stream, image, draw), so neither batch nor device changes an image's noise.
    """

    def __init__(self, seed: int, batch: slice, shape: tuple[int, ...], like: Tensor) -> None:
        self.seed, self.first = seed, batch.start
        self.image = torch.arange(batch.start, batch.stop, device=like.device)
        self.shape, self.dtype, self.draws = shape, like.dtype, 0

    def __call__(self) -> Tensor:
        normals = image_normals(self.image, prod(self.shape), self.seed, self._next())
        return normals.view(-1, *self.shape).to(self.dtype)

    def uniform(self) -> Tensor:
        """The next draw as one number in (0, 1) for each image, (B,) float64."""
        return (image_words(self.image, 1, self.seed, self._next())[:, 0].double() + 0.5) * 2.0**-32

    def generator(self) -> torch.Generator:
        """For what concerns a batch as a whole, such as resampling; seeded by the first image's next draw."""
        first = torch.tensor([self.first])  # on the host: nothing there waits for a device
        low, high = image_words(first, 2, self.seed, self._next())[0].tolist()
        return torch.Generator().manual_seed(low | high << 32)

    def _next(self) -> int:
        self.draws += 1
        return self.draws - 1
