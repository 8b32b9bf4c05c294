"""Adversarial attacks on classification by likelihood.

White-box attacks use exact gradients, without ODE. Two checks show that these gradients are not masked: a
black-box attack, and a transfer attack from another model. `attack_methods` has the attacks.

# B batch, n images, K classes, N grey levels, m budgets, P attacks in turn
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cdm_fast.config.choices import AttackName, AttackNorm
from cdm_fast.data import ImageData, PixelMap
from cdm_fast.data.draws import choose
from cdm_fast.data.pixels import bits_of_interval, from_brightness
from cdm_fast.errors import UserError, require_at_least
from cdm_fast.evaluation.attack_methods import STEPS, Run, attacker, check_attack, parts_of_auto
from cdm_fast.evaluation.class_scores import require_classes, require_posterior
from cdm_fast.evaluation.classification import labels_for
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


Batches = Sequence[tuple[Tensor, Tensor]]  # pixels (B, C, H, W) and labels (B,)


class _Judged(NamedTuple):
    """The outputs of a classifier for a batch, clean and attacked."""

    right: Tensor  # (B,) bool, clean image classified correctly
    survived: Tensor  # (m, B) bool, attacked image classified correctly
    clean_log_prob: Tensor  # (B,) log p(x) in nats
    log_prob: Tensor  # (m, B)


class ClassLogLikelihoods(nn.Module):
    """Pixels (B, C, H, W) in [0, 1] -> `log p(x|c) + log p(c)` in nats, (B, K), differentiable in the pixels.

    Its softmax is the class posterior, its logsumexp `log p(x)`. For a `Classifier` it is `log p(c|x)`.
    Pixels are mapped to [-1, 1] by `data.pixels.from_brightness`, to the centre of their grey level's
    interval, or to random points of it.

    Args:
        model: a CDM with classes (joint logits or embedding), or a `Classifier`.
        num_grey_levels: N of its data.
        pixels: the position of grey levels in [-1, 1], see `data.pixels`.
        draws: dequantisation draws over which the outputs are averaged, new ones in each call from the
            global generator; 0 for the centre.

    Raises UserError for a model without likelihood, or without classes, and for draws below 0.
    """

    def __init__(
        self,
        model: CDM | Classifier,
        num_grey_levels: int,
        pixels: PixelMap = "intervals",
        draws: int = 0,
    ) -> None:
        super().__init__()
        require_posterior(model)
        require_at_least("attack draws", draws, 0)
        self.model = model
        self.num_grey_levels, self.pixels, self.draws = num_grey_levels, pixels, draws

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> (B, K) in nats."""
        x = from_brightness(pixels, self.num_grey_levels, self.pixels)
        if not self.draws:
            return self._outputs(x)
        x = x.repeat(self.draws, *[1] * (x.dim() - 1))
        width = 2 ** -bits_of_interval(self.num_grey_levels, self.pixels)
        outputs = self._outputs(x + width * (torch.rand_like(x) - 0.5))
        return outputs.unflatten(0, (self.draws, -1)).mean(0)

    def _outputs(self, x: Tensor) -> Tensor:
        if isinstance(self.model, Classifier):
            return self.model.log_class_posterior(x)
        log_prob = self.model.log_prob_classes(x)
        return log_prob + self.model.log_class_prior.to(log_prob)  # type: ignore[union-attr]


