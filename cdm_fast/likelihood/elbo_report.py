"""bits/dim of a data set by the variational bound.

# n images, d = C*H*W
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cdm_fast.config.choices import Given
from cdm_fast.config.json import fields_without
from cdm_fast.data import ImageData, bits_of_interval
from cdm_fast.data.draws import choose_images
from cdm_fast.errors import UserError, require_at_least
from cdm_fast.host.progress import Progress, silent
from cdm_fast.likelihood.elbo import GROUPS, variational_bound
from cdm_fast.likelihood.given import labels_given
from cdm_fast.likelihood.units import bits_per_dim, nats_per_bit_per_dim, require_denoiser
from cdm_fast.model import Denoiser, evaluation_mode
from cdm_fast.model.denoiser import like_network
from cdm_fast.statistics import require_error_bar, standard_error


@dataclass(frozen=True)
class ElboReport:
    """bits/dim by the variational bound, and its terms.

    Fields:
        bits_per_dim, bits_per_dim_stderr: mean over images and its standard error.
        prior, reconstruction: these terms, bits/dim; the second includes the offset of the grey levels.
        levels: the m levels of the chain, lowest first.
        steps: (m-1,) bits/dim of each step `levels[i+1] -> levels[i]`.
        given: "label", each image given its label; "none", without a label.
        num_images, seconds: how it was measured.
        index, per_image: (n,) which images of the split, and the bits/dim of each.
    """

    bits_per_dim: float
    bits_per_dim_stderr: float
    prior: float
    reconstruction: float
    levels: list[int]
    steps: list[float]
    given: str
    num_images: int
    seconds: float
    index: Tensor
    per_image: Tensor

    def to_json(self) -> dict[str, Any]:
        """Everything but the per-image values, ready for `json.dumps`."""
        return fields_without(self, "index", "per_image")


@evaluation_mode
def evaluate_elbo(
    model: Denoiser,
    data: ImageData,
    num_images: int = 256,
    *,
    batch_size: int = 256,
    seed: int = 0,
    progress: Progress = silent,
    given: Given = "none",
    every: int = 1,
    groups: int = GROUPS,
) -> ElboReport:
    """bits/dim of `num_images` images of `data` by `variational_bound`: an upper bound on their code length.

    Args:
        num_images: number of images, drawn from `data` without replacement; all if there are fewer.
        batch_size: images per evaluation of the network.
        seed: seed of the choice of images, dequantisation and noise.
        given: "label" or "none"; see `ElboReport`.
        every: measure a level on every so many images only, as in `variational_bound`.
        groups: the largest number of groups of values with a variance of their own, as there.

    Raises:
        UserError: a classifier, fewer than 2 `every` images, batch_size or groups below 1, as in
            `labels_given`; and for given "all", since averaging over noise inside the logarithm of a sum over
            classes gives no bound.

    >>> from cdm_fast import DDM, NoiseSchedule
    >>> class StandardNormal(DDM):
    ...     def denoise(self, x, level, label=None):  # of pixels from N(0, I)
    ...         return self.amplitudes(self.schedule.levels(level, x), x)[1] * x
    >>> model = StandardNormal(torch.nn.Identity(), NoiseSchedule.cosine(T=200))
    >>> images = torch.full((500, 1, 1, 2), 128, dtype=torch.uint8)  # at x = 0
    >>> data = ImageData(images, None, num_grey_levels=256, num_classes=None, name="grey", split="test")
    >>> report = evaluate_elbo(model, data)
    >>> report.num_images, report.per_image.shape
    (256, torch.Size([256]))
    >>> 8.326 <= report.bits_per_dim + 2 * report.bits_per_dim_stderr  # exactly log2(2 pi) / 2 + 7
    True
    """
    require_denoiser(model)
    if given == "all":
        raise UserError(
            "--given all works with --method single and ode; the bound takes --given label or none"
        )
    labels = labels_given(model, data, given)
    require_error_bar(num_images, "ELBO images")
    require_at_least("batch_size", batch_size, 1)
    progress(f"variational bound: {min(num_images, len(data.images))} images at {model.schedule.T} levels")
    index, x = choose_images(data, num_images, torch.Generator().manual_seed(seed))
    start = time.perf_counter()
    bound = variational_bound(
        model,
        like_network(model, x),
        seed=seed,
        batch_size=batch_size,
        label=None if labels is None else labels[index],
        every=every,
        groups=groups,
    )
    unit = nats_per_bit_per_dim(data)
    per_image = bits_per_dim(-bound.nats, data)
    return ElboReport(
        bits_per_dim=float(per_image.mean()),
        bits_per_dim_stderr=standard_error(per_image),
        prior=bound.prior / unit,
        reconstruction=bound.reconstruction / unit + bits_of_interval(data.num_grey_levels, data.pixels),
        levels=bound.levels,
        steps=[step / unit for step in bound.steps],
        given=given,
        num_images=len(x),
        seconds=time.perf_counter() - start,
        index=index,
        per_image=per_image,
    )
