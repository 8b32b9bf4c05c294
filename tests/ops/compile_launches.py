"""Compiles what a kernel module launches for GPUs that need not be there, and reports what each kernel uses.

    python compile_launches.py noising 80 90 100 > report.json

The launchers run on CPU tensors, but each launch is recorded and compiled instead of run, with the argument
types that the launcher chose. The report is {kernel: [{arch, registers, spills, shared, loads, wide_loads},
...]}, wide loads being those of 16 bytes; a kernel that is never launched has an empty list. A program of its
own, as `compile_triton.py` is.
"""

import importlib
import json
import re
import sys
from typing import Any

import torch
import triton
from compile_triton import assemble
from launches import LAUNCHES
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
    ptx = compiled.asm["ptx"]
    wide = len(re.findall(r"ld\.global(?:\.\w+)*\.v4\.b32|ld\.global(?:\.\w+)*\.v2\.b64", ptx))
    loads = {"loads": len(re.findall(r"\bld\.global", ptx)), "wide_loads": wide}
    return {"arch": arch, "shared": compiled.metadata.shared, **loads, **assemble(ptx, arch)}


def report(name: str, archs: list[int]) -> dict[str, list[dict[str, int]]]:
    module = importlib.import_module(f"cdm_fast.kernels.{name}")
    JITFunction.run = record
    LAUNCHES[name](module, lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype))
    found: dict[str, list[dict[str, int]]] = {
        name: []
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("kernel")
    }
    for kernel, arguments, options in recorded:
        for arch in archs:
            found.setdefault(kernel.__name__, []).append(compile_launch(kernel, arguments, options, arch))
    return found


if __name__ == "__main__":
    json.dump(report(sys.argv[1], [int(arch) for arch in sys.argv[2:]]), sys.stdout)
