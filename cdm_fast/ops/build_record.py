"""The record of the extension's build: which kernels were built, and why others were not.

The build writes `cdm_fast/_build.json`, and `cdm_fast/_build.log` after a failure. Neither exists if the
package was installed as pure Python.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1]


@cache
def read() -> dict[str, Any] | None:
    """The record: `built`, `left_out` (kind -> reason), `torch`, `log` and others; None without one."""
    try:
        found = json.loads((FOLDER / "_build.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def log() -> Path | None:
    """The log of a build in which something failed; None if nothing did."""
    name = (read() or {}).get("log")
    return FOLDER / name if name else None


@cache
def why_left_out(
    kind: str,  # "cpp" or "cuda"
) -> str | None:
    """Why the build left these kernels out, with the place of its log; None if it did not."""
    reason = (read() or {}).get("left_out", {}).get(kind)
    if reason is None:
        return None
    return f"{reason}; the build's log is {log()}" if log() else str(reason)


def failed(kind: str) -> bool:
    """Whether the build of these kernels failed; False if it was not attempted."""
    return "building failed" in (why_left_out(kind) or "")
