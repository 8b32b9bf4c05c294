"""One data set scored by every method at once, and their disagreement beside the figures.

# n images, d = C*H*W
"""

import math
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cdm_fast.data import ImageData, bits_of_interval
from cdm_fast.data.draws import choose_images
from cdm_fast.errors import UserError
from cdm_fast.host.distributed import in_turn
from cdm_fast.host.progress import Progress, silent
from cdm_fast.likelihood.elbo import VariationalBound, variational_bound
from cdm_fast.likelihood.given import Given, labels_given, log_class_prior
from cdm_fast.likelihood.log_z import Normalisation, measure_log_z
from cdm_fast.likelihood.ode import ContinuousDenoiser, FlowLikelihood, flow_log_prob, load_solver
from cdm_fast.likelihood.single_pass import LikelihoodReport, evaluate
from cdm_fast.likelihood.units import bits_per_dim, nats_per_bit_per_dim, require_denoiser
from cdm_fast.model import CDM, Denoiser, evaluation_mode
from cdm_fast.model.cdm import require_likelihood
from cdm_fast.model.denoiser import like_network
from cdm_fast.statistics import stderr

COMPARED_LEVELS = 12  # at which single pass and ODE are compared, even in log-SNR
TIGHTENED = 0.1  # the tolerance of the convergence check, relative to the tolerance


@dataclass(frozen=True)
class OdeReport:
    """bits/dim by the probability-flow ODE, beside the single pass on the same noisy images.

    Fields:
        bits_per_dim, bits_per_dim_stderr: mean over images and its standard error (images and probes).
        probe_stderr: the part of it that the random probes of the divergence cause; 0 if it is exact.
        tolerance_shift: by how much the mean over `shift_images` of the images moves when the tolerance is
            tightened tenfold, bits/dim.
        difference, difference_stderr: single pass minus ODE on the same images, bits/dim; None for a model
            without single pass.
        levels, difference_at, difference_at_stderr: the same at levels on the images' way to noise.
        given: "label", each image given its label; "all", of all classes; "none", without a label.
        path: what was integrated: the model's own continuous path, or levels with eps_hat between them.
        level, tolerance, probes, evaluations, num_images, seconds: how it was measured.
        index, per_image: (n,) which images of the split, and the bits/dim of each.
    """

    bits_per_dim: float
    bits_per_dim_stderr: float
    probe_stderr: float
    tolerance_shift: float
    shift_images: int
    difference: float | None
    difference_stderr: float | None
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


