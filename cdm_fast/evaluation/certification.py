"""Certified robustness by randomized smoothing (Cohen et al., arXiv 1902.02918).

A smoothed classifier returns the class that its base classifier predicts most often under Gaussian noise of
standard deviation sigma. Its class does not change under any perturbation whose L2 norm is below
`sigma Phi^-1(p)`, where p is a lower bound on the probability of the class. A noise-level classifier can be
used as the base classifier directly: its class logits at the level whose noise is sigma are trained under
this noise.

Two certificates are computed from the same noise draws:

- votes: p bounds the probability that the base classifier votes for the class (Clopper & Pearson 1934);
- mean posterior: p bounds the mean of the class's posterior under the noise. `Phi^-1` of that mean is
  1/sigma-Lipschitz (Salman et al., arXiv 1906.04584, lemma 2), so the radius has the same formula. The bound
  is Hoeffding's for means of values in [0, 1], in its relative-entropy form (1963, theorem 1).

Noise, perturbation and radius are in units of white: pixels range from 0 to 1. Inputs of the model range from
-1 to 1, so sigma is `2 (N-1)/N` times as large there, or twice as large if pixels are "points".

# n images, B batch, K classes, C channels, H W pixels, N grey levels
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cdm_fast.data import PixelMap
from cdm_fast.data.pixels import from_brightness, noise_of_inputs, to_brightness
from cdm_fast.errors import UserError
from cdm_fast.evaluation.class_scores import require_posterior
from cdm_fast.host.optional import need
from cdm_fast.host.progress import Progress, silent
from cdm_fast.model import CDM, Denoiser
from cdm_fast.model.classifier import Classifier

ABSTAIN = -1
BISECTIONS = 60  # halve [0, 1] down to the resolution of float64

# Noisy pixels (B, C, H, W), white being 1 -> (B, K), whose softmax is the class posterior.
PixelClassifier = Callable[[Tensor], Tensor]


class NoisyPixelClassifier(nn.Module):
    """A run's classifier of noisy pixels: (B, C, H, W), white being 1 -> (B, K) log-posteriors.

    A CDM reads `log p(c | x_t)` at the level t whose noise is sigma, with the input scaled by `a[t]`. An
    ordinary `Classifier` takes the noisy image as it is.

    Args:
        model: a CDM with classes (one pass with joint logits, K with an embedding), or a `Classifier`.
        sigma: standard deviation of the noise, in units of white.
        num_grey_levels, pixels: fields of the model's `ImageData`.

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
        require_posterior(model)
        self.model = model
        self.num_grey_levels, self.pixels = num_grey_levels, pixels
        self.level = model.schedule.nearest_to_noise(noise_of_inputs(sigma, num_grey_levels, pixels))

    def forward(self, noisy: Tensor) -> Tensor:
        x = from_brightness(noisy, self.num_grey_levels, self.pixels)
        if isinstance(self.model, Classifier):
            return self.model.log_class_posterior(x)
        return self.model.log_class_posterior(float(self.model.a[self.level]) * x, self.level)


class DenoisedPixelClassifier(nn.Module):
    """A denoiser followed by any classifier of clean images (Carlini et al., arXiv 2206.10550).

    One evaluation of the denoiser estimates the clean image, which is clipped to [0, 1] and classified.

    Args:
        denoiser: a CDM or DDM.
        classifier: pixels (B, C, H, W) in [0, 1] -> (B, K), whose softmax is the class posterior.
        sigma: standard deviation of the noise, in units of white.
        num_grey_levels, pixels: fields of the denoiser's `ImageData`.

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
    """The certificates of n images.

    Fields:
        predicted: (n,) int64, the smoothed classifier's class, or `ABSTAIN` if its bound is at most 1/2.
        lower_bound: (n,) float64, lower bound on the probability, or on the mean posterior, of the class
            found by the selection draws.
        radius: (n,) float64, L2, white being 1; 0 for abstentions. No perturbation of smaller norm changes
            the class; each radius is too large with at most the failure probability.
    """

    predicted: Tensor
    lower_bound: Tensor
    radius: Tensor


def clopper_pearson(count: Tensor, draws: int, failure_probability: float) -> Tensor:
    """One-sided lower confidence bound on a probability, like `count` (int64, 0..draws); float64.

    The bound exceeds the true probability with a probability of at most `failure_probability`.
    Source: Clopper & Pearson, Biometrika 1934.
    """
    beta = need("scipy.stats", "a confidence bound").beta
    bound = beta.ppf(failure_probability, count.numpy(), draws - count.numpy() + 1)
    return torch.as_tensor(bound, dtype=torch.float64).nan_to_num(0.0)  # 0 votes give NaN, the bound is 0


def hoeffding(mean: Tensor, draws: int, failure_probability: float) -> Tensor:
    """One-sided lower confidence bound on the expectation of values in [0, 1], like `mean`; float64.

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
    """Certificates by votes and by mean posterior for each image; see the module docstring.

    The class is chosen from `selection_draws` draws of noise, and the bound comes from `draws` new ones, so
    the choice of the class costs no confidence (arXiv 1902.02918, algorithm CERTIFY).

    Args:
        classifier: see `PixelClassifier`; called with at most `batch_size` noisy images.
        sigma: standard deviation of the noise, in units of white.
        failure_probability: probability that the radius of an image is too large.

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
    """Votes (B, K) int64 and mean posteriors (B, K) float64 of the images over `draws` draws of noise."""
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
