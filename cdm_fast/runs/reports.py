"""The scores that a run keeps beside its weights, as JSON objects: nll.json, classes.json, audit.json."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from cdm_fast.config.json import finite
from cdm_fast.host.reading import bad, error_text, read_bytes
from cdm_fast.runs.checkpoint import write_json

KEPT_LIMIT = 2**26  # bytes of a picture, report or log that a run keeps


def read_report(run: Path, name: str) -> dict[str, Any] | None:
    """The JSON object in RUN/name, with None for a number that is not finite; None without the file.

    Raises UserError for a file that holds no JSON object.
    """
    path = run / name
    if not path.is_file():
        return None
    found = read_kept_json(path, run)
    if not isinstance(found, dict):
        raise bad(path, "is no JSON object; write it again or remove it")
    return found


def read_kept_json(path: Path, run: Path) -> Any:
    """The JSON value in a file of a run, with None for a number that is not finite; UserError if damaged."""
    content = read_bytes(path, KEPT_LIMIT, run)
    try:
        return json.loads(
            content,
            parse_constant=lambda _: None,
            parse_float=_finite_number(float),
            parse_int=_finite_number(int),
        )
    except (ValueError, RecursionError) as error:
        raise bad(path, f"cannot be read ({error_text(error)}); write it again or remove it") from None


def _finite_number(kind: type[int] | type[float]) -> Callable[[str], int | float | None]:
    """Reads a number of JSON; None for one beyond the range of a float, such as 1e999."""
    return lambda text: kind(text) if math.isfinite(float(text)) else None


def figure_text(report: Mapping[str, Any], key: str, scale: float = 1, unit: str = "") -> str:
    """A figure of a report times `scale`, with its standard error if it has one; empty without a number."""
    value, error = report.get(key), report.get(f"{key}_stderr")
    if not _is_finite(value):
        return ""
    digits = 2 if unit else 4
    spread = f" ± {scale * error:.{digits}f}" if _is_finite(error) else ""
    return f"{scale * value:.{digits}f}{spread}{unit}"


def _is_finite(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and math.isfinite(value)


def write_report(run: Path, name: str, report: dict[str, Any]) -> Path:
    """Writes RUN/name, a number that is not finite as null; returns its path."""
    write_json(run / name, finite({"run": str(run), **report}))
    return run / name
