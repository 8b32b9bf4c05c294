"""Kernels for GPUs become machine code on a machine without one: Triton for three kinds, CUDA C++ for two."""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from building.kernels import STABLE_ABI

pytestmark = pytest.mark.cpu
ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("compile_launches.py")
# attention compiles its kernels, and with them the functions of attention_tiles, in its own test, at the head
# widths where registers run short.
TRITON_MODULES = (
    "noising",
    "image_noise",
    "noise_level_ce",
    "denoise",
    "group_norm_silu",
    "group_norm_silu_split",
    "attention_rows",
    "rms_norm",
    "swiglu",
)
CUDA_SOURCES = sorted((ROOT / "csrc").glob("*.cu"))
CUDA_ARCHS = (80, 90)


def test_every_triton_module_is_compiled_somewhere():
    modules = {path.stem for path in (ROOT / "kernels").glob("*.py")} - {"__init__"}
    assert modules == {*TRITON_MODULES, "attention", "attention_tiles"}


@cache
def _compiled(name: str) -> dict[str, list[dict[str, int]]]:
    """What `compile_launches.py` reports of a module."""
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, PROGRAM, name, "80", "90", "100"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", TRITON_MODULES)
def test_triton_kernels_compile_without_spills(name):
    kernels = _compiled(name)
    assert kernels and all(kernels.values()), (
        f"never launched: {[k for k, uses in kernels.items() if not uses]}"
    )
    for kernel, uses in kernels.items():
        assert {use["arch"] for use in uses} == {80, 90, 100}
        assert all(use["spills"] == 0 and use["shared"] <= 163 * 1024 for use in uses), (kernel, uses)


@pytest.mark.parametrize("name", ["group_norm_silu_split"])
def test_triton_kernels_load_whole_vectors(name):
    """Images are read 16 bytes at a time; sums and parameters, a thousandth of them, need not be."""
    kernels = _compiled(name)
    for kernel, uses in kernels.items():
        if "combine" not in kernel:
            assert all(use["wide_loads"] >= 1 for use in uses), (kernel, uses)


def _nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


@pytest.mark.skipif(_nvcc() is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source", CUDA_SOURCES, ids=lambda path: path.stem)
def test_cuda_sources_compile_without_spills_or_warnings(source, tmp_path):
    from torch.utils.cpp_extension import include_paths

    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHS]
    includes = [f"-I{path}" for path in (ROOT / "csrc", *include_paths())]
    flags = ["-O3", "-std=c++17", "--expt-relaxed-constexpr", f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]
    outputs = ["-Xptxas=-v", "--threads=2", "-c", source, "-o", tmp_path / "out.o"]
    command = [_nvcc(), *flags, *targets, *includes, *outputs]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    spills = [int(count) for count in re.findall(r"(\d+) bytes spill stores", done.stderr)]
    for arch in CUDA_ARCHS:
        assert f"for 'sm_{arch}'" in done.stderr
    assert spills and max(spills) == 0, done.stderr
