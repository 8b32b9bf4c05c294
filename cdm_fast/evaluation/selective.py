"""Selective classification: risk against coverage, conformal prediction sets, rejection of unusual images.

# n images, K classes
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cdm_fast.config.json import fields_without
from cdm_fast.errors import UserError
from cdm_fast.evaluation.outliers import OutlierReport
from cdm_fast.statistics import standard_error

COVERAGES = (1.0, 0.95, 0.9, 0.8, 0.5)
SPLITS = 10


def risk_coverage(
    wrong: Tensor,  # (n,) bool
    confidence: Tensor,  # (n,)
) -> Tensor:
    """Share of wrong answers among the k most confident answers, for k = 1..n: (n,) float64.

    Images with equal confidence are averaged: each counts as the mean of its group.
    """
    order = confidence.argsort(descending=True, stable=True)
    _, group, size = confidence[order].unique_consecutive(return_inverse=True, return_counts=True)
    total = torch.zeros(len(size), dtype=torch.float64).index_add_(0, group, wrong[order].double())
    return (total / size)[group].cumsum(0) / torch.arange(1, len(wrong) + 1)


def conformal_threshold(
    nonconformity: Tensor,  # (m,) of the true classes of calibration images
    coverage: float,
) -> float:
    """The `ceil((m + 1) coverage)`-th smallest score; infinite if m is too small for the coverage.

    The set of all classes whose score is at most this contains the true class with a probability of at least
    `coverage`, if calibration images and new images are exchangeable (Vovk et al. 2005; arXiv 2107.07511,
    section 1).
    """
    rank = math.ceil((len(nonconformity) + 1) * coverage - 1e-9)
    return math.inf if rank > len(nonconformity) else float(nonconformity.sort().values[rank - 1])


def class_nonconformity(log_joint: Tensor) -> Tensor:
    """Log odds in nats against each class, (n, K) float64, from `log p(x, c)` up to a constant per image.

    They order classes as `1 - p(c|x)` does, and remain distinct when that rounds to 0 or 1.
    """
    log_joint = log_joint.double()
    num_classes = log_joint.shape[1]
    others = log_joint[:, None, :].expand(-1, num_classes, -1)
    own = torch.eye(num_classes, dtype=torch.bool)
    return others.masked_fill(own, -math.inf).logsumexp(2) - log_joint


@dataclass(frozen=True)
class SelectiveReport:
    """The gain in accuracy when a classifier may abstain.

    Fields:
        coverages: shares of images that are answered, the most confident first.
        accuracy_by_posterior, accuracy_by_likelihood: accuracy on these, ranked by the posterior of the
            predicted class, or by log p(x); the second is None without a likelihood.
        aurc_by_posterior, aurc_by_likelihood: area under the risk-coverage curve, 0..1, smaller is better
            (arXiv 1705.08500); aurc_oracle: the same for the best possible order.
        risk_by_posterior, risk_by_likelihood: the curves, at 1/n, 2/n, ..., 1.
        set_coverage: nominal coverage of the conformal prediction sets.
        set_coverage_found, set_coverage_stderr: measured coverage, mean over `splits` random splits into a
            calibration half and a test half, and its standard error. Given the images, random splits are
            independent, and each has the nominal coverage in expectation.
        set_size: mean number of classes in a set; empty_sets: share of images with an empty set.
    """

    coverages: list[float]
    accuracy_by_posterior: list[float]
    accuracy_by_likelihood: list[float] | None
    aurc_by_posterior: float
    aurc_by_likelihood: float | None
    aurc_oracle: float
    risk_by_posterior: list[float]
    risk_by_likelihood: list[float] | None
    set_coverage: float
    set_coverage_found: float
    set_coverage_stderr: float
    set_size: float
    empty_sets: float
    splits: int

    def to_json(self) -> dict[str, Any]:
        """All fields but the curves, ready for `json.dumps`."""
        return fields_without(self, "risk_by_posterior", "risk_by_likelihood")


def evaluate_selection(
    log_joint: Tensor,  # (n, K) log p(x, c) in nats, or log p(c|x)
    label: Tensor,  # (n,) int64
    *,
    has_likelihood: bool = True,
    set_coverage: float = 0.9,
    splits: int = SPLITS,
    seed: int = 0,
) -> SelectiveReport:
    """Risk against coverage and conformal sets; see `SelectiveReport`.

    Args:
        has_likelihood: True if `log_joint` holds densities, whose logsumexp is log p(x).
        set_coverage: wanted share of images whose prediction set contains their class, 0..1.
        splits, seed: number and seed of the random splits.

    Raises:
        UserError: fewer than 4 images, or a coverage that is not between 0 and 1.
    """
    if len(label) < 4:
        raise UserError(f"{len(label)} images: at least 4 are needed to calibrate on a half of them")
    if not 0 < set_coverage < 1:
        raise UserError(f"coverage of sets is {set_coverage}: give a share between 0 and 1")
    log_joint = log_joint.double()
    wrong = log_joint.argmax(1) != label
    log_odds = class_nonconformity(log_joint)
    by_posterior = risk_coverage(wrong, -log_odds.min(1).values)
    log_prob = log_joint.logsumexp(1) if has_likelihood else None
    by_likelihood = None if log_prob is None else risk_coverage(wrong, log_prob)
    answered = [max(1, round(share * len(label))) - 1 for share in COVERAGES]
    halves = _halves(len(label), splits, seed)
    sets = [_conformal_split(log_odds, label, set_coverage, *half) for half in halves]
    found, size, empty = torch.tensor(sets, dtype=torch.float64).T
    return SelectiveReport(
        coverages=list(COVERAGES),
        accuracy_by_posterior=[1 - float(by_posterior[i]) for i in answered],
        accuracy_by_likelihood=None
        if by_likelihood is None
        else [1 - float(by_likelihood[i]) for i in answered],
        aurc_by_posterior=float(by_posterior.mean()),
        aurc_by_likelihood=None if by_likelihood is None else float(by_likelihood.mean()),
        aurc_oracle=float(risk_coverage(wrong, -wrong.double()).mean()),
        risk_by_posterior=by_posterior.tolist(),
        risk_by_likelihood=None if by_likelihood is None else by_likelihood.tolist(),
        set_coverage=set_coverage,
        set_coverage_found=float(found.mean()),
        set_coverage_stderr=standard_error(found),
        set_size=float(size.mean()),
        empty_sets=float(empty.mean()),
        splits=splits,
    )


def _halves(count: int, splits: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """`splits` pairs of (calibration, test) indices: a random half and the rest."""
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(count, generator=generator) for _ in range(splits)]
    return [(order[: count // 2], order[count // 2 :]) for order in orders]


def _conformal_split(
    log_odds: Tensor, label: Tensor, coverage: float, calibration: Tensor, test: Tensor
) -> tuple[float, float, float]:
    """Coverage, mean size and share of empty sets on `test`."""
    own = log_odds.gather(1, label[:, None])[:, 0]
    in_set = log_odds[test] <= conformal_threshold(own[calibration], coverage)
    covered = in_set.gather(1, label[test, None]).double().mean()
    return float(covered), float(in_set.sum(1).double().mean()), float((~in_set.any(1)).double().mean())


@dataclass(frozen=True)
class Rejection:
    """A classifier that gives no answer for unusual images.

    Fields:
        false_alarms: share of images like the reference that may be rejected: those with a conformal p-value
            of the typicality of at most this (`evaluate_outliers`).
        reference, reference_images: held-out images that define what is usual, and their number.
        rejected, rejected_stderr: share of the images that is rejected, and its standard error.
        accuracy, accuracy_stderr: accuracy on the images that are answered; NaN if there are none.
        accuracy_of_rejected: accuracy that the rejected images would have had; NaN if there are none.
        num_images: number of images, answered or not.
    """

    false_alarms: float
    reference: str
    reference_images: int
    rejected: float
    rejected_stderr: float
    accuracy: float
    accuracy_stderr: float
    accuracy_of_rejected: float
    num_images: int


def reject_unusual(
    outliers: OutlierReport,
    right: Tensor,  # (n,) bool, of the same images
) -> Rejection:
    """The accuracy of a classifier that rejects the images that `outliers` flags; see `Rejection`."""
    flagged, right = outliers.p_value <= outliers.false_alarms, right.double()
    return Rejection(
        false_alarms=outliers.false_alarms,
        reference=outliers.reference,
        reference_images=outliers.reference_images,
        rejected=outliers.flagged,
        rejected_stderr=standard_error(flagged.double()),
        accuracy=float(right[~flagged].mean()),
        accuracy_stderr=standard_error(right[~flagged]),
        accuracy_of_rejected=float(right[flagged].mean()),
        num_images=len(right),
    )
