"""Runs one part of `run_gpu.sh` within a time limit and records how it went: OUT/NAME.json.

    python -m benchmarks.part OUT NAME SECONDS COMMAND...

The word {json} in COMMAND becomes a file that the command may write; what it holds ends up under "result".
Output goes to OUT/log.txt, its end into the JSON too. Exits with the command's status, 124 past the limit.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT, facts

TIMED_OUT = 124
TAIL = 4000  # characters of output kept in the JSON


def run(out: Path, name: str, limit: float, command: list[str], device: str = "cuda") -> int:
    """Runs `command` from the root of the repository, writes OUT/NAME.json, returns the exit status.

    limit: seconds, after which the command and all it started are killed.
    device: where its figures are taken, for the record.
    """
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        words = [word.replace("{json}", str(result)) for word in command]
        start = time.monotonic()
        status, output = _run(words, limit)
        record = {
            "part": name,
            "command": shlex.join(command),
            "exit_status": status,
            "seconds": round(time.monotonic() - start, 1),
            "limit_seconds": limit,
            "environment": facts(device),
            "output_tail": output[-TAIL:],
            "result": _json(result),
        }
    (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    with (out / "log.txt").open("a") as log:
        log.write(f"== {name}: {record['command']}\n{output}\n")
    return status


def _run(words: list[str], limit: float) -> tuple[int, str]:
    """Exit status and everything printed; a process group of its own, so that nothing outlives the limit."""
    with tempfile.TemporaryFile(mode="w+", errors="replace") as output:
        try:
            process = subprocess.Popen(
                words, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
            )
        except OSError as error:
            return 127, str(error)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = TIMED_OUT
        output.seek(0)
        return status, output.read()


def _json(path: Path) -> Any:
    """What a file holds, or None where there is none, or only half of one."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


if __name__ == "__main__":
    out, name, limit, *command = sys.argv[1:]
    sys.exit(run(Path(out), name, float(limit), command))
