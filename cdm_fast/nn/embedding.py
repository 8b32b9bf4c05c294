"""Embeddings of noise levels and of classes; labels are checked, and the null class stands for none.

# B batch, K classes, E embedding width
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cdm_fast.errors import UserError
from cdm_fast.ops.checks import may_read


def check_labels(
    label: Tensor | None,  # (B,) int64, 0..K-1, or -1 for none
    num_classes: int | None,  # K
    batch: int,
) -> None:
    """Raises UserError for labels of a network without classes, of a wrong dtype or shape, or out of range.

    The range is checked where `may_read` allows it.
    """
    if label is None:
        return
    if num_classes is None:
        raise UserError(
            "label= was given, but the network was built without num_classes, or its logits hold all classes;"
            " leave it out"
        )
    if label.dtype != torch.int64 or label.shape != (batch,):
        raise UserError(f"label is {label.dtype} of shape {tuple(label.shape)}: pass int64 ({batch},)")
    if may_read(label) and not -1 <= int(label.min()) <= int(label.max()) < num_classes:
        wrong = int(label.min()) if label.min() < -1 else int(label.max())
        raise UserError(f"label {wrong} does not exist: classes are 0 to {num_classes - 1}, and -1 is none")


def class_index(
    label: Tensor | None,  # (B,) int64, 0..K-1, or -1 for none
    num_classes: int | None,  # K
    batch: int,
    device: torch.device,
) -> Tensor | None:
    """(B,) index into the class table: `label`, or K, the null class, where there is no label.

    None for a network without classes. Raises UserError as `check_labels` does.
    """
    check_labels(label, num_classes, batch)
    if num_classes is None:
        return None
    if label is None:
        return torch.full((batch,), num_classes, device=device)
    return torch.where(label < 0, num_classes, label)


class Embedding(nn.Module):
    """linear - SiLU - linear, to a width of 4 base channels (E)."""

    def __init__(self, base_channels: int) -> None:
        super().__init__()
        width = 4 * base_channels
        self.dense = nn.ModuleList([nn.Linear(base_channels, width), nn.Linear(width, width)])
        for linear in self.dense:
            linear.casts = True  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """(B, base channels) -> (B, E), with the SiLU applied that precedes every block's projection."""
        return F.silu(self.dense[1](F.silu(self.dense[0](x))))


def sinusoids(position: Tensor, width: int) -> Tensor:
    """(B,) -> (B, width): sines and cosines of `position` at geometric wavelengths up to 10,000 (DDPM)."""
    half = width // 2
    exponent = torch.arange(half, device=position.device) / max(half - 1, 1)
    angle = position[:, None] * torch.exp(-math.log(10_000) * exponent)
    return F.pad(torch.cat([angle.sin(), angle.cos()], dim=1), (0, width - 2 * half))
