"""Adversarial attacks: white-box ones by foolbox, on exact gradients with no ODE and no noise; and two checks
that these gradients are not masked, a black-box attack and one carried over from another model.

# B batch, n images, K classes, N grey levels, m budgets
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any, get_args

import torch
from torch import Tensor, nn

from cdm_fast.config.choices import AttackName, AttackNorm
from cdm_fast.data import ImageData, PixelMap
from cdm_fast.data.draws import choose
from cdm_fast.errors import UserError
from cdm_fast.evaluation.class_scores import require_classes
from cdm_fast.evaluation.classification import labels_for
from cdm_fast.evaluation.square_attack import SquareAttack
from cdm_fast.host.progress import Progress, silent
from cdm_fast.model import CDM, evaluation_mode
from cdm_fast.model.cdm import require_likelihood
from cdm_fast.model.classifier import Classifier
from cdm_fast.model.denoiser import like_network
from cdm_fast.statistics import auroc, stderr

# In units of white, the whole range of a pixel; the usual ones of 8-bit pictures and of MNIST.
BUDGETS: dict[str, tuple[float, ...]] = {
    "linf": (1 / 255, 2 / 255, 4 / 255, 8 / 255, 16 / 255, 0.1, 0.2, 0.3),
    "l2": (0.1, 0.25, 0.5, 1.0, 2.0, 3.0),
}
PGD_WAY = 2.5  # budgets that all steps of PGD together could go (arXiv 1706.06083)
# Attacks that ascend the cross-entropy, and the gap in nats between the two largest logits that they may see.
OF_CROSS_ENTROPY, LARGEST_GAP = ("fgsm", "pgd"), 2.0
STEPS = {"fgsm": 1, "pgd": 40, "deepfool": 50, "cw": 200, "square": 1000}


class ClassLogLikelihoods(nn.Module):
    """Pixels (B, C, H, W) in [0, 1] -> `log p(x|c) + log p(c)` in nats, (B, K), differentiable in the pixels.

    Its softmax is the class posterior, its logsumexp `log p(x)`; of a `Classifier` it is `log p(c|x)`.
    A pixel p is grey level `u = (N-1) p`, not rounded, in the middle of its interval:
    `x = 2 (u + 1/2)/N - 1`, with no dequantisation noise; or at its point, `x = 2u/(N-1) - 1`.

    Args:
        model: a CDM with classes, joint logits or embedding; or a `Classifier`.
        num_grey_levels: N of its data.
        pixels: where grey levels stand in its data.

    Raises UserError for another model, or one without classes.
    """

    def __init__(self, model: CDM | Classifier, num_grey_levels: int, pixels: PixelMap = "intervals") -> None:
        super().__init__()
        if not isinstance(model, Classifier):
            require_likelihood(model)
        require_classes(model)
        self.model = model
        self.num_grey_levels, self.pixels = num_grey_levels, pixels

    def forward(self, pixels: Tensor) -> Tensor:
        N = self.num_grey_levels
        points = self.pixels == "points"
        x = 2 * pixels - 1 if points else (pixels * (N - 1) + 0.5) * (2 / N) - 1
        if isinstance(self.model, Classifier):
            return self.model.log_class_posterior(x)
        log_prob = self.model.log_prob_classes(x)
        return log_prob + self.model.log_class_prior.to(log_prob)  # type: ignore[union-attr]


class _Unsaturated(nn.Module):
    """A classifier whose outputs are divided, image by image, until its two largest are `LARGEST_GAP` apart.

    Likelihoods of classes lie tens of nats apart. In fp32 the own class then has a probability of exactly 1,
    its logit drops out of the gradient of the cross-entropy, and what ascends that gradient goes astray: an
    attack would spare a classifier for being sure. The divisor is a constant to the gradient; the order of
    classes stays.
    """

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, pixels: Tensor) -> Tensor:
        outputs: Tensor = self.classifier(pixels)
        largest = outputs.detach().topk(min(2, outputs.shape[1])).values
        return outputs / ((largest[:, :1] - largest[:, -1:]) / LARGEST_GAP).clamp(min=1)


@dataclass(frozen=True)
class AttackReport:
    """What one attack leaves of the accuracy.

    Fields:
        attack, norm, steps: the attack's settings; PGD starts at random and its steps are 2.5 budgets in all;
            "square" is `SquareAttack`; the others are foolbox's defaults.
        transferred: whether another model's gradients made the images.
        clean_accuracy: without attack, on the same images.
        budgets: largest norm of the perturbation, ascending, white being 1.
        accuracy, accuracy_stderr: at each, with standard error.
        detection_auroc: how well `log p(x)` tells attacked images from the clean ones at each budget: the
            chance that a clean image has the larger one. 0.5 is guessing, 1 is perfect; None for a
            `Classifier`, which has no log p(x).
    """

    attack: str
    norm: str
    steps: int
    transferred: bool
    clean_accuracy: float
    budgets: list[float]
    accuracy: list[float]
    accuracy_stderr: list[float]
    detection_auroc: list[float] | None
    num_images: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """All fields, ready for `json.dumps`."""
        return asdict(self)


@evaluation_mode
def evaluate_attack(
    model: CDM | Classifier,
    data: ImageData,
    attack: AttackName,
    norm: AttackNorm = "linf",
    budgets: Sequence[float] = (),
    *,
    steps: int | None = None,
    surrogate: CDM | Classifier | None = None,
    num_images: int = 100,
    batch_size: int = 100,
    seed: int = 0,
    progress: Progress = silent,
) -> AttackReport:
    """Attacks `num_images` images of `data` with foolbox; see `AttackReport` and `ClassLogLikelihoods`.

    Args:
        attack: "fgsm" (with "l2" the fast gradient method), "pgd", "deepfool", "cw" (Carlini & Wagner), or
            "square" (random search, no gradients).
        budgets: positive, white being 1; `BUDGETS[norm]` by default.
        steps: of "pgd", "deepfool", "square" and "cw" (each of its 9 searches); `STEPS` by default.
        surrogate: a model of the same images and classes to attack instead; its images are then shown to
            `model`.
        seed: of the choice of images and of the attack's random start.

    Raises:
        UserError: foolbox is missing, "cw" in L-inf, numbers out of range, a model without likelihood or
            classes, data without labels or of other classes.
    """
    classifier = ClassLogLikelihoods(model, data.num_grey_levels, data.pixels).eval()
    label = labels_for(data, require_classes(model))
    check_attack(attack, norm, budgets, steps)
    if num_images < 2:
        raise UserError(f"{num_images} images to attack: at least 2 are needed for an error bar")
    foolbox = load_foolbox()
    target = classifier
    if surrogate is not None:
        target = ClassLogLikelihoods(surrogate, data.num_grey_levels, data.pixels).eval()
    steps = steps or STEPS[attack]
    epsilons = sorted(budgets or BUDGETS[norm])
    index = choose(len(data), num_images, torch.Generator().manual_seed(seed))
    pixels = like_network(model, data.images[index].float() / (data.num_grey_levels - 1))
    label = label[index].to(pixels.device)
    began = time.perf_counter()
    clean_log_prob, right, log_prob, survived = [], [], [], []
    with torch.enable_grad(), _frozen(target), torch.random.fork_rng():
        torch.manual_seed(seed)
        shown = _Unsaturated(target).eval() if attack in OF_CROSS_ENTROPY else target
        attacked = foolbox.PyTorchModel(shown, bounds=(0, 1), device=pixels.device)
        run = _ATTACKS[attack, norm](foolbox.attacks, steps)
        for first in range(0, len(pixels), batch_size):
            progress(f"{attack}, {norm}: image {first} of {len(pixels)}")
            x, c = pixels[first : first + batch_size], label[first : first + batch_size]
            _, clipped, success = run(attacked, x, c, epsilons=epsilons)
            with torch.no_grad():
                outputs = classifier(x)
                right.append(outputs.argmax(1) == c)
                clean_log_prob.append(outputs.logsumexp(1))
                seen = torch.stack([classifier(adversary) for adversary in clipped])  # (m, B, K)
                log_prob.append(seen.logsumexp(2))
            survived.append(~success if surrogate is None else seen.argmax(2) == c)
    seconds = time.perf_counter() - began
    still_right = torch.cat(survived, dim=1).double().cpu()  # (m, n)
    clean, noisy = torch.cat(clean_log_prob).cpu(), torch.cat(log_prob, dim=1).cpu()
    return AttackReport(
        attack=attack,
        norm=norm,
        steps=steps,
        transferred=surrogate is not None,
        clean_accuracy=float(torch.cat(right).double().mean()),
        budgets=epsilons,
        accuracy=still_right.mean(1).tolist(),
        accuracy_stderr=[stderr(row) for row in still_right],
        detection_auroc=[auroc(clean, row) for row in noisy] if isinstance(model, CDM) else None,
        num_images=len(index),
        seconds=seconds,
    )


def load_foolbox() -> ModuleType:
    """foolbox; UserError when it is not installed."""
    try:
        import foolbox
    except ImportError:
        raise UserError('attacks need foolbox: pip install "cdm_fast[attacks]"') from None
    return foolbox


def check_attack(attack: str, norm: str, budgets: Sequence[float], steps: int | None) -> None:
    """UserError for settings of which no attack can be made."""
    if attack not in get_args(AttackName):
        raise UserError(f"unknown attack {attack!r}: choose one of {', '.join(get_args(AttackName))}")
    if norm not in get_args(AttackNorm):
        raise UserError(f"unknown norm {norm!r}: choose one of {', '.join(get_args(AttackNorm))}")
    if (attack, norm) not in _ATTACKS:
        only = "l2" if attack == "cw" else "linf"
        raise UserError(f"the attack {attack} is one in {only}: give --attack-norm {only}")
    for budget in budgets:
        if not 0 < budget < float("inf"):
            raise UserError(f"budget {budget}: give finite numbers above 0, in units of white")
    if steps is not None and steps < 1:
        raise UserError(f"attack steps is {steps}: at least one is needed")


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients of the weights: an attack wants those of its pixels alone."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


_ATTACKS: dict[tuple[str, str], Callable[[Any, int], Callable[..., Any]]] = {
    ("fgsm", "linf"): lambda attacks, steps: attacks.FGSM(),
    ("fgsm", "l2"): lambda attacks, steps: attacks.FGM(),
    ("pgd", "linf"): lambda attacks, steps: attacks.LinfPGD(steps=steps, rel_stepsize=PGD_WAY / steps),
    ("pgd", "l2"): lambda attacks, steps: attacks.L2PGD(steps=steps, rel_stepsize=PGD_WAY / steps),
    ("deepfool", "linf"): lambda attacks, steps: attacks.LinfDeepFoolAttack(steps=steps),
    ("deepfool", "l2"): lambda attacks, steps: attacks.L2DeepFoolAttack(steps=steps),
    ("square", "linf"): lambda attacks, steps: SquareAttack(steps),
    ("cw", "l2"): lambda attacks, steps: attacks.L2CarliniWagnerAttack(steps=steps),
}