@evaluation_mode
def evaluate_ode(
    model: Denoiser,
    data: ImageData,
    level: int = 0,
    num_images: int = 32,
    tolerance: float = 1e-5,
    probes: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    progress: Progress = silent,
    given: Given = "none",
) -> OdeReport:
    """bits/dim of `num_images` images of `data` at `level` by the ODE; see `OdeReport` and `flow_log_prob`.

    Raises:
        UserError: a classifier, a level outside 0..T, fewer than 2 images, and as `flow_log_prob` and
            `labels_given`.
    """
    require_denoiser(model)
    labels = labels_given(model, data, given)
    load_solver()  # its absence is told before any work
    _require("ODE images", num_images, 2)
    generator = torch.Generator().manual_seed(seed)
    index, x = choose_images(data, num_images, generator)
    x_t = like_network(model, model.schedule.noise(x, level, generator=generator))
    labels = None if labels is None else labels[index].to(x_t.device)
    levels: list[int] = []
    if isinstance(model, CDM) and given != "all":
        later = model.schedule.grid(min(COMPARED_LEVELS, model.schedule.T), "log_snr")
        levels = sorted(t for t in later if t > level)

    def flow_at(first: int, count: int, tolerance: float, levels: list[int]) -> FlowLikelihood:
        """The flow of `count` images from `first` on; of all classes, the mixture of their flows."""
        flow_of = partial(
            flow_log_prob,
            model,
            x_t[first : first + count],
            level,
            tolerance=tolerance,
            probes=probes,
            seed=seed + first,
            levels=levels,
        )
        if given != "all":
            return flow_of(label=None if labels is None else labels[first : first + count])
        prior = log_class_prior(model).to(x_t.device)
        each = [flow_of(label=torch.full((count,), c, device=x_t.device)) for c in range(len(prior))]
        joint = torch.stack([flow.log_prob for flow in each]) + prior[:, None]  # (K, n)
        errors = torch.stack([flow.probe_stderr for flow in each]) * joint.softmax(0)
        return replace(
            each[0],
            log_prob=joint.logsumexp(0),
            probe_stderr=errors.square().sum(0).sqrt(),
            evaluations=sum(flow.evaluations for flow in each),
        )

    def integrate(first: int) -> tuple[int, Tensor, Tensor, Tensor, Tensor]:
        """Evaluations, single pass, ODE, error of the probes, difference on the way, of one batch."""
        batch = x_t[first : first + batch_size]
        progress(f"ODE, images {first} to {first + len(batch)} of {len(x_t)}")
        flow = flow_at(first, len(batch), tolerance, levels)
        single, at = torch.zeros(0), torch.zeros(0, len(batch))
        if isinstance(model, CDM) and given != "all":
            label = None if labels is None else labels[first : first + batch_size]
            single = model.log_prob(batch, level, label=label).double()
            on_the_way = [
                model.log_prob(like_network(model, x), t, label=label).double()
                for t, x in zip(levels, flow.x, strict=True)
            ]
            at = torch.stack(on_the_way) - flow.log_prob_at
        return flow.evaluations, single.cpu(), flow.log_prob.cpu(), flow.probe_stderr.cpu(), at.cpu()

    began = time.perf_counter()
    # Whole batches: the step sizes of the solver, and its probes, belong to a batch.
    evaluations, single, ode, probe, at = zip(
        *in_turn(integrate, range(0, len(x_t), batch_size)), strict=True
    )
    seconds = time.perf_counter() - began
    few = min(8, batch_size, len(x_t))
    progress(f"ODE, {few} images again with the tolerance tightened to {TIGHTENED * tolerance:g}")
    tight = flow_at(0, few, TIGHTENED * tolerance, [])
    shift = (torch.cat(ode)[:few] - tight.log_prob.cpu()).mean()
    unit = nats_per_bit_per_dim(data)
    per_image = bits_per_dim(torch.cat(ode), data)
    difference = (torch.cat(ode) - torch.cat(single)) / unit if len(single[0]) else None
    difference_at = -torch.cat(at, dim=1) / unit  # (levels, n)
    return OdeReport(
        bits_per_dim=float(per_image.mean()),
        bits_per_dim_stderr=stderr(per_image),
        probe_stderr=float(torch.cat(probe).square().sum().sqrt()) / len(x_t) / unit,
        tolerance_shift=float(shift) / unit,
        shift_images=few,
        difference=None if difference is None else float(difference.mean()),
        difference_stderr=None if difference is None else stderr(difference),
        levels=levels,
        difference_at=difference_at.mean(1).tolist(),
        difference_at_stderr=[stderr(row) for row in difference_at],
        given=given,
        path=_path_of(model),
        level=level,
        tolerance=tolerance,
        probes=probes,
        evaluations=sum(evaluations),
        num_images=len(x_t),
        seconds=seconds,
        index=index,
        per_image=per_image,
    )


def _path_of(model: Denoiser) -> str:
    if isinstance(model, ContinuousDenoiser):
        return f"its own {model.path.name} path in continuous time"
    return f"{model.schedule.T} levels of {model.schedule.name}, eps_hat interpolated between them"


