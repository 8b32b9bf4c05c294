"""Generative classification: the likelihood of an image under every class, then Bayes' rule.

Four methods score the classes with a denoising network; the fifth is a baseline without one:

- joint: `log p(x|c)` of all classes from one forward pass of joint (level, class) logits;
- embedding: the same from one forward pass per class of a network that takes the label;
- ode: `log p(x|c)` by the probability-flow ODE, one integration per class (arXiv 2110.00473);
- denoising: minus the mean denoising error given each class (arXiv 2303.16203), which is no likelihood;
- discriminative: `log p(c|x)` of an ordinary classifier on the same trunk.

# B batch, n images, K classes, d = C*H*W
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cdm_fast.config.choices import ClassifyMethod
from cdm_fast.config.json import fields_without
from cdm_fast.data import ImageData
from cdm_fast.data.draws import choose, draw_generator
from cdm_fast.errors import UserError, require_at_least
from cdm_fast.evaluation.class_scores import (
    denoising_scores,
    fitting_method,
    ode_log_prob_classes,
    require_classes,
)
from cdm_fast.host.distributed import by_rows
from cdm_fast.host.progress import Progress, silent
from cdm_fast.likelihood.batches import noised_batches
from cdm_fast.likelihood.given import log_class_prior, require_known
from cdm_fast.likelihood.ode import load_solver
from cdm_fast.likelihood.units import bits_per_dim
from cdm_fast.model import CDM, Denoiser, evaluation_mode
from cdm_fast.model.classifier import Classifier
from cdm_fast.statistics import Reliability, confusion_matrix, reliability, standard_error

ODE_IMAGES, ODE_BATCH = 32, 64
DRAWS = {"joint": 3, "embedding": 3, "denoising": 1, "ode": 1, "discriminative": 3}

# (x_t (B, ...), index of its first image, noise) -> a score of every class (B, K), such as log p(x_t|c)
ScoreClasses = Callable[[Tensor, int, torch.Generator], Tensor]


@dataclass(frozen=True)
class ClassReport:
    """Accuracy and calibration of a model on a labelled data set, and how they were measured.

    Fields:
        method: how classes are scored; see the module docstring.
        accuracy, accuracy_stderr: share of images whose most probable class is right; its standard error.
        ece: expected calibration error of that class's posterior, 0..1.
        log_loss: mean of `-log p(label|x)`, nats.
        bits_per_dim, bits_per_dim_stderr: bits/dim of the marginal `sum_c p(c) p(x|c)` on dequantised images,
            and its standard error; None for "denoising" and "discriminative", which have no likelihood.
        confusion: (K, K) confusion matrix; rows are true classes.
        reliability: the bins of `ece`.
        draws: dequantisation draws, over which an image's class scores (log-probabilities) are averaged.
        level: noise level of the classified images and of `bits_per_dim`; every draw has its own noise.
        trials: number of (level, noise) pairs for "denoising", else None.
        tolerance: tolerance of the solver for "ode", else None.
        num_images, num_classes, data, split: what was classified.
        seconds, images_per_second: time of the scoring; images count once per draw.
        index: (n,) which images of the split.
        class_scores: (n, K) `log p(x|c)` in nats; for "denoising" minus the mean error, for "discriminative"
            `log p(c|x)`.
        log_joint: (n, K) `class_scores` plus `log p(c)`; `log p(x, c)` in nats for methods with a likelihood.
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
    class_scores: Tensor
    log_joint: Tensor
    posterior: Tensor

    def to_json(self) -> dict[str, Any]:
        """Everything but the values of single images, ready for `json.dumps`."""
        return fields_without(self, "index", "class_scores", "log_joint", "posterior")

    def columns(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Columns of the per-image file, name -> (images, values): `predicted`, and a score per class."""
        name = {"denoising": "denoising_score", "discriminative": "log_posterior"}.get(
            self.method, "log_prob"
        )
        classes = {f"{name}_{c}": (self.index, values) for c, values in enumerate(self.class_scores.T)}
        return {"predicted": (self.index, self.posterior.argmax(1)), **classes}


@evaluation_mode
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
    """Classifies the labelled images of `data` by Bayes' rule; see `ClassReport` and the module docstring.

    Args:
        method: by default the model's own conditioning, or "denoising" for a plain denoiser.
        num_images: number of images, drawn from the data; by default all, or `ODE_IMAGES` for "ode".
        draws: draws of dequantisation noise; by default 1 for "ode" and "denoising", 3 for the others.
        level: classify `x_level` by `p_level(x_level|c)`, with new noise in every draw; "joint" and
            "embedding" only. Noise hides details that differ between images of one class.
        trials: number of (level, noise) pairs for "denoising".
        tolerance, probes: passed to `flow_log_prob` for "ode".
        batch_size: network inputs per evaluation.
        seed: seed of all draws.
        class_prior: (K,) up to a factor; a CDM's own prior by default, else uniform. Not for a `Classifier`,
            whose posteriors already hold the class frequencies of its training.

    Raises:
        UserError: a model without classes, a method that the model does not support, data without labels or
            with other classes, a class prior for a `Classifier`, numbers out of range, and as in
            `flow_log_prob`.

    A network with zero weights finds every class equally likely:

    >>> from cdm_fast import MLP, NoiseSchedule
    >>> network = MLP(dim=2, num_levels=12, hidden=4, depth=1, num_classes=2, conditioning="joint")
    >>> _ = [torch.nn.init.zeros_(parameter) for parameter in network.parameters()]
    >>> flat = torch.nn.Sequential(torch.nn.Flatten(), network)
    >>> model = CDM(flat, NoiseSchedule.uniform(T=10), class_prior=torch.ones(2), conditioning="joint")
    >>> images, labels = torch.zeros(6, 1, 1, 2, dtype=torch.uint8), torch.arange(6) % 2
    >>> data = ImageData(images, labels, num_grey_levels=256, num_classes=2, name="black", split="test")
    >>> report = evaluate_classes(model, data)
    >>> report.method, report.accuracy, round(report.log_loss, 4)  # log 2
    ('joint', 0.5, 0.6931)
    >>> report.confusion  # the first class wins a tie
    [[3, 0], [3, 0]]
    """
    num_classes = require_classes(model)
    method = fitting_method(model, method)
    labels = labels_for(data, num_classes)
    _check_numbers(model, method, level, draws=draws, trials=trials, images=num_images, batch_size=batch_size)
    draws = draws or DRAWS[method]
    log_prior = _log_prior(model, num_classes, class_prior)
    wanted = num_images or (ODE_IMAGES if method == "ode" else None)
    index = choose(len(data), wanted, torch.Generator().manual_seed(seed))
    labels = labels[index]
    scores = _scores(model, method, num_classes, level, trials, tolerance, probes, seed)
    slow = method in ("ode", "denoising")  # the others are too fast to report each batch
    start = time.perf_counter()
    class_scores, bits = _mean_over_draws(
        model,
        data.take(index),
        scores,
        log_prior,
        draws=draws,
        level=level,
        batch_size=_images_per_batch(method, batch_size, num_classes),
        seed=seed,
        progress=(lambda message: progress(f"{method}, {message}")) if slow else silent,
    )
    seconds = time.perf_counter() - start
    return ClassReport(
        **_statistics((class_scores + log_prior).log_softmax(1), labels),
        **_marginal_likelihood(method, bits),
        method=method,
        draws=draws,
        level=level,
        trials=trials if method == "denoising" else None,
        tolerance=tolerance if method == "ode" else None,
        seconds=seconds,
        images_per_second=draws * len(index) / seconds,
        data=data.name,
        split=data.split,
        index=index,
        class_scores=class_scores,
        log_joint=class_scores + log_prior,
    )


def _check_numbers(model: Denoiser, method: ClassifyMethod, level: int, **counts: int | None) -> None:
    """Raises UserError for a count below 1, and for a level that the method does not support."""
    for name, count in counts.items():
        if count is not None:
            require_at_least(name, count, 1)
    if level and (method not in ("joint", "embedding") or not 0 < level <= model.schedule.T):
        raise UserError(
            f"level {level}: joint and embedding classify at 0 to T = {model.schedule.T}, other methods at 0"
        )


def _log_prior(model: Denoiser, num_classes: int, class_prior: Tensor | None) -> Tensor:
    """`log p(c)` (K,) to add to class scores; 0 for a `Classifier`, whose scores are posteriors."""
    if isinstance(model, Classifier):
        if class_prior is not None:
            raise UserError(
                "class_prior does not go with a classifier, whose posteriors hold the class frequencies of"
                " its training: leave it out, and add log of new over old ones to the report's log_joint"
            )
        return torch.zeros(num_classes, dtype=torch.float64)
    return log_class_prior(model, class_prior)


def _images_per_batch(method: ClassifyMethod, batch_size: int, num_classes: int) -> int:
    """Images per batch, such that an evaluation takes at most `batch_size` network inputs."""
    if method == "ode":
        return min(batch_size, ODE_BATCH)
    return max(1, batch_size // num_classes) if method == "denoising" else batch_size


def _scores(
    model: Denoiser,
    method: ClassifyMethod,
    num_classes: int,
    level: int,
    trials: int,
    tolerance: float,
    probes: int | None,
    seed: int,
) -> ScoreClasses:
    """The function with which the method scores a batch."""
    if method == "ode":
        load_solver()  # a missing package is reported before any work
        return _ode_scores(model, num_classes, tolerance, probes, seed)
    if method == "denoising":
        return _denoising_scores(model, num_classes, trials)
    return _single_pass_scores(model, level)


def _ode_scores(
    model: Denoiser, num_classes: int, tolerance: float, probes: int | None, seed: int
) -> ScoreClasses:
    def scores(x: Tensor, first: int, generator: torch.Generator) -> Tensor:
        return ode_log_prob_classes(model, x, num_classes, tolerance, probes, seed + first)

    return scores


def _denoising_scores(model: Denoiser, num_classes: int, trials: int) -> ScoreClasses:
    def scores(x: Tensor, first: int, generator: torch.Generator) -> Tensor:
        return denoising_scores(model, x, num_classes, trials, generator)

    return scores


def _single_pass_scores(model: Denoiser, level: int) -> ScoreClasses:
    assert isinstance(model, CDM | Classifier), "`fitting_method` refuses other models"
    single_pass: Callable[[Tensor], Tensor] = (
        model.log_class_posterior
        if isinstance(model, Classifier)
        else partial(model.log_prob_classes, level=level)
    )

    def scores(x: Tensor, first: int, generator: torch.Generator) -> Tensor:
        return by_rows(single_pass, x)

    return scores


def _mean_over_draws(
    model: Denoiser,
    data: ImageData,
    scores: ScoreClasses,
    log_prior: Tensor,  # (K,)
    *,
    draws: int,
    level: int,
    batch_size: int,
    seed: int,
    progress: Progress,
) -> tuple[Tensor, Tensor]:
    """Class scores (n, K) and bits/dim of the marginal (n,), float64, each the mean over draws of noise."""
    class_scores = torch.zeros(len(data), len(log_prior), dtype=torch.float64)
    bits = torch.zeros(len(data), dtype=torch.float64)
    for draw in range(draws):
        generator = draw_generator(seed, draw)
        for first, x_t in noised_batches(model, data, level, batch_size, generator):
            progress(f"draw {draw + 1} of {draws}, image {first} of {len(data)}")
            rows = slice(first, first + len(x_t))
            each = scores(x_t, first, generator).double().cpu()
            class_scores[rows] += each / draws
            bits[rows] += bits_per_dim((each + log_prior).logsumexp(1), data) / draws
    return class_scores, bits


def _statistics(
    log_posterior: Tensor,  # (n, K)
    labels: Tensor,  # (n,)
) -> dict[str, Any]:
    """The fields of a `ClassReport` that follow from the posterior and the labels."""
    num_images, num_classes = log_posterior.shape
    predicted = log_posterior.argmax(1)
    right = (predicted == labels).double()
    calibration = reliability(log_posterior.exp(), labels)
    return {
        "accuracy": float(right.mean()),
        "accuracy_stderr": standard_error(right),
        "ece": calibration.ece,
        "log_loss": -float(log_posterior.gather(1, labels[:, None]).mean()),
        "num_images": num_images,
        "num_classes": num_classes,
        "confusion": confusion_matrix(predicted, labels, num_classes).tolist(),
        "reliability": calibration,
        "posterior": log_posterior.exp(),
    }


def _marginal_likelihood(method: ClassifyMethod, bits: Tensor) -> dict[str, Any]:
    """bits/dim of the marginal and its standard error; None for methods without a likelihood."""
    if method in ("denoising", "discriminative"):
        return {"bits_per_dim": None, "bits_per_dim_stderr": None}
    return {"bits_per_dim": float(bits.mean()), "bits_per_dim_stderr": standard_error(bits)}


def labels_for(data: ImageData, num_classes: int) -> Tensor:
    """The labels (n,) int64 of `data`; raises UserError if it has none, or not K classes."""
    labels = require_labels(data)
    if data.num_classes != num_classes:
        raise UserError(
            f"{data.name} has {data.num_classes} classes, and the model was trained on {num_classes};"
            " give data of the same classes"
        )
    require_known(labels, num_classes, data.name)
    return labels


def require_labels(data: ImageData) -> Tensor:
    """The labels (n,) int64 of `data`; raises UserError if it has none."""
    if data.labels is None:
        raise UserError(f"{data.name} has no labels, and an accuracy needs them; give labelled data")
    return data.labels
