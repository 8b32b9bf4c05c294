"""bits/dim from nats, and back.

# d = C*H*W, N grey levels
"""

import math

from torch import Tensor

from cdm_fast.data import ImageData, bits_of_interval
from cdm_fast.errors import UserError
from cdm_fast.model import Denoiser
from cdm_fast.model.classifier import Classifier


def require_denoiser(model: Denoiser) -> None:
    """UserError for a classifier, which has neither denoiser nor likelihood."""
    if isinstance(model, Classifier):
        raise UserError("this is a classifier, which has no likelihood: train with --objective cdm")


def bits_per_dim(log_prob: Tensor, data: ImageData) -> Tensor:
    """`-log2 p(x) / d + log2(N/2)` from nats; `log2((N-1)/2)` for pixels around points."""
    return -log_prob / nats_per_bit_per_dim(data) + bits_of_interval(data.num_grey_levels, data.pixels)


def nats_per_bit_per_dim(data: ImageData) -> float:
    """`d ln 2`: nats of a whole image in one bit per dimension."""
    return data.images[0].numel() * math.log(2)
