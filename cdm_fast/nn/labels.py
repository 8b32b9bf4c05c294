"""Class labels on their way into a network: checked, and the null class where there are none."""

# B batch, K classes

import torch
from torch import Tensor

from cdm_fast.errors import UserError
from cdm_fast.ops._checks import may_read


def class_index(
    label: Tensor | None,  # (B,) int64, 0..K; K is the null class
    num_classes: int | None,  # K
    batch: int,
    device: torch.device,
) -> Tensor | None:
    """(B,) row of the class table: `label`, or K where none is given; None for a network without classes.

    Raises UserError for a label given to such a network, of another dtype or shape, or outside 0..K (looked
    at where that costs no wait for a device).
    """
    if num_classes is None:
        if label is not None:
            raise UserError("label= was given, but the network was built without num_classes; leave it out")
        return None
    if label is None:
        return torch.full((batch,), num_classes, device=device)
    if label.dtype != torch.int64 or label.shape != (batch,):
        raise UserError(f"label is {label.dtype} of shape {tuple(label.shape)}: pass int64 ({batch},)")
    if may_read(label) and not 0 <= int(label.min()) <= int(label.max()) <= num_classes:
        wrong = int(label.min()) if label.min() < 0 else int(label.max())
        raise UserError(
            f"label {wrong} does not exist: classes are 0 to {num_classes - 1}, and {num_classes} is none"
        )
    return label
