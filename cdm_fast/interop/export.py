"""Export of models for other programs: as graphs of torch.export, and as ONNX files.

# B batch, L = T+2 noise levels, K classes
"""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from cdm_fast.errors import UserError
from cdm_fast.model import CDM, any_parameter
from cdm_fast.ops import use_backend


class Likelihood(nn.Module):
    """`log p_t(x)` in nats at every level, (B, L), as a module with one input."""

    outputs = ("log_prob",)

    def __init__(self, model: CDM) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """`x` (B, ...) in [-1, 1] -> (B, L)."""
        return self.model.log_prob_levels(x)


class ClassPosterior(nn.Module):
    """`log p(c | x)` in nats at one level under the training class prior, (B, K), as a module with one input.

    Raises UserError for a model without classes.
    """

    outputs = ("log_prob",)

    def __init__(self, model: CDM, level: int = 0) -> None:
        super().__init__()
        if model.num_classes is None:
            raise UserError("this model was trained without classes: train with --conditioning joint")
        self.model, self.level = model, level

    def forward(self, x: Tensor) -> Tensor:
        """`x` (B, ...) in [-1, 1] -> (B, K)."""
        return self.model.log_class_posterior(x, self.level)


class Inspection(nn.Module):
    """Log-density, level posterior and denoised version of images with unknown noise, as a module.

    Returns `log p(x|c)` in nats at level 0, (B, K), or `log p(x)`, (B, 1), for a model without classes;
    the posterior `log p(t|x)` under a uniform prior over levels, (B, L); and the denoised image at the most
    probable of the levels 1..T, like x. The gradient is the network's explicit adjoint, so the graph holds no
    autograd.
    """

    outputs = ("log_prob", "log_level", "denoised")

    def __init__(self, model: CDM) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`x` (B, ...) in [-1, 1] -> (B, K), (B, L), (B, ...)."""
        model = self.model
        log_prob, of_levels, score = self._evaluate(x)
        log_level = of_levels.log_softmax(1)
        level = log_level[:, 1:-1].argmax(1) + 1
        column = (-1, *[1] * (x.dim() - 1))
        a, s = (table.to(x.dtype)[level].view(column) for table in (model.a, model.s))
        return log_prob, log_level, (x + s * s * score(level)) / a  # Tweedie's formula

    def _evaluate(self, x: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """The first output, `log p_t(x)` at every level (B, L), and the score at levels (B,), like x.

        With joint logits one evaluation of the network gives all of them.
        """
        model = self.model
        if model.conditioning == "joint":
            each, pull = model.log_prob_levels_each_and_pullback(x)
            marginal = torch.zeros_like(each[:, 0], dtype=x.dtype)
            marginal[:, -1] = 1
            return each[:, 0, :-1], each[:, :, -1], lambda level: pull(level, marginal)
        of_levels = model.log_prob_levels(x)
        log_prob = of_levels[:, :1] if model.num_classes is None else model.log_prob_classes(x)
        return log_prob, of_levels, lambda level: model.score(x, level)


def export(module: Likelihood | ClassPosterior | Inspection) -> torch.export.ExportedProgram:
    """The module as one graph of PyTorch operations, for any batch size, which `torch.export.save` can write.

    It runs without cdm_fast. The module is left in evaluation mode. Raises UserError if the model does not
    know the shape of one image.
    """
    module = module.eval()
    model = module.model
    if model.input_shape is None:
        raise UserError("the model does not know the shape of one image: build it with input_shape=")
    x = any_parameter(model).new_zeros((2, *model.input_shape))
    with use_backend("reference"), torch.no_grad():
        return torch.export.export(module, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch")}})


def export_onnx(
    module: Likelihood | ClassPosterior | Inspection,
    path: str | Path,  # ends in .onnx
) -> Path:
    """The module as an ONNX file, input `x`, outputs `module.outputs`, any batch size.

    Raises UserError without the packages of the extra `onnx`, and as `export`.
    """
    try:
        import onnxscript  # noqa: F401  (needed by torch.onnx)
    except ImportError as error:
        raise UserError("ONNX needs onnx and onnxscript: pip install 'cdm_fast[onnx]'") from error
    with _quiet():
        program = torch.onnx.export(
            export(module), input_names=["x"], output_names=[*module.outputs], dynamo=True, verbose=False
        )
    assert program is not None
    program.save(str(path))
    return Path(path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporter's notes about itself: missing torchvision, deprecated calls in its own code."""
    notes = logging.getLogger("torch.onnx")
    level = notes.level
    notes.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        notes.setLevel(level)
