"""Statistics of measurements: standard errors, calibration, confusion, AUROC, conformal p-values.

# n images, m reference images, K classes
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cdm_fast.errors import UserError
from cdm_fast.host.optional import need


def auroc(
    higher: Tensor,  # (n,)
    lower: Tensor,  # (m,)
) -> float:
    """Area under the ROC curve: the chance that a value of `higher` exceeds one of `lower`; ties count 1/2.

    1 is perfect separation, 0.5 is guessing. Raises UserError where scikit-learn is not installed.

    >>> auroc(torch.tensor([3.0, 1.0]), torch.tensor([2.0, 0.0]))  # three of the four pairs
    0.75
    """
    kind = torch.cat([torch.ones(len(higher)), torch.zeros(len(lower))])
    roc_auc_score = need("sklearn.metrics", "AUROC").roc_auc_score
    return float(roc_auc_score(kind.numpy(), torch.cat([higher, lower]).double().numpy()))


BINS = 15  # of the calibration error


@dataclass(frozen=True)
class Reliability:
    """Calibration of a classifier: confidence against accuracy in `BINS` equal bins of the confidence.

    Fields:
        ece: expected calibration error `sum_b n_b / n |accuracy_b - confidence_b|`, 0..1 (arXiv 1706.04599,
            eq. 3).
        count: images in each bin.
        confidence, accuracy: their means in each bin; NaN for an empty one.
    """

    ece: float
    count: list[int]
    confidence: list[float]
    accuracy: list[float]


def reliability(
    posterior: Tensor,  # (n, K) p(c|x)
    label: Tensor,  # (n,) int64
) -> Reliability:
    """The calibration of the most probable class; bin b holds confidences in (b, b+1] / `BINS`."""
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


def confusion_matrix(
    predicted: Tensor,  # (n,) int64
    label: Tensor,  # (n,) int64
    num_classes: int,
) -> Tensor:  # (K, K)
    """Counts (K, K) int64 of images by true class (row) and predicted class (column)."""
    pairs = torch.bincount(label * num_classes + predicted, minlength=num_classes**2)
    return pairs.view(num_classes, num_classes)


def require_error_bar(num: int, what: str) -> None:
    """Raises UserError where `num` values are too few for a standard error; `what` names them."""
    if num < 2:
        raise UserError(f"{num} {what}: at least 2 are needed for an error bar")


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of independent `values` (n,); NaN for a single one.

    >>> round(standard_error(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])), 4)  # sqrt(2.5 / 5)
    0.7071
    """
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


def conformal_p_value(
    value: Tensor,  # (n,), large where an image is unusual
    reference: Tensor,  # (m,), the same statistic on held-out data
) -> Tensor:  # (n,) float64
    """`(1 + #{reference >= value}) / (1 + m)`.

    On data exchangeable with the reference a p-value is at most q with probability at most q.
    """
    below = torch.searchsorted(reference.sort().values, value)
    return (1 + len(reference) - below).double() / (1 + len(reference))


def auroc_standard_error(
    higher: Tensor,  # (n,)
    lower: Tensor,  # (m,)
) -> float:
    """Standard error of `auroc(higher, lower)` (DeLong et al. 1988); NaN where a set has one value.

    The area is the mean over either set of the share of the other set that a value exceeds; its variance is
    the sum of the variances of these two means.
    """
    if min(len(higher), len(lower)) < 2:
        return math.nan
    variance = sum(_share_below(x, y).var() / len(x) for x, y in ((higher, lower), (-lower, -higher)))
    return math.sqrt(float(variance))


def _share_below(values: Tensor, others: Tensor) -> Tensor:
    """Share of `others` (m,) below each of `values` (n,), float64, ties counting half."""
    ordered = others.sort().values
    below, upto = (torch.searchsorted(ordered, values.contiguous(), right=right) for right in (False, True))
    return (below + upto).double() / (2 * len(others))
