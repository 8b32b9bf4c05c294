"""Images for which the probability-flow ODE diverges, so that its likelihood is meaningless.

One such image is off by thousands of nats and changes the mean over hundreds of others.

# n images, d values of one image
"""

import math

from torch import Tensor

OUTLIER_NATS = 30.0  # an image that deviates from the others by more than this is an outlier
LOG_PROB_DEVIATIONS = 10.0  # additional tolerance without single pass, in robust standard deviations of log p
NOISE_DEVIATIONS = 5.0  # additional tolerance of `|u|^2 / 2`, in its standard deviations under N(0, I)
DEVIATION_PER_MAD = 1.4826  # standard deviation of a Gaussian over its median absolute deviation
NAMED = 5  # most outliers named in a message


def find_outliers(
    ode: Tensor,  # (n,) log p in nats by the ODE
    single: Tensor | None,  # (n,) nats by the single pass
    noise_norm: Tensor,  # (n,) of `FlowLikelihood`
    dim: int,
) -> dict[int, str]:
    """Images whose ODE likelihood is unreliable, index -> reason in a few words.

    An image is an outlier if ODE minus single pass deviates from its median over the images by more than
    `OUTLIER_NATS` (the log Z of the single pass shifts the median, not the deviations). Without a single pass
    the ODE's log p is compared instead, with an additional tolerance of `LOG_PROB_DEVIATIONS` robust standard
    deviations. An image is also an outlier if its trajectory ends outside the range of N(0, I), where
    `|u|^2 / 2` has mean d/2 and standard deviation `sqrt(d/2)`: the tolerance is `OUTLIER_NATS` plus
    `NOISE_DEVIATIONS` of these.

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
    """A one-line warning; None without outliers."""
    if not reasons:
        return None
    named = [f"image {i} ({why})" for i, why in list(reasons.items())[:NAMED]]
    more = f" and {len(reasons) - len(named)} more" if len(reasons) > len(named) else ""
    return (
        f"the ODE runs away on {len(reasons)} of {len(per_image)} images, which moves the mean:"
        f" {', '.join(named)}{more}; the median is {float(per_image.nanquantile(0.5)):.4f} bits/dim"
    )
