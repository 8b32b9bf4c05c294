"""The variational bound on log p_0: the code length of the denoiser's ancestral chain, level by level.

The chain goes from pure noise down the levels with one Gaussian per step; each step costs
`KL(q(x_prev | x_t, x_0) || p(x_prev | x_t))` (DDPM, arXiv 2006.11239, eq. 5). The mean of p is the mean of
q with x0_hat in place of x_0; its variance is the optimal variance for the denoiser's error at that level
(arXiv 2201.06503). The error depends on the pixel: a pixel of a black background is known but for its
dequantisation, one of a texture is not (arXiv 2206.07309 has a variance for each pixel). Here pixels
are grouped by their x0_hat, which p may depend on, and each group has its variance, measured on one half
of the images and used for the other half.

# n images, d values of one image, m levels, K groups of values
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

GROUPS = 256
VALUES = 500  # fewest values, of one half of the images, from which a group's variance is measured
SHRINKAGE = 10.0  # number of values that the mean over all groups counts as in each group


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
    groups: int = GROUPS,
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
        groups: the largest number of groups of values that have a variance of their own at each level; few
            values have fewer. 1 is the bound of one variance for all, which is looser.

    Raises:
        UserError: too few images, a level outside 1..T, or `every` or `groups` below 1.
    """
    T = model.schedule.T
    used = sorted(set(levels if levels is not None else range(1, T + 1)))
    require_at_least("every", every, 1)
    require_at_least("groups", groups, 1)
    if len(x) < 2 * every:
        raise UserError(
            f"{len(x)} image{'s' * (len(x) > 1)}: the variational bound fits its variances on other images;"
            f" give {2 * every}"
        )
    if not used or used[0] < 1 or used[-1] > T:
        raise UserError(f"levels of the variational bound lie in 1 to T = {T}, not {used[:1]} to {used[-1:]}")
    generator = torch.Generator().manual_seed(seed)
    rows = [slice(i % every, None, every) if i else slice(None) for i in range(len(used))]
    dim = x[0].numel()
    a, s = model.schedule.a[used].tolist(), model.schedule.s[used].tolist()
    square = x.double().flatten(1).square().sum(1).cpu()
    prior = 0.5 * (dim * (s[-1] ** 2 - 1 - 2 * math.log(s[-1])) + a[-1] ** 2 * square)
    costs, mse = [], []  # of each level; the groups of a level take too much memory to keep
    for i, (t, chosen) in enumerate(zip(used, rows, strict=True)):
        given = None if label is None else label[chosen]
        error = _grouped_errors(model, x[chosen], given, t, generator, batch_size, groups)
        mse.append(float(error.sums.sum() / error.counts.sum()))
        if i:
            costs.append(_step_cost(error, a[i], s[i], a[i - 1], s[i - 1]))
        else:
            costs.append(_reconstruction(error, s[0] / a[0]))  # x0_hat - x_0 = s/a (eps - eps_hat)
    reconstruction, *steps = costs
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
        mse=mse,
    )


@dataclass(frozen=True)
class _Errors:
    """Squared errors `(eps_hat - eps)^2` of n images at one level, in K groups of values.

    sums: (n, K) float64, the sum over each image's values of each group.
    counts: (n, K) float64, how many these are; they sum to d.
    """

    sums: Tensor
    counts: Tensor

    def of_other_half(self) -> Tensor:
        """(n, K) mean error of each group over the other half of the images: odd ones for even ones."""
        mean = torch.empty_like(self.sums)
        for half in (0, 1):
            sums, counts = self.sums[1 - half :: 2].sum(0), self.counts[1 - half :: 2].sum(0)
            overall = sums.sum() / counts.sum()
            mean[half::2] = (sums + SHRINKAGE * overall) / (counts + SHRINKAGE)
        return mean


def _grouped_errors(
    model: Denoiser,
    x: Tensor,  # (n, ...)
    label: Tensor | None,
    t: int,
    generator: torch.Generator,
    batch_size: int,
    most_groups: int,
) -> _Errors:
    """The errors of all images at level t; each process evaluates its share of the images."""
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    mine = rank_range(len(x))
    x0_hat, error = x.new_empty(2, len(mine), x[0].numel(), device="cpu")
    for first in range(0, len(mine), batch_size):
        here = slice(first, first + batch_size)
        rows = mine[here]
        part = slice(rows.start, rows.stop)
        eps = upload(noise[part], x.device)
        x_t = model.schedule.noise(x[part], t, eps)
        given = None if label is None else upload(label[part], x.device)
        eps_hat = model.denoise(x_t, t, given)
        x0_hat[here] = ((x_t - model.schedule.s[t] * eps_hat) / model.schedule.a[t]).flatten(1).cpu()
        error[here] = (eps_hat - eps).square().flatten(1).cpu()

    edges = _edges(gather_rows(x0_hat, len(x)), most_groups)
    sums = torch.zeros(len(mine), len(edges) + 1, dtype=torch.float64)
    counts = torch.zeros_like(sums)
    for first in range(0, len(mine), batch_size):
        here = slice(first, first + batch_size)
        group = torch.bucketize(x0_hat[here], edges)
        sums[here].scatter_add_(1, group, error[here].double())
        counts[here].scatter_add_(1, group, torch.ones_like(group, dtype=torch.float64))
    return _Errors(gather_rows(sums, len(x)), gather_rows(counts, len(x)))


def _edges(x0_hat: Tensor, most_groups: int) -> Tensor:
    """(K-1,) ascending limits of K groups that hold about as many of the values x0_hat (n, d) each."""
    groups = min(max(x0_hat.numel() // (2 * VALUES), 1), most_groups)
    every = max(x0_hat.numel() // (groups * 4 * VALUES), 1)  # enough images for the quantiles
    ordered = x0_hat[::every].flatten().sort().values
    return ordered[torch.arange(1, groups) * len(ordered) // groups]


def _reconstruction(error: _Errors, scale: float) -> Tensor:
    """(n,) nats: `-log p(x_0 | x_t)` of Gaussians around x0_hat, at distance `scale |eps_hat - eps|`."""
    mse = error.of_other_half()
    return 0.5 * (error.counts * (2 * math.pi * scale**2 * mse).log() + error.sums / mse).sum(1)


def _step_cost(error: _Errors, a: float, s: float, a_prev: float, s_prev: float) -> Tensor:
    """(n,) nats: `KL(q || p)` of the two Gaussians of x_prev, for errors at the level of (a, s).

    With `v = s^2 - (a/a_prev)^2 s_prev^2` the variance of q is `v s_prev^2 / s^2` (DDPM eq. 7), the distance
    between the means is `a_prev v / (s a) |eps_hat - eps|`, and the variance of p is the variance of q plus
    the expected square of this distance.
    """
    v = s**2 - (a / a_prev * s_prev) ** 2
    variance = v * (s_prev / s) ** 2
    distance = (a_prev * v / (s * a)) ** 2
    wider = 1 + distance * error.of_other_half() / variance  # p's variance over q's
    cost = error.counts * (wider.log() + 1 / wider - 1) + distance * error.sums / (variance * wider)
    return 0.5 * cost.sum(1)
