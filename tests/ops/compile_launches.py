"""Compiles what a kernel module launches for GPUs that need not be there, and reports what each kernel uses.

    python compile_launches.py noising 80 90 100 > report.json

The launchers run on CPU tensors, but each launch is recorded and compiled instead of run, with the argument
types that the launcher chose. The report is {kernel: [{arch, registers, spills, shared}, ...]}; a kernel that
is never launched has an empty list. A program of its own, as `compile_triton.py` is.
"""

import importlib
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from compile_triton import assemble
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.uint8: "u8",
}

recorded: list[tuple[JITFunction, dict[str, Any], dict[str, Any]]] = []


def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """Stands in for JITFunction.run."""
    arguments = dict(zip(kernel.arg_names, args, strict=False))
    arguments |= {name: value for name, value in kwargs.items() if name in kernel.arg_names}
    options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
    recorded.append((kernel, arguments, options))


def compile_launch(
    kernel: JITFunction, arguments: dict[str, Any], options: dict[str, Any], arch: int
) -> dict[str, int]:
    signature, constants, attributes = {}, {}, {}
    for i, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = arguments[name]
        if isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            attributes[(i,)] = [["tt.divisibility", 16]]  # as torch allocates
        elif parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"
            if isinstance(value, int) and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return {"arch": arch, "shared": compiled.metadata.shared, **assemble(compiled.asm["ptx"], arch)}


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


LEVEL, SEED = empty(4, dtype=torch.int64), empty(2, dtype=torch.int64)


def noising(kernels: Any) -> None:
    images, tables = (4, 3, 32, 32), (empty(1002), empty(1002))
    pixels = empty(*images, dtype=torch.uint8)
    bf16 = empty(*images, dtype=torch.bfloat16)
    kernels.noising(pixels, LEVEL, *tables, SEED, None, 256, True, bf16, empty(*images), empty(*images))
    kernels.noising(
        empty(*images), LEVEL, *tables, None, empty(*images), 0, False, empty(*images), empty(0), empty(0)
    )
    last = [x.contiguous(memory_format=torch.channels_last) for x in (pixels, bf16, empty(*images))]
    kernels.noising(last[0], LEVEL, *tables, SEED, None, 256, True, last[1], last[2], last[2])


def noise_level_ce(kernels: Any) -> None:
    for dtype, label, classes in ((torch.float32, None, 1), (torch.bfloat16, LEVEL, 10)):
        logits = empty(4, 1001 * classes + 1, dtype=dtype)
        common = (logits, LEVEL, label, 1002, classes)
        kernels.forward(*common, empty(4), empty(4), empty(4, 6))
        kernels.backward(*common, empty(4, 6), empty(4), empty(4), empty(*logits.shape, dtype=dtype))
        kernels.level_logits(logits, 1002, classes, empty(4, 1002))


def denoise(kernels: Any) -> None:
    images, per_image, level = empty(4, 3, 64, 64), empty(4), LEVEL
    grad_x = empty(4, 3, 64, 64, dtype=torch.bfloat16)
    kernels.epilogue(grad_x, images, per_image, images)
    kernels.clean_image(grad_x, images, per_image, per_image, images)
    kernels.loss(grad_x, images, per_image, images, per_image)
    kernels.loss_backward(grad_x, images, per_image, images, per_image, grad_x)
    for weight, shares in ((empty(1002, 256), None), (empty(10011, 256), empty(4, 10))):
        kernels.cotangent(weight, level, shares, empty(4, 256))
        kernels.cotangent_backward(weight, level, shares, empty(4, 256), weight, shares)


def group_norm_silu(kernels: Any) -> None:
    x, stats = empty(4, 256, 16, 16, dtype=torch.bfloat16), (empty(4, 32), empty(4, 32))
    skip = empty(4, 128, 16, 16, dtype=torch.bfloat16)
    parameters, gradients = (empty(384), empty(384)), (empty(4, 384), empty(4, 384))
    contiguous, channels_last = torch.contiguous_format, torch.channels_last
    for second, layout, dropout, seed in (
        (None, contiguous, 0.0, None),
        (None, channels_last, 0.1, SEED),
        (skip, contiguous, 0.0, None),
        (skip, channels_last, 0.0, None),
    ):
        x = x.contiguous(memory_format=layout)
        inputs, options = (x, second, *parameters), (True, dropout)
        kernels.forward(*inputs, seed, x, *stats, 32, 1e-6, *options)
        kernels.vjp(x, *inputs, *stats, seed, x, second, *gradients, 32, *options)
        kernels.vjp_backward(x, second, x, *inputs, *stats, seed, x, x, second, *gradients, 32, *options)


LAUNCHES: dict[str, Callable[[Any], None]] = {
    "noising": noising,
    "noise_level_ce": noise_level_ce,
    "denoise": denoise,
    "group_norm_silu": group_norm_silu,
}


def report(name: str, archs: list[int]) -> dict[str, list[dict[str, int]]]:
    module = importlib.import_module(f"cdm_fast.kernels.{name}")
    JITFunction.run = record
    LAUNCHES[name](module)
    found: dict[str, list[dict[str, int]]] = {
        name: []
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("kernel")
    }
    for kernel, arguments, options in recorded:
        for arch in archs:
            found[kernel.__name__].append(compile_launch(kernel, arguments, options, arch))
    return found


if __name__ == "__main__":
    json.dump(report(sys.argv[1], [int(arch) for arch in sys.argv[2:]]), sys.stdout)
