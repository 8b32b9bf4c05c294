"""linear with its gradients against PyTorch's own function, in fp32, at the sizes of MLPs and of heads.

`onednn` takes oneDNN on every processor: the ratios tell whether `onednn_pays` is right about this one.
"""

from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

from cdm_fast.ops import linear

# batch, features in, features out
SHAPES = {
    "mlp-128": (256, 128, 128),
    "mlp-256": (512, 256, 256),
    "mlp-512": (512, 512, 512),
    "head": (128, 512, 1002),
}


def _check(got, expected):
    for value, other in zip(got, expected, strict=True):
        assert float((value - other).norm() / other.norm()) <= 1e-4


@pytest.mark.parametrize("library", ["chosen", "onednn"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_linear_with_gradients(benchmark, compare, device, small, monkeypatch, shape, library):
    if library == "onednn":
        if device.type != "cpu":
            pytest.skip("oneDNN runs on the CPU")
        monkeypatch.setattr(import_module("cdm_fast.ops.linear"), "_mkl_is_slow", lambda: True)
    batch, features_in, features_out = (4, *shape[1:]) if small else shape
    shapes = (batch, features_in), (features_out, features_in), (features_out,)
    leaves = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
    cotangent = torch.randn(batch, features_out, device=device)

    def with_gradients(function):
        y = function(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, cotangent)

    compare(benchmark, lambda: with_gradients(linear), lambda: with_gradients(F.linear), _check)
    benchmark.extra_info.update(shape=[batch, features_in, features_out], dtype="fp32")
