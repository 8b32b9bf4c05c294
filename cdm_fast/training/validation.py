"""Validation during training: likelihood, classification, and normalisation of the levels.

# n rows, B batch, L = T+2 noise levels, K classes
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cdm_fast.data import ImageData
from cdm_fast.data.draws import choose_images, draw_images
from cdm_fast.host.distributed import by_rows
from cdm_fast.likelihood import evaluate
from cdm_fast.likelihood.units import nats_per_bit_per_dim
from cdm_fast.model import CDM, DDM, evaluation_mode
from cdm_fast.model.classifier import Classifier
from cdm_fast.model.denoiser import like_network
from cdm_fast.training.levels import stratified_levels

ROWS = 1024  # noised images per check: less work than one training step at batch 128
CHUNK = 256  # rows per forward pass
BINS = 25  # ranges of neighbouring levels in which adjacent ratios are averaged


@dataclass(frozen=True)
class LevelChecks:
    """Normalisation of the levels of a CDM, on validation images noised to levels drawn from p(t).

    Fields:
        cross_entropy: mean of `-log p(t | x_t)` in nats; a proper score of the densities of all levels.
        log_mean_posterior: (L,) `log(mean_x p(t | x) / p(t))` in nats; 0 for true densities.
        log_mean_posterior_stderr: (L,) nats, assuming independent rows.
        bin_level: the middle level t of each bin.
        log_mean_ratio: `log E[p_t / p_{t+1}]` in nats, averaged over the t of each bin; 0 for true densities.
        log_mean_ratio_stderr: nats.
        ratio_bits_per_dim: sum of the log mean ratios over all t in 0..T, in bits/dim: the increase of
            bits/dim at level 0 if every level were rescaled to ratio 1. A positive value means that bits/dim
            is too low.
        ratio_bits_per_dim_stderr: its standard error.
    """

    cross_entropy: float
    log_mean_posterior: list[float]
    log_mean_posterior_stderr: list[float]
    bin_level: list[float]
    log_mean_ratio: list[float]
    log_mean_ratio_stderr: list[float]
    ratio_bits_per_dim: float
    ratio_bits_per_dim_stderr: float

    @property
    def worst(self) -> float:
        """The largest absolute `log_mean_posterior`, in nats."""
        return max(abs(value) for value in self.log_mean_posterior)

    @property
    def miscalibrated(self) -> float:
        """The share of levels with `|log_mean_posterior|` above 0.1 nats and two standard errors."""
        pairs = zip(self.log_mean_posterior, self.log_mean_posterior_stderr, strict=True)
        return sum(abs(value) > 0.1 + 2 * error for value, error in pairs) / len(self.log_mean_posterior)


@evaluation_mode
def check_levels(model: CDM, data: ImageData, num_rows: int = ROWS, seed: int = 0) -> LevelChecks:
    """Compares level posteriors of noised images with p(t), and checks adjacent ratios, in one pass.

    Args:
        num_rows: number of images drawn with replacement; their levels are stratified draws from p(t).

    `mean_x p(t | x) = p(t)` holds for the true posteriors, and so does `E[p_t / p_{t+1}] = 1` under p_{t+1}.
    """
    generator = torch.Generator().manual_seed(seed)
    log_prior = model.log_level_prior.double().cpu()
    level = stratified_levels(log_prior.exp(), num_rows, generator)
    x = draw_images(data, num_rows, generator)
    log_posterior = torch.cat(
        [
            by_rows(model.log_posterior, like_network(model, x_t)).double().cpu()
            for x_t in _noised(model, x, level, generator)
        ]
    )
    mean, error = _mean_posterior(log_posterior, log_prior)
    bins, ratio, ratio_error, sizes = _adjacent_ratios(log_posterior - log_prior, level, log_prior)
    unit = nats_per_bit_per_dim(data)
    return LevelChecks(
        cross_entropy=-float(log_posterior.gather(1, level[:, None]).mean()),
        log_mean_posterior=mean.tolist(),
        log_mean_posterior_stderr=error.tolist(),
        bin_level=bins,
        log_mean_ratio=ratio,
        log_mean_ratio_stderr=ratio_error,
        ratio_bits_per_dim=sum(map(math.prod, zip(sizes, ratio, strict=True))) / unit,
        ratio_bits_per_dim_stderr=math.hypot(*map(math.prod, zip(sizes, ratio_error, strict=True))) / unit,
    )


def _noised(model: CDM, x: Tensor, level: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    """The rows noised to their levels, `CHUNK` at a time."""
    for rows, levels in zip(x.split(CHUNK), level.split(CHUNK), strict=True):
        yield model.schedule.noise(rows, levels, generator=generator)


def _mean_posterior(log_posterior: Tensor, log_prior: Tensor) -> tuple[Tensor, Tensor]:
    """`log(mean p(t|x) / p(t))` (L,) and its standard error, from log posteriors (n, L)."""
    posterior = log_posterior.exp()
    mean = posterior.mean(0).clamp(min=torch.finfo(torch.float64).tiny)
    error = posterior.std(0) / (mean * math.sqrt(len(posterior)))
    return mean.log() - log_prior, error


def _adjacent_ratios(
    log_density: Tensor,  # (n, L) log p_t(x) up to one constant per x
    level: Tensor,  # (n,) int64
    log_prior: Tensor,  # (L,) log p(t) from which `level` is drawn
) -> tuple[list[float], list[float], list[float], list[int]]:
    """For each bin: middle level, log mean of `p_t / p_{t+1}`, its standard error, and number of levels t.

    The levels of a bin have equal weight, whatever the prior. Bins without rows are merged with the next one.
    """
    noisy = level > 0
    upper = level[noisy]
    rows = log_density[noisy]
    ratio = (rows.gather(1, upper[:, None] - 1) - rows.gather(1, upper[:, None])).squeeze(1).exp()
    weight = (-log_prior[upper]).exp()
    num = len(log_prior) - 1
    edges = torch.linspace(1, num + 1, min(BINS, num) + 1).round().long().tolist()
    middle, log_mean, error, sizes = [], [], [], []
    first = edges[0]
    for end in edges[1:]:
        inside = (upper >= first) & (upper < end)
        if not inside.any():
            continue
        w, r = weight[inside], ratio[inside]
        mean = float((w * r).sum() / w.sum())
        middle.append((first + end) / 2 - 1.5)
        log_mean.append(math.log(mean))
        error.append(float((w * (r - mean)).square().sum().sqrt() / w.sum()) / mean)
        sizes.append(end - first)
        first = end
    return middle, log_mean, error, sizes


@evaluation_mode
def check_classes(model: CDM | Classifier, data: ImageData, seed: int = 0) -> tuple[float, float] | None:
    """(mean of `-log p(c | x)` in nats at level 0, accuracy) on images of `data`; None without classes.

    A class embedding needs K passes per image, so it is tested on one K-th of the images.
    """
    if model.num_classes is None or data.labels is None:
        return None
    passes = model.num_classes if isinstance(model, CDM) and model.conditioning == "embedding" else 1
    num = max(1, len(data.images) // passes)
    index, x = choose_images(data, num, torch.Generator().manual_seed(seed))
    label = data.labels[index]
    log_posterior = torch.cat(
        [
            by_rows(model.log_class_posterior, like_network(model, rows)).double().cpu()
            for rows in x.split(max(1, CHUNK // passes))
        ]
    )
    ce = -log_posterior.gather(1, label[:, None]).mean()
    return float(ce), float((log_posterior.argmax(1) == label).double().mean())


def validate(model: CDM | DDM | Classifier, data: ImageData) -> dict[str, float]:
    """The numbers of a validation line in log.jsonl; none for a DDM.

    For a CDM: bits_per_dim (unaudited, one draw), level_ce (nats), ratio_bits_per_dim and its _stderr,
    level_worst (nats), level_miscalibrated (a share), see `LevelChecks`. With classes: class_ce (nats) and
    accuracy. Images, levels and noise are always the same, so that the lines of a run can be compared.
    """
    numbers: dict[str, float] = {}
    if isinstance(model, CDM):
        checks = check_levels(model, data, num_rows(data))
        numbers = {
            "bits_per_dim": evaluate(model, data, draws=1, check_levels=0).bits_per_dim,
            "level_ce": checks.cross_entropy,
            "ratio_bits_per_dim": checks.ratio_bits_per_dim,
            "ratio_bits_per_dim_stderr": checks.ratio_bits_per_dim_stderr,
            "level_worst": checks.worst,
            "level_miscalibrated": checks.miscalibrated,
        }
    if isinstance(model, CDM | Classifier) and (classes := check_classes(model, data)) is not None:
        numbers |= {"class_ce": classes[0], "accuracy": classes[1]}
    return numbers


def num_rows(data: ImageData) -> int:
    """Number of noised rows per check: 8 per validation image, at most `ROWS`."""
    return min(ROWS, 8 * len(data.images))
