"""Compiles Triton kernels to machine code for GPUs that need not be there, and reports what they use.

    python compile_triton.py < jobs.json > report.json

It is a program of its own because the tests' process runs Triton's interpreter, which replaces the compiler.
A job is {module, kernel, signature: {argument: type or "constexpr"}, constants: {argument: value}, arch,
warps}. A report is {shared: bytes of shared memory, wgmma: such instructions, registers,
spills: bytes per thread}.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def compile_job(job: dict[str, Any]) -> dict[str, int]:
    kernel = getattr(importlib.import_module(job["module"]), job["kernel"])
    signature = job["signature"]
    pointers = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    source = ASTSource(
        kernel,
        signature,
        constexprs={(list(signature).index(name),): value for name, value in job["constants"].items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers},  # as torch allocates
    )
    target = GPUTarget("cuda", job["arch"], 32)
    compiled = triton.compile(source, target=target, options={"num_warps": job["warps"], "num_stages": 2})
    wgmma = compiled.asm["ptx"].count("wgmma.mma_async")
    return {"shared": compiled.metadata.shared, "wgmma": wgmma, **assemble(compiled.asm["ptx"], job["arch"])}


def assemble(ptx: str, arch: int) -> dict[str, int]:
    """Registers and spilled bytes per thread, by the assembler's own report."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    assembler = folder / (
        "ptxas-blackwell" if arch >= 100 and (folder / "ptxas-blackwell").exists() else "ptxas"
    )
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE).group(1)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "kernel.ptx"
        path.write_text(ptx)
        command = [assembler, "-v", f"--gpu-name={target}", path, "-o", path.with_suffix(".cubin")]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "registers": int(re.search(r"Used (\d+) registers", report).group(1)),
        "spills": int(re.search(r"(\d+) bytes spill stores", report).group(1)),
    }


if __name__ == "__main__":
    json.dump([compile_job(job) for job in json.load(sys.stdin)], sys.stdout)
