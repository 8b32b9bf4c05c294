"""`cdm-fast doctor`: versions, devices, the backend of each op, and missing features."""

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch

import cdm_fast
import cdm_fast.ops as _ops  # noqa: F401  (every op declares its kernels when it is imported)
from cdm_fast.ops import backend as _backend
from cdm_fast.ops import build_record

PACKAGES = ("torch", "triton", "numpy", "safetensors", "pillow", "matplotlib", "scikit-learn", "tyro", "rich")

# The torch releases with which the kernels were built and tested, and the triton version of each.
TESTED_TORCH = ((2, 10), (2, 11), (2, 13), (2, 14))
TESTED_TRITON = {(2, 11): (3, 6), (2, 13): (3, 8), (2, 14): (3, 8)}

# Up to this triton version, its interpreter fails with this numpy version or newer.
OLD_INTERPRETER = ((3, 6), (2, 4))

# Optional features: extra of the package -> (module that it installs, purpose).
EXTRAS = {
    "audit": ("torchdiffeq", "nll --method ode and audit"),
    "attacks": ("foolbox", "classify --attack"),
    "onnx": ("onnxscript", "ONNX files and report --playground"),
    "hub": ("huggingface_hub", "push and runs named hf:OWNER/NAME"),
    "diffusers": ("diffusers", "models named diffusers:PATH"),
    "huggingface": ("datasets", "--data hf:NAME"),
    "tensorboard": ("tensorboard", "--tensorboard"),
    "wandb": ("wandb", "--wandb"),
}


def report() -> dict[str, Any]:
    """Everything that `cdm-fast doctor` prints, as JSON values.

    Keys: `version`, `python`, `platform`, `packages` (name -> version or None), `devices` (list of `device`,
    `name`, `detail`), `extension` (how `cdm_fast._C` was built, or None), `build` (what the build recorded:
    kernels that were `built`, those `left_out` and why, its `log` after a failure; or None), `backends` (list
    of `op`, `device`, `backend`, `reason`, for float32), `warnings` (lines about untested combinations) and
    `missing` (list of `what`, `remedy`).
    """
    return {
        "version": cdm_fast.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": _devices(),
        "extension": _backend.build_info(),
        "build": _build(),
        "backends": [choice._asdict() for choice in _backend.describe()],
        "warnings": combination_warnings(_version("torch"), _version("triton"), _version("numpy")),
        "missing": _missing(),
    }


def render(found: dict[str, Any]) -> str:
    """A `report` as text for a terminal, one fact per line."""
    lines = [f"cdm_fast {found['version']}, Python {found['python']}, {found['platform']}"]
    lines.append(", ".join(f"{name} {number or '(missing)'}" for name, number in found["packages"].items()))
    lines.append("\nDevices")
    lines += [f"  {row['device']:5} {row['name']}: {row['detail']}" for row in found["devices"]]
    lines += ["\nBuild", *_render_build(found["build"])]
    lines.append("\nOps (backend that `auto` picks for float32)")
    width = max((len(row["op"]) for row in found["backends"]), default=0)
    lines += [
        f"  {row['op']:{width}}  {row['device']:5} {row['backend']:10} {row['reason']}"
        for row in found["backends"]
    ]
    if found["warnings"]:
        lines += ["\nWarnings", *(f"  {line}" for line in found["warnings"])]
    lines.append("\nMissing" if found["missing"] else "\nNothing is missing.")
    lines += [f"  {row['what']}: {row['remedy']}" for row in found["missing"]]
    return "\n".join(lines)


def _build() -> dict[str, Any] | None:
    """The record of the build, with the full path of its log."""
    record = build_record.read()
    return None if record is None else {**record, "log": str(build_record.log() or "") or None}


def _render_build(record: dict[str, Any] | None) -> list[str]:
    if record is None:
        return ["  no record: installed as pure Python, or not installed"]
    lines = [f"  {kind} kernels: built beside torch {record['torch']}" for kind in record["built"]]
    lines += [f"  {kind} kernels: left out, {reason}" for kind, reason in record["left_out"].items()]
    for key in ("toolkit", "architectures", "log"):
        if record.get(key):
            lines.append(f"  {key}: {record[key]}")
    return lines


def combination_warnings(torch_: str | None, triton: str | None, numpy: str | None) -> list[str]:
    """A line for every version, or pair of versions, that is known to fail or was not tested."""
    lines = []
    release = _release(torch_)
    if release and release not in TESTED_TORCH:
        tested = ", ".join(".".join(map(str, end)) for end in TESTED_TORCH)
        lines.append(f"torch {torch_} was not tested: {tested} were")
    pair = _release(triton)
    if pair and release in TESTED_TRITON and pair != TESTED_TRITON[release]:
        tested = ".".join(map(str, TESTED_TRITON[release]))
        lines.append(f"triton {triton} was not tested with torch {torch_}: triton {tested} was")
    numpy_release = _release(numpy)
    if pair and numpy_release and pair <= OLD_INTERPRETER[0] and numpy_release >= OLD_INTERPRETER[1]:
        lines.append(
            f"triton {triton} does not interpret kernels (TRITON_INTERPRET=1) with numpy {numpy}; "
            "pip install 'numpy<2.4' for that, GPUs are not affected"
        )
    return lines


def _release(number: str | None) -> tuple[int, int] | None:
    """The first two numbers of a version; None without a version."""
    found = re.match(r"(\d+)\.(\d+)", number or "")
    return (int(found[1]), int(found[2])) if found else None


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
