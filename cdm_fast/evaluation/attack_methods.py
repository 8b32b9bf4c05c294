"""The attacks by name: foolbox's, those written here, and several in turn.

# B batch, C channels, H W pixels, K classes, m budgets, P attacks in turn
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, get_args

import torch
from torch import Tensor, nn

from cdm_fast.config.choices import AttackName, AttackNorm
from cdm_fast.errors import UserError, require_at_least
from cdm_fast.evaluation.apgd import AutoPGD, Undetected, log_odds_against, targeted_dlr
from cdm_fast.evaluation.square_attack import SquareAttack

PGD_LENGTH = 2.5  # total length of all PGD steps, in budgets (arXiv 1706.06083)
OF_CROSS_ENTROPY = ("fgsm", "pgd")  # attacks of foolbox that ascend the cross-entropy
MAX_GAP = 2.0  # largest gap in nats between the two largest logits shown to these attacks
STEPS = {
    "fgsm": 1, "pgd": 40, "deepfool": 50, "cw": 200, "square": 1000,
    "apgd-ce": 100, "apgd-t": 100, "apgd-undetected": 100, "auto": 100,
}  # fmt: skip
SQUARE_PER_STEP = 50  # evaluations of Square in "auto" for each step of Auto-PGD, as in AutoAttack

# (pixels (B, C, H, W), labels (B,), budgets) -> images at each budget, whether they are misclassified (m, B),
# and, of several attacks in turn, the same after each of them (P, m, B)
Run = Callable[[Tensor, Tensor, Sequence[float]], tuple[list[Tensor], Tensor, Tensor | None]]


class AutoAttack:
    """Attacks in turn, each on the images that withstood those before it (arXiv 2003.01690, section 5).

    An image counts as robust if all of them fail. It has the interface of a foolbox attack.

    Args:
        parts: the attacks by name, the cheapest first.
    """

    def __init__(self, parts: Mapping[str, Callable[..., Any]]) -> None:
        self.parts = parts

    def __call__(
        self,
        classifier: Callable[[Tensor], Tensor],  # pixels in [0, 1] -> (B, K)
        x: Tensor,  # (B, C, H, W)
        label: Tensor,  # (B,) int64
        epsilons: Sequence[float],
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """(misclassified after each part (P, m, B), images at each budget, misclassified (m, B))."""
        attacked, after = [], []
        for budget in epsilons:
            images, fooled = x.clone(), torch.zeros(len(x), dtype=torch.bool, device=x.device)
            stages = []
            for part in self.parts.values():
                left = (~fooled).nonzero()[:, 0]
                if len(left):
                    _, found, succeeded = part(classifier, x[left], label[left], [budget])
                    images[left], fooled[left] = found[0], succeeded[0]
                stages.append(fooled.clone())
            attacked.append(images)
            after.append(torch.stack(stages))
        by_part = torch.stack(after, dim=1)
        return by_part, attacked, by_part[-1]


class _Unsaturated(nn.Module):
    """A classifier whose outputs are scaled down, image by image, to a gap of at most `MAX_GAP`.

    The gap is the difference between the two largest outputs. Log-likelihoods of classes differ by tens of
    nats. In fp32 the most probable class then has probability exactly 1, so the cross-entropy has no
    gradient, which hides a confident classifier from attacks that ascend it. The scale is treated as a
    constant by the gradient and preserves the order of classes.
    """

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, pixels: Tensor) -> Tensor:
        outputs: Tensor = self.classifier(pixels)
        top_two = outputs.detach().topk(min(2, outputs.shape[1])).values
        return outputs / ((top_two[:, :1] - top_two[:, -1:]) / MAX_GAP).clamp(min=1)


@contextlib.contextmanager
def attacker(
    target: nn.Module,
    attack: AttackName,
    norm: AttackNorm,
    steps: int,
    threshold: float,
    device: torch.device,
) -> Iterator[Run]:
    """The attack on `target`, a module from pixels in [0, 1] to outputs (B, K); see `Run`.

    Inside the block gradients are enabled, except for the weights. Random numbers are drawn from the global
    generator.

    Args:
        threshold: log p(x) in nats below which a detector rejects an image ("apgd-undetected" only).
    """
    with torch.enable_grad(), frozen(target):
        classifier: Any = target
        if (attack, norm) in _OF_FOOLBOX:
            foolbox = load_foolbox()
            shown = _Unsaturated(target).eval() if attack in OF_CROSS_ENTROPY else target
            classifier = foolbox.PyTorchModel(shown, bounds=(0, 1), device=device)
            method = _OF_FOOLBOX[attack, norm](foolbox.attacks, steps)
        else:
            method = own_attack(attack, norm, steps, threshold)

        def run(
            pixels: Tensor, labels: Tensor, budgets: Sequence[float]
        ) -> tuple[list[Tensor], Tensor, Tensor | None]:
            after, clipped, fooled = method(classifier, pixels, labels, epsilons=budgets)
            return clipped, fooled, after if attack == "auto" else None

        yield run


def own_attack(attack: str, norm: str, steps: int, threshold: float = 0.0) -> Callable[..., Any]:
    """An attack written here, with the interface of a foolbox attack; `threshold` as in `attacker`."""
    if attack == "square":
        return SquareAttack(steps)
    if attack == "apgd-ce":
        return AutoPGD(log_odds_against, norm, steps)
    if attack == "apgd-t":
        return AutoPGD(targeted_dlr, norm, steps, targeted=True)
    if attack == "apgd-undetected":
        both = Undetected(threshold)
        return AutoPGD(both.goal, norm, steps, targeted=True, success=both.success)
    return AutoAttack(
        {
            part: own_attack(part, norm, steps * SQUARE_PER_STEP if part == "square" else steps)
            for part in parts_of_auto(norm)
        }
    )


def parts_of_auto(norm: str) -> tuple[str, ...]:
    """The attacks of "auto", in turn."""
    return ("apgd-ce", "apgd-t", "square") if norm == "linf" else ("apgd-ce", "apgd-t")


def needs_foolbox(attack: str) -> bool:
    """True for the attacks that foolbox provides."""
    return any(name == attack for name, _ in _OF_FOOLBOX)


def load_foolbox() -> ModuleType:
    """foolbox; raises UserError where it is not installed."""
    try:
        import foolbox
    except ImportError:
        raise UserError('attacks need foolbox: pip install "cdm_fast[attacks]"') from None
    return foolbox


def check_attack(attack: str, norm: str, budgets: Sequence[float], steps: int | None) -> None:
    """Raises UserError for unknown names, a norm that the attack does not have, and numbers out of range."""
    if attack not in get_args(AttackName):
        raise UserError(f"unknown attack {attack!r}: choose one of {', '.join(get_args(AttackName))}")
    if norm not in get_args(AttackNorm):
        raise UserError(f"unknown norm {norm!r}: choose one of {', '.join(get_args(AttackNorm))}")
    if (attack, norm) in (("cw", "linf"), ("square", "l2")):
        only = "l2" if attack == "cw" else "linf"
        raise UserError(f"the attack {attack} exists only in {only}: give --attack-norm {only}")
    for budget in budgets:
        if not 0 < budget < float("inf"):
            raise UserError(f"budget {budget}: give finite numbers above 0, in units of white")
    if steps is not None:
        require_at_least("attack steps", steps, 1)


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Disables gradients of the weights inside the block; an attack needs only those of the pixels."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


_OF_FOOLBOX: dict[tuple[str, str], Callable[[Any, int], Callable[..., Any]]] = {
    ("fgsm", "linf"): lambda attacks, steps: attacks.FGSM(),
    ("fgsm", "l2"): lambda attacks, steps: attacks.FGM(),
    ("pgd", "linf"): lambda attacks, steps: attacks.LinfPGD(steps=steps, rel_stepsize=PGD_LENGTH / steps),
    ("pgd", "l2"): lambda attacks, steps: attacks.L2PGD(steps=steps, rel_stepsize=PGD_LENGTH / steps),
    ("deepfool", "linf"): lambda attacks, steps: attacks.LinfDeepFoolAttack(steps=steps),
    ("deepfool", "l2"): lambda attacks, steps: attacks.L2DeepFoolAttack(steps=steps),
    ("cw", "l2"): lambda attacks, steps: attacks.L2CarliniWagnerAttack(steps=steps),
}
