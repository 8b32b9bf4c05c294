"""Certified robustness by randomized smoothing (Cohen et al., arXiv 1902.02918).

A smoothed classifier answers with the class that its base classifier gives most often under Gaussian noise of
standard deviation sigma. It keeps that class under every perturbation of L2 norm below `sigma Phi^-1(p)`,
where p bounds the probability of the class from below. A noise-level classifier needs no change to be that
base classifier: its class logits at the level whose noise is sigma are a classifier trained under this noise.

Two certificates come out of the same noise draws:

- votes: p bounds the probability that the base classifier votes for the class (Clopper & Pearson 1934);
- mean posterior: p bounds the mean of the class's posterior under the noise. `Phi^-1` of that mean is
  1/sigma-Lipschitz (Salman et al., arXiv 1906.04584, lemma 2), so the radius has the same formula. The bound
  is Hoeffding's for means of values in [0, 1], in its relative-entropy form (1963, theorem 1).

The noise, the perturbation and the radius are in units of white: pixels run from 0 to 1. Inputs of the model
run from -1 to 1, so that sigma there is `2 (N-1)/N` times as large, or twice around points.

# n images, B batch, K classes, C channels, H W pixels, N grey levels
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cdm_fast.data import ImageData, PixelMap
from cdm_fast.data.draws import choose
from cdm_fast.data.pixels import from_brightness, noise_of_inputs, to_brightness
from cdm_fast.errors import UserError
from cdm_fast.evaluation.class_scores import require_classes
from cdm_fast.evaluation.classification import labels_for
from cdm_fast.host.optional import need
from cdm_fast.host.progress import Progress, silent
from cdm_fast.model import CDM, Denoiser, evaluation_mode
from cdm_fast.model.cdm import require_likelihood
from cdm_fast.model.classifier import Classifier
from cdm_fast.model.denoiser import any_parameter

ABSTAIN = -1
RADII = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
BISECTIONS = 60  # halve [0, 1] down to the resolution of float64

# Noisy pixels (B, C, H, W), white being 1 -> (B, K), whose softmax is the class posterior.
PixelClassifier = Callable[[Tensor], Tensor]


class NoisyPixelClassifier(nn.Module):
    """A run's classifier of noisy pixels: (B, C, H, W), white being 1 -> (B, K) log-posteriors.

    A CDM reads `log p(c | x_t)` at the level t whose noise is sigma, with the input scaled by `a[t]`. An
    ordinary `Classifier` takes the noisy image as it is.

    Args:
        model: a CDM with classes (joint logits in one pass, an embedding in K), or a `Classifier`.
        sigma: of the noise, in units of white.
        num_grey_levels, pixels: of the data, as `ImageData` has them.

    Raises:
        UserError: a model without likelihood or classes, or a sigma that is not positive and finite.
    """

    def __init__(
        self,
        model: CDM | Classifier,
        sigma: float,
        num_grey_levels: int,
        pixels: PixelMap = "intervals",
    ) -> None:
        super().__init__()
        if not isinstance(model, Classifier):
            require_likelihood(model)
        require_classes(model)
        self.model = model
        self.num_grey_levels, self.pixels = num_grey_levels, pixels
        self.level = model.schedule.nearest_to_noise(noise_of_inputs(sigma, num_grey_levels, pixels))

    def forward(self, noisy: Tensor) -> Tensor:
        x = from_brightness(noisy, self.num_grey_levels, self.pixels)
        if isinstance(self.model, Classifier):
            return self.model.log_class_posterior(x)
        return self.model.log_class_posterior(float(self.model.a[self.level]) * x, self.level)


class DenoisedPixelClassifier(nn.Module):
    """Any classifier of clean images behind a denoiser (Carlini et al., arXiv 2206.10550).

    One evaluation of the denoiser estimates the clean image, which is clipped to [0, 1] and classified.

    Args:
        denoiser: a CDM or DDM.
        classifier: pixels (B, C, H, W) in [0, 1] -> (B, K), whose softmax is the class posterior.
        sigma: of the noise, in units of white.
        num_grey_levels, pixels: of the denoiser's data.

    Raises:
        UserError: a sigma that is not positive and finite.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        classifier: PixelClassifier,
        sigma: float,
        num_grey_levels: int,
        pixels: PixelMap = "intervals",
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.classifier = classifier
        self.num_grey_levels, self.pixels = num_grey_levels, pixels
        self.level = denoiser.schedule.nearest_to_noise(noise_of_inputs(sigma, num_grey_levels, pixels))

    def forward(self, noisy: Tensor) -> Tensor:
        x = from_brightness(noisy, self.num_grey_levels, self.pixels)
        clean = self.denoiser.predict_x0(float(self.denoiser.a[self.level]) * x, self.level)
        return self.classifier(to_brightness(clean, self.num_grey_levels, self.pixels).clamp(0, 1))


