"""Certified accuracy of a smoothed classifier on a data set, and how it was measured.

# n images, K classes, R radii
"""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cdm_fast.config.json import fields_without
from cdm_fast.data import ImageData
from cdm_fast.data.draws import choose
from cdm_fast.errors import UserError
from cdm_fast.evaluation.certification import ABSTAIN, Certificates, certify
from cdm_fast.evaluation.classification import labels_for
from cdm_fast.host.progress import Progress, silent
from cdm_fast.model import evaluation_mode
from cdm_fast.model.denoiser import any_parameter
from cdm_fast.nn.working import cast_weights

RADII = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)


@dataclass(frozen=True)
class CertificationReport:
    """Certified accuracy of a smoothed classifier on a data set.

    Fields:
        sigma: standard deviation of the noise, in units of white.
        level: noise level at which a CDM classifies or denoises.
        draws, selection_draws, failure_probability: as in `certify`.
        precision: arithmetic of the networks.
        smoothed_accuracy: accuracy of the smoothed classifier; an abstention counts as wrong.
        abstained: share of images without a certificate.
        radii: L2 norms, white being 1, ascending.
        certified_accuracy, certified_accuracy_stderr: share of images whose class is right and whose radius
            is at least each of `radii`, by votes; and its standard error.
        certified_accuracy_of_mean: the same by mean posterior.
        images_per_second: certified images per second, with all their noise draws.
        index: (n,) which images of the data; votes, mean: their certificates.
    """

    sigma: float
    level: int | None
    draws: int
    selection_draws: int
    failure_probability: float
    precision: str
    num_images: int
    data: str
    split: str
    smoothed_accuracy: float
    abstained: float
    radii: list[float]
    certified_accuracy: list[float]
    certified_accuracy_stderr: list[float]
    certified_accuracy_of_mean: list[float]
    seconds: float
    images_per_second: float
    index: Tensor
    votes: Certificates
    mean: Certificates

    def to_json(self) -> dict[str, Any]:
        """Everything but the values of single images, ready for `json.dumps`."""
        return fields_without(self, "index", "votes", "mean")

    def columns(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Smoothed class (-1: abstained) and radius of each image, for `write_per_image`."""
        name = f"sigma_{self.sigma:g}"
        return {
            f"certified_class_{name}": (self.index, self.votes.predicted),
            f"certified_radius_{name}": (self.index, self.votes.radius),
            f"certified_radius_of_mean_{name}": (self.index, self.mean.radius),
        }


@evaluation_mode
def evaluate_certificates(
    classifier: nn.Module,
    data: ImageData,
    num_classes: int,
    sigma: float,
    *,
    radii: Sequence[float] = RADII,
    num_images: int | None = None,
    draws: int = 1000,
    selection_draws: int = 100,
    failure_probability: float = 0.001,
    precision: Literal["fp32", "bf16"] = "fp32",
    batch_size: int = 500,
    seed: int = 0,
    progress: Progress = silent,
) -> CertificationReport:
    """Certifies labelled images of `data` on the device of the classifier; see `CertificationReport`.

    Args:
        classifier: `NoisyPixelClassifier`, `DenoisedPixelClassifier`, or any module that is a
            `PixelClassifier`.
        num_classes: K.
        radii: radii at which to report the certified accuracy.
        num_images: number of images, drawn from the data; all by default.
        precision: arithmetic of the networks; the certificates hold for the classifier in this precision.
        The others as in `certify`.

    Raises:
        UserError: data without labels or with other classes, a radius that is negative or not finite, and as
            in `certify`.
    """
    label = labels_for(data, num_classes)
    _check_radii(radii)
    index = choose(len(data), num_images, torch.Generator().manual_seed(seed))
    pixels = (data.images[index].float() / (data.num_grey_levels - 1)).to(any_parameter(classifier))
    began = time.perf_counter()
    with cast_weights(classifier, pixels.device, precision):
        votes, mean = certify(
            classifier,
            pixels,
            sigma,
            draws=draws,
            selection_draws=selection_draws,
            failure_probability=failure_probability,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
        )
    seconds = time.perf_counter() - began
    return CertificationReport(
        sigma=sigma,
        level=getattr(classifier, "level", None),
        draws=draws,
        selection_draws=selection_draws,
        failure_probability=failure_probability,
        precision=precision,
        num_images=len(index),
        data=data.name,
        split=data.split,
        **_accuracies(votes, mean, label[index], sorted(radii)),
        seconds=seconds,
        images_per_second=len(index) / seconds,
        index=index,
        votes=votes,
        mean=mean,
    )


def _check_radii(radii: Sequence[float]) -> None:
    if any(not 0 <= radius < math.inf for radius in radii):
        raise UserError(
            f"radii {', '.join(f'{radius:g}' for radius in radii)}: give finite ones of at least 0"
        )


def _accuracies(
    votes: Certificates,
    mean: Certificates,
    label: Tensor,  # (n,)
    radii: list[float],  # R, ascending
) -> dict[str, Any]:
    """The fields of a `CertificationReport` that follow from certificates and labels."""

    def certified_accuracy(certificates: Certificates) -> Tensor:  # (R,)
        right = certificates.predicted == label
        return torch.stack([(right & (certificates.radius >= radius)).double().mean() for radius in radii])

    accuracy = certified_accuracy(votes)
    return {
        "smoothed_accuracy": float((votes.predicted == label).double().mean()),
        "abstained": float((votes.predicted == ABSTAIN).double().mean()),
        "radii": radii,
        "certified_accuracy": accuracy.tolist(),
        "certified_accuracy_stderr": (accuracy * (1 - accuracy) / len(label)).sqrt().tolist(),
        "certified_accuracy_of_mean": certified_accuracy(mean).tolist(),
    }
