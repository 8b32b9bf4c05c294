"""rms_norm against F.rms_norm and autograd, at the shapes of the transformer presets.

Timed: y, the adjoint <g, y> -> grad_x, and the gradients of both with respect to g, x and weight. The weight
is fp32 for the op and of the tokens' dtype for PyTorch, as autocast would have it.
"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.support.cases import DTYPES, close_in_norm
from cdm_fast.ops import rms_norm, rms_norm_vjp

EPS = 1e-6
SHAPES = [(8, 64, 512), (64, 49, 128), (128, 16, 128), (8, 256, 512)]


def _fused(x, weight, g, grad_y, v):
    y, rstd = rms_norm(x, weight, EPS)
    grad_x = rms_norm_vjp(g, x, weight, rstd)
    return y, grad_x, *torch.autograd.grad((y, grad_x), (g, x, weight), (grad_y, v))


def _plain(x, weight, g, grad_y, v):
    y = F.rms_norm(x, weight.shape, weight, EPS)
    (grad_x,) = torch.autograd.grad(y, x, g, create_graph=True)
    return y, grad_x, *torch.autograd.grad((y, grad_x), (g, x, weight), (grad_y, v))


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_rms_norm(benchmark, compare, device, small, shape, dtype):
    if small:
        shape = (2, *shape[1:])
    torch.manual_seed(0)
    x, g, grad_y, v = (torch.randn(shape).to(device, dtype).requires_grad_() for _ in range(4))
    weight = 1 + 0.1 * torch.randn(shape[2], device=device)
    ours, theirs = weight.requires_grad_(), weight.detach().to(dtype).requires_grad_()
    cotangents = g, grad_y.detach(), v.detach()
    compare(
        benchmark,
        lambda: _fused(x, ours, *cotangents),
        lambda: _plain(x, theirs, *cotangents),
        close_in_norm(dtype),
    )
    benchmark.extra_info["shape"] = list(shape)
