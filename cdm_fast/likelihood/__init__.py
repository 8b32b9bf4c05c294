"""Likelihood of real data in bits per dimension, its audit, and noise estimates from the level posterior.

`evaluate` needs one forward pass. `evaluate_ode` (`flow_log_prob`) and `evaluate_elbo` (`variational_bound`)
use only the denoiser of the same network, and `measure_log_z` integrates the single-pass density. `audit`
reports them side by side.
"""

from cdm_fast.config.choices import Given
from cdm_fast.likelihood.audits import (
    AuditReport,
    DenoiserAudit,
    audit,
    audit_denoiser,
)
from cdm_fast.likelihood.elbo import VariationalBound, variational_bound
from cdm_fast.likelihood.elbo_report import ElboReport, evaluate_elbo
from cdm_fast.likelihood.levels import (
    SigmaCalibration,
    calibrate_sigma,
    denoise_blind,
    estimate_level,
    level_confusion,
    mse_per_level,
)
from cdm_fast.likelihood.log_z import Normalisation, measure_log_z
from cdm_fast.likelihood.ode import ContinuousDenoiser, FlowLikelihood, flow_log_prob
from cdm_fast.likelihood.ode_report import OdeReport, evaluate_ode
from cdm_fast.likelihood.ratios import RatioCheck, ratio_check
from cdm_fast.likelihood.single_pass import LikelihoodReport, evaluate
from cdm_fast.likelihood.units import bits_per_dim

__all__ = [
    "AuditReport",
    "ContinuousDenoiser",
    "DenoiserAudit",
    "ElboReport",
    "FlowLikelihood",
    "Given",
    "LikelihoodReport",
    "Normalisation",
    "OdeReport",
    "RatioCheck",
    "SigmaCalibration",
    "VariationalBound",
    "audit",
    "audit_denoiser",
    "bits_per_dim",
    "calibrate_sigma",
    "denoise_blind",
    "estimate_level",
    "evaluate",
    "evaluate_elbo",
    "evaluate_ode",
    "flow_log_prob",
    "level_confusion",
    "measure_log_z",
    "mse_per_level",
    "ratio_check",
    "variational_bound",
]
