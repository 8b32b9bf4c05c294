"""Scores of how unusual images are under a model, and how well they separate other data from the model's own.

Three scores come from one forward pass; each is larger for more unusual images. None is sufficient alone: see
docs/explanation/score.md.

# B batch, n images, C channels, H W pixels, d = C*H*W, L = T+2 noise levels, m reference images
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cdm_fast.data import ImageData
from cdm_fast.data.corruptions import KINDS, SEVERITIES, corrupt
from cdm_fast.data.draws import draw_generator
from cdm_fast.errors import UserError, require_at_least
from cdm_fast.host.device import upload
from cdm_fast.host.distributed import by_rows
from cdm_fast.host.progress import Progress, silent
from cdm_fast.likelihood.batches import noised_batches
from cdm_fast.likelihood.units import bits_per_dim
from cdm_fast.model import CDM, evaluation_mode
from cdm_fast.model.cdm import require_likelihood
from cdm_fast.statistics import auroc, auroc_standard_error, conformal_p_value, standard_error

SCORES = ("likelihood", "typicality", "level_posterior")

Scores = dict[str, Tensor]  # name from SCORES -> (n,) float64


@dataclass(frozen=True)
class Separation:
    """How well each score separates other images from the data.

    Fields:
        data: name of the other images.
        bits_per_dim: their mean bits/dim.
        auroc: AUROC of each score: the probability that one of the other images scores higher than one of the
            data.
        auroc_stderr: its standard error over both sets (DeLong et al. 1988).
        scores: scores of each of the other images.
    """

    data: str
    bits_per_dim: float
    auroc: dict[str, float]
    auroc_stderr: dict[str, float]
    scores: Scores


@dataclass(frozen=True)
class OutlierReport:
    """Scores of a data set, and how well they separate other data from it.

    Fields:
        data, split, num_images, level, draws: what is scored.
        bits_per_dim, bits_per_dim_stderr: mean over images, and its standard error.
        reference, reference_images, reference_bits_per_dim: the split whose mean defines the typical
            likelihood, its size, and that mean.
        p_value: (n,) conformal p-value of the typicality: the share of the reference images, including this
            image, that are at least as untypical. For data distributed like the reference, `p_value <= q`
            holds for at most a share q of images (false alarms).
        false_alarms, flagged: q, and the share of the data with `p_value <= q`.
        scores: scores of each image.
        against: separation from other data, if any was given.
        corruptions: kind -> score -> AUROC at severity 1 to 5, if requested.
    """

    data: str
    split: str
    num_images: int
    level: int
    draws: int
    bits_per_dim: float
    bits_per_dim_stderr: float
    reference: str
    reference_images: int
    reference_bits_per_dim: float
    false_alarms: float
    flagged: float
    scores: Scores
    p_value: Tensor
    against: Separation | None
    corruptions: dict[str, dict[str, list[float]]] | None

    def to_json(self) -> dict[str, Any]:
        """Everything but the values of single images, ready for `json.dumps`."""
        hidden = ("scores", "p_value", "against")
        fields = {name: value for name, value in vars(self).items() if name not in hidden}
        other = self.against
        fields["against"] = None if other is None else {k: v for k, v in vars(other).items() if k != "scores"}
        mean = None if self.corruptions is None else mean_by_severity(self.corruptions)
        return {**fields, "corruptions_mean": mean}

    def order(self) -> Tensor:
        """Indices of the images (n,) int64, the most likely first."""
        return self.scores["likelihood"].argsort(stable=True)


@evaluation_mode
def evaluate_outliers(
    model: CDM,
    data: ImageData,
    reference: ImageData,
    against: ImageData | None = None,
    *,
    corruptions: bool = False,
    level: int = 0,
    draws: int = 1,
    false_alarms: float = 0.05,
    batch_size: int = 500,
    seed: int = 0,
    progress: Progress = silent,
) -> OutlierReport:
    """Scores every image of `data`, and of `against`, with one forward pass per draw.

    likelihood: `-log2 p_t(x_t)/d + log2(N/2)`, bits/dim. typicality: its distance from the mean of
    `reference`, bits/dim. level_posterior: `E|t' - t|` for t' from `p(t'|x_t)`, in levels: how much the
    apparent noise of an image differs from its level t.

    Args:
        reference: images distributed like the training images, on which the model was not trained.
        against: other images, to measure how well each score separates them from `data`.
        corruptions: also score `data` under every kind of `corruptions.KINDS` at every severity.
        level: t, 0 for the data; above 0, `x_t = a x + s eps` is scored.
        draws: draws of dequantisation noise (and eps), over which scores are averaged.
        false_alarms: q of `OutlierReport`.
        batch_size: images per forward pass.
        seed: seed of all draws, and of the corruptions.

    Raises:
        UserError: a model without likelihood, or one that has diverged; a level outside 0..T+1, or another
            argument out of range.

    A network with zero weights has the density N(0, I): black images are less likely than grey ones.

    >>> from cdm_fast import MLP, NoiseSchedule
    >>> network = MLP(dim=2, num_levels=12, hidden=4, depth=1)
    >>> _ = [torch.nn.init.zeros_(parameter) for parameter in network.parameters()]
    >>> model = CDM(torch.nn.Sequential(torch.nn.Flatten(), network), NoiseSchedule.uniform(T=10))
    >>> def images(level, name):
    ...     pixels = torch.full((50, 1, 1, 2), level, dtype=torch.uint8)
    ...     return ImageData(pixels, None, num_grey_levels=256, num_classes=None, name=name, split="test")
    >>> report = evaluate_outliers(model, images(128, "grey"), images(128, "grey"), images(0, "black"))
    >>> report.against.auroc["likelihood"], report.against.auroc["typicality"]
    (1.0, 1.0)
    >>> report.scores["likelihood"].shape, report.p_value.shape
    (torch.Size([50]), torch.Size([50]))
    """
    require_likelihood(model)
    require_at_least("draws", draws, 1)
    require_at_least("batch_size", batch_size, 1)
    if not 0 < false_alarms < 1:
        raise UserError(f"the share of false alarms is {false_alarms}: it must lie between 0 and 1")
    raw = partial(_bits_and_distance, model, level=level, draws=draws, batch_size=batch_size, seed=seed)
    reference_bits, _ = raw(reference)
    typical = float(reference_bits.mean())

    def scores(images: ImageData) -> Scores:
        bits, distance = raw(images)
        return dict(zip(SCORES, (bits, (bits - typical).abs(), distance), strict=True))

    own = scores(data)
    p_value = conformal_p_value(own["typicality"], (reference_bits - typical).abs())
    return OutlierReport(
        data=data.name,
        split=data.split,
        num_images=len(data),
        level=level,
        draws=draws,
        bits_per_dim=float(own["likelihood"].mean()),
        bits_per_dim_stderr=standard_error(own["likelihood"]),
        reference=f"{reference.name}, {reference.split}",
        reference_images=len(reference),
        reference_bits_per_dim=typical,
        false_alarms=false_alarms,
        flagged=float((p_value <= false_alarms).double().mean()),
        scores=own,
        p_value=p_value,
        against=None if against is None else _separation(against, scores(against), own),
        corruptions=_corruption_areas(data, scores, own, seed, progress) if corruptions else None,
    )


def _corruption_areas(
    data: ImageData, scores: Callable[[ImageData], Scores], own: Scores, seed: int, progress: Progress
) -> dict[str, dict[str, list[float]]]:
    """AUROC of corrupted `data` against its `own` scores: kind -> name of the score -> one per severity."""
    areas: dict[str, dict[str, list[float]]] = {}
    for kind in KINDS:
        progress(f"corruption {len(areas) + 1} of {len(KINDS)}: {kind}")
        found = []
        for severity in SEVERITIES:
            images = corrupt(data.images, kind, severity, data.num_grey_levels, seed)
            found.append(scores(replace(data, images=images)))
        areas[kind] = {name: [auroc(each[name], own[name]) for each in found] for name in SCORES}
    return areas


def _bits_and_distance(
    model: CDM, data: ImageData, level: int, draws: int, batch_size: int, seed: int
) -> tuple[Tensor, Tensor]:
    """bits/dim (n,) and `E|t' - level|` under the level posterior (n,), float64, each the mean over draws."""
    prior = model.log_level_prior.double().cpu()
    distance_to = (torch.arange(len(prior)) - level).abs().double()  # (L,)

    def log_prob_levels(x_t: Tensor) -> Tensor:
        return model.log_prob_levels(x_t).double().cpu()

    total = torch.zeros(2, len(data), dtype=torch.float64)
    for draw in range(draws):
        for first, x_t in noised_batches(model, data, level, batch_size, draw_generator(seed, draw)):
            log_prob = by_rows(log_prob_levels, x_t)
            rows = slice(first, first + len(x_t))
            total[0, rows] += bits_per_dim(log_prob[:, level], data)
            total[1, rows] += (log_prob + prior).softmax(1) @ distance_to  # Bayes: p(t|x) ~ p_t(x) p(t)
    if not bool(total.isfinite().all()):
        bad = int((~total.isfinite()).any(0).sum())
        raise UserError(f"{bad} of {len(data)} images have no finite score; the model has diverged")
    bits, distance = total / draws
    return bits, distance


