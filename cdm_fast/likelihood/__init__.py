"""Likelihood of real data in bits per dimension, the audit of it, and what else the level posterior tells.

`evaluate` takes one forward pass; `flow_log_prob` (ODE) and `variational_bound` use the same network's
denoiser alone, and `measure_log_z` integrates the single-pass density. `audit` puts them side by side.
"""

from cdm_fast.likelihood.elbo import VariationalBound, variational_bound
from cdm_fast.likelihood.levels import denoise_blind, estimate_level, level_confusion, mse_per_level
from cdm_fast.likelihood.normalisation import Normalisation, measure_log_z
from cdm_fast.likelihood.ode import FlowLikelihood, flow_log_prob
from cdm_fast.likelihood.ratios import RatioCheck, ratio_check
from cdm_fast.likelihood.single import LikelihoodReport, evaluate

__all__ = [
    "FlowLikelihood",
    "LikelihoodReport",
    "Normalisation",
    "RatioCheck",
    "VariationalBound",
    "denoise_blind",
    "estimate_level",
    "evaluate",
    "flow_log_prob",
    "level_confusion",
    "measure_log_z",
    "mse_per_level",
    "ratio_check",
    "variational_bound",
]
