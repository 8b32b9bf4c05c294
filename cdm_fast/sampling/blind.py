"""`Blind`: a sampler that asks the model at every step how noisy its images are.

Other samplers suppose that the images of a step have exactly the noise of its level. A network leaves a
little noise behind at each step, takes it for a part of the image at the next one, where it is told of less,
and so draws speckle. A CDM recognises that noise: its logits are log-densities of all levels. Here an image
whose own level is not that of the step is denoised at its own, from the same evaluation, and moves from there
to the next level of the grid.

# B batch; a, s amplitudes of data and noise; sigma = s/a; t the level of the grid, u the next one
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import sqrt

from torch import Tensor

from cdm_fast.errors import UserError
from cdm_fast.model import CDM, Denoiser
from cdm_fast.model.conditioned import Guided, OfClass
from cdm_fast.sampling.sampler import BatchNoise, Callback, Run, Sampler, Step


@dataclass(frozen=True)
class Blind(Sampler):
    """DDPM and DDIM from the level that the model finds in each image, where it excludes the grid's.

    `x_u = a_u x0_hat + sqrt(s_u^2 - c^2) eps_hat + c z` with `c = eta s_u sqrt(1 - (sigma_u/sigma_t)^2)` as
    in DDIM, eq. 12 (arXiv 2010.02502). Here x0_hat and eps_hat are those of level t if it is credible for x,
    and of the nearest credible level if it is not (`CDM.denoise_at_own_level`). Other samplers that estimate
    the noise do so by the residual of a blind denoiser (arXiv 2007.13640) or by a second network (arXiv
    2104.02600).

    Args:
        eta: 0..1, the share of fresh noise; 1 as in DDPM.
        credibility: 0..1, the share of the posterior of levels that is credible: 1 for DDPM and DDIM, 0 for
            the median of the posterior. In a few dimensions the posterior is wide, and 0 draws wrongly.

    Raises:
        UserError: an eta or a credibility outside 0..1.

    >>> import torch
    >>> from cdm_fast import CDM, MLP, NoiseSchedule, sample
    >>> model = CDM(MLP(2, 22, hidden=8), NoiseSchedule.uniform(T=20))
    >>> sample(model, 3, Blind(), steps=10).shape
    torch.Size([3, 2])
    """

    eta: float = 1.0
    credibility: float = 0.5
    name = "blind"

    def __post_init__(self) -> None:
        for name, value in (("eta", self.eta), ("credibility", self.credibility)):
            if not 0 <= value <= 1:
                raise UserError(f"{name} is {value}: it must lie between 0 and 1")

    def prepare(
        self, model: Denoiser, grid: Sequence[int], shape: tuple[int, ...], label: Tensor | None
    ) -> Run:
        """The loop. Raises UserError unless the model is a CDM, a class of one, or guided."""
        _cdm_of(model)
        return partial(blind, eta=self.eta, credibility=self.credibility)


def blind(
    model: Denoiser,
    x: Tensor,  # (B, ...) at level grid[0]
    noise: BatchNoise,
    grid: Sequence[int],
    label: Tensor | None = None,  # (B,) int64
    *,
    eta: float = 1.0,
    credibility: float = 0.5,
    callback: Callback | None = None,
) -> Tensor:
    """The loop of `Blind`."""
    cdm, guidance = _cdm_of(model)
    if isinstance(model, OfClass):
        label = model.labels(x)
    guidance = guidance if label is not None else 0.0
    a, s, sigma = (table.tolist() for table in (model.schedule.a, model.schedule.s, model.schedule.sigma))
    for t, u in pairwise(grid):
        level, eps_hat = cdm.denoise_at_own_level(x, t, label, guidance, credibility)
        a_x, s_x = model.amplitudes(level, x)
        x0_hat = (x - s_x * eps_hat) / a_x
        c = eta * s[u] * sqrt(1 - (sigma[u] / sigma[t]) ** 2)
        x = a[u] * x0_hat + sqrt(s[u] ** 2 - c**2) * eps_hat
        if c > 0:
            x = x + c * noise()
        if callback is not None:
            callback(Step(u, x))
    return x


def knows_levels(model: Denoiser) -> bool:
    """Whether the model is a CDM, one class of it, or guided, and so tells the noise of an image."""
    return isinstance(_unwrapped(model), CDM)


def _unwrapped(model: Denoiser) -> Denoiser:
    return model.model if isinstance(model, Guided | OfClass) else model


def _cdm_of(model: Denoiser) -> tuple[CDM, float]:
    """The CDM that knows the levels, and the strength of guidance."""
    inner = _unwrapped(model)
    if not isinstance(inner, CDM):
        raise UserError(
            f"sampler 'blind' needs a CDM, which knows the noise of its images, not {type(inner).__name__}:"
            " choose 'ddpm'"
        )
    return inner, model.guidance if isinstance(model, Guided) else 0.0
