"""Balls of images in L-inf and L2, in which attacks move: their steps, random points, projections.

# B batch, C channels, H W pixels
"""

import torch
from torch import Tensor


def steepest(gradient: Tensor, norm: str) -> Tensor:
    """The step of norm 1 along which a function with this gradient (B, ...) rises most, of each image."""
    return gradient.sign() if norm == "linf" else scaled(gradient, norm)


def scaled(direction: Tensor, norm: str) -> Tensor:
    """Each image of `direction` (B, ...), scaled to norm 1; zero stays zero."""
    flat = direction.flatten(1)
    length = flat.abs().amax(1) if norm == "linf" else flat.norm(dim=1)
    return direction / per_image(length.clamp(min=1e-30), direction)


def random_step(like: Tensor, norm: str, generator: torch.Generator | None = None) -> Tensor:
    """A random step of norm 1 for each image, like `like` (B, ...)."""
    draw = torch.empty_like(like)
    draw = draw.uniform_(-1, 1, generator=generator) if norm == "linf" else draw.normal_(generator=generator)
    return scaled(draw, norm)


def project(
    images: Tensor,  # (B, ...)
    x: Tensor,  # like images
    budget: float,
    norm: str,
    lowest: float = 0.0,
    highest: float = 1.0,
) -> Tensor:
    """The point of the ball of radius `budget` around `x` that is nearest to `images`, clipped to the range.

    Clipping moves towards `x`, which lies in the range, so that the result is in the ball.
    """
    offset = images - x
    if norm == "linf":
        return (x + offset.clamp(-budget, budget)).clamp(lowest, highest)
    length = offset.flatten(1).norm(dim=1).clamp(min=1e-30)
    return (x + offset * per_image((budget / length).clamp(max=1), offset)).clamp(lowest, highest)


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """Values (B,) in a shape that goes with images `like` (B, ...)."""
    return values.view(-1, *[1] * (like.dim() - 1))
