"""attention: forward, VJP and gradients of the VJP, against softmax(q k^T) v with autograd double backward.

The peaks of memory of both are stored in `extra_info` as candidate_peak_mib and baseline_peak_mib; on the CPU
each is the growth of the resident set of a separate process. Run as a program, this file prints that figure:

    python -m benchmarks.bench_attention candidate|baseline BATCH TOKENS CHANNELS DTYPE DEVICE THREADS
"""

import subprocess
import sys

import pytest
import torch

from benchmarks.support.memory import peak_resident_mib
from cdm_fast.ops import attention, attention_vjp

# batch, tokens, channels: the 33.4 M network at 16x16 pixels, then longer sequences with narrower heads
SHAPES = {"256-tokens": (8, 256, 256), "1024-tokens": (8, 1024, 128), "4096-tokens": (2, 4096, 64)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def inputs(shape, dtype, device):
    """(u_q, u_k, u_v, g, q, k, v)"""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for _ in range(7)]


def candidate(u_q, u_k, u_v, g, q, k, v):
    scale = q.shape[-1] ** -0.5
    out, lse = attention(q, k, v, scale)
    gradients = attention_vjp(g, q, k, v, out, lse, scale)
    return out, *gradients, *torch.autograd.grad(gradients, (g, q, k, v), (u_q, u_k, u_v))


def baseline(u_q, u_k, u_v, g, q, k, v):
    out = (q.shape[-1] ** -0.5 * (q @ k.mT)).softmax(-1) @ v
    gradients = torch.autograd.grad(out, (q, k, v), g, create_graph=True)
    return out, *gradients, *torch.autograd.grad(gradients, (g, q, k, v), (u_q, u_k, u_v))


FUNCTIONS = {"candidate": candidate, "baseline": baseline}


def check(got, expected):
    for value, other in zip(got, expected, strict=True):
        error = float((value - other).detach().double().norm() / other.detach().double().norm())
        assert error <= TOLERANCE[value.dtype], error


def peak_mib(function, tensors, device):
    """Memory in MiB by which one call raises the peak."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function(*tensors)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    function(*(x[:1, :64].detach().requires_grad_() for x in tensors))  # loads the libraries' code
    before = peak_resident_mib()
    function(*tensors)
    return peak_resident_mib() - before


def measured_peak_mib(function, tensors, dtype, device):
    if device.type == "cuda":
        return peak_mib(FUNCTIONS[function], tensors, device)
    shape = tensors[0].shape
    arguments = [function, *map(str, shape), dtype, device.type, str(torch.get_num_threads())]
    return float(subprocess.check_output([sys.executable, "-m", "benchmarks.bench_attention", *arguments]))


@pytest.mark.parametrize("dtype", DTYPES.keys())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_attention_with_gradients(benchmark, compare, device, small, shape, dtype):
    shape = (1, 64, 16) if small else shape
    tensors = inputs(shape, DTYPES[dtype], device)
    if not small:
        for function in ("candidate", "baseline"):
            peak = measured_peak_mib(function, tensors, dtype, device)
            benchmark.extra_info[f"{function}_peak_mib"] = peak
    compare(benchmark, lambda: candidate(*tensors), lambda: baseline(*tensors), check)
    benchmark.extra_info["shape"] = list(shape)


def main():
    name, *sizes, dtype, device, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    device = torch.device(device)
    tensors = inputs(tuple(map(int, sizes)), DTYPES[dtype], device)
    print(peak_mib(FUNCTIONS[name], tensors, device))


if __name__ == "__main__":
    main()
