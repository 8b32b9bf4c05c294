"""Models of other programs here, and ours there: diffusers, torch.export, ONNX, the paper's public code."""

from cdm_fast.interop.diffusers import NoisePredictor, Prediction, Scheduler, build_scheduler
from cdm_fast.interop.export import ClassPosterior, Likelihood, export, export_onnx

__all__ = [
    "ClassPosterior",
    "Likelihood",
    "NoisePredictor",
    "Prediction",
    "Scheduler",
    "build_scheduler",
    "export",
    "export_onnx",
]
