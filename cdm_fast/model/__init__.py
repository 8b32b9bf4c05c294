"""Models on a noise schedule: CDM, DDM, and what is made of them."""

from cdm_fast.model.cdm import CDM
from cdm_fast.model.denoiser import DDM, Denoiser, measures, prototype
from cdm_fast.model.energy import Energy, log_normal

__all__ = [
    "CDM",
    "DDM",
    "Denoiser",
    "Energy",
    "log_normal",
    "measures",
    "prototype",
]