@dataclass(frozen=True)
class Certificates:
    """What holds for each of n images.

    Fields:
        predicted: (n,) int64, the smoothed classifier's class, or `ABSTAIN` where its bound is at most 1/2.
        lower_bound: (n,) float64, of the probability, or of the mean posterior, of the class found by the
            selection draws.
        radius: (n,) float64, L2, white being 1; 0 where it abstains. Every perturbation of smaller norm
            leaves the class as it is; each radius is too large with at most the failure probability.
    """

    predicted: Tensor
    lower_bound: Tensor
    radius: Tensor


def clopper_pearson(count: Tensor, draws: int, failure_probability: float) -> Tensor:
    """One-sided lower confidence bound of a probability, like `count` (int64, 0..draws); float64.

    The bound exceeds the true probability with a probability of at most `failure_probability`.
    Source: Clopper & Pearson, Biometrika 1934.
    """
    beta = need("scipy.stats", "a confidence bound").beta
    bound = beta.ppf(failure_probability, count.numpy(), draws - count.numpy() + 1)
    return torch.as_tensor(bound, dtype=torch.float64).nan_to_num(0.0)  # without a single vote it is 0


def hoeffding(mean: Tensor, draws: int, failure_probability: float) -> Tensor:
    """One-sided lower confidence bound of the expectation of values in [0, 1], like `mean`; float64.

    The smallest q with `draws KL(mean || q) <= log(1/failure_probability)`, KL between Bernoulli variables.
    Source: Hoeffding 1963, theorem 1, inequality 2.1.
    """
    mean = mean.double()
    allowed = math.log(1 / failure_probability) / draws
    low, high = torch.zeros_like(mean), mean.clone()
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        divergence = torch.xlogy(mean, mean / middle) + torch.xlogy(1 - mean, (1 - mean) / (1 - middle))
        too_far = divergence > allowed
        low, high = torch.where(too_far, middle, low), torch.where(too_far, high, middle)
    return low


