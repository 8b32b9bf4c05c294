"""Logs of a training run: log.jsonl, TensorBoard, Weights & Biases."""

import contextlib
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from cdm_fast.config import RunConfig
from cdm_fast.config.json import to_json
from cdm_fast.errors import DiskError, UserError
from cdm_fast.host.files import write_atomically
from cdm_fast.host.processes import is_main
from cdm_fast.host.reading import bad, error_text, read_bytes

_LIMIT = 2**30  # bytes of a log that is read: some 5 million lines

Numbers = Mapping[str, float | int | str | None]


class Sink(Protocol):
    """A log of numbers by step."""

    def write(self, step: int, numbers: Numbers) -> None:
        """Logs the numbers of one step."""

    def sync(self) -> None:
        """Flushes to the disk; called from another thread than `write`."""

    def close(self) -> None:
        """Flushes, and releases the log."""


class JsonLines:
    """RUN/log.jsonl: one JSON object per line; a number that is not finite is written as null.

    Lines of steps after `last_step` are removed at the start, so a resumed run has no duplicates. If the disk
    is full, a line is kept in memory, with a warning, and written before the next one. Raises DiskError when
    the file cannot be opened.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        self.path = path
        kept = [line for line in _lines(path) if _step_of(line) <= last_step]
        write_atomically(path, "".join(f"{line}\n" for line in kept).encode())
        self._file = open(path, "ab", buffering=0)
        self._unwritten = b""

    def write(self, step: int, numbers: Numbers) -> None:
        """Appends one line."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in numbers.items()}
        warned = bool(self._unwritten)
        self._unwritten += json.dumps({"step": step, **finite}).encode() + b"\n"
        try:
            self._append()
        except OSError as error:
            if not warned:
                warnings.warn(f"{self._refusal(error)}; the lines are kept in memory meanwhile", stacklevel=2)

    def sync(self) -> None:
        """Flushes the lines to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flushes the lines to the disk; raises DiskError when that fails."""
        with self._file:
            try:
                self._append()
                self.sync()
            except OSError as error:
                raise DiskError(self._refusal(error)) from error

    def _append(self) -> None:
        """Writes all pending bytes; after a failure the next call continues where this one ended."""
        while self._unwritten:
            written = self._file.write(self._unwritten)
            self._unwritten = self._unwritten[written:]

    def _refusal(self, error: OSError) -> str:
        return f"cannot write {self.path}: {error.strerror}; make room there"


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines() if path.exists() else []


def _step_of(line: str) -> float:
    """The step of a log line; infinity for an incomplete line, so that it is removed."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class TensorBoard:
    """TensorBoard event files in the run directory; events of steps after `last_step` are hidden."""

    def __init__(self, run: Path, last_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=last_step + 1)

    def write(self, step: int, numbers: Numbers) -> None:
        """One scalar per number."""
        for name, value in numbers.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    def sync(self) -> None:
        """Flushes the event file."""
        self._writer.flush()

    def close(self) -> None:
        """Flushes the event file."""
        self._writer.close()


class WeightsAndBiases:
    """A Weights & Biases run named after the run directory."""

    def __init__(self, run: Path, config: RunConfig) -> None:
        import wandb

        facts = to_json(config)
        name = run.resolve().name
        self._run = wandb.init(
            project="cdm-fast", name=name, id=name, dir=str(run), config=facts, resume="allow"
        )

    def write(self, step: int, numbers: Numbers) -> None:
        """One row."""
        self._run.log({k: v for k, v in numbers.items() if isinstance(v, int | float)}, step=step)

    def sync(self) -> None:
        """Does nothing: the client uploads in the background."""

    def close(self) -> None:
        """Uploads the remaining rows."""
        self._run.finish()


def require_extras(config: RunConfig) -> None:
    """Raises UserError when the config asks for a log whose package is not installed."""
    for wanted, name in ((config.output.tensorboard, "tensorboard"), (config.output.wandb, "wandb")):
        if wanted and find_spec(name) is None:
            raise UserError(f"--{name} needs the {name} package; pip install 'cdm_fast[{name}]'")


@contextlib.contextmanager
def open_sinks(run: Path, config: RunConfig, last_step: int) -> Iterator[list[Sink]]:
    """The log file and the other logs of the config, closed when the block ends; only rank 0 has any.

    Raises DiskError when the log cannot be completed, unless the block raises another error.
    """
    if not is_main():
        yield []
        return
    sinks: list[Sink] = [JsonLines(run / "log.jsonl", last_step)]
    failed = True
    try:
        if config.output.tensorboard:
            sinks.append(TensorBoard(run, last_step))
        if config.output.wandb:
            sinks.append(WeightsAndBiases(run, config))
        yield sinks
        failed = False
    finally:
        for sink in reversed(sinks):
            with contextlib.suppress(*[DiskError] * failed):
                sink.close()


def read_log(
    path: str | Path,  # log.jsonl of a run
) -> list[dict[str, Any]]:
    """The records of a JSON-lines log, oldest first; an incomplete last line (of a killed run) is left out.

    Raises UserError when the file is missing, too large or no text, or names the first line that is not a
    JSON object.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"cannot read {path}: no such file; give the directory of a training run")
    try:
        lines = read_bytes(path, _LIMIT).decode().splitlines()
    except UnicodeDecodeError as error:
        raise bad(path, f"is no text ({error_text(error)}); give the log of a training run") from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            told = error.msg if isinstance(error, json.JSONDecodeError) else error_text(error)
            raise UserError(f"{path}, line {number}: not JSON ({told}); delete that line") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number}: not a JSON object; delete that line")
        records.append(record)
    return records
