"""Memory-bound kernels on a GPU: bytes/s against a measured copy; time against the compiled reference.

A kernel's bytes are those it cannot avoid: each input read once, each output written once. The copy moves as
many, half of them read. Figures of tensors that fit a cache mean nothing, so the tensors have 256 MB and
more. The CPU kernels are measured in the benchmarks of the ops, and run here only with --small.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.support.timing import seconds_per_call
from cdm_fast.ops import backend as _backend
from cdm_fast.ops import group_norm_silu, group_norm_silu_vjp
from cdm_fast.ops.denoise import (
    denoise_epilogue,
    denoise_epilogue_reference,
    denoise_loss,
    denoise_loss_reference,
)
from cdm_fast.ops.group_norm_silu import group_norm_silu_reference, group_norm_silu_vjp_reference
from cdm_fast.ops.noise_level_ce import (
    level_logits,
    level_logits_reference,
    noise_level_ce,
    noise_level_ce_reference,
)
from cdm_fast.ops.noising import noising, noising_reference

# Large enough that a call takes longer than its launch, at 4 TB/s.
IMAGES, SMALL_IMAGES = (32768, 3, 32, 32), (2, 3, 8, 8)
LOGITS, SMALL_LOGITS = (131072, 1002), (8, 102)
FEATURES, SMALL_FEATURES = (1024, 128, 32, 32), (2, 64, 8, 8)
GROUPS = 32


class Case(NamedTuple):
    """An op and its reference, both functions of no arguments that return tensors, and the bytes it moves."""

    op: Callable[[], tuple[Tensor, ...]]
    reference: Callable[[], tuple[Tensor, ...]]
    moved: int
    shape: tuple[int, ...]
    dtype: str = "fp32"


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
        "uint8",
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


def _level_logits(small: bool, device: torch.device) -> Case:
    classes = 10
    rows, levels = SMALL_LOGITS if small else (LOGITS[0] // classes, LOGITS[1])
    logits = torch.randn(rows, (levels - 1) * classes + 1, device=device)
    return Case(
        lambda: (level_logits(logits, classes),),
        lambda: (level_logits_reference(logits, classes),),
        (logits.numel() + rows * levels) * 4,
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
    """g, x, weight and bias."""
    shape = SMALL_FEATURES if small else FEATURES
    g, x = (torch.randn(shape, device=device).to(dtype, memory_format=layout) for _ in range(2))
    weight, bias = (torch.randn(shape[1], device=device) for _ in range(2))
    return g, x, weight, bias


def _group_norm_silu(
    dtype: torch.dtype, layout: torch.memory_format, gradient: bool = False
) -> Callable[..., Case]:
    """The op alone, or with its gradients, which read g and x and write one of x."""

    def case(small: bool, device: torch.device) -> Case:
        g, *leaves = _group_norm_inputs(small, device, dtype, layout)

        def run(op: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
            if not gradient:
                return op(*leaves, GROUPS)
            inputs = [tensor.detach().requires_grad_() for tensor in leaves]
            y = op(*inputs, GROUPS)[0]
            return y.detach(), *torch.autograd.grad(y, inputs, g)

        return Case(
            lambda: run(group_norm_silu),
            lambda: run(group_norm_silu_reference),
            (2 + 3 * gradient) * g.nbytes,
            tuple(g.shape),
            SHORT[dtype],
        )

    return case


def _group_norm_silu_vjp(
    dtype: torch.dtype, layout: torch.memory_format, gradient: bool = False
) -> Callable[..., Case]:
    """The VJP alone, or with its gradients, which read v, g and x and write those of g and x."""

    def case(small: bool, device: torch.device) -> Case:
        g, x, weight, bias = _group_norm_inputs(small, device, dtype, layout)
        v = torch.randn_like(g)
        _, mean, rstd = group_norm_silu_reference(x, weight, bias, GROUPS)

        def run(op: Callable[..., Tensor]) -> tuple[Tensor, ...]:
            if not gradient:
                return (op(g, x, weight, bias, mean, rstd, GROUPS),)
            inputs = [tensor.detach().requires_grad_() for tensor in (g, x, weight, bias)]
            vjp = op(*inputs, mean, rstd, GROUPS)
            return vjp.detach(), *torch.autograd.grad(vjp, inputs, v)

        return Case(
            lambda: run(group_norm_silu_vjp),
            lambda: run(group_norm_silu_vjp_reference),
            (3 + 5 * gradient) * g.nbytes,
            tuple(g.shape),
            SHORT[dtype],
        )

    return case


SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}
NCHW, NHWC = torch.contiguous_format, torch.channels_last
CASES = {
    "noising-uint8": _noising,
    "noise_level_ce-with_gradient-fp32": _noise_level_ce,
    "level_logits-joint-fp32": _level_logits,
    "denoise_epilogue-fp32": _denoise_epilogue,
    "denoise_loss-with_gradient-fp32": _denoise_loss,
    "group_norm_silu-fp32-nhwc": _group_norm_silu(torch.float32, NHWC),
    "group_norm_silu-bf16-nhwc": _group_norm_silu(torch.bfloat16, NHWC),
    "group_norm_silu-bf16-nchw": _group_norm_silu(torch.bfloat16, NCHW),
    "group_norm_silu-with_gradient-bf16-nhwc": _group_norm_silu(torch.bfloat16, NHWC, gradient=True),
    "group_norm_silu_vjp-bf16-nhwc": _group_norm_silu_vjp(torch.bfloat16, NHWC),
    "group_norm_silu_vjp-with_gradient-bf16-nhwc": _group_norm_silu_vjp(torch.bfloat16, NHWC, gradient=True),
}
BACKENDS = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}
TRITON_ONLY = {"level_logits-joint-fp32"}  # on a GPU


def copy_bytes_per_second(moved: int, device: torch.device, calls: int = 20) -> float:
    """Bytes read and written per second by a copy on the device: the best of five rounds."""
    source = torch.randint(0, 256, (moved // 2,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = min(seconds_per_call(lambda: target.copy_(source), calls, device) for _ in range(5))
    return 2 * (moved // 2) / seconds


def check(case: Case) -> Callable[[tuple[Tensor, ...], tuple[Tensor, ...]], None]:
    """A `check` of the case's op against its reference, which computes in the dtype of the case."""
    allowed = 1e-2 if case.dtype == "bf16" else 1e-5

    def checked(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
        for ours, theirs in zip(got, expected, strict=True):
            error = float((ours - theirs).float().norm() / theirs.float().norm())
            assert error < allowed, f"relative error {error}"

    return checked


@pytest.mark.parametrize("backend", ["cpp", "cuda", "triton"])
@pytest.mark.parametrize("name", CASES)
def test_kernel(benchmark, compare, device, small, name, backend):
    if not small and device.type == "cpu":
        pytest.skip("bandwidth is measured on GPUs")
    if backend not in BACKENDS[device.type] or (reason := _backend.missing(backend)):
        pytest.skip(f"{backend}: not for {device}" if backend not in BACKENDS[device.type] else reason)
    if backend == "cuda" and name in TRITON_ONLY:
        pytest.skip("this op has no kernel in CUDA C++")
    case = CASES[name](small, device)
    reference = case.reference if small else torch.compile(case.reference)
    with _backend.use_backend(backend):
        compare(benchmark, case.op, reference, check(case))
    rate = case.moved / (1e-3 * benchmark.extra_info["candidate_ms"])
    copy = copy_bytes_per_second(case.moved, device)
    benchmark.extra_info.update(
        shape=list(case.shape),
        bytes=case.moved,
        bytes_per_second=rate,
        copy_bytes_per_second=copy,
        share_of_copy=rate / copy,
    )
