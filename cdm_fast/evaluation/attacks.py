"""Adversarial attacks on classification by likelihood.

White-box attacks are foolbox's, with exact gradients, without ODE or noise. Two checks show that these
gradients are not masked: a black-box attack, and a transfer attack from another model.

# B batch, n images, K classes, N grey levels, m budgets
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from cdm_fast.config.choices import AttackName, AttackNorm
from cdm_fast.data import ImageData, PixelMap
from cdm_fast.data.draws import choose
from cdm_fast.data.pixels import from_brightness
from cdm_fast.errors import UserError, require_at_least
from cdm_fast.evaluation.class_scores import require_classes, require_posterior
from cdm_fast.evaluation.classification import labels_for
from cdm_fast.evaluation.square_attack import SquareAttack
from cdm_fast.host.progress import Progress, silent
from cdm_fast.model import CDM, evaluation_mode
from cdm_fast.model.classifier import Classifier
from cdm_fast.model.denoiser import like_network
from cdm_fast.statistics import auroc, require_error_bar, standard_error

# White is 1, black 0. The usual budgets of 8-bit pictures and of MNIST.
BUDGETS: dict[str, tuple[float, ...]] = {
    "linf": (1 / 255, 2 / 255, 4 / 255, 8 / 255, 16 / 255, 0.1, 0.2, 0.3),
    "l2": (0.1, 0.25, 0.5, 1.0, 2.0, 3.0),
}
PGD_LENGTH = 2.5  # total length of all PGD steps, in budgets (arXiv 1706.06083)
OF_CROSS_ENTROPY = ("fgsm", "pgd")  # attacks that ascend the cross-entropy
MAX_GAP = 2.0  # largest gap in nats between the two largest logits shown to these attacks
STEPS = {"fgsm": 1, "pgd": 40, "deepfool": 50, "cw": 200, "square": 1000}


class ClassLogLikelihoods(nn.Module):
    """Pixels (B, C, H, W) in [0, 1] -> `log p(x|c) + log p(c)` in nats, (B, K), differentiable in the pixels.

    Its softmax is the class posterior, its logsumexp `log p(x)`. For a `Classifier` it is `log p(c|x)`.
    Pixels are mapped to [-1, 1] by `data.pixels.from_brightness`, without dequantisation noise.

    Args:
        model: a CDM with classes (joint logits or embedding), or a `Classifier`.
        num_grey_levels: N of its data.
        pixels: the position of grey levels in [-1, 1], see `data.pixels`.

    Raises UserError for a model without likelihood, or without classes.
    """

    def __init__(self, model: CDM | Classifier, num_grey_levels: int, pixels: PixelMap = "intervals") -> None:
        super().__init__()
        require_posterior(model)
        self.model = model
        self.num_grey_levels, self.pixels = num_grey_levels, pixels

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> (B, K) in nats."""
        x = from_brightness(pixels, self.num_grey_levels, self.pixels)
        if isinstance(self.model, Classifier):
            return self.model.log_class_posterior(x)
        log_prob = self.model.log_prob_classes(x)
        return log_prob + self.model.log_class_prior.to(log_prob)  # type: ignore[union-attr]


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


@dataclass(frozen=True)
class AttackReport:
    """Accuracy of a classifier under one attack.

    Fields:
        attack, norm, steps: the attack's settings. PGD starts at a random point, and its steps have a total
            length of 2.5 budgets; "square" is `SquareAttack`; the others use foolbox's defaults.
        transferred: True if the attacked model is another one.
        clean_accuracy: accuracy without attack, on the same images.
        budgets: largest norms of the perturbation, ascending, white being 1.
        accuracy, accuracy_stderr: accuracy at each budget, and its standard error over images.
        detection_auroc: AUROC of clean against attacked images by `log p(x)` at each budget: the probability
            that a clean image has the larger value; None for a `Classifier`, which has no log p(x).
        num_images, seconds: how it was measured.
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
        norm: norm of the perturbation, "linf" or "l2".
        budgets: largest norms, positive, white being 1; `BUDGETS[norm]` by default.
        steps: steps of "pgd", "deepfool", "square" and "cw" (per search, of which there are 9); `STEPS` by
            default.
        surrogate: another model for the same images and classes that is attacked instead (transfer attack);
            `model` then classifies the attacked images.
        batch_size: images attacked at once.
        seed: seed of the choice of images and of the attack.

    Raises:
        UserError: foolbox is missing, "cw" in L-inf, numbers out of range, a model without likelihood or
            classes, data without labels or of other classes.
    """
    classifier = ClassLogLikelihoods(model, data.num_grey_levels, data.pixels).eval()
    labels = labels_for(data, require_classes(model))
    check_attack(attack, norm, budgets, steps)
    require_error_bar(num_images, "images to attack")
    require_at_least("batch_size", batch_size, 1)
    target = classifier
    if surrogate is not None:
        target = ClassLogLikelihoods(surrogate, data.num_grey_levels, data.pixels).eval()
    steps = steps or STEPS[attack]
    epsilons = sorted(budgets or BUDGETS[norm])
    index = choose(len(data), num_images, torch.Generator().manual_seed(seed))
    pixels = like_network(model, data.images[index].float() / (data.num_grey_levels - 1))
    labels = labels[index].to(pixels.device)
    start = time.perf_counter()
    batches = []
    with _attacker(target, attack, norm, steps, seed, pixels.device) as run:
        for first in range(0, len(pixels), batch_size):
            progress(f"{attack}, {norm}: image {first} of {len(pixels)}")
            rows = slice(first, first + batch_size)
            attacked, fooled = run(pixels[rows], labels[rows], epsilons)
            judged = _judge(classifier, pixels[rows], labels[rows], attacked)
            # "Fooled" refers to the attacked model, whose logits may have been rescaled, so judge again.
            batches.append(judged if surrogate is not None else judged._replace(survived=~fooled))
    found = _Judged(*(torch.cat(parts, dim=-1).cpu() for parts in zip(*batches, strict=True)))
    survived = found.survived.double()
    return AttackReport(
        attack=attack,
        norm=norm,
        steps=steps,
        transferred=surrogate is not None,
        clean_accuracy=float(found.right.double().mean()),
        budgets=epsilons,
        accuracy=survived.mean(1).tolist(),
        accuracy_stderr=[standard_error(row) for row in survived],
        detection_auroc=_detection(found) if isinstance(model, CDM) else None,
        num_images=len(index),
        seconds=time.perf_counter() - start,
    )


