"""Auto-PGD: projected gradient ascent whose step size follows from its progress (arXiv 2003.01690).

The only parameter is the number of steps. It ascends a goal: the odds against a class, the DLR loss towards
another class, or, for models with a likelihood, another class under a detector by log p(x).

# B batch, C channels, H W pixels, K classes, white being 1
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cdm_fast.evaluation.norms import per_image, project, random_step, steepest
from cdm_fast.evaluation.square_attack import margin

MOMENTUM = 0.75  # alpha of algorithm 1
ENOUGH = 0.75  # rho: the share of the steps that must increase the goal for the step size to stay
# Intervals of the checks in shares of the steps: the first, by how much each is shorter, the shortest.
FIRST_CHECK, CHECK_SHORTER, SHORTEST_CHECK = 0.22, 0.03, 0.06
TARGETS = 9  # likeliest other classes that a targeted attack tries

# (outputs (B, K) of the classifier, label (B,), target (B,)) -> (B,), to be increased
Goal = Callable[[Tensor, Tensor, Tensor], Tensor]
# (outputs (B, K), label (B,)) -> (B,) bool, whether the attack has succeeded
Success = Callable[[Tensor, Tensor], Tensor]


def log_odds_against(outputs: Tensor, label: Tensor, target: Tensor) -> Tensor:
    """`log (1 - p(label)) / p(label)`, (B,), from log-probabilities up to a constant per image.

    Its gradient has the direction of the cross-entropy's, and both order images alike. In fp32 the
    cross-entropy and its gradient are exactly 0 where classes lie tens of nats apart, as log-likelihoods of
    classes do; the log odds are not.
    """
    own = outputs.gather(1, label[:, None])[:, 0]
    return outputs.scatter(1, label[:, None], -math.inf).logsumexp(1) - own


def targeted_dlr(outputs: Tensor, label: Tensor, target: Tensor) -> Tensor:
    """`(z_target - z_label) / (z_1 - (z_3 + z_4)/2)`, (B,), z_i being the i-th largest output.

    It does not change with shift and scale of the outputs. With fewer than 4 classes the denominator is 1.
    Source: arXiv 2003.01690, eq. 7.
    """
    difference = (outputs.gather(1, target[:, None]) - outputs.gather(1, label[:, None]))[:, 0]
    if outputs.shape[1] < 4:
        return difference
    first, _, third, fourth = outputs.topk(4, dim=1).values.unbind(1)
    return difference / (first - (third + fourth) / 2).clamp(min=1e-12)


def misclassified(outputs: Tensor, label: Tensor) -> Tensor:
    """(B,) bool: another class has the largest output."""
    return margin(outputs, label) < 0


class Undetected:
    """The goal and the success of an attack on a classifier and a detector together.

    The detector rejects images with `log p(x)`, the logsumexp of the outputs, below `threshold` (nats).
    Success is another class above the threshold. The goal is the smaller of two distances in nats: that of a
    target's output beyond the label's, and that of log p(x) above the threshold.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def goal(self, outputs: Tensor, label: Tensor, target: Tensor) -> Tensor:
        difference = (outputs.gather(1, target[:, None]) - outputs.gather(1, label[:, None]))[:, 0]
        return torch.minimum(difference, outputs.logsumexp(1) - self.threshold)

    def success(self, outputs: Tensor, label: Tensor) -> Tensor:
        return misclassified(outputs, label) & (outputs.detach().logsumexp(1) >= self.threshold)


class AutoPGD:
    """Auto-PGD towards a goal, on a whole batch at once, with the interface of a foolbox attack.

    Args:
        goal: what to increase.
        norm: "linf" or "l2".
        steps: gradient steps for each image, budget and target.
        targeted: increase the goal towards each of the `TARGETS` likeliest other classes in turn, instead of
            towards the likeliest alone.
        success: when an image is done.
    """

    def __init__(
        self,
        goal: Goal,
        norm: str,
        steps: int,
        *,
        targeted: bool = False,
        success: Success = misclassified,
    ) -> None:
        self.goal, self.norm, self.steps = goal, norm, steps
        self.targeted, self.success = targeted, success

    def __call__(
        self,
        classifier: Callable[[Tensor], Tensor],  # pixels in [0, 1] -> (B, K)
        x: Tensor,  # (B, C, H, W)
        label: Tensor,  # (B,) int64
        epsilons: Sequence[float],
    ) -> tuple[Any, list[Tensor], Tensor]:
        """(None, attacked images (B, C, H, W) at each budget, whether each attack succeeded (m, B))."""
        found = [self._attack(classifier, x, label, budget) for budget in epsilons]
        attacked, succeeded = zip(*found, strict=True)
        return None, list(attacked), torch.stack(succeeded)

    def _attack(
        self, classifier: Callable[[Tensor], Tensor], x: Tensor, label: Tensor, budget: float
    ) -> tuple[Tensor, Tensor]:
        """Attacked images of one budget, and where the attack succeeded; one target after another."""
        with torch.no_grad():
            outputs = classifier(x)
        others = outputs.scatter(1, label[:, None], -math.inf).argsort(dim=1, descending=True)
        tries = min(TARGETS, outputs.shape[1] - 1) if self.targeted else 1
        attacked, done = x.clone(), self.success(outputs, label)
        for target in others.T[:tries]:
            left = (~done).nonzero()[:, 0]
            if not len(left):
                break

            def evaluate(images: Tensor, rows: Tensor, target: Tensor = target) -> tuple[Tensor, Tensor]:
                outputs = classifier(images)
                goal = self.goal(outputs, label[rows], target[rows])
                return goal, self.success(outputs.detach(), label[rows])

            attacked[left], done[left] = auto_pgd(evaluate, x[left], left, budget, self.norm, self.steps)
        return attacked, done


