"""denoise against plain PyTorch, at the CIFAR-10 batch: squared error and head cotangent, with gradients."""

import pytest
import torch

from cdm_fast.ops.denoise import denoise_loss, head_cotangent


def _check(candidate, baseline):
    for got, expected in zip(candidate, baseline, strict=True):
        tolerance = 1e-2 if got.dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def _with_gradient(function, leaf, cotangent):
    out = function(leaf)
    (gradient,) = torch.autograd.grad(out, leaf, cotangent)
    return out.detach(), gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_squared_error(benchmark, compare, small, device, dtype):
    shape = (4, 3, 32, 32) if small else (128, 3, 32, 32)
    grad_x = torch.randn(shape, device=device).to(dtype).requires_grad_()
    x, eps = torch.randn(shape, device=device), torch.randn(shape, device=device)
    s_t = torch.rand(shape[0], device=device)
    cotangent = torch.full((shape[0],), 1 / x.numel(), device=device)

    def plain(grad_x):
        eps_hat = s_t[:, None, None, None] * (grad_x + x)
        return (eps_hat - eps).square().flatten(1).sum(1)

    compare(
        benchmark,
        lambda: _with_gradient(lambda g: denoise_loss(g, x, s_t, eps), grad_x, cotangent),
        lambda: _with_gradient(plain, grad_x, cotangent),
        _check,
    )
    benchmark.extra_info["shape"] = list(shape)


def test_head_cotangent(benchmark, compare, small, device):
    batch, num_levels, num_features = (4, 52, 64) if small else (128, 1002, 256)
    weight = torch.randn(num_levels, num_features, device=device, requires_grad=True)
    level = torch.randint(0, num_levels, (batch,), device=device)
    noise = torch.tensor([num_levels - 1], device=device)
    cotangent = torch.randn(batch, num_features, device=device)

    def plain(weight):
        return weight.index_select(0, noise) - weight.index_select(0, level)

    compare(
        benchmark,
        lambda: _with_gradient(lambda w: head_cotangent(w, level), weight, cotangent),
        lambda: _with_gradient(plain, weight, cotangent),
        _check,
    )
    benchmark.extra_info.update(shape=list(weight.shape), dtype="fp32")
