"""The PEP 517 backend: setuptools', which also asks for torch where the environment has none.

Naming torch among the build requirements would install it into every isolated build. It is asked for only
where there is a compiler and the target environment has no torch yet; the package itself needs the same
wheel, which pip then takes from its cache.
"""

from typing import Any

try:
    from setuptools import build_meta
except ImportError as error:
    raise ImportError(
        "--no-build-isolation needs the build requirements installed: "
        "pip install 'setuptools>=77' wheel 'pybind11>=2.13' ninja"
    ) from error

from building.host_compiler import compiler
from building.kernels import switched_on
from building.target import find_torch, torch_requirement

build_wheel = build_meta.build_wheel
build_sdist = build_meta.build_sdist
build_editable = build_meta.build_editable
get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist
prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """What a wheel's build needs beside pyproject's `requires`."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *missing_torch()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """What an editable install's build needs beside pyproject's `requires`."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *missing_torch()]


def missing_torch() -> list[str]:
    """The requirement on torch, if kernels can be built and there is no torch to build them against."""
    if switched_on("CDM_FAST_NO_EXT") or compiler() is None or find_torch() is not None:
        return []
    return [torch_requirement()]
