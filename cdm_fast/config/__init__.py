"""The description of a run: settings, presets, bounds. Does not import torch."""

from cdm_fast.config.check import check
from cdm_fast.config.choices import Compile, Objective, Precision, Sampler
from cdm_fast.config.presets import PRESETS, Preset, preset
from cdm_fast.config.settings import (
    DataConfig,
    ImageShape,
    NetworkConfig,
    OutputConfig,
    PixelMap,
    RunConfig,
    Schedule,
    ScheduleConfig,
    TrainConfig,
)

__all__ = [
    "Compile",
    "DataConfig",
    "ImageShape",
    "NetworkConfig",
    "Objective",
    "OutputConfig",
    "PRESETS",
    "PixelMap",
    "Precision",
    "Preset",
    "RunConfig",
    "Sampler",
    "Schedule",
    "ScheduleConfig",
    "TrainConfig",
    "check",
    "preset",
]
