"""The variational bound on log p_0: the code length of the denoiser's ancestral chain, level by level.

The chain goes from pure noise down the levels with one Gaussian per step; each step costs
`KL(q(x_prev | x_t, x_0) || p(x_prev | x_t))` (DDPM, arXiv 2006.11239, eq. 5). The mean of p is the mean of
q with x0_hat in place of x_0; its variance is the optimal variance for the denoiser's error at that level
(arXiv 2201.06503), measured on one half of the images and used for the other half.

# n images, d values of one image, m levels
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cdm_fast.errors import UserError, require_at_least
from cdm_fast.host.device import upload
from cdm_fast.host.distributed import gather_rows, rank_range
from cdm_fast.model import Denoiser, evaluation_mode


@dataclass(frozen=True)
class VariationalBound:
    """An upper bound on `-log p_0(x)` in nats, and its terms.

    Fields:
        nats: (n,) the bound on `-log p_0` of each image, an unbiased estimate of its mean over noise.
        prior: mean of `KL(q(x_T | x_0) || N(0, I))`, where T is the noisiest level used.
        levels: the m levels of the chain, lowest first.
        steps: mean cost of each step `levels[i+1] -> levels[i]`.
        reconstruction: mean of `-log p(x_0 | x_t)` at the lowest level, Gaussian around x0_hat.
        mse: mean of `(eps_hat - eps)^2` at each level.
    """

    nats: Tensor
    prior: float
    levels: list[int]
    steps: list[float]
    reconstruction: float
    mse: list[float]


@evaluation_mode
def variational_bound(
    model: Denoiser,
    x: Tensor,
    *,
    levels: Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int = 256,
    label: Tensor | None = None,
    every: int = 1,
) -> VariationalBound:
    """The bound on `-log p_0` of every image of `x`; see `VariationalBound`.

    Args:
        x: (n, ...) dequantised data on the model's device, n >= 2.
        levels: levels of the chain, in 1..T; all by default. Fewer levels make the bound looser.
        seed: seed of the noise; every level has its own noise.
        batch_size: images per evaluation.
        label: (n,) int64, for a bound on `-log p_0(x|label)` of a class-conditional model.
        every: measure the i-th level on images i, i + every, ... (modulo `every`) only, and the lowest level
            on all; n is at least 2 `every`. The bound of an image is then the mean cost of the other levels,
            plus `every` times what its own levels cost more. Its mean over images is as unbiased as before,
            for 1/`every` of the evaluations; single images differ by more.

    Raises:
        UserError: too few images, or a level outside 1..T.
    """
    T = model.schedule.T
    used = sorted(set(levels if levels is not None else range(1, T + 1)))
    require_at_least("every", every, 1)
    if len(x) < 2 * every:
        raise UserError(
            f"{len(x)} image{'s' * (len(x) > 1)}: the variational bound fits its variances on other images;"
            f" give {2 * every}"
        )
    if not used or used[0] < 1 or used[-1] > T:
        raise UserError(f"levels of the variational bound lie in 1 to T = {T}, not {used[:1]} to {used[-1:]}")
    generator = torch.Generator().manual_seed(seed)
    rows = [slice(i % every, None, every) if i else slice(None) for i in range(len(used))]
    dim, errors = x[0].numel(), []
    for t, chosen in zip(used, rows, strict=True):
        given = None if label is None else label[chosen]
        mine = _squared_error(model, x[chosen], given, t, generator, batch_size)
        errors.append(gather_rows(mine.cpu(), len(x[chosen])))
    mse = [_mean_of_other_half(error) / dim for error in errors]

    a, s = model.schedule.a[used].tolist(), model.schedule.s[used].tolist()
    square = x.double().flatten(1).square().sum(1).cpu()
    prior = 0.5 * (dim * (s[-1] ** 2 - 1 - 2 * math.log(s[-1])) + a[-1] ** 2 * square)
    scale = s[0] / a[0]  # x0_hat - x_0 = scale (eps - eps_hat)
    reconstruction = 0.5 * (dim * (2 * math.pi * scale**2 * mse[0]).log() + errors[0] / mse[0])
    steps = [_step_cost(dim, errors[i], mse[i], a[i], s[i], a[i - 1], s[i - 1]) for i in range(1, len(used))]
    means = [step.mean() for step in steps]
    for_all = [mean.expand(len(x)).clone() for mean in means]
    for total, chosen, step, mean in zip(for_all, rows[1:], steps, means, strict=True):
        total[chosen] = every * step - (every - 1) * mean
    return VariationalBound(
        nats=prior + reconstruction + sum(for_all),
        prior=float(prior.mean()),
        levels=used,
        steps=[float(mean) for mean in means],
        reconstruction=float(reconstruction.mean()),
        mse=[float(error.mean()) / dim for error in errors],
    )


def _squared_error(
    model: Denoiser,
    x: Tensor,
    label: Tensor | None,
    t: int,
    generator: torch.Generator,
    batch_size: int,
) -> Tensor:
    """`|eps_hat - eps|^2` at level t, float64, for this process's share of the images (n, ...)."""
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    errors = [torch.empty(0, dtype=torch.float64, device=x.device)]  # for a process without images
    mine = rank_range(len(x))
    x, noise = x[mine.start : mine.stop], noise[mine.start : mine.stop]
    label = None if label is None else upload(label[mine.start : mine.stop], x.device)
    for first in range(0, len(x), batch_size):
        rows = slice(first, first + batch_size)
        eps = upload(noise[rows], x.device)
        x_t = model.schedule.noise(x[rows], t, eps)
        residual = model.denoise(x_t, t, None if label is None else label[rows]) - eps
        errors.append(residual.double().square().flatten(1).sum(1))
    return torch.cat(errors)


def _mean_of_other_half(error: Tensor) -> Tensor:
    """Mean error (n,) over the other half of the images: over odd ones for even ones, and vice versa."""
    means = torch.empty_like(error)
    means[0::2], means[1::2] = error[1::2].mean(), error[0::2].mean()
    return means


def _step_cost(
    dim: int,
    error: Tensor,  # (n,) |eps_hat - eps|^2 at level t
    mse: Tensor,  # (n,) per value, from other images
    a: float,
    s: float,
    a_prev: float,
    s_prev: float,
) -> Tensor:  # (n,) nats
    """`KL(q || p)` of the two Gaussians of x_prev.

    With `v = s^2 - (a/a_prev)^2 s_prev^2` the variance of q is `v s_prev^2 / s^2` (DDPM eq. 7), the distance
    between the means is `a_prev v / (s a) |eps_hat - eps|`, and the variance of p is the variance of q plus
    the expected square of this distance.
    """
    v = s**2 - (a / a_prev * s_prev) ** 2
    variance = v * (s_prev / s) ** 2
    distance = (a_prev * v / (s * a)) ** 2
    wider = 1 + distance * mse / variance  # p's variance over q's
    return 0.5 * (dim * (wider.log() + 1 / wider - 1) + distance * error / (variance * wider))
