"""The scores that a run keeps beside its weights, as JSON objects: nll.json, classes.json, audit.json."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cdm_fast.config.json import finite
from cdm_fast.errors import UserError
from cdm_fast.host.reading import bad, error_text, read_bytes
from cdm_fast.runs.checkpoint import write_json

_LIMIT = 2**26  # bytes


def read_report(run: Path, name: str) -> dict[str, Any] | None:
    """The JSON object in RUN/name, with None for a number that is not finite; None without the file.

    Raises UserError for a file that holds no JSON object.
    """
    path = run / name
    if not path.is_file():
        return None
    try:
        found = json.loads(
            read_bytes(path, _LIMIT, run),
            parse_constant=lambda _: None,
            parse_float=_finite_number(float),
            parse_int=_finite_number(int),
        )
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise bad(path, f"cannot be read ({error_text(error)}); write it again or remove it") from None
    if not isinstance(found, dict):
        raise bad(path, "is no JSON object; write it again or remove it")
    return found


def _finite_number(kind: type[int] | type[float]) -> Callable[[str], int | float | None]:
    """Reads a number of JSON; None for one beyond the range of a float, such as 1e999."""
    return lambda text: kind(text) if math.isfinite(float(text)) else None


def write_report(run: Path, name: str, report: dict[str, Any]) -> Path:
    """Writes RUN/name, a number that is not finite as null; returns its path."""
    write_json(run / name, finite({"run": str(run), **report}))
    return run / name
