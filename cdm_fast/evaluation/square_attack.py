"""A black-box attack in L-inf: random search with squares, from the outputs of a classifier only.

# B batch, C channels, H W pixels, K classes, m budgets
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

FIRST_SHARE = 0.8  # share of the pixels in the first square
HALVE_AT = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)  # shares of the steps at which this halves


class SquareAttack:
    """The Square Attack of arXiv 1912.00049, algorithms 1 and 2, in L-inf, on a whole batch at once.

    Each step adds +-budget to one random square of every image, and keeps the change if the margin
    `z[label] - max of the others` decreases. The first step adds vertical stripes. It has the interface of a
    foolbox attack.

    Args:
        steps: evaluations of the classifier per image and budget, at least 1.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps

    @torch.no_grad()
    def __call__(
        self,
        classifier: Callable[[Tensor], Tensor],  # pixels in [0, 1] -> (B, K)
        x: Tensor,  # (B, C, H, W)
        label: Tensor,  # (B,) int64
        epsilons: Sequence[float],
    ) -> tuple[Any, list[Tensor], Tensor]:
        """(None, attacked images (B, C, H, W) at each budget, whether each is misclassified (m, B))."""
        found = [self._search(classifier, x, label, budget) for budget in epsilons]
        attacked, margins = zip(*found, strict=True)
        return None, list(attacked), torch.stack(margins) < 0

    def _search(
        self, classifier: Callable[[Tensor], Tensor], x: Tensor, label: Tensor, budget: float
    ) -> tuple[Tensor, Tensor]:
        """The images (B, C, H, W) with the smallest margin found within `budget`, and their margins (B,)."""
        batch, channels, height, width = x.shape
        best, least = x, margin(classifier(x), label)
        rows, columns = (torch.arange(size, device=x.device) for size in (height, width))
        for step in range(self.steps):
            stripes = step == 0
            side = square_side(step / self.steps, height, width)
            top, left = (
                torch.randint(size - side + 1, (batch, 1), device=x.device) for size in (height, width)
            )
            in_rows, in_columns = (
                (index >= first) & (index < first + side) for index, first in ((rows, top), (columns, left))
            )
            square = (in_rows[:, :, None] & in_columns[:, None, :])[:, None] | stripes
            signs = _signs(batch, channels, 1, width if stripes else 1, like=x)
            candidate = torch.where(square, (x + budget * signs).clamp(0, 1), best)
            reached = margin(classifier(candidate), label)
            better = reached < least
            best = torch.where(better[:, None, None, None], candidate, best)
            least = torch.where(better, reached, least)
            if bool((least < 0).all()):
                break
        return best, least


def margin(
    logits: Tensor,  # (B, K)
    label: Tensor,  # (B,) int64
) -> Tensor:  # (B,)
    """The true class's logit minus the largest other logit; negative if the image is misclassified."""
    true = logits.gather(1, label[:, None])
    others = logits.scatter(1, label[:, None], -math.inf)
    return true[:, 0] - others.amax(1)


def square_side(progress: float, height: int, width: int) -> int:
    """Side of the square in pixels after a share `progress` of the steps, from 1 to the image's side."""
    share = FIRST_SHARE * 0.5 ** sum(progress >= at for at in HALVE_AT)
    return min(max(1, round(math.sqrt(share * height * width))), height, width)


def _signs(*shape: int, like: Tensor) -> Tensor:
    return (torch.randint(2, shape, device=like.device) * 2 - 1).to(like.dtype)
