"""From noise to images: samplers, and restoration by sampling."""

from cdm_fast.model.conditioned import Between, Guided, GuidedEnergy
from cdm_fast.sampling.blind import Blind, blind
from cdm_fast.sampling.corrected import MALA, SMC, MoveLog
from cdm_fast.sampling.noise import ImageNoise
from cdm_fast.sampling.plain import DDIM, ddim, ddpm, dpm_solver_pp_2m, euler_ot, heun
from cdm_fast.sampling.restoration import restore
from cdm_fast.sampling.sample import SAMPLERS, sample, sampler_name
from cdm_fast.sampling.sampler import Callback, Noise, Sampler, Step

__all__ = [
    "Between",
    "Blind",
    "Callback",
    "DDIM",
    "Guided",
    "GuidedEnergy",
    "ImageNoise",
    "MALA",
    "MoveLog",
    "Noise",
    "SAMPLERS",
    "SMC",
    "Sampler",
    "Step",
    "blind",
    "ddim",
    "ddpm",
    "dpm_solver_pp_2m",
    "euler_ot",
    "heun",
    "restore",
    "sample",
    "sampler_name",
]