@dataclass(frozen=True)
class AttackReport:
    """Accuracy of a classifier under one attack.

    Fields:
        attack, norm, steps: the attack's settings. PGD starts at a random point, and its steps have a total
            length of 2.5 budgets; "square" is `SquareAttack`, "apgd-..." are `AutoPGD`, "auto" is several
            attacks in turn; the others use foolbox's defaults.
        draws: dequantisation draws over which the attacked outputs are averaged; 0 for the centre of the grey
            levels.
        transferred: True if the attacked model is another one.
        clean_accuracy: accuracy without attack, on the same images.
        budgets: largest norms of the perturbation, ascending, white being 1.
        accuracy, accuracy_stderr: accuracy at each budget, and its standard error over images.
        accuracy_after: for "auto", attack -> accuracy at each budget after this attack and those before it.
        detection_auroc: AUROC of clean against attacked images by `log p(x)` at each budget: the probability
            that a clean image has the larger value; None for a `Classifier`, which has no log p(x).
        false_alarms: share of the clean images that a detector by `log p(x)` may reject; None for a
            `Classifier`.
        undetected: share of attacked images at each budget that are misclassified and that the detector does
            not reject; None for a `Classifier`.
        num_images, seconds: how it was measured.
    """

    attack: str
    norm: str
    steps: int
    draws: int
    transferred: bool
    clean_accuracy: float
    budgets: list[float]
    accuracy: list[float]
    accuracy_stderr: list[float]
    accuracy_after: dict[str, list[float]] | None
    detection_auroc: list[float] | None
    false_alarms: float | None
    undetected: list[float] | None
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
    draws: int = 0,
    surrogate: CDM | Classifier | None = None,
    false_alarms: float = 0.05,
    num_images: int = 100,
    batch_size: int = 100,
    seed: int = 0,
    progress: Progress = silent,
) -> AttackReport:
    """Attacks `num_images` images of `data`; see `AttackReport` and `ClassLogLikelihoods`.

    Args:
        attack: "fgsm" (with "l2" the fast gradient method), "pgd", "deepfool", "cw" (Carlini & Wagner), all
            foolbox's; "square" (random search, no gradients); "apgd-ce" and "apgd-t" (Auto-PGD on the class
            and towards each other class); "apgd-undetected" (Auto-PGD that also keeps log p(x) above the
            detector's threshold); or "auto": apgd-ce, apgd-t and, in L-inf, square in turn.
        norm: norm of the perturbation, "linf" or "l2".
        budgets: largest norms, positive, white being 1; `BUDGETS[norm]` by default.
        steps: steps of all but "fgsm" ("cw": per search, of which there are 9; "auto": of Auto-PGD, and 50
            times as many evaluations of square); `STEPS` by default.
        draws: dequantisation draws over which attacked and final outputs are averaged (expectation over
            transformation); 0 for the centre of the grey levels.
        surrogate: another model for the same images and classes that is attacked instead (transfer attack);
            `model` then classifies the attacked images.
        false_alarms: share of the clean images that the detector may reject, 0..1.
        batch_size: images attacked at once.
        seed: seed of the choice of images and of the attack.

    Raises:
        UserError: foolbox is needed and missing, an attack without this norm, numbers out of range, a model
            without likelihood or classes, data without labels or of other classes, "apgd-undetected" for a
            `Classifier`.
    """
    labels = labels_for(data, require_classes(model))
    _check(model if surrogate is None else surrogate, attack, norm, budgets, steps)
    require_error_bar(num_images, "images to attack")
    require_at_least("batch_size", batch_size, 1)
    if not 0 < false_alarms < 1:
        raise UserError(f"the share of false alarms is {false_alarms}: it must lie between 0 and 1")
    classifier, target = (
        ClassLogLikelihoods(each, data.num_grey_levels, data.pixels, draws).eval()
        for each in (model, model if surrogate is None else surrogate)
    )
    steps = steps or STEPS[attack]
    epsilons = sorted(budgets or BUDGETS[norm])
    index = choose(len(data), num_images, torch.Generator().manual_seed(seed))
    pixels = like_network(model, data.images[index].float() / (data.num_grey_levels - 1))
    each = (pixels, labels[index].to(pixels.device))
    batches = list(zip(*(tensor.split(batch_size) for tensor in each), strict=True))
    start = time.perf_counter()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        threshold = _threshold(target, batches, false_alarms)
        with attacker(target, attack, norm, steps, threshold, pixels.device) as run:
            # Success refers to the attacked model, or to other draws, or is more than a wrong class.
            final = surrogate is None and not draws and attack != "apgd-undetected"
            found, after = _attack(run, classifier, batches, epsilons, final, progress)
    return AttackReport(
        attack=attack,
        norm=norm,
        steps=steps,
        draws=draws,
        transferred=surrogate is not None,
        budgets=epsilons,
        **_accuracies(found, after if final else (), norm),
        **_detection(found, false_alarms if isinstance(model, CDM) else None),
        num_images=len(index),
        seconds=time.perf_counter() - start,
    )


