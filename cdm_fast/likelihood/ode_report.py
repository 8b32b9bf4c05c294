"""bits/dim of a data set by the probability-flow ODE, beside the single pass on the same images.

# n images, B batch, m recorded levels, d = C*H*W, K classes
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cdm_fast.config.choices import Given
from cdm_fast.config.json import fields_without
from cdm_fast.data import ImageData
from cdm_fast.data.draws import choose_images
from cdm_fast.errors import require_at_least
from cdm_fast.host.distributed import in_turn
from cdm_fast.host.progress import Progress, silent
from cdm_fast.likelihood.given import labels_given, log_class_prior
from cdm_fast.likelihood.ode import ContinuousDenoiser, FlowLikelihood, flow_log_prob, load_solver
from cdm_fast.likelihood.ode_outliers import describe_outliers, find_outliers
from cdm_fast.likelihood.units import bits_per_dim, nats_per_bit_per_dim, require_denoiser
from cdm_fast.model import CDM, Denoiser, evaluation_mode
from cdm_fast.model.denoiser import like_network
from cdm_fast.statistics import require_error_bar, standard_error

COMPARED_LEVELS = 12  # levels at which single pass and ODE are compared, evenly spaced in log-SNR
TIGHTENED = 0.1  # the tolerance of the convergence check, relative to the tolerance
TIGHTENED_IMAGES = 8  # images of the convergence check


@dataclass(frozen=True)
class OdeReport:
    """bits/dim by the probability-flow ODE, beside the single pass on the same noisy images.

    An image whose trajectory diverges is off by thousands of nats and dominates the means; the medians are
    robust to it, and `outliers` lists it.

    Fields:
        bits_per_dim, bits_per_dim_stderr: mean over images and its standard error (images and probes).
        median_bits_per_dim: median over images.
        probe_stderr: the part of the error due to the random probes of the divergence; 0 if it is exact.
        tolerance_shift: change of the mean over `shift_images` of the images when the tolerance is tightened
            tenfold, bits/dim.
        difference, difference_stderr: single pass minus ODE on the same images, bits/dim; None for a model
            without single pass.
        median_difference: its median over images.
        outliers: images of the split whose difference is far from its median, or whose trajectory ends
            outside the range of the noise; see `ode_outliers.find_outliers`.
        warning: one line that names the outliers; None if there are none.
        levels, difference_at, difference_at_stderr: the difference at levels along the trajectories to noise.
        given: "label": each image given its label; "all": marginal over all classes; "none": without a label.
        path: the path that is integrated: the model's own in continuous time, or the levels with eps_hat
            interpolated between them.
        level, tolerance, probes, evaluations, num_images, seconds: how it was measured.
        index, per_image: (n,) which images of the split, and the bits/dim of each.
    """

    bits_per_dim: float
    bits_per_dim_stderr: float
    median_bits_per_dim: float
    probe_stderr: float
    tolerance_shift: float
    shift_images: int
    difference: float | None
    difference_stderr: float | None
    median_difference: float | None
    outliers: list[int]
    warning: str | None
    levels: list[int]
    difference_at: list[float]
    difference_at_stderr: list[float]
    given: str
    path: str
    level: int
    tolerance: float
    probes: int | None
    evaluations: int
    num_images: int
    seconds: float
    index: Tensor
    per_image: Tensor

    def to_json(self) -> dict[str, Any]:
        """Everything but the per-image values, ready for `json.dumps`."""
        return fields_without(self, "index", "per_image")


@evaluation_mode
def evaluate_ode(
    model: Denoiser,
    data: ImageData,
    level: int = 0,
    *,
    num_images: int = 32,
    tolerance: float = 1e-5,
    probes: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: Progress = silent,
    given: Given = "none",
) -> OdeReport:
    """bits/dim of `num_images` images of `data` at `level` by the ODE; see `OdeReport`.

    Args:
        level: 0 for the data; above 0, `x_t = a x + s eps` is scored.
        num_images: number of images, drawn from `data` without replacement; all if there are fewer.
        tolerance, probes: passed to `flow_log_prob`.
        batch_size: images per integration.
        seed: seed of the choice of images, dequantisation, noise and probes.
        given: conditioning of a class-conditional model, see `OdeReport`. "all" takes one integration per
            class.

    Raises:
        UserError: a classifier, a level outside 0..T, fewer than 2 images, batch_size below 1, and as in
            `flow_log_prob` and `labels_given`.

    >>> from cdm_fast import MLP, NoiseSchedule
    >>> network = MLP(dim=2, num_levels=102, hidden=4, depth=1)
    >>> _ = [torch.nn.init.zeros_(parameter) for parameter in network.parameters()]  # density N(0, I)
    >>> model = CDM(torch.nn.Sequential(torch.nn.Flatten(), network), NoiseSchedule.uniform(T=100))
    >>> images = torch.full((100, 1, 1, 2), 128, dtype=torch.uint8)  # at x = 0
    >>> data = ImageData(images, None, num_grey_levels=256, num_classes=None, name="grey", split="test")
    >>> report = evaluate_ode(model, data, level=1, num_images=4, tolerance=1e-3)
    >>> abs(report.difference) < 0.01, report.outliers  # bits/dim
    (True, [])
    """
    require_denoiser(model)
    labels = labels_given(model, data, given)
    load_solver()  # a missing package is reported before any work
    require_error_bar(num_images, "ODE images")
    require_at_least("batch_size", batch_size, 1)
    generator = torch.Generator().manual_seed(seed)
    index, x = choose_images(data, num_images, generator)
    x_t = like_network(model, model.schedule.noise(x, level, generator=generator))
    labels = None if labels is None else labels[index].to(x_t.device)
    flows = _Flows(model, x_t, level, labels, given, probes, seed)
    start = time.perf_counter()
    scored = flows.score_all(tolerance, batch_size, progress)
    seconds = time.perf_counter() - start
    few = min(TIGHTENED_IMAGES, batch_size, len(x_t))
    progress(f"ODE, {few} images again with the tolerance tightened to {TIGHTENED * tolerance:g}")
    tight = flows.of(0, few, TIGHTENED * tolerance).log_prob.cpu()
    return OdeReport(
        **_statistics(scored, data, index),
        tolerance_shift=float((scored.ode[:few] - tight).mean()) / nats_per_bit_per_dim(data),
        shift_images=few,
        levels=flows.levels(),
        given=given,
        path=_path_of(model),
        level=level,
        tolerance=tolerance,
        probes=probes,
        seconds=seconds,
        index=index,
    )


class _Scored(NamedTuple):
    """Log-likelihoods of images by both methods, float64, on the CPU."""

    evaluations: int
    ode: Tensor  # (n,) nats
    probe_stderr: Tensor  # (n,) nats
    noise_norm: Tensor  # (n,), of `FlowLikelihood`
    single: Tensor | None  # (n,) nats
    single_minus_ode_at: Tensor  # (m, n) nats


@dataclass(frozen=True)
class _Flows:
    """The flows of some images, batch by batch, with all settings fixed except batch and tolerance."""

    model: Denoiser
    x_t: Tensor  # (n, C, H, W)
    level: int
    labels: Tensor | None  # (n,)
    given: Given
    probes: int | None
    seed: int

    def levels(self) -> list[int]:
        """The levels at which the single pass is compared; none without a single pass."""
        if not isinstance(self.model, CDM) or self.given == "all":
            return []
        grid = self.model.schedule.grid(min(COMPARED_LEVELS, self.model.schedule.T), "log_snr")
        return sorted(t for t in grid if t > self.level)

    def of(self, first: int, count: int, tolerance: float, levels: Sequence[int] = ()) -> FlowLikelihood:
        """The flow of `count` images starting at `first`; for "all", the mixture over all classes."""
        flow_of = partial(
            flow_log_prob,
            self.model,
            self.x_t[first : first + count],
            self.level,
            tolerance=tolerance,
            probes=self.probes,
            seed=self.seed + first,
            levels=levels,
        )
        if self.given != "all":
            return flow_of(label=self._labels(first, count))
        prior = log_class_prior(self.model).to(self.x_t.device)
        labels = (torch.full((count,), c, device=self.x_t.device) for c in range(len(prior)))
        return _mixture([flow_of(label=label) for label in labels], prior)

    def score_all(self, tolerance: float, batch_size: int, progress: Progress) -> _Scored:
        """Scores every image by the ODE and by the single pass; processes take batches in turn.

        Batches are never split, because the solver's step sizes and the probes depend on the batch.
        """
        score = partial(self._score, tolerance, batch_size, progress)
        parts = in_turn(score, range(0, len(self.x_t), batch_size))
        single = [part.single for part in parts if part.single is not None]
        return _Scored(
            sum(part.evaluations for part in parts),
            torch.cat([part.ode for part in parts]),
            torch.cat([part.probe_stderr for part in parts]),
            torch.cat([part.noise_norm for part in parts]),
            torch.cat(single) if single else None,
            torch.cat([part.single_minus_ode_at for part in parts], dim=1),
        )

    def _score(self, tolerance: float, batch_size: int, progress: Progress, first: int) -> _Scored:
        """The batch that begins at `first`."""
        batch = self.x_t[first : first + batch_size]
        progress(f"ODE, images {first} to {first + len(batch)} of {len(self.x_t)}")
        levels = self.levels()
        flow = self.of(first, len(batch), tolerance, levels)
        single, at = None, torch.zeros(0, len(batch))
        if isinstance(self.model, CDM) and self.given != "all":
            log_prob = partial(self._single_pass, self.model, self._labels(first, len(batch)))
            single = log_prob(batch, self.level).cpu()
            on_the_way = [log_prob(x, t) for t, x in zip(levels, flow.x, strict=True)]
            at = torch.stack(on_the_way) - flow.log_prob_at
        return _Scored(
            flow.evaluations,
            flow.log_prob.cpu(),
            flow.probe_stderr.cpu(),
            flow.noise_norm.cpu(),
            single,
            at.cpu(),
        )

    @staticmethod
    def _single_pass(model: CDM, labels: Tensor | None, x: Tensor, level: int) -> Tensor:
        return model.log_prob(like_network(model, x), level, label=labels).double()

    def _labels(self, first: int, count: int) -> Tensor | None:
        return None if self.labels is None else self.labels[first : first + count]


def _mixture(flows: list[FlowLikelihood], log_prior: Tensor) -> FlowLikelihood:
    """The flow of all K classes: `log sum_c p(c) p(x|c)`, with the end point of the likeliest class."""
    joint = torch.stack([flow.log_prob for flow in flows]) + log_prior[:, None]  # (K, B)
    errors = torch.stack([flow.probe_stderr for flow in flows]) * joint.softmax(0)
    norms = torch.stack([flow.noise_norm for flow in flows])
    return replace(
        flows[0],
        log_prob=joint.logsumexp(0),
        probe_stderr=errors.square().sum(0).sqrt(),
        evaluations=sum(flow.evaluations for flow in flows),
        noise_norm=norms.gather(0, joint.argmax(0, keepdim=True))[0],
    )


def _statistics(
    scored: _Scored,
    data: ImageData,
    index: Tensor,  # (n,)
) -> dict[str, Any]:
    """The fields of an `OdeReport` that follow from the scores of its images."""
    unit = nats_per_bit_per_dim(data)
    per_image = bits_per_dim(scored.ode, data)
    difference = None if scored.single is None else (scored.ode - scored.single) / unit  # (n,) bits/dim
    difference_at = -scored.single_minus_ode_at / unit  # (m, n)
    off = find_outliers(scored.ode, scored.single, scored.noise_norm, data.images[0].numel())
    return {
        "bits_per_dim": float(per_image.mean()),
        "bits_per_dim_stderr": standard_error(per_image),
        "median_bits_per_dim": float(per_image.nanquantile(0.5)),
        "probe_stderr": float(scored.probe_stderr.square().sum().sqrt()) / len(index) / unit,
        "difference": None if difference is None else float(difference.mean()),
        "difference_stderr": None if difference is None else standard_error(difference),
        "median_difference": None if difference is None else float(difference.nanquantile(0.5)),
        "outliers": index[list(off)].tolist(),
        "warning": describe_outliers({int(index[i]): why for i, why in off.items()}, per_image),
        "difference_at": difference_at.mean(1).tolist(),
        "difference_at_stderr": [standard_error(row) for row in difference_at],
        "evaluations": scored.evaluations,
        "num_images": len(index),
        "per_image": per_image,
    }


def _path_of(model: Denoiser) -> str:
    if isinstance(model, ContinuousDenoiser):
        return f"its own {model.path.name} path in continuous time"
    return f"{model.schedule.T} levels of {model.schedule.name}, eps_hat interpolated between them"
