"""Networks whose input gradient is a forward computation, and plain denoisers to compare them with."""

from cdm_fast.nn.base import MixtureBase
from cdm_fast.nn.encoder import Encoder
from cdm_fast.nn.mlp import MLP, MLPDenoiser
from cdm_fast.nn.network import AdjointNetwork, as_classifier
from cdm_fast.nn.transformer import Transformer
from cdm_fast.nn.unet import UNet, UNetDenoiser

__all__ = [
    "MLP",
    "AdjointNetwork",
    "Encoder",
    "MLPDenoiser",
    "MixtureBase",
    "Transformer",
    "UNet",
    "UNetDenoiser",
    "as_classifier",
]
