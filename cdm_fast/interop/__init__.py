"""Models of other programs in this library, and models of this library in other programs.

Other programs' models become denoisers, with likelihoods by ODE and bound: `from_diffusers`,
`load_diffusers`, `SigmaDenoiser` (EDM), `ScoreSDE`, `FlowMatching`, and any callable as `PathDenoiser` or
`LevelDenoiser`. The paper's public checkpoints become runs: `convert.convert`. Models of this library work
with diffusers' schedulers, and can be exported as torch.export programs and ONNX files.
"""

from cdm_fast.interop.denoisers import (
    FlowMatching,
    Foreign,
    LevelDenoiser,
    PathDenoiser,
    ScoreSDE,
    SigmaDenoiser,
)
from cdm_fast.interop.diffusers import NoisePredictor, Prediction, Scheduler, build_scheduler
from cdm_fast.interop.edm import read_edm
from cdm_fast.interop.export import ClassPosterior, Inspection, Likelihood, export, export_onnx
from cdm_fast.interop.from_diffusers import from_diffusers, load_diffusers
from cdm_fast.interop.paths import sigma_path, straight_path, sub_vp_path, ve_path, vp_path

__all__ = [
    "ClassPosterior",
    "FlowMatching",
    "Foreign",
    "LevelDenoiser",
    "Inspection",
    "Likelihood",
    "NoisePredictor",
    "PathDenoiser",
    "Prediction",
    "Scheduler",
    "ScoreSDE",
    "SigmaDenoiser",
    "build_scheduler",
    "export",
    "export_onnx",
    "from_diffusers",
    "load_diffusers",
    "read_edm",
    "sigma_path",
    "straight_path",
    "sub_vp_path",
    "ve_path",
    "vp_path",
]
