"""The audit: one data set scored by every likelihood method, and their differences."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from cdm_fast.config.choices import PARTICLES, Given
from cdm_fast.data import ImageData
from cdm_fast.errors import UserError, require_at_least
from cdm_fast.host.progress import Progress, silent
from cdm_fast.likelihood.elbo_report import ElboReport, evaluate_elbo
from cdm_fast.likelihood.log_z import Normalisation, measure_log_z
from cdm_fast.likelihood.ode import load_solver
from cdm_fast.likelihood.ode_report import OdeReport, evaluate_ode
from cdm_fast.likelihood.single_pass import LikelihoodReport, evaluate
from cdm_fast.likelihood.units import nats_per_bit_per_dim
from cdm_fast.model import CDM, Denoiser, evaluation_mode
from cdm_fast.model.cdm import require_likelihood
from cdm_fast.statistics import require_error_bar

LARGEST_ELBO_BATCH, LARGEST_ODE_BATCH = 256, 64  # images; the ODE also holds the graph of its divergence


@dataclass(frozen=True)
class DenoiserAudit:
    """The figures that need only a denoiser: the ODE, and at level 0 the variational bound.

    Fields:
        ode: the report of the ODE.
        elbo: the report of the bound; None above level 0.
        gap, gap_stderr: bound minus ODE, bits/dim, and its standard error; None above level 0. The two share
            no noise. A bound several standard errors below the ODE's figure shows that one of them is wrong.
    """

    ode: OdeReport
    elbo: ElboReport | None
    gap: float | None
    gap_stderr: float | None

    def to_json(self) -> dict[str, Any]:
        """`ode_...` and `elbo_...` figures at the top, details below, ready for `json.dumps`."""
        elbo = self.elbo
        return {
            "method": "audit",
            "ode_bits_per_dim": self.ode.bits_per_dim,
            "ode_bits_per_dim_stderr": self.ode.bits_per_dim_stderr,
            "elbo_bits_per_dim": None if elbo is None else elbo.bits_per_dim,
            "elbo_bits_per_dim_stderr": None if elbo is None else elbo.bits_per_dim_stderr,
            "gap_bits_per_dim": self.gap,
            "gap_bits_per_dim_stderr": self.gap_stderr,
            "ode": self.ode.to_json(),
            "elbo": None if elbo is None else elbo.to_json(),
        }


@dataclass(frozen=True)
class AuditReport:
    """Every figure of one data set at one level.

    Fields:
        single: the single pass, unaudited.
        denoiser: ODE and bound of the same network; they do not depend on the constants of its logits.
        normalisation: log Z of the single pass's density at every level.
        log_z_bits_per_dim, log_z_bits_per_dim_stderr: `log2 Z / d` at the level and its standard error.
        audited_bits_per_dim, audited_bits_per_dim_stderr: the single pass with its density normalised,
            `bits_per_dim + log2 Z / d`, and its standard error.
    """

    single: LikelihoodReport
    denoiser: DenoiserAudit
    normalisation: Normalisation
    log_z_bits_per_dim: float
    log_z_bits_per_dim_stderr: float
    audited_bits_per_dim: float
    audited_bits_per_dim_stderr: float

    @property
    def ode(self) -> OdeReport:
        """The ODE's report."""
        return self.denoiser.ode

    @property
    def elbo(self) -> ElboReport | None:
        """The bound's report; None above level 0."""
        return self.denoiser.elbo

    def to_json(self) -> dict[str, Any]:
        """The single pass at the top, `ode_...`, `elbo_...`, `log_z_...`, `audited_...`, details below."""
        return {
            **self.single.to_json(),
            **self.denoiser.to_json(),
            "log_z_bits_per_dim": self.log_z_bits_per_dim,
            "log_z_bits_per_dim_stderr": self.log_z_bits_per_dim_stderr,
            "audited_bits_per_dim": self.audited_bits_per_dim,
            "audited_bits_per_dim_stderr": self.audited_bits_per_dim_stderr,
            "log_z": asdict(self.normalisation),
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
    elbo_every: int = 1,
    progress: Progress = silent,
    given: Given = "none",
) -> DenoiserAudit:
    """ODE and variational bound of any denoiser on one data set at `level`, 0..T.

    Args:
        batch_size: images per evaluation, capped at `LARGEST_ELBO_BATCH` and `LARGEST_ODE_BATCH`.
        ode_images, tolerance, probes: passed to `evaluate_ode`.
        elbo_images, elbo_every: passed to `evaluate_elbo`.
        seed, progress, given: passed to both.

    Raises:
        UserError: as in `evaluate_ode` and `evaluate_elbo`.
    """
    _require_denoiser_audit(ode_images, elbo_images, elbo_every)
    elbo = gap = error = None
    if level == 0:
        elbo = evaluate_elbo(
            model,
            data,
            elbo_images,
            batch_size=min(batch_size, LARGEST_ELBO_BATCH),
            seed=seed,
            progress=progress,
            given=given,
            every=elbo_every,
        )
    ode = evaluate_ode(
        model,
        data,
        level,
        num_images=ode_images,
        tolerance=tolerance,
        probes=probes,
        batch_size=min(batch_size, LARGEST_ODE_BATCH),
        seed=seed,
        progress=progress,
        given=given,
    )
    if elbo is not None:
        gap = elbo.bits_per_dim - ode.bits_per_dim
        error = math.hypot(elbo.bits_per_dim_stderr, ode.bits_per_dim_stderr)
    return DenoiserAudit(ode, elbo, gap, error)


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
    elbo_every: int = 1,
    particles: int = PARTICLES,
    runs: int = 3,
    moves: int = 1,
    rungs: int | None = None,
    progress: Progress = silent,
) -> AuditReport:
    """Single pass, ODE, variational bound and log Z of one model on one data set at `level`, 0..T.

    Args:
        draws: passed to `evaluate`.
        ode_images, tolerance, probes, elbo_images, elbo_every: passed to `audit_denoiser`.
        particles, runs, moves, rungs: passed to `measure_log_z`.
        batch_size, seed, progress: passed to all of them.

    Raises:
        UserError: as in these functions; arguments are checked before any work.

    >>> import torch
    >>> from cdm_fast import MLP, NoiseSchedule
    >>> network = MLP(dim=2, num_levels=6, hidden=4, depth=1)
    >>> _ = [torch.nn.init.zeros_(parameter) for parameter in network.parameters()]  # density N(0, I)
    >>> model = CDM(torch.nn.Sequential(torch.nn.Flatten(), network), NoiseSchedule.uniform(T=4))
    >>> images = torch.full((100, 1, 1, 2), 128, dtype=torch.uint8)  # at x = 0
    >>> data = ImageData(images, None, num_grey_levels=256, num_classes=None, name="grey", split="test")
    >>> report = audit(model, data, draws=1, ode_images=2, tolerance=0.01, particles=8, runs=2)
    >>> abs(report.log_z_bits_per_dim) < 1e-4  # the single pass is normalised
    True
    >>> report.audited_bits_per_dim == report.single.bits_per_dim + report.log_z_bits_per_dim
    True
    """
    require_likelihood(model)
    if not 0 <= level <= model.schedule.T:
        raise UserError(f"level {level}: give a level from 0 to T = {model.schedule.T}")
    _require_denoiser_audit(ode_images, elbo_images, elbo_every)
    progress(f"single pass: {len(data.images)} images, {draws} draws")
    single = evaluate(model, data, level, draws=draws, batch_size=batch_size, seed=seed)
    normalisation = measure_log_z(
        model,
        data,
        particles=particles,
        runs=runs,
        moves=moves,
        rungs=rungs,
        seed=seed,
        through=(level,),
        progress=progress,
    )
    denoiser = audit_denoiser(
        model,
        data,
        level,
        batch_size=batch_size,
        seed=seed,
        ode_images=ode_images,
        tolerance=tolerance,
        probes=probes,
        elbo_images=elbo_images,
        elbo_every=elbo_every,
        progress=progress,
    )
    log_z, error = (value / nats_per_bit_per_dim(data) for value in normalisation.at(level))
    return AuditReport(
        single=single,
        denoiser=denoiser,
        normalisation=normalisation,
        log_z_bits_per_dim=log_z,
        log_z_bits_per_dim_stderr=error,
        audited_bits_per_dim=single.bits_per_dim + log_z,
        audited_bits_per_dim_stderr=math.hypot(single.bits_per_dim_stderr, error),
    )


def _require_denoiser_audit(ode_images: int, elbo_images: int, elbo_every: int) -> None:
    """Raises UserError if the solver is missing, or there are too few images for an error bar."""
    load_solver()
    require_error_bar(ode_images, "ODE images")
    require_error_bar(elbo_images, "ELBO images")
    require_at_least("elbo_every", elbo_every, 1)
    require_at_least("elbo_images", elbo_images, 2 * elbo_every)