def auto_pgd(
    evaluate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    x: Tensor,  # (B, C, H, W) in [0, 1]
    rows: Tensor,  # (B,) int64
    budget: float,
    norm: str,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """Images within `budget` of `x` that increase a goal: (B, C, H, W), and whether each succeeded (B,).

    Starts at a random point of the ball. Images that have succeeded are left where they are.

    Args:
        evaluate: images (b, C, H, W) and their rows (b,) -> the goal (b,), and whether each succeeded (b,).
        rows: passed to `evaluate`; those of the images that are still at work.

    Source: arXiv 2003.01690, algorithm 1.
    """
    ascent = _Ascent(evaluate, x, rows, budget, norm)
    checks, last = check_steps(steps), 0
    for step in range(steps):
        if ascent.done.all():
            break
        ascent.step(1.0 if step == 0 else MOMENTUM)
        if step + 1 in checks:
            ascent.adapt(step + 1 - last)
            last = step + 1
    return ascent.result()


def check_steps(steps: int) -> list[int]:
    """The steps after which the step size is adapted: `ceil(p_j steps)`, with intervals that shorten.

    >>> check_steps(100)
    [22, 41, 57, 70, 80, 87, 93, 99]
    """
    found, share, interval = [], FIRST_CHECK, FIRST_CHECK
    while share < 1:
        found.append(math.ceil(share * steps - 1e-9))
        interval = max(interval - CHECK_SHORTER, SHORTEST_CHECK)
        share += interval
    return found


class _Ascent:
    """The state of `auto_pgd` for every image: points, goals, step sizes."""

    def __init__(
        self,
        evaluate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        x: Tensor,
        rows: Tensor,
        budget: float,
        norm: str,
    ) -> None:
        self.evaluate, self.rows, self.norm = evaluate, rows, norm
        self.x, self.budget = x, budget
        self.size = per_image(torch.full((len(x),), 2 * budget, dtype=x.dtype, device=x.device), x)
        self.done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.at = self._project(x + budget * random_step(x, norm))
        self.before = self.at
        self.value = torch.full((len(x),), -math.inf, dtype=x.dtype, device=x.device)
        self.gradient = torch.zeros_like(x)
        self._evaluate()
        self.best, self.best_value, self.best_gradient = self.at, self.value, self.gradient
        self.rises = torch.zeros(len(x), device=x.device)  # steps upwards since the last check
        self.value_at_check, self.halved = self.best_value, torch.ones_like(self.done)

    def step(self, momentum: float) -> None:
        """One step along the gradient, with momentum; `before` and `at` move on."""
        ahead = self._project(self.at + self.size * steepest(self.gradient, self.norm))
        moved = self._project(
            self.at + momentum * (ahead - self.at) + (1 - momentum) * (self.at - self.before)
        )
        self.before, self.at = self.at, torch.where(per_image(self.done, moved), self.at, moved)
        previous = self.value
        self._evaluate()
        self.rises += (self.value > previous).to(self.rises)
        self._keep(self.value > self.best_value)

    def adapt(self, interval: int) -> None:
        """Halves step sizes where the last `interval` steps gained little, and goes back to the best."""
        stuck = ~self.halved & (self.value_at_check >= self.best_value)
        halve = (self.rises < ENOUGH * interval) | stuck
        self.size = torch.where(per_image(halve, self.size), self.size / 2, self.size)
        back = halve & ~self.done
        self.at = torch.where(per_image(back, self.at), self.best, self.at)
        self.before = torch.where(per_image(back, self.at), self.best, self.before)
        self.gradient = torch.where(per_image(back, self.at), self.best_gradient, self.gradient)
        self.value = torch.where(back, self.best_value, self.value)
        self.rises, self.halved, self.value_at_check = torch.zeros_like(self.rises), halve, self.best_value

    def result(self) -> tuple[Tensor, Tensor]:
        """The first images that succeeded, or else those of the largest goal; and which succeeded."""
        return torch.where(per_image(self.done, self.at), self.at, self.best), self.done

    def _keep(self, better: Tensor) -> None:
        self.best = torch.where(per_image(better, self.at), self.at, self.best)
        self.best_gradient = torch.where(per_image(better, self.at), self.gradient, self.best_gradient)
        self.best_value = torch.where(better, self.value, self.best_value)

    def _evaluate(self) -> None:
        """Goal, gradient and success at `at`, of the images that are still at work."""
        work = (~self.done).nonzero()[:, 0]
        images = self.at[work].requires_grad_()
        value, succeeded = self.evaluate(images, self.rows[work])
        (gradient,) = torch.autograd.grad(value.sum(), images)
        self.value = self.value.index_copy(0, work, value.detach().to(self.value.dtype))
        self.gradient = self.gradient.index_copy(0, work, gradient)
        self.done = self.done.index_copy(0, work, succeeded)

    def _project(self, images: Tensor) -> Tensor:
        return project(images, self.x, self.budget, self.norm)
