"""Restoration: draws from p(x_0 | y) for a linear measurement y = A x_0 + sigma n, ranked by the model.

`Posterior` is an `Energy` like its prior, so `MALA` and `SMC` sample from it. docs/explanation/energy.md
derives its path from noise to data and shows that the path is exact at both ends.

# B batch, k measured values, L = T+2 noise levels, N candidates
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdm_fast.errors import UserError
from cdm_fast.model import Energy, any_parameter, evaluation_mode
from cdm_fast.model.denoiser import Wrapper
from cdm_fast.sampling.corrected import MALA
from cdm_fast.sampling.sample import sample
from cdm_fast.sampling.sampler import Callback, Sampler

RESTORER = MALA(moves=4)
LEVEL_DRAWS = 8  # noise draws with which candidates are compared at a level above 0


class Measurement(nn.Module):
    """A linear measurement of an image: `y = A x_0 + sigma n`, n ~ N(0, I), with `A A^T = gain I`.

    Subclasses provide A as `forward` and its transpose as `transpose`: `Known` and `MeanPool`.

    Args:
        y: the measured values, k of them in any shape.
        sigma: standard deviation of the noise, in the images' units, positive.
        shape: shape of one image.
        gain: squared norm of a row of A.

    Raises:
        UserError: no measured value, a value that is not finite, or a sigma that is not positive and finite.
    """

    y: Tensor

    def __init__(self, y: Tensor, sigma: float, shape: tuple[int, ...], gain: float = 1.0) -> None:
        super().__init__()
        if y.numel() == 0:
            raise UserError("nothing was measured: at least one value of the image must be known")
        if not bool(torch.isfinite(y).all()):
            raise UserError("the measurement holds a value that is not finite")
        if not (sigma > 0 and math.isfinite(sigma)):
            raise UserError(f"sigma is {sigma}: give a positive standard deviation of the noise")
        self.register_buffer("y", y.flatten())
        self.sigma, self.shape, self.gain = float(sigma), tuple(shape), gain

    def forward(self, x: Tensor) -> Tensor:
        """`A x`, (B, k), for x (B, *shape)."""
        raise NotImplementedError

    def transpose(self, values: Tensor) -> Tensor:
        """`A^T values`, (B, *shape), for values (B, k)."""
        raise NotImplementedError


class Known(Measurement):
    """Some values of an image, each with noise (inpainting), or all of them (denoising).

    Args:
        image: (C, H, W), or any other shape; only the known values are read.
        sigma: standard deviation of the noise in the known values, in the images' units.
        known: bool, like `image`; True everywhere by default.

    Raises:
        UserError: as `Measurement`, or a `known` of another dtype or shape.

    >>> measurement = Known(torch.tensor([0.5, -0.5, 0.0]), 0.1, torch.tensor([True, False, True]))
    >>> measurement.y
    tensor([0.5000, 0.0000])
    """

    index: Tensor

    def __init__(self, image: Tensor, sigma: float, known: Tensor | None = None) -> None:
        known = torch.ones_like(image, dtype=torch.bool) if known is None else known
        if known.shape != image.shape or known.dtype != torch.bool:
            raise UserError(
                f"known is {known.dtype} of shape {tuple(known.shape)}: pass bool {tuple(image.shape)}"
            )
        super().__init__(image[known], sigma, tuple(image.shape))
        self.register_buffer("index", known.flatten().nonzero()[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        """The known values of x (B, *shape), (B, k)."""
        return x.flatten(1)[:, self.index]

    def transpose(self, values: Tensor) -> Tensor:
        """Values (B, k) where they are known and 0 elsewhere, (B, *shape)."""
        empty = values.new_zeros(len(values), math.prod(self.shape))
        return empty.index_copy(1, self.index, values).view(-1, *self.shape)


class MeanPool(Measurement):
    """Means of `factor` x `factor` pixels, each with noise: super-resolution. `A A^T = I / factor^2`.

    Args:
        small: (C, H/factor, W/factor), the means.
        factor: 2 or more.
        sigma: standard deviation of the noise in the means, in the images' units.

    Raises:
        UserError: as `Measurement`, a factor below 2, or a `small` that is not (C, h, w).
    """

    def __init__(self, small: Tensor, factor: int, sigma: float) -> None:
        if factor < 2 or small.dim() != 3:
            raise UserError(
                f"factor {factor}, image of shape {tuple(small.shape)}: give 2 or more, and (C, H, W)"
            )
        channels, height, width = small.shape
        super().__init__(small, sigma, (channels, height * factor, width * factor), factor**-2)
        self.factor, self.small_shape = factor, tuple(small.shape)

    def forward(self, x: Tensor) -> Tensor:
        """The means of x (B, C, H, W), (B, k)."""
        return F.avg_pool2d(x, self.factor).flatten(1)

    def transpose(self, values: Tensor) -> Tensor:
        """Each value, divided by factor^2, at all pixels of its block: (B, C, H, W) for values (B, k)."""
        small = values.view(-1, *self.small_shape)
        return small.repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3) / self.factor**2


class Posterior(Wrapper[Energy], Energy):
    """The posterior p(x_0 | y) given a measurement, as an energy with its own path from noise to data.

    `log q_t(x) = log p_t(x) + log N(y; m_t A x, sigma^2 I + r_t^2 A A^T)`, up to a constant per level.

    `m_t x` with `m_t = a / (a^2 + s^2)`, and `r_t^2 = s^2 / (a^2 + s^2)`, are the mean and the variance of
    x_0 | x_t = x under x_0 ~ N(0, I). Both ends are exact for any data: level 0 is log p(x) + log p(y | x),
    level T+1 is N(0, I). The levels between them are p(x_t | y) if the data are N(0, I), and otherwise merely
    a path. The variance is that of pseudoinverse guidance (Song et al., ICLR 2023). Their mean is the
    denoiser's output, whose gradient needs a Jacobian of the network; a mean linear in x needs none.

    See also `restore`, which draws from the posterior and ranks the draws.

    Args:
        model: the prior.
        measurement: a measurement of one image.

    Raises:
        UserError: a model without log p(x), or an image of another shape.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, model: Energy, measurement: Measurement) -> None:
        if not isinstance(model, Energy):
            raise UserError(f"a {type(model).__name__} has no log p(x), hence no posterior: give a CDM")
        super().__init__(model)
        self.input_shape = model.input_shape or measurement.shape
        if self.input_shape != measurement.shape:
            raise UserError(
                f"the measured image has shape {measurement.shape}: the model's images are {self.input_shape}"
            )
        self.measurement = measurement
        power = self.a**2 + self.s**2
        self.register_buffer("mean", self.a / power, persistent=False)  # (L,) m_t
        of_x0 = measurement.gain * self.s**2 / power  # r_t^2 A A^T
        self.register_buffer("variance", measurement.sigma**2 + of_x0, persistent=False)  # (L,) of y | x_t

    def log_likelihood_levels(self, x: Tensor) -> Tensor:
        """`log N(y; m_t A x, variance_t I)` in nats at every level, (B, L) float64."""
        measured, y = self.measurement(x.double()), self.measurement.y.double()
        mean, variance = self.mean.double(), self.variance.double()
        products = torch.stack([measured @ y, measured.square().sum(1)], dim=1)  # (B, 2)
        distance = (y @ y) - 2 * products[:, :1] * mean + products[:, 1:] * mean**2
        return -0.5 * (distance / variance + len(y) * (2 * math.pi * variance).log())

    def log_likelihood_score(self, x: Tensor, level: int | Tensor) -> Tensor:
        """Gradient of `log_likelihood_levels` at `level`: `m_t A^T (y - m_t A x) / variance_t`, like x."""
        index = self.schedule.levels(level, x)
        mean, variance = (table[index].to(x.dtype)[:, None] for table in (self.mean, self.variance))
        residual = self.measurement.y.to(x.dtype) - mean * self.measurement(x)
        return self.measurement.transpose(mean / variance * residual)

    def log_prob_levels(self, x: Tensor, *, label: Tensor | None = None) -> Tensor:
        """`log q_t(x)` in nats at every level, up to a constant per level, (B, L) float64."""
        return self.model.log_prob_levels(x, label=label).double() + self.log_likelihood_levels(x)

    def log_prob_levels_and_score(
        self, x: Tensor, level: int | Tensor, label: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As in `Energy`."""
        log_prob, score = self.model.log_prob_levels_and_score(x, level, label)
        return log_prob.double() + self.log_likelihood_levels(x), score + self.log_likelihood_score(x, level)


@dataclass(frozen=True)
class Restored:
    """Candidates of a restoration, best first.

    Fields:
        images: (N, ...).
        log_prob: (N,) float64 nats, the model's log-density, by which they are ranked (`log_prob_at`).
        log_likelihood: (N,) float64 nats, `log p(y | x)` of the measurement.
    """

    images: Tensor
    log_prob: Tensor
    log_likelihood: Tensor

    @property
    def mean(self) -> Tensor:
        """The mean of the candidates, (...): an estimate of least mean squared error."""
        return self.images.mean(0)


@evaluation_mode
def restore(
    model: Energy,
    measurement: Measurement,
    candidates: int = 16,
    steps: int | Sequence[int] = 50,
    seed: int = 0,
    *,
    level: int = 0,
    sampler: str | Sampler = RESTORER,
    label: int | None = None,
    callback: Callback | None = None,
) -> Restored:
    """Draws `candidates` images from p(x_0 | y) and ranks them by `log_prob_at`.

    Args:
        model: the prior: a `CDM`, one of its classes, or a composition.
        measurement: `Known` values or `MeanPool` means of one image.
        candidates: how many images to draw.
        steps, seed, label, callback: as in `sample`.
        level: noise level of the ranking, 0..T.
        sampler: as in `sample`; only the corrected samplers, `MALA` and `SMC`, sample from the posterior.

    Raises:
        UserError: a model without log p(x), or an argument out of range.

    >>> from cdm_fast import CDM, MLP, NoiseSchedule
    >>> schedule = NoiseSchedule.uniform(T=20)
    >>> model = CDM(MLP(4, schedule.num_levels, hidden=8), schedule)
    >>> image, known = torch.tensor([0.5, -0.5, 0.0, 0.0]), torch.tensor([True, True, False, False])
    >>> found = restore(model, Known(image, 0.1, known), candidates=3, steps=4)
    >>> found.images.shape, found.mean.shape, bool((found.log_prob.diff() <= 0).all())
    (torch.Size([3, 4]), torch.Size([4]), True)
    """
    posterior = Posterior(model, measurement).to(any_parameter(model).device)
    if candidates < 1:
        raise UserError(f"{candidates} candidates: draw 1 or more")
    if not 0 <= level <= model.schedule.T:
        raise UserError(f"level {level}: candidates are ranked at a level from 0 to T = {model.schedule.T}")
    x = sample(posterior, candidates, sampler, steps, seed, label=label, callback=callback)
    log_prob = log_prob_at(model, x, level, label)
    order = log_prob.argsort(descending=True, stable=True)
    return Restored(x[order], log_prob[order], posterior.log_likelihood_levels(x)[order, 0])


@evaluation_mode
def log_prob_at(model: Energy, x: Tensor, level: int, label: int | None = None, seed: int = 0) -> Tensor:
    """The log-density by which candidates are ranked, for clean images x (B, ...): (B,) float64 nats.

    At level 0 it is `log p(x)`; at higher levels the mean of `log p_t(a x + s eps)` over `LEVEL_DRAWS` draws
    of eps, the same for every image: a comparison that ignores details smaller than the noise.
    """
    labels = None if label is None else torch.full((len(x),), label, device=x.device)
    if level == 0:
        return model.log_prob(x, 0, label=labels).double()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(LEVEL_DRAWS, *x.shape[1:], generator=generator, dtype=torch.float64).to(x)
    noisy = (model.schedule.noise(x, level, eps) for eps in noise)
    each = [model.log_prob(x_t, level, label=labels).double() for x_t in noisy]
    return torch.stack(each).mean(0)
