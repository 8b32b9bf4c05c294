"""Result files: JSON objects, one a line. The first holds the environment, each further one a measurement.

    {"environment": {"device": "cpu", "torch": ..., "commit": ..., "command": ..., "small": false, ...}}
    {"benchmark": "noising", "case": "float images", "candidate_ms": 1.234, "baseline_ms": 2.345, ...}

`pytest benchmarks/ --benchmark-only --results FILE` writes one, row by row. The results.json of `run_gpu.sh`
becomes one by `benchmarks.support.report --keep`; profiles, trainings, errors and stages that did not pass
are rows too.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple


class Run(NamedTuple):
    """One result file: where its figures come from, and one dict per row."""

    name: str
    environment: dict[str, Any]
    rows: list[dict[str, Any]]


class BadResult(ValueError):
    """A result file that cannot be used; the message names it and the reason."""


def start(path: Path, environment: dict[str, Any]) -> None:
    """Begins a result file, in place of what is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_line({"environment": environment}))


def add(path: Path, row: dict[str, Any]) -> None:
    """Appends one measurement."""
    with path.open("a") as file:
        file.write(_line(row))


def read(path: Path) -> Run:
    """The run in one result file.

    Raises:
        BadResult: not JSON lines, no environment in the first or no measurement after it, or a smoke run.
    """
    try:
        first, *rows = [json.loads(line) for line in path.read_text().splitlines()]
        environment = first["environment"]
        environment["device"]
        if not rows or not all(_told(row) for row in rows):
            raise KeyError("benchmark")
    except json.JSONDecodeError as error:
        raise BadResult(f"{path.name}: not JSON ({error}); remove it or take the figures again") from error
    except (KeyError, TypeError, ValueError) as error:
        raise BadResult(f"{path.name}: holds no figures of a benchmark ({error!r}); remove it") from error
    if environment.get("small"):
        raise BadResult(f"{path.name}: a smoke run (--small), whose times mean nothing; remove it")
    return Run(path.stem, environment, rows)


def keep(document: Path, path: Path) -> None:
    """Writes the results.json of `run_gpu.sh` as a result file.

    Raises:
        BadResult: it is not such a document, or one of a dry run.
    """
    try:
        found = json.loads(document.read_text())
        rows = [row for stage in found["stages"] for row in _rows_of(stage)]
        environment = found["environment"]
    except (OSError, json.JSONDecodeError) as error:
        raise BadResult(f"{document}: cannot be read ({error})") from error
    except (KeyError, TypeError) as error:
        raise BadResult(f"{document}: not a results.json of run_gpu.sh ({error!r})") from error
    if environment.get("small"):
        raise BadResult(f"{document}: of a dry run, whose times mean nothing")
    start(path, environment)
    for row in rows:
        add(path, row)


def _rows_of(stage: dict[str, Any]) -> list[dict[str, Any]]:
    """What a stage measured, after a row of its own if it did not pass."""
    rows = [row for row in stage["records"] if _told(row)]
    if stage["status"] == "passed":
        return rows
    return [{key: stage[key] for key in ("name", "status", "reason") if key in stage}, *rows]


def _told(row: dict[str, Any]) -> bool:
    """Whether a row has a place in the report: a measurement, a part of a profile, or a stage."""
    return any(key in row for key in ("benchmark", "profile", "status"))


def _line(row: dict[str, Any]) -> str:
    return json.dumps(_rounded(row), separators=(",", ":")) + "\n"


def _rounded(value: Any) -> Any:
    """Floating-point numbers to eight significant digits, in lists and dicts too."""
    if isinstance(value, float):
        return float(f"{value:.8g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
