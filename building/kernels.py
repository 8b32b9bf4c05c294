"""What can be built on this machine, and how: the extension `cdm_fast._C` with or without CUDA kernels."""

import os
import shlex
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from building.errors import NotPossible
from building.host_compiler import compiler, compiler_command
from building.target import ROOT, find_torch, torch_requirement
from building.toolkit import Toolkit, find_toolkit

EXTENSION = "cdm_fast._C"
STABLE_ABI = "0x020a000000000000"  # torch 2.10: the oldest one whose stable ABI has parallel_for
ARCHITECTURES = "8.0;9.0+PTX"  # A100, H100 and H200, and PTX that newer GPUs compile at first use

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


def cxx_flags() -> list[str]:
    """`CXX_FLAGS`, and no debug information, which Python's own flags ask for, unless the user's do too."""
    of_user = (shlex.split(os.environ.get(name, "")) for name in ("CFLAGS", "CXXFLAGS"))
    wanted = any(flag.startswith("-g") for flags in of_user for flag in flags)
    return CXX_FLAGS if wanted else [*CXX_FLAGS, "-g0"]


class Plan(NamedTuple):
    """What to build against, and with which CUDA toolkit, if any; `left_out` says why without one."""

    torch: Any
    cpp_extension: Any
    toolkit: Toolkit | None
    left_out: str | None


def switched_on(name: str) -> bool:
    """Whether the environment variable `name` is set to anything but an empty string or 0."""
    return os.environ.get(name, "0") not in ("", "0")


def plan() -> Plan:
    """What this machine can build; NotPossible, with the reason, if it can build no kernels at all."""
    if compiler() is None:
        raise NotPossible(
            f"there is no C++ compiler ({shlex.join(compiler_command())}): install one, or set CXX"
        )
    found = find_torch()
    if found is None:
        raise NotPossible(f"there is no {torch_requirement()} to build against: install it first")
    sys.path.extend(found.path)
    torch = _import(f"torch {found.version}", "torch", "reinstall it")
    _import("pybind11", "pybind11", "pip install pybind11, or leave out --no-build-isolation")
    try:
        toolkit, left_out = cuda_toolkit(torch.version.cuda), None
    except NotPossible as error:
        toolkit, left_out = None, str(error)
    if toolkit is not None:
        os.environ["CUDA_HOME"] = str(toolkit.home)  # before cpp_extension looks for one by itself
    return Plan(torch, import_module("torch.utils.cpp_extension"), toolkit, left_out)


def _import(name: str, module: str, remedy: str) -> Any:
    """A module of the build; NotPossible if it is missing or does not load."""
    try:
        return import_module(module)
    except (ImportError, OSError) as error:
        raise NotPossible(f"{name} cannot be imported ({error}): {remedy}") from error


def cuda_toolkit(
    torch_cuda: str | None,  # CUDA release that torch was built with
) -> Toolkit:
    """The toolkit for the CUDA kernels; NotPossible, with the reason, if they cannot be built."""
    if switched_on("CDM_FAST_FORCE_CPU"):
        raise NotPossible("CDM_FAST_FORCE_CPU is set")
    if torch_cuda is None:
        raise NotPossible("torch is a build without CUDA")
    toolkit = find_toolkit()
    if toolkit.release.split(".")[0] != torch_cuda.split(".")[0]:
        raise NotPossible(
            f"torch has CUDA {torch_cuda}, nvcc is {toolkit.release} ({toolkit.home}): "
            "install a toolkit of torch's major version, or set CUDA_HOME"
        )
    return toolkit


def choose_architectures(sees_gpu: bool) -> str:
    """What the CUDA kernels are compiled for, in words; sets TORCH_CUDA_ARCH_LIST where nothing else does."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return f"{os.environ['TORCH_CUDA_ARCH_LIST']} (TORCH_CUDA_ARCH_LIST)"
    if sees_gpu:
        return "those of the GPUs that torch sees"
    os.environ["TORCH_CUDA_ARCH_LIST"] = ARCHITECTURES
    return f"{ARCHITECTURES} (no GPU in sight; TORCH_CUDA_ARCH_LIST=9.0 chooses one and compiles faster)"


def make_extension(chosen: Plan, cuda: bool) -> Any:
    """The setuptools Extension with or without the CUDA kernels."""
    import pybind11

    make = chosen.cpp_extension.CUDAExtension if cuda else chosen.cpp_extension.CppExtension
    suffixes = (".cpp", ".cu") if cuda else (".cpp",)
    sources = sorted(path for path in (ROOT / "csrc").iterdir() if path.suffix in suffixes)
    return make(
        EXTENSION,
        [_relative(path) for path in sources],
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
        depends=[_relative(path) for path in sorted((ROOT / "csrc").glob("*.*h"))],
        define_macros=[("CDM_WITH_CUDA", "1")] if cuda else [],
        extra_compile_args={"cxx": cxx_flags(), "nvcc": NVCC_FLAGS},
    )


def _relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def distinct_objects(object_filenames: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """A compiler's method, except that X.cu becomes X.cu.o, so that an X.cpp beside it keeps X.o."""

    def distinct(sources: list[str], *arguments: Any, **options: Any) -> list[str]:
        objects = object_filenames(sources, *arguments, **options)
        return [
            str(Path(name).with_suffix(f".cu{Path(name).suffix}")) if source.endswith(".cu") else name
            for source, name in zip(sources, objects, strict=True)
        ]

    return distinct
