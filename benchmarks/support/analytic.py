"""Densities whose noisy marginals have a closed form, as networks that a CDM can hold.

Legend: B batch, d dimensions, L = T+2 noise levels, M components.

A density here is the law of x_0; with x_t = a x_0 + s eps every quantity below is exact, in float64.
"""

import math

import torch
from torch import Tensor, nn

from cdm_fast.model import Denoiser
from cdm_fast.model.schedule import NoiseSchedule


class GaussianMixture(nn.Module):
    """`x_0 ~ sum_m weights[m] N(means[m], covariances[m])`; one component is a plain Gaussian.

    Arguments: weights (M,), positive, summing to 1; means (M, d); covariances (M, d, d), positive definite.
    """

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor) -> None:
        super().__init__()
        self.register_buffer("weights", weights.double())
        self.register_buffer("means", means.double())
        self.register_buffer("covariances", covariances.double())
        variances, axes = torch.linalg.eigh(self.covariances)
        self.register_buffer("variances", variances)  # (M, d)
        self.register_buffer("axes", axes)  # (M, d, d), columns

    @classmethod
    def gaussian(cls, mean: Tensor, covariance: Tensor) -> "GaussianMixture":
        """One Gaussian, mean (d,), covariance (d, d)."""
        return cls(torch.ones(1), mean[None], covariance[None])

    @property
    def dim(self) -> int:
        return self.means.shape[1]

    def component(self, index: int) -> "GaussianMixture":
        """One component as a density of its own: the law of x_0 given the label `index`."""
        return GaussianMixture.gaussian(self.means[index], self.covariances[index])

    def components_log_prob(self, x: Tensor, a: Tensor, s: Tensor) -> Tensor:
        """(B, L, M) `log N(x; a means, a^2 covariances + s^2 I)` for x (B, d) and amplitudes a, s (L,)."""
        y = torch.einsum("bd,mde->bme", x, self.axes)
        centre = torch.einsum("md,mde->me", self.means, self.axes)
        variance = (a**2)[:, None, None] * self.variances + (s**2)[:, None, None]  # (L, M, d)
        residual = y[:, None] - a[:, None, None] * centre
        return -0.5 * (residual**2 / variance + (2 * math.pi * variance).log()).sum(-1)

    def log_prob(self, x: Tensor, a: Tensor, s: Tensor, label: Tensor | None = None) -> Tensor:
        """(B, L) log p_t(x) in nats; with label (B,), the density of that component alone."""
        each = self.components_log_prob(x, a, s)
        if label is not None:
            return each.gather(2, label[:, None, None].expand(-1, len(a), 1)).squeeze(2)
        return (each + self.weights.log()).logsumexp(-1)

    def score(self, x: Tensor, a: float, s: float) -> Tensor:
        """(B, d) grad_x log p_t(x) with full matrices: no eigenvectors, no autograd."""
        eye = torch.eye(self.dim, dtype=torch.float64)
        precision = torch.linalg.inv(a**2 * self.covariances + s**2 * eye)  # (M, d, d)
        residual = x[:, None] - a * self.means  # (B, M, d)
        log_det = torch.linalg.slogdet(precision).logabsdet
        mahalanobis = torch.einsum("bmd,mde,bme->bm", residual, precision, residual)
        responsibility = (self.weights.log() + 0.5 * (log_det - mahalanobis)).softmax(-1)
        return -torch.einsum("bm,mde,bme->bd", responsibility, precision, residual)

    def mean(self) -> Tensor:
        """(d,)"""
        return self.weights @ self.means

    def covariance(self) -> Tensor:
        """(d, d)"""
        centred = self.means - self.mean()
        return torch.einsum(
            "m,mde->de", self.weights, self.covariances + centred[:, :, None] * centred[:, None]
        )

    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        """(num, d) exact draws of x_0."""
        component = torch.multinomial(self.weights, num, replacement=True, generator=generator)
        z = torch.randn(num, self.dim, dtype=torch.float64, generator=generator)
        return self.means[component] + torch.einsum(
            "bde,be->bd", self.axes[component], z * self.variances[component].sqrt()
        )


