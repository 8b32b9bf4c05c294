"""Builds the optional extension `cdm_fast._C` from csrc/; everything else is in pyproject.toml.

Switches (environment variables):

- `CDM_FAST_NO_EXT=1`       install pure Python, whatever is available
- `CDM_FAST_REQUIRE_EXT=1`  fail instead of falling back to pure Python
- `CDM_FAST_FORCE_CPU=1`    leave the CUDA sources out
- `MAX_JOBS`                number of compilers that run at once
- `TORCH_CUDA_ARCH_LIST`    GPU architectures, e.g. "8.0;9.0"
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.errors import BaseError

ROOT = Path(__file__).parent
STABLE_ABI = "0x020a000000000000"  # torch 2.10: the oldest one whose stable ABI has parallel_for

CXX_FLAGS = [
    "-O3",
    "-std=c++17",
    "-fopenmp-simd",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-psabi",  # wide vectors never cross a call that is not inlined
    "-Wno-unknown-pragmas",
    "-Wno-maybe-uninitialized",  # GCC 12 says it of its own immintrin.h
    f"-DTORCH_TARGET_VERSION={STABLE_ABI}",
]
NVCC_FLAGS = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]


def switched_on(name: str) -> bool:
    """Whether the environment variable `name` is set to anything but an empty string or 0."""
    return os.environ.get(name, "0") not in ("", "0")


def say(line: str) -> None:
    """Prints one line to the build log."""
    print(f"cdm_fast: {line}", file=sys.stderr, flush=True)


def pure_python(reason: str) -> dict[str, Any]:
    """Arguments of setup() for an install without the extension, or exit if one was demanded."""
    if switched_on("CDM_FAST_REQUIRE_EXT"):
        raise SystemExit(f"cdm_fast: CDM_FAST_REQUIRE_EXT is set, but {reason}")
    say(f"{reason}: installing pure Python, every op runs on its reference or Triton backend")
    return {}


def reveal_installed_torch() -> None:
    """Lets an isolated build import the torch of the environment that it builds for."""
    for key in ("purelib", "platlib"):
        path = sysconfig.get_path(key)
        if path not in sys.path:
            sys.path.append(path)


def nvcc_major(cuda_home: str | None) -> str | None:
    """Major version of the CUDA compiler, as text, or None if there is none."""
    nvcc = Path(cuda_home or "") / "bin" / "nvcc"
    if not nvcc.exists():
        return None
    report = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+)\.", report)
    return found.group(1) if found else None


def with_cuda(torch: Any, cpp_extension: Any) -> bool:
    """Whether the CUDA sources can be built: a CUDA torch and an nvcc of the same major version."""
    if torch.version.cuda is None or switched_on("CDM_FAST_FORCE_CPU"):
        return False
    major = nvcc_major(cpp_extension.CUDA_HOME)
    if major == torch.version.cuda.split(".")[0]:
        return True
    say(f"torch has CUDA {torch.version.cuda}, nvcc is {major or 'missing'}: leaving the CUDA sources out")
    return False


def optional(build_extension: type) -> type:
    """torch's BuildExtension, except that a failure leaves a pure Python install behind."""

    class OptionalBuild(build_extension):  # type: ignore[misc]
        def run(self) -> None:
            try:
                super().run()
            except (BaseError, RuntimeError, OSError, subprocess.CalledProcessError) as error:
                self.extensions = self.distribution.ext_modules = []
                pure_python(f"building the extension failed ({error})")

    return OptionalBuild


def extension() -> dict[str, Any]:
    """Arguments of setup() that describe the extension, as far as this machine can build it."""
    if switched_on("CDM_FAST_NO_EXT"):
        return pure_python("CDM_FAST_NO_EXT is set")
    reveal_installed_torch()
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        return pure_python(f"torch cannot be imported ({error})")
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        return pure_python("there is no C++ compiler (set CXX)")

    import pybind11

    cuda = with_cuda(torch, cpp_extension)
    if cuda and not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    make_extension = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    suffixes = (".cpp", ".cu") if cuda else (".cpp",)
    sources = sorted(path for path in (ROOT / "csrc").iterdir() if path.suffix in suffixes)
    module = make_extension(
        "cdm_fast._C",
        [str(path.relative_to(ROOT)) for path in sources],
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
        depends=[str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").glob("*.*h"))],
        define_macros=[("CDM_WITH_CUDA", "1")] if cuda else [],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": optional(cpp_extension.BuildExtension)}}


setup(package_dir={"cdm_fast.kernels": "kernels"}, **extension())
