"""What this installation can do: versions, devices, the backend of every op and why, and what is missing."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch

import cdm_fast
import cdm_fast.ops as _ops  # noqa: F401  (every op declares its kernels when it is imported)
from cdm_fast.ops import _backend

PACKAGES = ("torch", "triton", "numpy", "safetensors", "pillow", "matplotlib", "scikit-learn", "tyro", "rich")

# Optional features: extra of the package -> (module it brings, what it is for).
EXTRAS = {
    "huggingface": ("datasets", "--data hf:NAME"),
    "tensorboard": ("tensorboard", "--tensorboard"),
    "wandb": ("wandb", "--wandb"),
}


def report() -> dict[str, Any]:
    """Everything that `cdm-fast doctor` tells, as JSON values.

    Keys: `version`, `python`, `platform`, `packages` (name -> version or None), `devices` (list of `device`,
    `name`, `detail`), `extension` (how `cdm_fast._C` was built, or None), `backends` (list of `op`, `device`,
    `backend`, `reason`, for float32) and `missing` (list of `what`, `remedy`).
    """
    return {
        "version": cdm_fast.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": _devices(),
        "extension": _backend.build_info(),
        "backends": [choice._asdict() for choice in _backend.describe()],
        "missing": _missing(),
    }


def render(found: dict[str, Any]) -> str:
    """A `report` as text for a terminal, one fact a line."""
    lines = [f"cdm_fast {found['version']}, Python {found['python']}, {found['platform']}"]
    lines.append(", ".join(f"{name} {number or '(missing)'}" for name, number in found["packages"].items()))
    lines.append("\nDevices")
    lines += [f"  {row['device']:5} {row['name']}: {row['detail']}" for row in found["devices"]]
    lines.append("\nOps (backend that `auto` picks for float32)")
    width = max((len(row["op"]) for row in found["backends"]), default=0)
    lines += [
        f"  {row['op']:{width}}  {row['device']:5} {row['backend']:10} {row['reason']}"
        for row in found["backends"]
    ]
    lines.append("\nMissing" if found["missing"] else "\nNothing is missing.")
    lines += [f"  {row['what']}: {row['remedy']}" for row in found["missing"]]
    return "\n".join(lines)


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _devices() -> list[dict[str, str]]:
    capability = _backend.cpu_capability()
    kernels = f"C++ kernels use {capability}" if capability else "no C++ kernels"
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = f"{usable} usable cores, torch uses {torch.get_num_threads()} threads, {kernels}"
    rows = [{"device": "cpu", "name": platform.machine(), "detail": cpu}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        detail = (
            f"compute capability {properties.major}.{properties.minor}, {memory}, CUDA {torch.version.cuda}"
        )
        rows.append({"device": f"cuda:{index}", "name": properties.name, "detail": detail})
    return rows


def _missing() -> list[dict[str, str]]:
    rows = []
    for backend, what in (("cpp", "C++ kernels"), ("triton", "Triton kernels"), ("cuda", "CUDA kernels")):
        obstacle = _backend.missing(backend)
        if obstacle is not None:
            rows.append({"what": what, "remedy": obstacle})
    for extra, (module, purpose) in EXTRAS.items():
        if find_spec(module) is None:
            rows.append({"what": f"{module} (for {purpose})", "remedy": f"pip install 'cdm_fast[{extra}]'"})
    return rows
