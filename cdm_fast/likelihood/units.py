"""bits/dim from nats, and back.

# n images, d = C*H*W, N grey levels
"""

import math

from torch import Tensor

from cdm_fast.data import ImageData, bits_of_interval
from cdm_fast.errors import UserError
from cdm_fast.model import Denoiser
from cdm_fast.model.classifier import Classifier


def require_denoiser(model: Denoiser) -> None:
    """Raises UserError for a classifier, which has neither denoiser nor likelihood."""
    if isinstance(model, Classifier):
        raise UserError("this is a classifier, which has no likelihood: train with --objective cdm")


def bits_per_dim(log_prob: Tensor, data: ImageData) -> Tensor:
    """`-log2 p(x) / d + log2(N/2)`: the code length of the grey levels of an image in bits per value.

    The offset converts a density on [-1, 1] into one over grey levels; it is `log2((N-1)/2)` if `data.pixels`
    is "points" (arXiv 1511.01844, section 3.1).

    Args:
        log_prob: (n,) nats, for dequantised images.
        data: any images with the same size and number of grey levels.

    Returns: (n,) bits/dim.

    >>> import math, torch
    >>> from cdm_fast.data import ImageData
    >>> images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    >>> data = ImageData(images, None, num_grey_levels=16, num_classes=None, name="black", split="test")
    >>> uniform = torch.full((2,), -64 * math.log(2))  # density 1/2 a value, on [-1, 1]
    >>> bits_per_dim(uniform, data).tolist()  # log2(16)
    [4.0, 4.0]
    """
    return -log_prob / nats_per_bit_per_dim(data) + bits_of_interval(data.num_grey_levels, data.pixels)


def nats_per_bit_per_dim(data: ImageData) -> float:
    """`d ln 2`: the nats of a whole image per bit/dim."""
    return data.images[0].numel() * math.log(2)
