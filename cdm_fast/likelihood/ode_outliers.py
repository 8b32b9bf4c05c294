"""Images whose probability-flow ODE runs away, so that its figure says nothing about them.

One such image is off by thousands of nats and moves the mean over hundreds of others.

# n images, d values of one image
"""

import math

from torch import Tensor

OUTLIER_NATS = 30.0  # an image further than this from what the others do is an outlier
NOISE_DEVIATIONS = 5.0  # standard deviations of `|u|^2 / 2` that draws of N(0, I) are granted besides
NAMED = 5  # outliers that a line names


def find_outliers(
    ode: Tensor,  # (n,) log p in nats by the ODE
    single: Tensor | None,  # (n,) nats by the single pass
    noise_norm: Tensor,  # (n,) of `FlowLikelihood`
    dim: int,
) -> dict[int, str]:
    """Images whose ODE cannot be trusted, with the reason in a few words.

    An image is one of them where ODE and single pass differ by more than `OUTLIER_NATS` more or less than
    their median difference (which is the log Z of the single pass), or where its trajectory ends outside the
    range of N(0, I): there `|u|^2 / 2` has mean d/2 and standard deviation `sqrt(d/2)`, and lies more than
    `OUTLIER_NATS` plus `NOISE_DEVIATIONS` standard deviations off.

    >>> import torch
    >>> ode, single = torch.tensor([-9.0, -8911.0, -10.0]), torch.tensor([-8.0, -11.0, -9.0])
    >>> find_outliers(ode, single, torch.tensor([1.5, 9e3, 2.0]), dim=2)
    {1: '-8899 nats off, trajectory outside the range of noise'}
    """
    found: dict[int, list[str]] = {}
    if single is not None:
        gap = ode - single
        gap = gap - gap.nanquantile(0.5)
        for i in (~(gap.abs() <= OUTLIER_NATS)).nonzero().flatten().tolist():
            found.setdefault(i, []).append(f"{float(gap[i]):+.0f} nats off")
    outside = (noise_norm - dim).abs() / 2 - NOISE_DEVIATIONS * math.sqrt(dim / 2)
    for i in (~(outside <= OUTLIER_NATS)).nonzero().flatten().tolist():
        found.setdefault(i, []).append("trajectory outside the range of noise")
    return {i: ", ".join(found[i]) for i in sorted(found)}


def describe_outliers(
    reasons: dict[int, str],  # image of the split -> why it is an outlier
    per_image: Tensor,  # (n,) bits/dim
) -> str | None:
    """One line for a person; None without outliers."""
    if not reasons:
        return None
    named = [f"image {i} ({why})" for i, why in list(reasons.items())[:NAMED]]
    more = f" and {len(reasons) - len(named)} more" if len(reasons) > len(named) else ""
    return (
        f"the ODE of {len(reasons)} of {len(per_image)} images runs away: {', '.join(named)}{more}; the mean"
        f" depends on them, the median is {float(per_image.nanquantile(0.5)):.4f} bits/dim"
    )
