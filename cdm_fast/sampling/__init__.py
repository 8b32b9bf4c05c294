"""From noise to images: samplers, and restoration by sampling."""

from cdm_fast.model.conditioned import Between, Guided, GuidedEnergy
from cdm_fast.sampling.noise import ImageNoise
from cdm_fast.sampling.plain import Noise, ddim, ddpm, dpm_solver_pp_2m, euler_ot, heun
from cdm_fast.sampling.sample import SAMPLERS, sample

__all__ = [
    "Between",
    "Guided",
    "GuidedEnergy",
    "ImageNoise",
    "Noise",
    "SAMPLERS",
    "ddim",
    "ddpm",
    "dpm_solver_pp_2m",
    "euler_ot",
    "heun",
    "sample",
]
