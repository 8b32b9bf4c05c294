"""Memory-bound kernels on a GPU: bytes/s against a measured copy; time against the compiled reference.

A kernel's bytes are those it cannot avoid: each input read once, each output written once. The copy moves as
many, half of them read. Figures of tensors that fit a cache mean nothing, so these are of 64 MB and more; the
CPU's kernels are measured where they matter, in the benchmarks of the ops, and run here only with --small.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from cdm_fast.ops import _backend, group_norm_silu, group_norm_silu_vjp
from cdm_fast.ops.denoise import (
    denoise_epilogue,
    denoise_epilogue_reference,
    denoise_loss,
    denoise_loss_reference,
)
from cdm_fast.ops.group_norm_silu import group_norm_silu_reference, group_norm_silu_vjp_reference
from cdm_fast.ops.noise_level_ce import noise_level_ce, noise_level_ce_reference
from cdm_fast.ops.noising import noising, noising_reference

IMAGES, SMALL_IMAGES = (8192, 3, 32, 32), (2, 3, 8, 8)
LOGITS, SMALL_LOGITS = (32768, 1002), (8, 102)
FEATURES, SMALL_FEATURES = (256, 128, 32, 32), (2, 64, 8, 8)
GROUPS = 32
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


class Case(NamedTuple):
    """An op and its reference, both functions of no arguments that return tensors, and the bytes it moves."""

    op: Callable[[], tuple[Tensor, ...]]
    reference: Callable[[], tuple[Tensor, ...]]
    moved: int
    shape: tuple[int, ...]


def _noising(small: bool, device: torch.device) -> Case:
    shape = SMALL_IMAGES if small else IMAGES
    x0 = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    level = torch.randint(0, 1002, shape[:1], device=device)
    s = torch.linspace(0, 1, 1002, device=device)
    arguments = x0, level, (1 - s**2).sqrt(), s, torch.tensor([1, 2], device=device)
    options = {"num_grey_levels": 256, "flip": True}
    return Case(
        lambda: noising(*arguments, **options),
        lambda: noising_reference(*arguments, **options),
        x0.numel() * (1 + 3 * 4),  # uint8 in; x_t, eps and x_0 out
        shape,
    )


def _noise_level_ce(small: bool, device: torch.device) -> Case:
    logits = torch.randn(SMALL_LOGITS if small else LOGITS, device=device, requires_grad=True)
    level = torch.randint(0, logits.shape[1], logits.shape[:1], device=device)

    def with_gradient(function: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
        loss, log_ratio = function(logits, level)
        return loss.detach(), *torch.autograd.grad((loss.sum() + log_ratio.sum()), logits)

    return Case(
        lambda: with_gradient(noise_level_ce),
        lambda: with_gradient(noise_level_ce_reference),
        logits.numel() * 3 * 4,  # read by loss and gradient, which is written
        tuple(logits.shape),
    )


def _denoise_epilogue(small: bool, device: torch.device) -> Case:
    shape = SMALL_IMAGES if small else IMAGES
    grad_x, x = torch.randn(shape, device=device), torch.randn(shape, device=device)
    s_t = torch.rand(shape[0], device=device)
    return Case(
        lambda: (denoise_epilogue(grad_x, x, s_t),),
        lambda: (denoise_epilogue_reference(grad_x, x, s_t),),
        x.numel() * 3 * 4,
        shape,
    )


def _denoise_loss(small: bool, device: torch.device) -> Case:
    shape = SMALL_IMAGES if small else IMAGES
    grad_x, x, eps = (torch.randn(shape, device=device) for _ in range(3))
    s_t = torch.rand(shape[0], device=device)
    grad_x.requires_grad_()

    def with_gradient(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        loss = function(grad_x, x, s_t, eps)
        return loss.detach(), *torch.autograd.grad(loss.sum(), grad_x)

    return Case(
        lambda: with_gradient(denoise_loss),
        lambda: with_gradient(denoise_loss_reference),
        x.numel() * (3 + 4) * 4,  # three inputs, read twice, and one gradient
        shape,
    )


def _group_norm_inputs(
    small: bool, device: torch.device, dtype: torch.dtype, layout: torch.memory_format
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = SMALL_FEATURES if small else FEATURES
    g, x = (torch.randn(shape, device=device).to(dtype, memory_format=layout) for _ in range(2))
    weight, bias = (torch.randn(shape[1], device=device) for _ in range(2))
    return g, x, weight, bias


def _group_norm_silu(dtype: torch.dtype, layout: torch.memory_format) -> Callable[..., Case]:
    def case(small: bool, device: torch.device) -> Case:
        _, *arguments = _group_norm_inputs(small, device, dtype, layout)
        return Case(
            lambda: group_norm_silu(*arguments, GROUPS),
            lambda: group_norm_silu_reference(*arguments, GROUPS),
            2 * arguments[0].nbytes,
            tuple(arguments[0].shape),
        )

    return case


def _group_norm_silu_vjp(dtype: torch.dtype, layout: torch.memory_format) -> Callable[..., Case]:
    def case(small: bool, device: torch.device) -> Case:
        g, x, weight, bias = _group_norm_inputs(small, device, dtype, layout)
        _, mean, rstd = group_norm_silu_reference(x, weight, bias, GROUPS)
        arguments = g, x, weight, bias, mean, rstd, GROUPS
        return Case(
            lambda: (group_norm_silu_vjp(*arguments),),
            lambda: (group_norm_silu_vjp_reference(*arguments),),
            3 * x.nbytes,
            tuple(x.shape),
        )

    return case


CASES = {
    "noising-uint8": _noising,
    "noise_level_ce-with_gradient-fp32": _noise_level_ce,
    "denoise_epilogue-fp32": _denoise_epilogue,
    "denoise_loss-with_gradient-fp32": _denoise_loss,
    "group_norm_silu-fp32-nhwc": _group_norm_silu(torch.float32, torch.channels_last),
    "group_norm_silu-bf16-nhwc": _group_norm_silu(torch.bfloat16, torch.channels_last),
    "group_norm_silu-bf16-nchw": _group_norm_silu(torch.bfloat16, torch.contiguous_format),
    "group_norm_silu_vjp-bf16-nhwc": _group_norm_silu_vjp(torch.bfloat16, torch.channels_last),
}
BACKENDS = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}


def _copy_bytes_per_second(moved: int, device: torch.device, calls: int = 20) -> float:
    """Bytes read and written per second by a copy on the device: the best of five rounds."""
    source = torch.randint(0, 256, (moved // 2,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - start) / calls)
    return 2 * (moved // 2) / min(seconds)


def _check(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        error = float((ours - theirs).float().norm() / theirs.float().norm())
        assert error < TOLERANCE[ours.dtype], error


@pytest.mark.parametrize("backend", ["cpp", "cuda", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_kernel(benchmark, compare, device, small, name, backend):
    if not small and device.type == "cpu":
        pytest.skip("bandwidth is measured on GPUs")
    if backend not in BACKENDS[device.type] or (reason := _backend.missing(backend)):
        pytest.skip(f"{backend}: not for {device}" if backend not in BACKENDS[device.type] else reason)
    case = CASES[name](small, device)
    reference = case.reference if small else torch.compile(case.reference)
    with _backend.use_backend(backend):
        compare(benchmark, case.op, reference, _check)
    rate = case.moved / (1e-3 * benchmark.extra_info["candidate_ms"])
    copy = _copy_bytes_per_second(case.moved, device)
    benchmark.extra_info.update(
        shape=list(case.shape),
        bytes=case.moved,
        bytes_per_second=rate,
        copy_bytes_per_second=copy,
        share_of_copy=rate / copy,
    )
