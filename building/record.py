"""The record of a build, which `cdm-fast doctor` reads: `_build.json`, and `_build.log` after a failure."""

import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

RECORD, LOG = "_build.json", "_build.log"

# From the particular to the general: a compiler's complaint, a linker's, that of any tool.
_COMPLAINTS = (
    re.compile(r"\b(?:fatal )?error\b ?[:#]|\): error\b|\bfatal\s*:"),  # nvcc: "fatal   :"
    re.compile(r"undefined (?:reference|symbol)|cannot find -l|not found"),
    re.compile(r"\bFAILED\b|\b[Ee]rror\b"),
)


def first_complaint(log: str) -> str | None:
    """The line of a build log that tells best what went wrong, at most 200 characters; None without one."""
    for pattern in _COMPLAINTS:
        for line in log.splitlines():
            if pattern.search(line):
                return line.strip()[:200]
    return None


def write_record(folder: Path, record: dict[str, Any], log: str | None) -> None:
    """Writes the record, and the log or, if that is None, removes an earlier one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if log is None:
        (folder / LOG).unlink(missing_ok=True)
    else:
        (folder / LOG).write_text(log, encoding="utf-8")


@contextmanager
def copied_output(chunks: list[bytes]) -> Iterator[None]:
    """Appends what this process and its children write to stdout and stderr, which still goes there too."""
    _flush()
    saved = {number: os.dup(number) for number in (1, 2)}
    readable, writable = os.pipe()
    for number in saved:
        os.dup2(writable, number)
    os.close(writable)

    def copy() -> None:
        while chunk := os.read(readable, 2**16):
            chunks.append(chunk)
            os.write(saved[2], chunk)

    reader = threading.Thread(target=copy)
    reader.start()
    try:
        yield
    finally:
        _flush()
        for number, original in saved.items():
            os.dup2(original, number)
        reader.join()
        for descriptor in (readable, *saved.values()):
            os.close(descriptor)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
