"""Models on a noise schedule: CDM, DDM, and models built from them."""

from cdm_fast.model.cdm import CDM
from cdm_fast.model.composition import Mixture, Product, negation
from cdm_fast.model.conditioned import Between, Guided, GuidedEnergy, OfClass
from cdm_fast.model.denoiser import DDM, Denoiser, any_parameter, evaluation_mode
from cdm_fast.model.energy import Energy, log_normal
from cdm_fast.model.schedule import NoiseSchedule

__all__ = [
    "Between",
    "CDM",
    "DDM",
    "Denoiser",
    "Energy",
    "Guided",
    "GuidedEnergy",
    "Mixture",
    "NoiseSchedule",
    "OfClass",
    "Product",
    "any_parameter",
    "evaluation_mode",
    "log_normal",
    "negation",
]
