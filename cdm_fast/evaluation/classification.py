"""Generative classification: every class's likelihood of an image, then Bayes' rule; and how good that is.

Four ways to a score of each class from networks that denoise, and one baseline that does not:

- joint: `log p(x|c)` of all classes from one forward pass of joint (level, class) logits;
- embedding: the same from one pass per class of a network that takes the label;
- ode: `log p(x|c)` by the probability-flow ODE, one integration per class (arXiv 2110.00473);
- denoising: minus the mean denoising error given each class (arXiv 2303.16203), which is no likelihood;
- discriminative: `log p(c|x)` of an ordinary classifier on the same trunk.

# B batch, n images, K classes, d = C*H*W
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cdm_fast.config.choices import ClassifyMethod
from cdm_fast.data import ImageData
from cdm_fast.data.draws import batches, choose, draw_generator
from cdm_fast.errors import UserError
from cdm_fast.evaluation.class_scores import (
    denoising_scores,
    fitting_method,
    ode_log_prob_classes,
    require_classes,
)
from cdm_fast.host.distributed import by_rows
from cdm_fast.host.progress import Progress, silent
from cdm_fast.likelihood.ode import load_solver
from cdm_fast.likelihood.units import bits_per_dim
from cdm_fast.model import CDM, Denoiser, measures
from cdm_fast.model.classifier import Classifier
from cdm_fast.model.denoiser import like_network
from cdm_fast.model.schedule import add_noise
from cdm_fast.statistics import Reliability, confusion_matrix, reliability, stderr

ODE_IMAGES, ODE_BATCH = 32, 64
DRAWS = {"joint": 3, "embedding": 3, "denoising": 1, "ode": 1, "discriminative": 3}


@dataclass(frozen=True)
class ClassReport:
    """How well a model tells the classes of a data set, and how it was measured.

    Fields:
        accuracy, accuracy_stderr: share of images whose most probable class is theirs, and its error bar.
        ece: calibration error of that class's posterior, 0..1.
        log_loss: mean of `-log p(label|x)`, nats.
        bits_per_dim, bits_per_dim_stderr: of the marginal `sum_c p(c) p(x|c)` on dequantised images, with its
            standard error; None for "denoising" and "discriminative", which have no likelihood.
        confusion: (K, K) rows are true classes.
        reliability: the bins of `ece`.
        draws: dequantisation draws; an image's class scores are their mean: log-probabilities are averaged.
        level: noise level at which it was classified, and of `bits_per_dim`; every draw has its own noise.
        trials: pairs of level and noise of "denoising"; tolerance: of "ode"; None for the others.
        images_per_second: classified, once each: images times draws over seconds.
        index: (n,) which images of the split; score: (n, K) log p(x|c) in nats, for "denoising" its score,
            for "discriminative" log p(c|x);
        log_joint: (n, K) `score` plus `log p(c)`: for a likelihood `log p(x, c)` in nats.
        posterior: (n, K) `p(c|x)`.
    """

    method: str
    accuracy: float
    accuracy_stderr: float
    ece: float
    log_loss: float
    bits_per_dim: float | None
    bits_per_dim_stderr: float | None
    num_images: int
    num_classes: int
    draws: int
    level: int
    trials: int | None
    tolerance: float | None
    seconds: float
    images_per_second: float
    data: str
    split: str
    confusion: list[list[int]]
    reliability: Reliability
    index: Tensor
    score: Tensor
    log_joint: Tensor
    posterior: Tensor

    def to_json(self) -> dict[str, Any]:
        """Everything but the values of single images, ready for `json.dumps`."""
        fields = asdict(self)
        for of_images in ("index", "score", "log_joint", "posterior"):
            del fields[of_images]
        return fields

    def columns(self) -> dict[str, tuple[Tensor, Tensor]]:
        """`predicted` and each class's score, as `write_per_image` takes them."""
        name = {"denoising": "denoising_score", "discriminative": "log_posterior"}.get(
            self.method, "log_prob"
        )
        classes = {f"{name}_{c}": (self.index, values) for c, values in enumerate(self.score.T)}
        return {"predicted": (self.index, self.posterior.argmax(1)), **classes}


