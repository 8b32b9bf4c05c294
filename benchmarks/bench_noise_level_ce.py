"""noise_level_ce with its gradient against cross_entropy and gather: plain logits (128, 1002), joint ones."""

import pytest
import torch
import torch.nn.functional as F

from cdm_fast.ops import use_backend
from cdm_fast.ops.noise_level_ce import level_logits, noise_level_ce


def _check(candidate, baseline):
    for got, expected in zip(candidate, baseline, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def _with_gradient(function, logits, cotangents):
    loss, log_ratio = function(logits)
    (gradient,) = torch.autograd.grad((loss, log_ratio), logits, cotangents)
    return loss.detach(), log_ratio.detach(), gradient


def test_level_logits(benchmark, compare, small, device):
    batch, num_levels = (16, 102) if small else (128, 1002)
    logits = torch.randn(batch, num_levels, device=device, requires_grad=True)
    level = torch.randint(0, num_levels, (batch,), device=device)
    cotangents = torch.full((batch,), 1e-3 / batch, device=device), torch.randn(batch, device=device)

    def plain(logits):
        log_ratio = logits.gather(1, level[:, None]).squeeze(1) - logits[:, -1]
        return F.cross_entropy(logits, level, reduction="none"), log_ratio

    compare(
        benchmark,
        lambda: _with_gradient(lambda z: noise_level_ce(z, level), logits, cotangents),
        lambda: _with_gradient(plain, logits, cotangents),
        _check,
    )
    benchmark.extra_info.update(shape=list(logits.shape), dtype="fp32")


def test_joint_logits(benchmark, compare, small, device):
    batch, num_levels, num_classes = (16, 52, 10) if small else (128, 1002, 10)
    logits = torch.randn(batch, (num_levels - 1) * num_classes + 1, device=device, requires_grad=True)
    level = torch.randint(0, num_levels, (batch,), device=device)
    label = torch.randint(-1, num_classes, (batch,), device=device)
    cotangents = torch.full((batch,), 1e-3 / batch, device=device), torch.randn(batch, device=device)

    def fused(logits):
        return noise_level_ce(logits, level, label, num_classes)

    def plain():
        with use_backend("reference"):
            return _with_gradient(fused, logits, cotangents)

    compare(benchmark, lambda: _with_gradient(fused, logits, cotangents), plain, _check)
    benchmark.extra_info.update(shape=list(logits.shape), dtype="fp32")


def test_product_of_gradient(benchmark, compare, small, device):
    """The gradient of a head's weight from that of trained logits, whose shares reach down to e^-130."""
    batch, num_levels, features = (16, 52, 16) if small else (512, 409, 416)
    logits = (-130 * torch.rand(batch, num_levels, device=device)).requires_grad_()
    level = logits.detach().argmax(1)
    h, cotangent = torch.randn(batch, features, device=device), torch.full((batch,), 1 / batch, device=device)

    def of(loss):
        (gradient,) = torch.autograd.grad(loss, logits, cotangent)
        return (gradient.T @ h,)

    compare(
        benchmark,
        lambda: of(noise_level_ce(logits, level).loss),
        lambda: of(F.cross_entropy(logits, level, reduction="none")),
        _check,
    )
    benchmark.extra_info.update(shape=[batch, num_levels, features], dtype="fp32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_joint_posterior(benchmark, compare, small, device, dtype):
    batch, num_levels, num_classes = (16, 52, 10) if small else (128, 1002, 10)
    logits = torch.randn(batch, (num_levels - 1) * num_classes + 1, device=device).to(dtype)

    def posterior():
        return level_logits(logits, num_classes).log_softmax(1)

    def plain():
        with use_backend("reference"):
            return posterior()

    def check(got, expected):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)

    compare(benchmark, posterior, plain, check)
    benchmark.extra_info.update(shape=list(logits.shape), dtype=str(dtype).removeprefix("torch."))
