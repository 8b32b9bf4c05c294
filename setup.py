"""Builds the optional extension `cdm_fast._C` from csrc/; everything else is in pyproject.toml.

Switches (environment variables):

- `CDM_FAST_NO_EXT=1`       install pure Python, whatever is available
- `CDM_FAST_REQUIRE_EXT=1`  fail where the build of kernels fails, instead of taking the next best
- `CDM_FAST_FORCE_CPU=1`    leave the CUDA sources out
- `MAX_JOBS`                number of compilers that run at once
- `CXX`, `CUDA_HOME`        the C++ compiler ("ccache g++" will do), the folder of the CUDA toolkit
- `CC` or `NVCC_CCBIN`      the host compiler of nvcc; by default its own choice, gcc
- `TORCH_CUDA_ARCH_LIST`    GPU architectures, e.g. "9.0"; by default those of the GPUs in sight
"""

from setuptools import find_packages, setup

from building.command import setup_arguments

setup(
    packages=[*find_packages(include=["cdm_fast", "cdm_fast.*"]), "cdm_fast.kernels"],
    package_dir={"cdm_fast.kernels": "kernels"},
    **setup_arguments(),
)
