"""`linear`, the product with a matrix of weights.

For fp32 on a CPU PyTorch uses MKL, which runs at half speed on processors with AVX-512 other than Intel's: it
uses AVX2 there. oneDNN, which PyTorch also contains and uses for convolutions, does not have this problem, so
large fp32 products use it there. On processors that have AVX2 alone MKL is up to 1.9 times as fast as oneDNN;
on Intel's own the two are equally fast, and MKL multiplies batches of matrices without copies.
All other devices and dtypes, small products, compiled graphs and the reference backend use PyTorch's own
function.

# M rows, K features in, N features out
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_fast.ops import backend

# oneDNN's `x W^T + b` of matrices, which torch.compile uses too; below autograd.
_ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)

# Below this number of multiplications the call costs more than it gains (20 microseconds); below this number
# of weights memory is the limit, and the two libraries are equally fast.
_MIN_MULTIPLICATIONS = 1 << 22
_MIN_WEIGHTS = 1 << 14


def onednn_pays(x: Tensor, weight: Tensor) -> bool:
    """True if `onednn_linear` is faster for the product of matrices with the last two sizes of these."""
    if _ONEDNN_LINEAR is None or x.dtype != torch.float32 or x.device.type != "cpu" or not _mkl_is_slow():
        return False
    weights = weight.shape[-2] * weight.shape[-1]
    return weights >= _MIN_WEIGHTS and x.shape[-2] * weights >= _MIN_MULTIPLICATIONS


@cache
def _mkl_is_slow() -> bool:
    """Whether the CPU has AVX-512 and Linux names another vendor than Intel."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return True
    return not any(line.startswith("vendor_id") and line.endswith("GenuineIntel") for line in lines)


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + b` of fp32 matrices (M, K) and (N, K), of any strides; without a derivative."""
    assert _ONEDNN_LINEAR is not None
    return _ONEDNN_LINEAR(_dense(x), _dense(weight), bias, "none", [], "")


def _dense(matrix: Tensor) -> Tensor:
    """A copy if neither rows nor columns are contiguous, for which oneDNN only has a plain loop."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + b`: x (..., K), weight (N, K), bias (N,) -> (..., N). As `torch.nn.functional.linear`.

    Differentiable to any order; `torch.func` needs the reference backend.
    """
    plain = torch.compiler.is_compiling() or backend.selected_backend() == "reference"
    if plain or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    rows = x.flatten(0, -2)
    if not onednn_pays(rows, weight) or weight.dtype != x.dtype:
        return F.linear(x, weight, bias)
    return _OneDNNLinear.apply(rows, weight, bias).unflatten(0, x.shape[:-1])


class _OneDNNLinear(torch.autograd.Function):
    """`onednn_linear` whose gradients are products of the same kind, so it can be differentiated again."""

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
