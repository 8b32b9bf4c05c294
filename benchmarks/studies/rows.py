"""What the studies share: result files that grow by a row, one JSON object a line, and runs trained once."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.support.environment import facts
from cdm_fast.config import RunConfig
from cdm_fast.errors import UserError
from cdm_fast.host.allocator import keep_freed_memory
from cdm_fast.runs.checkpoint import load_checkpoint, read_config
from cdm_fast.training.prepare import config_to_resume
from cdm_fast.training.train import resume, train

keep_freed_memory()  # as the command line does


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a results file, oldest first; none where there is no file yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def has_row(path: Path, key: dict[str, Any]) -> bool:
    """Whether the file holds a row with all these values."""
    return any(key.items() <= row.items() for row in read_rows(path))


def add_row(path: Path, row: dict[str, Any]) -> dict[str, Any]:
    """Appends a row with where it was measured: device, versions, commit. Returns what was written."""
    row = {**row, "environment": facts("cpu")}
    with path.open("a") as file:
        print(json.dumps(row), file=file)
    return row


def trained(config: RunConfig, run: Path) -> Path:
    """The run directory, trained first if it is missing or unfinished; nothing is drawn on the way.

    Raises UserError for a directory that holds another run, and if the training is stopped by a signal.
    """
    if not run.exists():
        train(replace(config, output=replace(config.output, sample_every=0, evaluate_every=0)), run)
    elif config_to_resume(config, run) is None or read_config(run).train.steps != config.train.steps:
        raise UserError(f"{run} holds a run of other settings; give another --runs")
    elif load_checkpoint(run, ()).step < config.train.steps:
        resume(run)
    if load_checkpoint(run, ()).step < config.train.steps:
        raise UserError(f"the training of {run} was stopped; start the study again to continue it")
    return run