@dataclass(frozen=True)
class ElboReport:
    """bits/dim by the variational bound, and where they are spent.

    Fields:
        bits_per_dim, bits_per_dim_stderr: mean over images and its standard error.
        prior, reconstruction: those terms, bits/dim; the offset of grey levels is in the second.
        levels, steps: the cost in bits/dim of the step that ends at each level but the noisiest.
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


@evaluation_mode
def evaluate_elbo(
    model: Denoiser,
    data: ImageData,
    num_images: int = 256,
    batch_size: int = 256,
    seed: int = 0,
    progress: Progress = silent,
    given: Given = "none",
) -> ElboReport:
    """bits/dim of `num_images` images of `data` by `variational_bound`.

    Raises UserError for a classifier, fewer than 2 images, and as `labels_given`; and for given "all": noise
    averaged inside the logarithm of a sum over classes is no bound.
    """
    require_denoiser(model)
    if given == "all":
        raise UserError(
            "--given all goes with --method single and ode; the bound is one of a label, or of none"
        )
    labels = labels_given(model, data, given)
    _require("ELBO images", num_images, 2)
    progress(f"variational bound: {min(num_images, len(data.images))} images at {model.schedule.T} levels")
    index, x = choose_images(data, num_images, torch.Generator().manual_seed(seed))
    began = time.perf_counter()
    bound: VariationalBound = variational_bound(
        model,
        like_network(model, x),
        seed=seed,
        batch_size=batch_size,
        label=None if labels is None else labels[index],
    )
    unit = nats_per_bit_per_dim(data)
    per_image = bits_per_dim(-bound.nats, data)
    return ElboReport(
        bits_per_dim=float(per_image.mean()),
        bits_per_dim_stderr=stderr(per_image),
        prior=bound.prior / unit,
        reconstruction=bound.reconstruction / unit + bits_of_interval(data.num_grey_levels, data.pixels),
        levels=bound.levels,
        steps=[step / unit for step in bound.steps],
        given=given,
        num_images=len(x),
        seconds=time.perf_counter() - began,
        index=index,
        per_image=per_image,
    )


@dataclass(frozen=True)
class AuditReport:
    """Every figure of one data set at one level; `elbo`, a bound at level 0, is None above it.

    `audited_bits_per_dim` is the single pass with its density normalised: `bits_per_dim + log2 Z / d`.
    """

    single: LikelihoodReport
    ode: OdeReport
    elbo: ElboReport | None
    normalisation: Normalisation
    log_z_bits_per_dim: float
    log_z_bits_per_dim_stderr: float
    audited_bits_per_dim: float
    audited_bits_per_dim_stderr: float

    def to_json(self) -> dict[str, Any]:
        """The single pass at the top, `ode_...`, `elbo_...`, `log_z_...`, `audited_...`, details below."""
        elbo = self.elbo
        return {
            **self.single.to_json(),
            "method": "audit",
            "ode_bits_per_dim": self.ode.bits_per_dim,
            "ode_bits_per_dim_stderr": self.ode.bits_per_dim_stderr,
            "elbo_bits_per_dim": None if elbo is None else elbo.bits_per_dim,
            "elbo_bits_per_dim_stderr": None if elbo is None else elbo.bits_per_dim_stderr,
            "log_z_bits_per_dim": self.log_z_bits_per_dim,
            "log_z_bits_per_dim_stderr": self.log_z_bits_per_dim_stderr,
            "audited_bits_per_dim": self.audited_bits_per_dim,
            "audited_bits_per_dim_stderr": self.audited_bits_per_dim_stderr,
            "ode": without_images(self.ode),
            "elbo": None if elbo is None else without_images(elbo),
            "log_z": asdict(self.normalisation),
        }


@evaluation_mode
def audit(
    model: CDM,
    data: ImageData,
    level: int = 0,
    *,
    draws: int = 3,
    batch_size: int = 500,
    seed: int = 0,
    ode_images: int = 32,
    tolerance: float = 1e-5,
    probes: int | None = None,
    elbo_images: int = 256,
    particles: int = 128,
    runs: int = 3,
    moves: int = 1,
    rungs: int | None = None,
    progress: Progress = silent,
) -> AuditReport:
    """Single pass, ODE, variational bound and log Z of one model on one data set at `level`, 0..T.

    Arguments as in `evaluate`, `evaluate_ode`, `evaluate_elbo` and `measure_log_z`. Raises UserError as they
    do, before the work begins for whatever can be known then.
    """
    require_likelihood(model)
    load_solver()
    if not 0 <= level <= model.schedule.T:
        raise UserError(f"level {level}: an audit is of one of 0 to T = {model.schedule.T}")
    _require("ODE images", ode_images, 2)
    _require("ELBO images", elbo_images, 2)
    progress(f"single pass: {len(data.images)} images, {draws} draws")
    single = evaluate(model, data, level, draws, batch_size, seed)
    normalisation = measure_log_z(
        model, data, particles, runs, moves, rungs, seed, through=(level,), progress=progress
    )
    elbo = None
    if level == 0:
        elbo = evaluate_elbo(model, data, elbo_images, min(batch_size, 256), seed, progress)
    ode = evaluate_ode(model, data, level, ode_images, tolerance, probes, min(batch_size, 64), seed, progress)
    log_z, error = (value / nats_per_bit_per_dim(data) for value in normalisation.at(level))
    return AuditReport(
        single=single,
        ode=ode,
        elbo=elbo,
        normalisation=normalisation,
        log_z_bits_per_dim=log_z,
        log_z_bits_per_dim_stderr=error,
        audited_bits_per_dim=single.bits_per_dim + log_z,
        audited_bits_per_dim_stderr=math.hypot(single.bits_per_dim_stderr, error),
    )


@dataclass(frozen=True)
class DenoiserAudit:
    """The figures of a model that denoises only: its ODE, and at level 0 a bound, None above it.

    `gap` is the bound minus the ODE, bits/dim, with its standard error: the two share no images' noise, and a
    bound below the ODE's figure by several errors says that one of them is wrong for this model.
    """

    ode: OdeReport
    elbo: ElboReport | None
    gap: float | None
    gap_stderr: float | None

    def to_json(self) -> dict[str, Any]:
        """`ode_...` and `elbo_...` figures at the top, details below."""
        elbo = self.elbo
        return {
            "method": "audit",
            "ode_bits_per_dim": self.ode.bits_per_dim,
            "ode_bits_per_dim_stderr": self.ode.bits_per_dim_stderr,
            "elbo_bits_per_dim": None if elbo is None else elbo.bits_per_dim,
            "elbo_bits_per_dim_stderr": None if elbo is None else elbo.bits_per_dim_stderr,
            "gap_bits_per_dim": self.gap,
            "gap_bits_per_dim_stderr": self.gap_stderr,
            "ode": without_images(self.ode),
            "elbo": None if elbo is None else without_images(elbo),
        }


@evaluation_mode
def audit_denoiser(
    model: Denoiser,
    data: ImageData,
    level: int = 0,
    *,
    batch_size: int = 256,
    seed: int = 0,
    ode_images: int = 32,
    tolerance: float = 1e-5,
    probes: int | None = None,
    elbo_images: int = 256,
    progress: Progress = silent,
    given: Given = "none",
) -> DenoiserAudit:
    """ODE and variational bound of any denoiser on one data set at `level`, 0..T.

    Arguments and errors as in `evaluate_ode` and `evaluate_elbo`.
    """
    load_solver()
    _require("ODE images", ode_images, 2)
    _require("ELBO images", elbo_images, 2)
    elbo = gap = error = None
    if level == 0:
        elbo = evaluate_elbo(model, data, elbo_images, min(batch_size, 256), seed, progress, given)
    ode = evaluate_ode(
        model, data, level, ode_images, tolerance, probes, min(batch_size, 64), seed, progress, given
    )
    if elbo is not None:
        gap = elbo.bits_per_dim - ode.bits_per_dim
        error = math.hypot(elbo.bits_per_dim_stderr, ode.bits_per_dim_stderr)
    return DenoiserAudit(ode, elbo, gap, error)


def without_images(report: OdeReport | ElboReport) -> dict[str, Any]:
    """The fields of a report but those of single images, ready for `json.dumps`."""
    fields = asdict(report)
    del fields["index"], fields["per_image"]
    return fields


def _require(what: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"{value} {what}: at least {least} are needed for an error bar")
