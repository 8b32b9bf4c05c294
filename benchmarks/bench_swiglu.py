"""swiglu against F.silu, a product and autograd, at the shapes of the transformer presets.

Timed: y, the adjoint <g, y> -> grad_h, and the gradients of both with respect to g and h.
"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.support.cases import DTYPES, close_in_norm
from cdm_fast.ops import swiglu_vjp, swiglu_with_input

SHAPES = [(8, 64, 1376), (64, 49, 352), (128, 16, 352), (8, 256, 1376)]  # B, N, H


def _fused(h, g, grad_y, v):
    y, h_again = swiglu_with_input(h)
    grad_h = swiglu_vjp(g, h_again)
    return y, grad_h, *torch.autograd.grad((y, grad_h), (g, h), (grad_y, v))


def _plain(h, g, grad_y, v):
    gate, value = h.chunk(2, -1)
    y = F.silu(gate) * value
    (grad_h,) = torch.autograd.grad(y, h, g, create_graph=True)
    return y, grad_h, *torch.autograd.grad((y, grad_h), (g, h), (grad_y, v))


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_swiglu(benchmark, compare, device, small, shape, dtype):
    batch, tokens, hidden = (2 if small else shape[0]), *shape[1:]
    torch.manual_seed(0)
    wide, narrow = (batch, tokens, 2 * hidden), (batch, tokens, hidden)
    h, g, grad_y, v = (torch.randn(size).to(device, dtype) for size in (wide, narrow, narrow, wide))
    inputs = h.requires_grad_(), g.requires_grad_(), grad_y, v
    compare(benchmark, lambda: _fused(*inputs), lambda: _plain(*inputs), close_in_norm(dtype))
    benchmark.extra_info["shape"] = [batch, tokens, hidden]
