"""Images whose probability-flow ODE runs away, so that its figure says nothing about them.

One such image is off by thousands of nats and moves the mean over hundreds of others.

# n images, d values of one image
"""

import math

from torch import Tensor

OUTLIER_NATS = 30.0  # off the others by more than this, an image is an outlier
LOG_PROB_DEVIATIONS = 10.0  # robust standard deviations of log p between images, allowed without single pass
NOISE_DEVIATIONS = 5.0  # standard deviations of `|u|^2 / 2` between draws of N(0, I), allowed besides
DEVIATION_PER_MAD = 1.4826  # standard deviation of a normal law over its median absolute deviation
NAMED = 5  # outliers that a line names


def find_outliers(
    ode: Tensor,  # (n,) log p in nats by the ODE
    single: Tensor | None,  # (n,) nats by the single pass
    noise_norm: Tensor,  # (n,) of `FlowLikelihood`
    dim: int,
) -> dict[int, str]:
    """Images whose ODE cannot be trusted, with the reason in a few words.

    An image is one of them where ODE minus single pass is more than `OUTLIER_NATS` off its median over the
    images (the log Z of the single pass moves the median, not the deviations). Without a single pass the
    ODE's log p is compared, with `LOG_PROB_DEVIATIONS` robust standard deviations allowed besides. Nor may a
    trajectory end outside the range of N(0, I): there `|u|^2 / 2` has mean d/2 and standard deviation
    `sqrt(d/2)`, of which `NOISE_DEVIATIONS` are allowed besides.

    >>> import torch
    >>> ode, single = torch.tensor([-9.0, -8911.0, -10.0]), torch.tensor([-8.0, -11.0, -9.0])
    >>> find_outliers(ode, single, torch.tensor([1.5, 9e3, 2.0]), dim=2)
    {1: '-8899 nats off, trajectory outside the range of noise'}
    """
    off = ode if single is None else ode - single
    off = off - off.nanquantile(0.5)
    allowed = OUTLIER_NATS
    if single is None:
        allowed += LOG_PROB_DEVIATIONS * DEVIATION_PER_MAD * float(off.abs().nanquantile(0.5))
    excess = (noise_norm - dim).abs() / 2 - NOISE_DEVIATIONS * math.sqrt(dim / 2)
    found: dict[int, list[str]] = {}
    for i in (~(off.abs() <= allowed)).nonzero().flatten().tolist():  # NaN too
        found.setdefault(i, []).append(f"{float(off[i]):+.0f} nats off")
    for i in (~(excess <= OUTLIER_NATS)).nonzero().flatten().tolist():
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
        f"the ODE runs away on {len(reasons)} of {len(per_image)} images, which moves the mean:"
        f" {', '.join(named)}{more}; the median is {float(per_image.nanquantile(0.5)):.4f} bits/dim"
    )
