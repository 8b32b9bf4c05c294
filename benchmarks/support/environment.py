"""What a figure depends on: the device, the versions, and the commit of the code."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


def facts(device: str) -> dict[str, Any]:
    """The environment as JSON values, stored beside every figure.

    device: "cpu" or "cuda", where the figures are taken.
    """
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": device,
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": gpu,
        "driver": _line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "commit": commit(),
    }


def commit() -> str:
    """Short hash of the checked-out commit, with "+" where tracked files differ from it.

    A copy without a repository takes the environment variable CDM_FAST_COMMIT, or says "unknown".
    """
    found = _line("git", "rev-parse", "--short=10", "HEAD")
    if found is None:
        return os.environ.get("CDM_FAST_COMMIT", "unknown")
    return found + ("+" if _line("git", "status", "--porcelain", "--untracked-files=no") else "")


def _line(*command: str) -> str | None:
    """First line that a command prints, or None if it cannot run, fails or prints nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    except (OSError, subprocess.CalledProcessError):
        return None
    return next(iter(done.stdout.splitlines()), None)


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
