"""linear and conv1x1 with gradients against PyTorch's own functions, fp32, at the sizes of networks."""

import pytest
import torch
import torch.nn.functional as F

from cdm_fast.ops import conv1x1, linear

# batch, features in, features out, and height = width of the images or None for vectors
SHAPES = {
    "attention": (8, 256, 256, 16),
    "shortcut": (8, 384, 256, 32),
    "mlp": (512, 512, 512, None),
    "head": (128, 512, 1002, None),
}


def _check(got, expected):
    for value, other in zip(got, expected, strict=True):
        assert float((value - other).norm() / other.norm()) <= 1e-4


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_linear_with_gradients(benchmark, compare, device, small, shape):
    batch, features_in, features_out, size = (4, *shape[1:]) if small else shape
    pixels = () if size is None else (size, size)
    ones = (1,) * len(pixels)
    ours, plain = (linear, F.linear) if size is None else (conv1x1, F.conv2d)
    x, weight, bias, cotangent = (
        torch.randn(shape, device=device)
        for shape in (
            (batch, features_in, *pixels),
            (features_out, features_in, *ones),
            (features_out,),
            (batch, features_out, *pixels),
        )
    )
    if pixels:
        x, cotangent = (t.contiguous(memory_format=torch.channels_last) for t in (x, cotangent))
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]

    def with_gradients(function):
        y = function(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, cotangent)

    compare(benchmark, lambda: with_gradients(ours), lambda: with_gradients(plain), _check)
    benchmark.extra_info.update(shape=[batch, features_in, features_out, *pixels], dtype="fp32")
