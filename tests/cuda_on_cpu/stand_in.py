"""Builds csrc/*.cu for the host, and puts the result in the place of the extension `cdm_fast._C`.

    python -m tests.cuda_on_cpu.stand_in build/cuda_on_cpu [--sanitize]   # prints the library's path
    python -m pytest tests/ops --test-device cuda-on-cpu --stand-in LIBRARY --thread-order reversed

README.md, beside this file, says what such a run sees and what it does not.
"""

import argparse
import ctypes
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from building.host_compiler import compiler, compiler_command
from building.kernels import STABLE_ABI

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
THREAD_ORDERS = ("natural", "reversed", "random")
FLAGS = [
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # philox.h asks for one rounding per operation
    "-Wall",
    "-Wno-unknown-pragmas",
    f"-DTORCH_TARGET_VERSION={STABLE_ABI}",
]
# vptr checks would need the C++ runtime of UBSan in every library that the classes come from.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined", "-g1"]
RUNTIME = [HERE / "fiber.cpp", HERE / "runtime.cpp"]


def num_launches() -> int:
    """How many kernels have run so far; `install` puts the library's own counter here."""
    return 0


def missing() -> str | None:
    """Why the stand-in cannot be built here, or None if it can."""
    if compiler() is None:
        return f"there is no C++ compiler {compiler_command()[0]!r} (set CXX)"
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"it switches stacks on Linux on x86-64 only, this is {platform.system()} {platform.machine()}"
    return None


def missing_sanitizer() -> str | None:
    """Why it cannot be built with AddressSanitizer, or None if it can."""
    if missing() is not None:
        return missing()
    command = [*compiler_command(), "-print-file-name=libasan.so"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return (
        None
        if os.path.isabs(found)
        else f"{compiler_command()[0]} has no AddressSanitizer runtime (libasan.so)"
    )


def build_library(folder: Path, sanitize: bool = False) -> Path:
    """Compiles every csrc/*.cu into one library; subprocess.CalledProcessError if that fails."""
    sources = [*sorted((ROOT / "csrc").glob("*.cu")), HERE / "torch_shim.cpp", *RUNTIME]
    library = folder / "libcdm_fast_cuda_on_cpu.so"
    torch_libraries = Path(torch.__file__).parent / "lib"
    link = ["-shared", "-Wl,-Bsymbolic", f"-L{torch_libraries}", "-ltorch", "-ltorch_cpu", "-lc10"]
    return _build(library, sources, sanitize, link)


def build_faults(folder: Path, sanitize: bool = False) -> Path:
    """Compiles the program of small, mostly faulty kernels; it needs nothing of torch."""
    return _build(folder / "faults", [HERE / "faults.cu", *RUNTIME], sanitize, [])


def _build(result: Path, sources: Iterable[Path], sanitize: bool, link: list[str]) -> Path:
    from torch.utils.cpp_extension import include_paths

    result.parent.mkdir(parents=True, exist_ok=True)
    instrumentation = SANITIZE if sanitize else []
    includes = [f"-I{path}" for path in (HERE / "include", HERE, ROOT / "csrc", *include_paths())]

    def compile_one(source: Path) -> Path:
        out = result.parent / f"{source.name}.o"
        command = [
            *compiler_command(),
            *FLAGS,
            *instrumentation,
            *includes,
            "-c",
            "-x",
            "c++",
            source,
            "-o",
            out,
        ]
        subprocess.run(command, check=True)
        return out

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        objects = list(pool.map(compile_one, sources))
    subprocess.run([*compiler_command(), *instrumentation, *objects, *link, "-o", result], check=True)
    return result


def install(library: Path, thread_order: str) -> None:
    """Makes the backend "cuda" run on CPU tensors by this library; "cpp" is missing from then on."""
    import cdm_fast.ops
    from cdm_fast.ops import backend

    assert backend._loaded is None, "the extension is loaded already"
    sys.modules["cdm_fast._C"] = None  # type: ignore[assignment]  # its kernels would be CPU's, too
    backend._loaded = SimpleNamespace(build_info=lambda: {"cuda": True})  # type: ignore[assignment]
    before = _ops_with_cuda_kernels()
    stand_in = ctypes.CDLL(str(library))
    stand_in.cuda_on_cpu_set_order(thread_order.encode())
    global num_launches
    num_launches = stand_in.cuda_on_cpu_num_launches
    for name in sorted(_ops_with_cuda_kernels() - before):
        cdm_fast.ops.registry._library.impl(name, _as_cuda(name), "CPU")

    for backends in backend._coverage.values():
        if "cuda" in backends:
            backends["cuda"] = backends["cuda"]._replace(device="cpu")
    backend._FASTEST_FIRST["cpu"] = ("cuda",)
    backend._missing_extension = _missing_extension


def _missing_extension(cuda: bool) -> str | None:
    return None if cuda else "the stand-in for CUDA has no C++ kernels"


def _ops_with_cuda_kernels() -> set[str]:
    """Names of the package's ops that a library has registered for CUDA."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    ops = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("cdm_fast::"))
    return {name.removeprefix("cdm_fast::") for name in ops if has_kernel(name, "CUDA")}


def _as_cuda(name: str) -> Callable[..., Any]:
    """What calls the op's CUDA kernel whatever the device of its arguments."""
    op = getattr(torch.ops.cdm_fast, name).default
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    return lambda *arguments: op.redispatch(keys, *arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer and UBSan")
    arguments = parser.parse_args()
    reason = missing_sanitizer() if arguments.sanitize else missing()
    if reason is not None:
        parser.exit(3, f"left out: {reason}\n")
    print(build_library(arguments.folder, arguments.sanitize))


if __name__ == "__main__":
    main()