@measures
def evaluate_classes(
    model: Denoiser,
    data: ImageData,
    method: ClassifyMethod | None = None,
    *,
    num_images: int | None = None,
    draws: int | None = None,
    level: int = 0,
    trials: int = 50,
    tolerance: float = 1e-5,
    probes: int | None = None,
    batch_size: int = 500,
    seed: int = 0,
    class_prior: Tensor | None = None,
    progress: Progress = silent,
) -> ClassReport:
    """Classifies the labelled images of `data` by Bayes' rule; see `ClassReport` and this module's head.

    Args:
        method: the model's own conditioning by default, and "denoising" for a plain denoiser.
        num_images: so many images, drawn from the data; by default all, or `ODE_IMAGES` by the ODE.
        draws: of dequantisation noise; by default 1 for "ode" and "denoising", 3 for the others.
        level: classify `x_level` by `p_level(x_level|c)`, with fresh noise in every draw; "joint" and
            "embedding" only. Noise hides what tells images apart without telling classes apart.
        trials: of "denoising"; tolerance, probes: of "ode".
        batch_size: network inputs per evaluation.
        seed: of every draw.
        class_prior: (K,) up to a factor; a CDM's own by default, else equal shares.

    Raises:
        UserError: a model without classes, a method that does not fit it, data without labels or of other
            classes, numbers out of range, and as `flow_log_prob`.
    """
    num_classes = require_classes(model)
    method = fitting_method(model, method)
    label = labels_for(data, num_classes)
    for what, value in (("draws", draws), ("trials", trials), ("images", num_images)):
        if value is not None and value < 1:
            raise UserError(f"{what} is {value}: at least one is needed")
    if level and (method not in ("joint", "embedding") or not 0 < level <= model.schedule.T):
        raise UserError(
            f"level {level}: joint and embedding classify at 0 to T = {model.schedule.T}, other methods at 0"
        )
    draws = draws or DRAWS[method]
    log_prior = _log_class_prior(model, num_classes, class_prior)
    wanted = num_images or (ODE_IMAGES if method == "ode" else None)
    index = choose(len(data), wanted, torch.Generator().manual_seed(seed))
    chosen, label = data.take(index), label[index]
    scores: Callable[[Tensor, int, torch.Generator], Tensor]
    if method == "ode":
        load_solver()  # its absence is told before any work
        batch_size = min(batch_size, ODE_BATCH)

        def scores(x: Tensor, first: int, generator: torch.Generator) -> Tensor:
            return ode_log_prob_classes(model, x, num_classes, tolerance, probes, seed + first)
    elif method == "denoising":
        batch_size = max(1, batch_size // num_classes)

        def scores(x: Tensor, first: int, generator: torch.Generator) -> Tensor:
            return denoising_scores(model, x, num_classes, trials, generator)
    else:
        assert isinstance(model, CDM | Classifier)
        one_pass: Callable[[Tensor], Tensor] = (
            model.log_class_posterior
            if isinstance(model, Classifier)
            else partial(model.log_prob_classes, level=level)
        )

        def scores(x: Tensor, first: int, generator: torch.Generator) -> Tensor:
            return by_rows(one_pass, x)

    began = time.perf_counter()
    score = torch.zeros(len(index), num_classes, dtype=torch.float64)
    bits = torch.zeros(len(index), dtype=torch.float64)
    for draw in range(draws):
        generator = draw_generator(seed, draw)
        for first, x in batches(chosen, batch_size, generator):
            if method in ("ode", "denoising"):
                progress(f"{method}, draw {draw + 1} of {draws}, image {first} of {len(index)}")
            x = like_network(model, add_noise(model.schedule, x, level, generator))
            each = scores(x, first, generator).double().cpu()
            score[first : first + len(x)] += each / draws
            bits[first : first + len(x)] += bits_per_dim((each + log_prior).logsumexp(1), data) / draws
    seconds = time.perf_counter() - began
    log_joint = score + log_prior
    log_posterior = log_joint.log_softmax(1)
    predicted = log_posterior.argmax(1)
    right = (predicted == label).double()
    calibration = reliability(log_posterior.exp(), label)
    has_likelihood = method not in ("denoising", "discriminative")
    return ClassReport(
        method=method,
        accuracy=float(right.mean()),
        accuracy_stderr=stderr(right),
        ece=calibration.ece,
        log_loss=-float(log_posterior.gather(1, label[:, None]).mean()),
        bits_per_dim=float(bits.mean()) if has_likelihood else None,
        bits_per_dim_stderr=stderr(bits) if has_likelihood else None,
        num_images=len(index),
        num_classes=num_classes,
        draws=draws,
        level=level,
        trials=trials if method == "denoising" else None,
        tolerance=tolerance if method == "ode" else None,
        seconds=seconds,
        images_per_second=draws * len(index) / seconds,
        data=data.name,
        split=data.split,
        confusion=confusion_matrix(predicted, label, num_classes).tolist(),
        reliability=calibration,
        index=index,
        score=score,
        log_joint=log_joint,
        posterior=log_posterior.exp(),
    )


def labels_for(data: ImageData, num_classes: int) -> Tensor:
    """(n,) int64 labels of `data`; UserError if it has none, or others than K classes."""
    labels = require_labels(data)
    if data.num_classes != num_classes:
        raise UserError(
            f"{data.name} has {data.num_classes} classes, and the model was trained on {num_classes};"
            " give data of the same classes"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        raise UserError(
            f"{data.name} holds label {wrong}, out of range: classes are 0 to {num_classes - 1}; relabel it"
        )
    return labels


def require_labels(data: ImageData) -> Tensor:
    """(n,) int64 labels of `data`; UserError if it has none."""
    if data.labels is None:
        raise UserError(f"{data.name} has no labels, and an accuracy needs them; give labelled data")
    return data.labels


def _log_class_prior(model: Denoiser, num_classes: int, class_prior: Tensor | None) -> Tensor:
    """(K,) float64 in nats, on the CPU; 0 where the scores are posteriors already."""
    if isinstance(model, Classifier):
        return torch.zeros(num_classes, dtype=torch.float64)
    if class_prior is None and isinstance(model, CDM) and model.log_class_prior is not None:
        return model.log_class_prior.double().cpu()
    prior = torch.ones(num_classes) if class_prior is None else class_prior
    if prior.shape != (num_classes,) or not bool((torch.isfinite(prior) & (prior > 0)).all()):
        raise UserError(f"class_prior must be {num_classes} positive finite numbers, one per class")
    return (prior.double() / prior.sum()).log().cpu()
