"""group_norm_silu against F.group_norm + F.silu and autograd, at the shapes of the 33.4 M network.

Timed: y, the adjoint <g, y> -> grad_x, and the gradients of both with respect to g, x, weight and bias. All
parameters are fp32 for the op and of the images' dtype for PyTorch, as autocast would have them.

A second benchmark times the op on two separate pieces against the op on their concatenation, with its copy.
"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.support.cases import close_in_norm
from cdm_fast.ops import group_norm_silu, group_norm_silu_vjp

GROUPS, EPS = 32, 1e-6
SHAPES = [
    (8, 128, 32, 32),
    (8, 384, 32, 32),
    (8, 256, 16, 16),
    (8, 512, 16, 16),
    (8, 256, 8, 8),
    (8, 256, 4, 4),
]
SPLIT_SHAPES = [(8, 256, 128, 32, 32), (8, 256, 256, 16, 16)]  # B, channels of the two pieces, H, W
LAYOUTS = {"nchw": torch.contiguous_format, "channels-last": torch.channels_last}


def _fused(x, weight, bias, g, grad_y, v):
    y, mean, rstd = group_norm_silu(x, weight, bias, GROUPS, EPS)
    grad_x = group_norm_silu_vjp(g, x, weight, bias, mean, rstd, GROUPS)
    return y, grad_x, *torch.autograd.grad((y, grad_x), (g, x, weight, bias), (grad_y, v))


def _plain(x, weight, bias, g, grad_y, v):
    y = F.silu(F.group_norm(x, GROUPS, weight, bias, EPS))
    (grad_x,) = torch.autograd.grad(y, x, g, create_graph=True)
    return y, grad_x, *torch.autograd.grad((y, grad_x), (g, x, weight, bias), (grad_y, v))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_group_norm_silu(benchmark, compare, device, small, shape, dtype, layout):
    if small:
        shape = (2, *shape[1:])
    torch.manual_seed(0)
    images = [
        torch.randn(shape).to(device, dtype, memory_format=LAYOUTS[layout]).requires_grad_() for _ in range(4)
    ]
    x, g, grad_y, v = images
    weight, bias = (
        (1 + 0.1 * torch.randn(shape[1], device=device)),
        0.1 * torch.randn(shape[1], device=device),
    )
    ours = [parameter.detach().requires_grad_() for parameter in (weight, bias)]
    theirs = [parameter.detach().to(dtype).requires_grad_() for parameter in (weight, bias)]
    cotangents = g, grad_y.detach(), v.detach()
    compare(
        benchmark,
        lambda: _fused(x, *ours, *cotangents),
        lambda: _plain(x, *theirs, *cotangents),
        close_in_norm(dtype),
    )
    benchmark.extra_info["shape"] = list(shape)


def _in_two(x, skip, weight, bias, g, grad_y, v, v_skip):
    y, mean, rstd = group_norm_silu(x, weight, bias, GROUPS, EPS, skip=skip)
    grads = group_norm_silu_vjp(g, x, weight, bias, mean, rstd, GROUPS, skip=skip)
    leaves = g, x, skip, weight, bias
    return y, *grads, *torch.autograd.grad((y, *grads), leaves, (grad_y, v, v_skip))


def _concatenated(x, skip, weight, bias, g, grad_y, v, v_skip):
    whole = torch.cat((x, skip), 1)
    y, mean, rstd = group_norm_silu(whole, weight, bias, GROUPS, EPS)
    grads = group_norm_silu_vjp(g, whole, weight, bias, mean, rstd, GROUPS).split(
        (x.shape[1], skip.shape[1]), 1
    )
    leaves = g, x, skip, weight, bias
    return y, *grads, *torch.autograd.grad((y, *grads), leaves, (grad_y, v, v_skip))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SPLIT_SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_group_norm_silu_in_two_pieces(benchmark, compare, device, small, shape, dtype, layout):
    batch, first, second, *spatial = shape
    if small:
        batch = 2
    torch.manual_seed(0)

    def image(channels):
        return torch.randn(batch, channels, *spatial).to(device, dtype, memory_format=LAYOUTS[layout])

    channels = first + second
    x, skip, g = (image(width).requires_grad_() for width in (first, second, channels))
    weight, bias = (
        parameter.to(device).requires_grad_()
        for parameter in (1 + 0.1 * torch.randn(channels), 0.1 * torch.randn(channels))
    )
    inputs = x, skip, weight, bias, g, image(channels), image(first), image(second)
    compare(benchmark, lambda: _in_two(*inputs), lambda: _concatenated(*inputs), close_in_norm(dtype))
    benchmark.extra_info["shape"] = list(shape)
