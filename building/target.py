"""The torch that the kernels are built against: the one installed where the package is going to be."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]

_PROBE = (
    "import importlib.metadata, json, sys; print(json.dumps([importlib.metadata.version('torch'), sys.path]))"
)


class Torch(NamedTuple):
    """An installed torch: its version, and the folders to append to sys.path before importing it."""

    version: str
    path: list[str]


def torch_requirement() -> str:
    """The project's own requirement on torch, such as "torch>=2.10"."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return next(line for line in project["dependencies"] if re.match(r"torch\b", line))


def is_supported(version: str) -> bool:
    """Whether a torch of this version satisfies `torch_requirement`."""
    lowest = re.search(r">=(\d+)\.(\d+)", torch_requirement())
    found = re.match(r"(\d+)\.(\d+)", version)
    assert lowest is not None, "the requirement on torch has a lower bound"
    return found is not None and tuple(map(int, found.groups())) >= tuple(map(int, lowest.groups()))


def find_torch() -> Torch | None:
    """The torch to build against, or None if there is none that the project supports.

    First the one that this process can import; then, since pip hides the environment that it installs into
    from an isolated build, the one that the same interpreter finds without pip's PYTHONPATH.
    """
    for found in (_own_torch, _torch_of_environment):
        torch = found()
        if torch is not None and is_supported(torch.version):
            return torch
    return None


def _own_torch() -> Torch | None:
    try:
        return Torch(importlib.metadata.version("torch"), [])
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch_of_environment() -> Torch | None:
    hidden_by_pip = ("PYTHONPATH", "PYTHONNOUSERSITE")
    environment = {name: value for name, value in os.environ.items() if name not in hidden_by_pip}
    run = subprocess.run(
        [sys.executable, "-P", "-c", _PROBE], env=environment, capture_output=True, text=True, check=False
    )
    if run.returncode != 0:
        return None
    version, path = json.loads(run.stdout)
    return Torch(version, [folder for folder in path if folder not in sys.path])
