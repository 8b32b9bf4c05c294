"""Launches every CUDA kernel and every Triton kernel once at small odd shapes, for compute-sanitizer.

compute-sanitizer --tool memcheck|racecheck python -m benchmarks.support.sanitize_kernels BACKEND [DEVICE]

BACKEND "fastest" is the first of cuda, triton (on a GPU) or cpp, reference (on the CPU) that works here.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from cdm_fast.ops import (
    attention,
    attention_vjp,
    group_norm_silu,
    group_norm_silu_vjp,
    rms_norm,
    rms_norm_vjp,
    swiglu,
    swiglu_vjp,
    use_attention_method,
    use_backend,
)
from cdm_fast.ops import backend as _backend
from cdm_fast.ops.denoise import denoise_epilogue, denoise_loss, denoise_x0, head_cotangent
from cdm_fast.ops.noise_level_ce import noise_level_ce
from cdm_fast.ops.noising import noising

SEED = (2024, 7)
LEVELS = 12


def _differentiate(outputs: tuple[Tensor, ...], leaves: tuple[Tensor, ...]) -> None:
    torch.autograd.grad([out.float().sum() for out in outputs], leaves, allow_unused=True)


def run_noising(dtype: torch.dtype) -> None:
    """uint8 and floating images, whole packs and ragged ends, noise drawn and given."""
    s = torch.linspace(0, 1, LEVELS)
    tables = (1 - s**2).sqrt(), s
    for shape in ((3, 1, 5, 7), (2, 3, 16, 16)):
        level = torch.arange(shape[0])
        pixels = torch.randint(0, 17, shape, dtype=torch.uint8)
        noising(pixels, level, *tables, torch.tensor(SEED), num_grey_levels=17, flip=True, dtype=dtype)
        noising(torch.rand(shape).to(dtype), level, *tables, eps=torch.randn(shape))


def run_noise_level_ce(dtype: torch.dtype) -> None:
    """Plain and joint logits, with their gradient."""
    level = torch.tensor([0, 4, LEVELS - 1])
    for num_classes, label in ((1, None), (5, torch.tensor([2, -1, 0]))):
        logits = torch.randn(3, (LEVELS - 1) * num_classes + 1).to(dtype).requires_grad_()
        _differentiate(tuple(noise_level_ce(logits, level, label, num_classes)), (logits,))


def run_denoise(dtype: torch.dtype) -> None:
    """The three epilogues and the head's cotangent, with their gradients."""
    for shape in ((3, 1, 5, 7), (2, 3, 16, 16)):
        leaves = tuple(torch.randn(shape).to(dtype).requires_grad_() for _ in range(3))
        grad_x, x, eps = leaves
        s_t = torch.rand(shape[0])
        outputs = denoise_epilogue(grad_x, x, s_t), denoise_x0(grad_x, x, s_t, s_t)
        _differentiate((*outputs, denoise_loss(grad_x, x, s_t, eps)), leaves)
    weight, shares = torch.randn(16, 33).to(dtype).requires_grad_(), torch.rand(2, 3).requires_grad_()
    level = torch.tensor([0, 4])
    _differentiate((head_cotangent(weight, level), head_cotangent(weight, level, shares)), (weight, shares))


def run_group_norm_silu(dtype: torch.dtype) -> None:
    """Forward, VJP and the gradients of both; both layouts, with dropout; groups in one program and split."""
    for layout in (torch.contiguous_format, torch.channels_last):
        for shape, groups in (((2, 6, 3, 5), 2), ((2, 64, 8, 8), 32), ((2, 36, 9, 16), 3)):
            x, g = (torch.randn(shape).to(dtype, memory_format=layout).requires_grad_() for _ in range(2))
            weight, bias = torch.randn(shape[1]).requires_grad_(), torch.randn(shape[1]).requires_grad_()
            options = {"dropout": 0.1, "seed": torch.tensor(SEED)}
            y, mean, rstd = group_norm_silu(x, weight, bias, groups, **options)
            vjp = group_norm_silu_vjp(g, x, weight, bias, mean, rstd, groups, **options)
            _differentiate((y, vjp), (g, x, weight, bias))


def run_attention(dtype: torch.dtype) -> None:
    """Forward, VJP and the gradients of both; one head and two; Triton by both methods and all tiles."""
    for tokens, channels, heads in ((35, 33, 1), (64, 32, 2), (515, 16, 1)):
        for method in ("fused", "composed") if _backend.selected_backend() == "triton" else ("auto",):
            g, q, k, v = (torch.randn(2, tokens, channels).to(dtype).requires_grad_() for _ in range(4))
            with use_attention_method(method):
                out, lse = attention(q, k, v, channels**-0.5, heads)
                vjp = attention_vjp(g, q, k, v, out, lse, channels**-0.5, heads)
                _differentiate((out, *vjp), (g, q, k, v))


def run_rms_norm(dtype: torch.dtype) -> None:
    """Forward, VJP and the gradients of both, with one weight and one of each image."""
    for shape in ((2, 35, 33), (3, 64, 512)):
        for parameters in (shape[2:], (shape[0], shape[2])):
            x, g = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(2))
            weight = torch.randn(parameters).requires_grad_()
            y, rstd = rms_norm(x, weight)
            _differentiate((y, rms_norm_vjp(g, x, weight, rstd)), (g, x, weight))


def run_swiglu(dtype: torch.dtype) -> None:
    """Forward, VJP and the gradients of both, with dropout."""
    for batch, tokens, hidden in ((2, 35, 33), (3, 64, 1376)):
        h = torch.randn(batch, tokens, 2 * hidden).to(dtype).requires_grad_()
        g = torch.randn(batch, tokens, hidden).to(dtype).requires_grad_()
        options = {"dropout": 0.1, "seed": torch.tensor(SEED)}
        _differentiate((swiglu(h, **options), swiglu_vjp(g, h, **options)), (g, h))


ALL = (
    run_noising,
    run_noise_level_ce,
    run_denoise,
    run_group_norm_silu,
    run_rms_norm,
    run_swiglu,
    run_attention,
)
# attention has no kernel in CUDA C++.
OPS: dict[str, tuple[Callable[[torch.dtype], None], ...]] = {
    "cpp": ALL,
    "cuda": ALL[:-1],
    "triton": ALL,
    "reference": ALL,
}
FASTEST_FIRST = {"cuda": ("cuda", "triton"), "cpu": ("cpp", "reference")}


def main(backend: str, device: str = "cuda") -> None:
    """Runs every op of `backend` in fp32 and bf16."""
    if backend == "fastest":
        backend = next(name for name in FASTEST_FIRST[device] if _backend.missing(name) is None)
        print(f"backend {backend}", flush=True)
    torch.set_default_device(device)
    torch.manual_seed(0)
    with use_backend(backend):
        for dtype in (torch.float32, torch.bfloat16):
            for run in OPS[backend]:
                run(dtype)
                print(run.__name__, dtype, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
