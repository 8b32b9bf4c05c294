"""Statistics of measurements: standard errors, calibration, confusion, AUROC, conformal p-values.

# n images, m reference images, K classes
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cdm_fast.host.optional import need


def auroc(higher: Tensor, lower: Tensor) -> float:
    """The chance that a value of `higher` exceeds one of `lower`, ties counting half."""
    kind = torch.cat([torch.ones(len(higher)), torch.zeros(len(lower))])
    roc_auc_score = need("sklearn.metrics", "AUROC").roc_auc_score
    return float(roc_auc_score(kind.numpy(), torch.cat([higher, lower]).double().numpy()))


BINS = 15  # of the calibration error


@dataclass(frozen=True)
class Reliability:
    """How far confidence is from accuracy, over `BINS` bins of equal width of the confidence.

    Fields:
        ece: `sum_b n_b / n |accuracy_b - confidence_b|`, 0..1 (arXiv 1706.04599, eq. 3).
        count, confidence, accuracy: of each bin; the means of an empty one are NaN.
    """

    ece: float
    count: list[int]
    confidence: list[float]
    accuracy: list[float]


def reliability(
    posterior: Tensor,  # (n, K) p(c|x)
    label: Tensor,  # (n,) int64
) -> Reliability:
    """The calibration of a classifier's largest posterior; bin b holds confidences in (b, b+1] / `BINS`."""
    confidence, predicted = posterior.double().max(1)
    right = (predicted == label).double()
    index = ((confidence * BINS).ceil().long() - 1).clamp(0, BINS - 1)
    count = torch.bincount(index, minlength=BINS)
    mean_confidence, mean_right = (
        torch.bincount(index, weights=values, minlength=BINS) / count for values in (confidence, right)
    )
    gap = (mean_right - mean_confidence).abs().nan_to_num() * count
    return Reliability(
        float(gap.sum() / len(label)), count.tolist(), mean_confidence.tolist(), mean_right.tolist()
    )


def confusion_matrix(predicted: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """(K, K) int64: how many images of each class (row) were taken for each (column)."""
    pairs = torch.bincount(label * num_classes + predicted, minlength=num_classes**2)
    return pairs.view(num_classes, num_classes)


def stderr(values: Tensor) -> float:
    """Standard error of the mean of independent values; NaN for a single one."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


def conformal_p_value(
    score: Tensor,  # (n,)
    reference: Tensor,  # (m,) of held-out data
) -> Tensor:
    """`(1 + #{reference >= score}) / (1 + m)`, (n,): at most q on a share q of data like the reference."""
    below = torch.searchsorted(reference.sort().values, score)
    return (1 + len(reference) - below).double() / (1 + len(reference))


def auroc_stderr(
    higher: Tensor,  # (n,)
    lower: Tensor,  # (m,)
) -> float:
    """Standard error of `auroc(higher, lower)` (DeLong et al. 1988); NaN where a set has one value.

    The area is a mean, over either set, of the share of the other that a value beats; so is its variance.
    """
    if min(len(higher), len(lower)) < 2:
        return math.nan
    variance = sum(_beaten(x, y).var() / len(x) for x, y in ((higher, lower), (-lower, -higher)))
    return math.sqrt(float(variance))


def _beaten(values: Tensor, others: Tensor) -> Tensor:
    """Share of `others` (m,) below each of `values` (n,), ties counting half."""
    ordered = others.sort().values
    below, upto = (torch.searchsorted(ordered, values.contiguous(), right=right) for right in (False, True))
    return (below + upto).double() / (2 * len(others))