class UniformPixels(nn.Module):
    """d independent pixels, each uniform on [-width/2, width/2]; with noise, a difference of normal CDFs."""

    def __init__(self, width: float, dim: int) -> None:
        super().__init__()
        self.width, self.dim = width, dim

    def log_prob(self, x: Tensor, a: Tensor, s: Tensor, label: Tensor | None = None) -> Tensor:
        """(B, L) log p_t(x) in nats."""
        return self.pixels_log_prob(x[:, None], a[:, None], s[:, None]).sum(-1)

    def pixels_log_prob(self, x: Tensor, a: Tensor, s: Tensor) -> Tensor:
        """log p_t of each pixel; x, a, s broadcast."""
        clean, pure = s == 0, a == 0
        safe_a, safe_s = torch.where(pure, 1.0, a), torch.where(clean, 1.0, s)
        half = safe_a * self.width / 2
        distance = x.abs()  # the density is even; the far tail is the accurate side
        upper, lower = (half - distance) / safe_s, (-half - distance) / safe_s
        log_upper, log_lower = torch.special.log_ndtr(upper), torch.special.log_ndtr(lower)
        smooth = log_upper + torch.log(-torch.expm1(log_lower - log_upper)) - (safe_a * self.width).log()
        normal = -0.5 * (x**2 + math.log(2 * math.pi))
        flat = torch.where(distance <= self.width / 2, x.new_tensor(-math.log(self.width)), -math.inf)
        return torch.where(pure, normal, torch.where(clean, flat, smooth))

    def score(self, x: Tensor, a: float, s: float) -> Tensor:
        """(B, d) grad_x log p_t(x), s > 0."""
        if a == 0:
            return -x
        upper, lower = (x + a * self.width / 2) / s, (x - a * self.width / 2) / s
        bell = torch.exp(-0.5 * upper**2) - torch.exp(-0.5 * lower**2)
        mass = torch.exp(self.pixels_log_prob(x, x.new_tensor(a), x.new_tensor(s))) * (a * self.width)
        return bell / (math.sqrt(2 * math.pi) * s * mass)

    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        """(num, d) exact draws of x_0."""
        return self.width * (torch.rand(num, self.dim, dtype=torch.float64, generator=generator) - 0.5)


Density = GaussianMixture | UniformPixels


class ExactNetwork(nn.Module):
    """The network that a CDM would become with perfect training on `density`.

    forward(x (B, d) or (B, C, H, W), label None or (B,)) returns (B, L) `log p_t(x) + log p(t) + c(x)` for an
    arbitrary `c`, on which no result of a model may depend.
    """

    def __init__(self, density: Density, schedule: NoiseSchedule, level_prior: Tensor | None = None) -> None:
        super().__init__()
        self.density = density
        prior = torch.ones(schedule.num_levels) if level_prior is None else level_prior
        self.register_buffer("log_prior", prior.double().log())
        self.register_buffer("a", schedule.a)
        self.register_buffer("s", schedule.s)

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        flat = x.flatten(1)
        constant = 0.3 * (flat**2).sum(1, keepdim=True) + flat.sin().sum(1, keepdim=True)
        return self.density.log_prob(flat, self.a, self.s, label) + self.log_prior + constant


class ExactImageNetwork(ExactNetwork):
    """`ExactNetwork` for images (B, C, H, W) of any dtype, without labels; computes in float64."""

    def forward(self, x: Tensor, label: None = None) -> Tensor:
        return super().forward(x.double())


class ExactDenoiser(Denoiser):
    """The exact denoiser alone: what a sampler sees of a perfect model, cheaply where a batch has few levels.

    `x` is (B, d); a label asks for a mixture's component, at one level for all.
    """

    def __init__(self, density: Density, schedule: NoiseSchedule) -> None:
        super().__init__(density, schedule, input_shape=(density.dim,))

    def denoise(self, x: Tensor, level: int | Tensor, label: Tensor | None = None) -> Tensor:
        levels = self.schedule.levels(level, x)
        if label is None:
            result = torch.zeros_like(x)
            for t in levels.unique().tolist():
                exact = eps_hat(self.network, self.schedule, x, t)
                result = torch.where((levels == t)[:, None], exact, result)
            return result
        level = int(levels[0])
        each = [
            eps_hat(self.network.component(int(k)), self.schedule, x[i : i + 1], level)
            for i, k in enumerate(label)
        ]
        return torch.cat(each)


def log_posterior(
    density: Density, schedule: NoiseSchedule, x: Tensor, level_prior: Tensor | None = None
) -> Tensor:
    """(B, L) exact log p(t | x) by Bayes' rule, for x (B, d); `level_prior` (L,) is uniform by default."""
    prior = torch.ones(schedule.num_levels) if level_prior is None else level_prior
    return (density.log_prob(x, schedule.a, schedule.s) + prior.double().log()).log_softmax(-1)


def eps_hat(density: Density, schedule: NoiseSchedule, x: Tensor, level: int) -> Tensor:
    """(B, d) exact E[eps | x_t = x] = -s score(x) (Tweedie); zero at level 0."""
    a, s = float(schedule.a[level]), float(schedule.s[level])
    return -s * density.score(x, a, s) if s > 0 else torch.zeros_like(x)


def noisy_sample(density: Density, schedule: NoiseSchedule, level: int, num: int, seed: int = 0) -> Tensor:
    """(num, d) exact draws of x_t at one level."""
    generator = torch.Generator().manual_seed(seed)
    x0 = density.sample(num, generator)
    eps = torch.randn(x0.shape, dtype=torch.float64, generator=generator)
    return schedule.a[level] * x0 + schedule.s[level] * eps


def random_mixture(dim: int, components: int, seed: int = 0, spread: float = 1.0) -> GaussianMixture:
    """A mixture with full covariances (standard deviations around 0.3) drawn from the seed."""
    generator = torch.Generator().manual_seed(seed)
    weights = 0.5 + torch.rand(components, dtype=torch.float64, generator=generator)
    means = spread * torch.randn(components, dim, dtype=torch.float64, generator=generator)
    factor = 0.3 * torch.randn(components, dim, dim, dtype=torch.float64, generator=generator)
    covariances = factor @ factor.mT / dim + 0.05 * torch.eye(dim, dtype=torch.float64)
    return GaussianMixture(weights / weights.sum(), means, covariances)


