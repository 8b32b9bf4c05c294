"""`linear`, the product with a matrix of weights.

PyTorch gives it to MKL in fp32 on the CPU, which runs at half speed on processors other than Intel's. oneDNN,
part of PyTorch too and its choice for convolutions, does not: large fp32 products go there. All other devices
and dtypes, small products, compiled graphs and the reference backend keep PyTorch's own function.

# M rows, K features in, N features out
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_fast.ops import _backend

# oneDNN's `x W^T + b` of matrices, which torch.compile uses too; below autograd.
_ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)

# Below so many multiplications the call costs more than it gains (20 microseconds); below so many weights
# memory is the limit, and the two libraries are equally fast.
_MIN_MULTIPLICATIONS = 1 << 22
_MIN_WEIGHTS = 1 << 14


def has_onednn(x: Tensor) -> bool:
    """Whether `onednn_linear` takes tensors like `x`: fp32 on the CPU, in a PyTorch that has it."""
    return _ONEDNN_LINEAR is not None and x.dtype == torch.float32 and x.device.type == "cpu"


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + b` of fp32 matrices (M, K) and (N, K), of any strides; without a derivative."""
    assert _ONEDNN_LINEAR is not None
    return _ONEDNN_LINEAR(_dense(x), _dense(weight), bias, "none", [], "")


def _dense(matrix: Tensor) -> Tensor:
    """Copied if neither its rows nor its columns lie end to end: oneDNN has only a plain loop for those."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + b`: x (..., K), weight (N, K), bias (N,) -> (..., N). As `torch.nn.functional.linear`.

    Differentiable to any order; under `torch.func` on the reference backend.
    """
    if not _onednn_pays(x, weight):
        return F.linear(x, weight, bias)
    rows = _OneDNNLinear.apply(x.flatten(0, -2), weight, bias)
    return rows.unflatten(0, x.shape[:-1])


def _onednn_pays(x: Tensor, weight: Tensor) -> bool:
    if not has_onednn(x) or torch.compiler.is_compiling() or _backend.selected_backend() == "reference":
        return False
    multiplications = x.shape[:-1].numel() * weight.numel()
    large = multiplications >= _MIN_MULTIPLICATIONS and weight.numel() >= _MIN_WEIGHTS
    return large and weight.dtype == x.dtype and not torch.is_autocast_enabled("cpu")


class _OneDNNLinear(torch.autograd.Function):
    """Its gradients are products of the same kind, so that it can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        return (
            linear(g, weight.t()) if ctx.needs_input_grad[0] else None,
            linear(g.t(), x.t()) if ctx.needs_input_grad[1] else None,
            g.sum(0) if ctx.needs_input_grad[2] else None,
        )
