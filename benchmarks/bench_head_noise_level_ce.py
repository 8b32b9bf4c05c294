"""head_noise_level_ce with its gradients against head and noise_level_ce one after the other: time, memory.

The sizes are those of a head of 256 features over 1,002 levels and K classes, batch 128.
"""

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_fast.ops.head_noise_level_ce import head_noise_level_ce
from cdm_fast.ops.noise_level_ce import NoiseLevelCE, noise_level_ce

BATCH, FEATURES, LEVELS = 128, 256, 1002


def composition(
    h: Tensor, weight_c: Tensor, bias_c: Tensor, level: Tensor, label: Tensor, num_classes: int
) -> NoiseLevelCE:
    """What head_noise_level_ce computes, with all logits at once."""
    return noise_level_ce(F.linear(h, weight_c, bias_c), level, label, num_classes)


VARIANTS = {"fused": head_noise_level_ce, "composition": composition}


def step(variant: str, num_classes: int, small: bool, device: torch.device) -> Callable[[], tuple]:
    """A function of no arguments: loss, log-ratio and all gradients of a variant, from pinned data."""
    batch, features, levels = (16, 32, 52) if small else (BATCH, FEATURES, LEVELS)
    generator = torch.Generator(device).manual_seed(0)
    num_rows = (levels - 1) * num_classes + 1
    h, weight_c, bias_c = (
        torch.randn(shape, generator=generator, device=device).mul_(scale).requires_grad_()
        for shape, scale in (((batch, features), 1), ((num_rows, features), features**-0.5), ((num_rows,), 1))
    )
    level = torch.arange(batch, device=device) * 7 % levels
    label = torch.arange(batch, device=device) % (num_classes + 1) - 1  # one in K + 1 has none
    cotangents = torch.full((batch,), 1e-3 / batch, device=device), torch.ones(batch, device=device) / batch

    def run() -> tuple[Tensor, ...]:
        values = VARIANTS[variant](h, weight_c, bias_c, level, label, num_classes)
        gradients = torch.autograd.grad(values, (h, weight_c, bias_c), cotangents)
        return *(value.detach() for value in values), *gradients

    return run


def _check(candidate, baseline):
    for got, expected in zip(candidate, baseline, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_classes", [1, 10, 100])
def test_time(benchmark, compare, small, device, num_classes):
    variants = (step(variant, num_classes, small, device) for variant in VARIANTS)
    compare(benchmark, *variants, _check)


@pytest.mark.parametrize("num_classes", [1, 10, 100, 1000])
def test_peak_memory(benchmark, small, device, num_classes):
    """Peak memory of one call beyond inputs and results; the time shown means nothing."""
    candidate = benchmark.pedantic(lambda: peak_mib(step("fused", num_classes, small, device), device))
    baseline = peak_mib(step("composition", num_classes, small, device), device)
    benchmark.extra_info.update(candidate_peak_mib=candidate, baseline_peak_mib=baseline)


def peak_mib(run: Callable[[], tuple[Tensor, ...]], device: torch.device) -> float:
    """The most that torch's allocator holds at a time during one call, in MiB, without what is returned."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = run()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with torch.profiler.profile(profile_memory=True) as profile:
            results = run()
        events = profile.profiler.kineto_results.events()
        changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        peak = max(accumulate(size for _, size in changes))
    return (peak - sum(x.numel() * x.element_size() for x in results)) / 2**20