class _Judged(NamedTuple):
    """The outputs of a classifier for a batch, clean and attacked."""

    right: Tensor  # (B,) bool, clean image classified correctly
    survived: Tensor  # (m, B) bool, attacked image classified correctly
    clean_log_prob: Tensor  # (B,) log p(x) in nats
    log_prob: Tensor  # (m, B)


def _detection(found: _Judged) -> list[float]:
    """AUROC of clean against attacked images by log p(x), at each budget."""
    return [auroc(found.clean_log_prob, attacked) for attacked in found.log_prob]


@torch.no_grad()
def _judge(
    classifier: nn.Module,
    pixels: Tensor,  # (B, C, H, W)
    labels: Tensor,  # (B,)
    attacked: list[Tensor],  # at each budget
) -> _Judged:
    clean = classifier(pixels)  # (B, K)
    outputs = torch.stack([classifier(images) for images in attacked])  # (m, B, K)
    return _Judged(
        clean.argmax(1) == labels, outputs.argmax(2) == labels, clean.logsumexp(1), outputs.logsumexp(2)
    )


@contextlib.contextmanager
def _attacker(
    target: nn.Module, attack: AttackName, norm: AttackNorm, steps: int, seed: int, device: torch.device
) -> Iterator[Callable[[Tensor, Tensor, list[float]], tuple[list[Tensor], Tensor]]]:
    """The attack on `target`: (pixels, labels, m budgets) -> (images at each budget, fooled (m, B) bool).

    Inside the block gradients are enabled, except for the weights, and global generators belong to the
    attack.
    """
    foolbox = load_foolbox()
    with torch.enable_grad(), _frozen(target), torch.random.fork_rng():
        torch.manual_seed(seed)
        shown = _Unsaturated(target).eval() if attack in OF_CROSS_ENTROPY else target
        attacked_model = foolbox.PyTorchModel(shown, bounds=(0, 1), device=device)
        method = _ATTACKS[attack, norm](foolbox.attacks, steps)

        def run(pixels: Tensor, labels: Tensor, budgets: list[float]) -> tuple[list[Tensor], Tensor]:
            _, clipped, fooled = method(attacked_model, pixels, labels, epsilons=budgets)
            return clipped, fooled

        yield run


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
    if (attack, norm) not in _ATTACKS:
        only = "l2" if attack == "cw" else "linf"
        raise UserError(f"the attack {attack} exists only in {only}: give --attack-norm {only}")
    for budget in budgets:
        if not 0 < budget < float("inf"):
            raise UserError(f"budget {budget}: give finite numbers above 0, in units of white")
    if steps is not None:
        require_at_least("attack steps", steps, 1)


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Disables gradients of the weights inside the block; an attack needs only those of the pixels."""
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
    ("pgd", "linf"): lambda attacks, steps: attacks.LinfPGD(steps=steps, rel_stepsize=PGD_LENGTH / steps),
    ("pgd", "l2"): lambda attacks, steps: attacks.L2PGD(steps=steps, rel_stepsize=PGD_LENGTH / steps),
    ("deepfool", "linf"): lambda attacks, steps: attacks.LinfDeepFoolAttack(steps=steps),
    ("deepfool", "l2"): lambda attacks, steps: attacks.L2DeepFoolAttack(steps=steps),
    ("square", "linf"): lambda attacks, steps: SquareAttack(steps),
    ("cw", "l2"): lambda attacks, steps: attacks.L2CarliniWagnerAttack(steps=steps),
}