def _separation(other: ImageData, theirs: Scores, own: Scores) -> Separation:
    return Separation(
        data=f"{other.name}, {other.split}",
        bits_per_dim=float(theirs["likelihood"].mean()),
        auroc={name: auroc(theirs[name], own[name]) for name in SCORES},
        auroc_stderr={name: auroc_standard_error(theirs[name], own[name]) for name in SCORES},
        scores=theirs,
    )


def mean_by_severity(areas: dict[str, dict[str, list[float]]]) -> dict[str, list[float]]:
    """Score -> mean of its AUROC over kinds of corruption, at each severity."""
    return {
        name: torch.tensor([kind[name] for kind in areas.values()], dtype=torch.float64).mean(0).tolist()
        for name in SCORES
    }


@evaluation_mode
def anomaly_map(
    model: CDM,
    x: Tensor,  # (n, C, H, W) in [-1, 1]
    level: int,
    draws: int = 8,
    seed: int = 0,
) -> Tensor:
    """Denoising error of each pixel: (n, H, W), in units of x.

    It is `sqrt(mean (x0_hat(x_t) - x)^2)` over channels and `draws` draws of `x_t = a x + s eps` at one
    level, and large if a pixel differs from what the model expects given the rest of the image.

    Raises:
        UserError: a model without likelihood, draws below 1, level 0 (no noise), or level T+1 (no image).
    """
    require_likelihood(model)
    if not 1 <= level <= model.schedule.T:
        raise UserError(f"level {level} gives no anomaly map: choose one of 1 to {model.schedule.T}")
    require_at_least("draws", draws, 1)
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(x.shape, dtype=torch.float64)
    for _ in range(draws):
        x_t = upload(model.schedule.noise(x, level, generator=generator), model.a.device)
        total += (model.predict_x0(x_t, level).cpu() - x).double().square()
    return (total / draws).mean(1).sqrt()


def level_of(model: CDM, sigma: float) -> int:
    """The level 1..T whose noise is nearest to `sigma` > 0 in log sigma, for data in [-1, 1]."""
    return 1 + int((model.schedule.sigma[1:-1].log() - math.log(sigma)).abs().argmin())
