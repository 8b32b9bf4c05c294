"""A network that hides its adjoint, so that the model differentiates it by torch.func."""

from torch import nn


class Opaque(nn.Module):
    """Hides the adjoint and the head of a network.

    Args:
        network: what it calls.
    """

    def __init__(self, network):
        super().__init__()
        self.network, self.input_shape = network, network.input_shape

    def forward(self, x):
        return self.network(x)
