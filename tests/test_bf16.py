"""bf16 on this processor: every preset's network computes in it what it computes in fp32."""

import pytest
import torch

from cdm_fast.config import preset
from cdm_fast.config.presets import PRESETS
from cdm_fast.runs.build import build_model


@pytest.mark.parametrize("name", [name for name in PRESETS if "celeba" not in name])
def test_a_preset_in_bf16_evaluates_as_in_fp32(name):
    """A wrong kernel of a library, for sizes that only a preset has, is off by more than the values are."""
    torch.manual_seed(0)
    model = build_model(preset(name)).eval().to(memory_format=torch.channels_last)
    x = torch.randn(2, *model.input_shape).contiguous(memory_format=torch.channels_last)
    level = torch.tensor([1, model.schedule.T])
    with torch.no_grad():
        for parameter in model.parameters():  # nothing that starts at zero may hide a layer
            parameter.add_(0.02 * torch.randn(parameter.shape))
        expected = model.network.features(x)[0], model.denoise(x, level)
        with torch.autocast("cpu", torch.bfloat16):
            found = model.network.features(x)[0], model.denoise(x, level)
    for value, truth in zip(found, expected, strict=True):
        assert float((value.float() - truth).norm() / truth.norm()) < 0.1