def _attack(
    run: Run,
    classifier: nn.Module,
    batches: Batches,
    budgets: Sequence[float],
    final: bool,
    progress: Progress,
) -> tuple[list[_Judged], list[Tensor | None]]:
    """The outputs of `classifier` for each attacked batch, and the attack's own stages (`Run`).

    final: the attack's success decides whether an image survived, instead of the outputs.
    """
    found, after, done = [], [], 0
    for images, label in batches:
        progress(f"attacking: image {done} of {sum(len(label) for _, label in batches)}")
        attacked, succeeded, by_part = run(images, label, budgets)
        judged = _judge(classifier, images, label, attacked)
        found.append(judged._replace(survived=~succeeded) if final else judged)
        after.append(by_part)
        done += len(label)
    return found, after


def _check(
    attacked: CDM | Classifier, attack: str, norm: str, budgets: Sequence[float], steps: int | None
) -> None:
    """UserError for an attack that the model does not support, or as in `check_attack`."""
    check_attack(attack, norm, budgets, steps)
    if attack == "apgd-undetected" and not isinstance(attacked, CDM):
        raise UserError("apgd-undetected evades a detector by log p(x), which a classifier lacks: give auto")


@torch.no_grad()
def _threshold(classifier: nn.Module, batches: Batches, false_alarms: float) -> float:
    """The value of log p(x) in nats below which a share `false_alarms` of the clean images lies."""
    return _quantile(torch.cat([classifier(images).logsumexp(1) for images, _ in batches]), false_alarms)


def _quantile(log_prob: Tensor, share: float) -> float:
    """The smallest of the values (n,) that has at least `floor(share n)` others below it."""
    return float(log_prob.sort().values[int(share * len(log_prob))])


def _accuracies(found: Sequence[_Judged], after: Sequence[Tensor | None], norm: str) -> dict[str, Any]:
    """The fields of an `AttackReport` about accuracy.

    after: of each batch, whether images are misclassified after each part of "auto", (P, m, B), or None.
    """
    survived = torch.cat([each.survived for each in found], dim=1).double().cpu()
    stages = [each for each in after if each is not None]
    accuracy_after = None
    if stages:
        left = (~torch.cat(stages, dim=2)).double().mean(2)
        accuracy_after = dict(zip(parts_of_auto(norm), left.tolist(), strict=True))
    return {
        "clean_accuracy": float(torch.cat([each.right for each in found]).double().mean()),
        "accuracy": survived.mean(1).tolist(),
        "accuracy_stderr": [standard_error(row) for row in survived],
        "accuracy_after": accuracy_after,
    }


def _detection(found: Sequence[_Judged], false_alarms: float | None) -> dict[str, Any]:
    """The fields of an `AttackReport` about detection by log p(x); None for a model without it."""
    if false_alarms is None:
        return dict.fromkeys(("detection_auroc", "false_alarms", "undetected"))
    clean = torch.cat([each.clean_log_prob for each in found]).cpu()
    attacked, survived = (
        torch.cat(each, dim=1).cpu() for each in zip(*((x.log_prob, x.survived) for x in found), strict=True)
    )
    missed = ~survived & (attacked >= _quantile(clean, false_alarms))
    return {
        "detection_auroc": [auroc(clean, row) for row in attacked],
        "false_alarms": false_alarms,
        "undetected": missed.double().mean(1).tolist(),
    }


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
