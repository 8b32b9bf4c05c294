"""Classification accuracy on corrupted images."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from cdm_fast.data import ImageData
from cdm_fast.data.corruptions import KINDS, SEVERITIES, corrupt
from cdm_fast.evaluation.classification import ClassReport, require_labels
from cdm_fast.host.progress import Progress, silent
from cdm_fast.statistics import standard_error


@dataclass(frozen=True)
class CorruptionReport:
    """Accuracy on corrupted images.

    Fields:
        accuracy: kind of corruption -> accuracy at severity 1 to 5.
        mean, mean_stderr: mean over all kinds and severities, and its standard error over images, each of
            which appears in every kind.
    """

    accuracy: dict[str, list[float]]
    mean: float
    mean_stderr: float

    def to_json(self) -> dict[str, Any]:
        """`corruptions`, `corrupted_accuracy` and its `_stderr`, ready for `json.dumps`."""
        return {
            "corruptions": self.accuracy,
            "corrupted_accuracy": self.mean,
            "corrupted_accuracy_stderr": self.mean_stderr,
        }


def evaluate_corruptions(
    evaluate: Callable[[ImageData], ClassReport],
    data: ImageData,
    progress: Progress = silent,
    seed: int = 0,
) -> CorruptionReport:
    """Classifies `data` under every corruption at every severity.

    Args:
        evaluate: classifies a data set, such as `evaluate_classes` with all its other arguments fixed.
        data: clean images with labels.
        progress: called with a line for each kind of corruption.
        seed: seed of `data.corruptions.corrupt`.

    Raises:
        UserError: data without labels, and as in `evaluate`.
    """
    labels = require_labels(data)
    accuracy: dict[str, list[float]] = {}
    right = []
    for kind in KINDS:
        progress(f"corruption {len(accuracy) + 1} of {len(KINDS)}: {kind}")
        accuracy[kind] = []
        for severity in SEVERITIES:
            images = corrupt(data.images, kind, severity, data.num_grey_levels, seed)
            report = evaluate(replace(data, images=images))
            right.append((report.posterior.argmax(1) == labels[report.index]).double())
            accuracy[kind].append(report.accuracy)
    per_image = torch.stack(right).mean(0)
    return CorruptionReport(accuracy, float(per_image.mean()), standard_error(per_image))