def product(p: GaussianMixture, q: GaussianMixture, power: float = 1.0) -> GaussianMixture:
    """`p(x) q(x)^power`, normalised; q is one Gaussian unless the power is 1.

    A product of Gaussians is one: precisions add, and so do precisions times means; its constant is what is
    left of theirs.
    """
    P, Q = torch.linalg.inv(p.covariances)[:, None], power * torch.linalg.inv(q.covariances)[None]
    covariances = torch.linalg.inv(P + Q)
    pulls = (P @ p.means[:, None, :, None] + Q @ q.means[None, :, :, None])[..., 0]
    means = (covariances @ pulls[..., None])[..., 0]

    def constant(precision: Tensor, mean: Tensor) -> Tensor:
        return -0.5 * torch.einsum("...d,...de,...e->...", mean, precision, mean)

    weights = p.weights.log()[:, None] + power * q.weights.log()[None]
    weights = weights + constant(P, p.means[:, None]) + constant(Q, q.means[None]) - constant(P + Q, means)
    weights = weights + 0.5 * (torch.logdet(P) + power * torch.logdet(Q / power) - torch.logdet(P + Q))
    dim = p.dim
    return GaussianMixture(
        weights.flatten().softmax(0), means.reshape(-1, dim), covariances.reshape(-1, dim, dim)
    )


def mixture(p: GaussianMixture, q: GaussianMixture, share: float) -> GaussianMixture:
    """`share p(x) + (1 - share) q(x)`."""
    return GaussianMixture(
        torch.cat([share * p.weights, (1 - share) * q.weights]),
        torch.cat([p.means, q.means]),
        torch.cat([p.covariances, q.covariances]),
    )


def given(
    p: GaussianMixture,
    A: Tensor,  # (k, d)
    y: Tensor,  # (k,)
    variance: float,
) -> GaussianMixture:
    """The law of x_0 given `y = A x_0 + n`, n ~ N(0, variance I).

    Each component is conditioned as a Gaussian, and weighted by its density of y.
    """
    A, y = A.double(), y.double()
    predicted = A @ p.covariances @ A.T + variance * torch.eye(len(A), dtype=torch.float64)  # (M, k, k)
    gain = torch.linalg.solve(predicted, A @ p.covariances).mT  # (M, d, k)
    residual = y - p.means @ A.T  # (M, k)
    means = p.means + (gain @ residual[..., None])[..., 0]
    covariances = p.covariances - gain @ A @ p.covariances
    mahalanobis = (residual * torch.linalg.solve(predicted, residual)).sum(1)
    weights = p.weights.log() - 0.5 * (mahalanobis + torch.logdet(predicted))
    return GaussianMixture(weights.softmax(0), means, (covariances + covariances.mT) / 2)


def smooth_pixels(side: int, length: float = 3.0) -> GaussianMixture:
    """One Gaussian of side x side pixels that say much about each other, and far from N(0, I).

    Covariance `0.4 exp(-distance / length)`, mean from -0.6 to 0.5 down the rows.
    """
    grid = torch.arange(side, dtype=torch.float64)
    place = torch.cartesian_prod(grid, grid)
    covariance = 0.4 * torch.exp(-torch.cdist(place, place) / length)
    return GaussianMixture.gaussian(torch.linspace(-0.6, 0.5, side**2, dtype=torch.float64), covariance)


def gaussian_flow(density: GaussianMixture, schedule: NoiseSchedule, x: Tensor, level: int) -> Tensor:
    """(B, d) where the probability-flow ODE carries x_t = x to at level 0, for one Gaussian.

    Along each principal axis the flow keeps the number of standard deviations from the mean.
    """
    a, s = schedule.a[level], schedule.s[level]
    mean, variance, axes = density.means[0], density.variances[0], density.axes[0]
    deviations = ((x - a * mean) @ axes) / (a**2 * variance + s**2).sqrt()
    return mean + (deviations * variance.sqrt()) @ axes.mT


def flow_1d(density: GaussianMixture, schedule: NoiseSchedule, x: Tensor, level: int) -> Tensor:
    """(B, 1) where the probability-flow ODE carries x_t = x to at level 0, for a mixture on the line.

    In one dimension the flow keeps quantiles: solve F_0(x_0) = F_t(x) by bisection.
    """

    def cdf(value: Tensor, a: Tensor, s: Tensor) -> Tensor:
        scale = (a**2 * density.variances[:, 0] + s**2).sqrt()
        return torch.special.ndtr((value - a * density.means[:, 0]) / scale) @ density.weights

    quantile = cdf(x, schedule.a[level], schedule.s[level])
    low, high = torch.full_like(x, -50.0), torch.full_like(x, 50.0)
    for _ in range(80):
        middle = (low + high) / 2
        below = (cdf(middle, schedule.a[0], schedule.s[0]) < quantile)[:, None]
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2