def certify(
    classifier: PixelClassifier,
    pixels: Tensor,  # (n, C, H, W), white being 1
    sigma: float,
    *,
    draws: int = 1000,
    selection_draws: int = 100,
    failure_probability: float = 0.001,
    batch_size: int = 500,
    seed: int = 0,
    progress: Progress = silent,
) -> tuple[Certificates, Certificates]:
    """Certificates by votes and by mean posterior, of each image; see this module's head.

    The class comes from `selection_draws` of noise, and the bound on it from `draws` fresh ones, so that the
    choice of the class costs no confidence (arXiv 1902.02918, algorithm CERTIFY).

    Args:
        classifier: see `PixelClassifier`; called with at most `batch_size` noisy images.
        sigma: of the noise, in units of white.
        failure_probability: that the radius of one image is too large.

    Raises:
        UserError: numbers out of range.
    """
    _check_numbers(sigma, draws, selection_draws, failure_probability, batch_size)
    generator = torch.Generator(pixels.device).manual_seed(seed)
    found: tuple[list[Tensor], ...] = ([], [], [], [])
    for first, images in _in_chunks(pixels, max(1, batch_size // draws)):
        progress(f"certifying at sigma {sigma:g}: image {first} of {len(pixels)}")
        votes, mean = _under_noise(classifier, images, sigma, selection_draws, batch_size, generator)
        voted, likely = votes.argmax(1), mean.argmax(1)
        votes, mean = _under_noise(classifier, images, sigma, draws, batch_size, generator)
        values = (voted, votes.gather(1, voted[:, None])[:, 0], likely, mean.gather(1, likely[:, None])[:, 0])
        for each, value in zip(found, values, strict=True):
            each.append(value.cpu())
    voted, votes, likely, mean = map(torch.cat, found)
    return (
        _certificates(voted, clopper_pearson(votes, draws, failure_probability), sigma),
        _certificates(likely, hoeffding(mean, draws, failure_probability), sigma),
    )


@torch.no_grad()
def _under_noise(
    classifier: PixelClassifier,
    images: Tensor,  # (B, C, H, W)
    sigma: float,
    draws: int,
    batch_size: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Votes (B, K) int64 and mean posteriors (B, K) float64 of the images under `draws` of noise each."""
    votes: Tensor | float = 0
    total: Tensor | float = 0
    for first in range(0, draws, batch_size):
        count = min(batch_size, draws - first)
        repeated = images.repeat_interleave(count, dim=0)
        noise = torch.randn(repeated.shape, generator=generator, device=images.device, dtype=images.dtype)
        outputs = classifier(repeated + sigma * noise).double().unflatten(0, (len(images), count))
        votes = votes + nn.functional.one_hot(outputs.argmax(2), outputs.shape[2]).sum(1)
        total = total + outputs.softmax(2).sum(1)
    assert isinstance(votes, Tensor) and isinstance(total, Tensor)
    return votes, (total / draws).clamp(max=1)


def _certificates(predicted: Tensor, lower_bound: Tensor, sigma: float) -> Certificates:
    holds = lower_bound > 0.5
    radius = torch.where(holds, sigma * torch.special.ndtri(lower_bound), 0.0)
    return Certificates(torch.where(holds, predicted, ABSTAIN), lower_bound, radius)


def _in_chunks(images: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    for first in range(0, len(images), size):
        yield first, images[first : first + size]


def _check_numbers(
    sigma: float, draws: int, selection_draws: int, failure_probability: float, batch_size: int
) -> None:
    if not 0 < sigma < math.inf:
        raise UserError(f"sigma is {sigma}: give a positive finite standard deviation, in units of white")
    for what, count in (("draws", draws), ("selection draws", selection_draws), ("batch size", batch_size)):
        if count < 1:
            raise UserError(f"{what} is {count}: at least one is needed")
    if not 0 < failure_probability < 0.5:
        raise UserError(f"failure probability is {failure_probability}: give a number between 0 and 0.5")
    if clopper_pearson(torch.tensor(draws), draws, failure_probability) <= 0.5:
        least = math.ceil(math.log(1 / failure_probability, 2)) + 1
        raise UserError(
            f"{draws} draws certify nothing at a failure probability of {failure_probability}: give at least"
            f" {least}"
        )


@dataclass(frozen=True)
class CertificationReport:
    """Certified accuracy of a smoothed classifier on a data set.

    Fields:
        sigma: of the noise, in units of white; level: at which a CDM reads its classes, or denoises.
        draws, selection_draws, failure_probability: as `certify` takes them.
        smoothed_accuracy: share of images whose smoothed class is theirs; an abstention counts as wrong.
        abstained: share of images without a certificate.
        radii: L2 norms, white being 1, ascending.
        certified_accuracy, certified_accuracy_stderr: share of images whose class is right and whose radius
            is at least each of `radii`, by votes.
        certified_accuracy_of_mean: the same by mean posterior.
        images_per_second: certified, all noise draws included.
        index: (n,) which images of the data; votes, mean: their certificates.
    """

    sigma: float
    level: int | None
    draws: int
    selection_draws: int
    failure_probability: float
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
        fields = asdict(self)
        del fields["index"], fields["votes"], fields["mean"]
        return fields

    def columns(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Smoothed class (-1: abstained) and radius of each image, as `write_per_image` takes them."""
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
    batch_size: int = 500,
    seed: int = 0,
    progress: Progress = silent,
) -> CertificationReport:
    """Certifies labelled images of `data` on the device of the classifier; see `CertificationReport`.

    Args:
        classifier: `NoisyPixelClassifier`, `DenoisedPixelClassifier`, or any module that is a
            `PixelClassifier`.
        num_classes: K.
        radii: at which to state the certified accuracy.
        num_images: so many images, drawn from the data; by default all.
        The others as `certify` takes them.

    Raises:
        UserError: data without labels or of other classes, a radius that is not finite or negative, and as
            `certify`.
    """
    label = labels_for(data, num_classes)
    if any(not 0 <= radius < math.inf for radius in radii):
        raise UserError(
            f"radii {', '.join(f'{radius:g}' for radius in radii)}: give finite ones of at least 0"
        )
    index = choose(len(data), num_images, torch.Generator().manual_seed(seed))
    pixels = (data.images[index].float() / (data.num_grey_levels - 1)).to(any_parameter(classifier))
    began = time.perf_counter()
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
    label, radii = label[index], sorted(radii)
    by_votes, by_mean = (
        torch.stack([(each.predicted == label) & (each.radius >= radius) for radius in radii]).double()
        for each in (votes, mean)
    )
    share = by_votes.mean(1)
    return CertificationReport(
        sigma=sigma,
        level=getattr(classifier, "level", None),
        draws=draws,
        selection_draws=selection_draws,
        failure_probability=failure_probability,
        num_images=len(index),
        data=data.name,
        split=data.split,
        smoothed_accuracy=float((votes.predicted == label).double().mean()),
        abstained=float((votes.predicted == ABSTAIN).double().mean()),
        radii=list(radii),
        certified_accuracy=share.tolist(),
        certified_accuracy_stderr=(share * (1 - share) / len(index)).sqrt().tolist(),
        certified_accuracy_of_mean=by_mean.mean(1).tolist(),
        seconds=seconds,
        images_per_second=len(index) / seconds,
        index=index,
        votes=votes,
        mean=mean,
    )
