"""Export of models for other programs: as graphs of torch.export, and as ONNX files.

# B batch, L = T+2 noise levels, K classes
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from cdm_fast.errors import UserError
from cdm_fast.model import CDM, any_parameter
from cdm_fast.ops import use_backend


class Likelihood(nn.Module):
    """`log p_t(x)` in nats at every level, (B, L), as a plain module of one tensor."""

    def __init__(self, model: CDM) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """`x` (B, ...) in [-1, 1] -> (B, L)."""
        return self.model.log_prob_levels(x)


class ClassPosterior(nn.Module):
    """`log p(c | x)` in nats at a level, (B, K), as a plain module of one tensor.

    Raises UserError for a model without classes.
    """

    def __init__(self, model: CDM, level: int = 0) -> None:
        super().__init__()
        if model.num_classes is None:
            raise UserError("this model was trained without classes: train with --conditioning joint")
        self.model, self.level = model, level

    def forward(self, x: Tensor) -> Tensor:
        """`x` (B, ...) in [-1, 1] -> (B, K)."""
        return self.model.log_class_posterior(x, self.level)


def export(module: Likelihood | ClassPosterior) -> torch.export.ExportedProgram:
    """The module as one graph of PyTorch operations, for any batch size, which `torch.export.save` can write.

    It runs without cdm_fast; dropout is off.
    """
    module = module.eval()
    model = module.model
    if model.input_shape is None:
        raise UserError("the model does not know the shape of one image: build it with input_shape=")
    x = any_parameter(model).new_zeros((2, *model.input_shape))
    with use_backend("reference"), torch.no_grad():
        return torch.export.export(module, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})


def export_onnx(
    module: Likelihood | ClassPosterior,
    path: str | Path,  # ends in .onnx
) -> Path:
    """The module as an ONNX file, input `x`, output `log_prob`, any batch size.

    Raises UserError without the packages of the extra `onnx`.
    """
    try:
        import onnxscript  # noqa: F401  (needed by torch.onnx)
    except ImportError as error:
        raise UserError("ONNX needs onnx and onnxscript: pip install 'cdm_fast[onnx]'") from error
    program = torch.onnx.export(export(module), input_names=["x"], output_names=["log_prob"], dynamo=True)
    assert program is not None
    program.save(str(path))
    return Path(path)
