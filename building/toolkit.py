"""The CUDA toolkit that the kernels are built with."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from building.errors import NotPossible

_DEFAULT_HOME = Path("/usr/local/cuda")  # as torch has it


class Toolkit(NamedTuple):
    """A CUDA toolkit: its folder, its release ("13.0"), and how it was found."""

    home: Path
    release: str
    found_by: str


def find_toolkit() -> Toolkit:
    """The toolkit of CUDA_HOME or CUDA_PATH, else of the nvcc on PATH, else /usr/local/cuda.

    Raises NotPossible, with the reason, if there is none or its nvcc does not run.
    """
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home:
            return Toolkit(Path(home), nvcc_release(Path(home, "bin", "nvcc")), variable)
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        release = nvcc_release(Path(nvcc))
        return Toolkit(toolkit_of(Path(nvcc)), release, f"{nvcc} on PATH")
    if (_DEFAULT_HOME / "bin" / "nvcc").exists():
        return Toolkit(_DEFAULT_HOME, nvcc_release(_DEFAULT_HOME / "bin" / "nvcc"), "the default folder")
    raise NotPossible("there is no nvcc: install the CUDA toolkit, or set CUDA_HOME to its folder")


def nvcc_release(nvcc: Path) -> str:
    """Release of a CUDA compiler, such as "13.0"; NotPossible if it does not run."""
    found = re.search(r"release (\d+\.\d+)", _output(nvcc, "--version"))
    if found is None:
        raise NotPossible(f"{nvcc} --version names no release: repair the CUDA toolkit, or set CUDA_HOME")
    return found.group(1)


def toolkit_of(nvcc: Path) -> Path:
    """The folder of the toolkit that an nvcc belongs to.

    nvcc itself says where that is, which also holds for a wrapper script in another folder; a compiler that
    does not say belongs to the folder above its own, links resolved.
    """
    try:
        found = re.search(r"^#\$ TOP=(.+)$", _output(nvcc, "--dryrun", "-x", "cu", os.devnull), re.MULTILINE)
    except NotPossible:
        found = None
    return Path(found.group(1).strip()).resolve() if found else nvcc.resolve().parents[1]


def _output(nvcc: Path, *arguments: str) -> str:
    """What `nvcc` prints; NotPossible if it cannot be run or fails."""
    try:
        run = subprocess.run([nvcc, *arguments], capture_output=True, text=True, check=False)
    except OSError as error:
        raise NotPossible(f"{nvcc} does not run ({error.strerror}): repair it, or set CUDA_HOME") from error
    if run.returncode != 0:
        lines = (run.stderr or run.stdout).strip().splitlines() or ["no message"]
        raise NotPossible(
            f"{nvcc} fails with status {run.returncode} ({lines[0]}): repair it, or set CUDA_HOME"
        )
    return run.stdout + run.stderr
