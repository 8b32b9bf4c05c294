"""A data set as the noisy batches that a model scores.

# B batch, C channels, H W pixels
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from cdm_fast.data import ImageData
from cdm_fast.data.draws import Protocol, batches
from cdm_fast.host.device import upload
from cdm_fast.model import Denoiser
from cdm_fast.model.denoiser import like_network


def noised_batches(
    model: Denoiser,
    data: ImageData,
    level: int,
    batch_size: int,
    generator: torch.Generator,
    protocol: Protocol = "dequantized",
) -> Iterator[tuple[int, Tensor]]:
    """One pass over `data`: yields (index of the first image, `x_t = a x + s eps` (B, C, H, W)) per batch.

    `x_t` has the dtype and the device of the model's parameters. The dequantisation noise and eps of a batch
    are drawn from `generator` when the batch is requested. Raises UserError for a level outside 0..T+1.
    """
    for first, x in batches(data, batch_size, generator, protocol):
        x_t = model.schedule.noise(x, level, generator=generator)
        yield first, like_network(model, upload(x_t, model.a.device))
