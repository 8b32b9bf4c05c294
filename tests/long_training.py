"""A long training of a small network: its memory, open files and log must not grow with the steps.

    python -m tests.long_training [--steps 5000]     # about two minutes; prints one JSON object

Checkpoints every 25 steps (`--save-every 50`), a log line every 10, samples and loss curves every 500. Memory
is what the process holds at the end of each tenth of the run. Fails when, after the second tenth, it grows by
more than 8 MiB, or when a file is left open.
"""

import argparse
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from cdm_fast import train
from tests.tiny_run import tiny_config, write_images

MAX_GROWTH = 8 << 20


def resident_bytes() -> int:
    """What the process holds in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    """Files that the process has open."""
    return len(os.listdir("/proc/self/fd"))


def long_training(steps: int, folder: Path) -> dict[str, object]:
    """Trains, and returns what was held over the run."""
    config = tiny_config(write_images(folder / "images.npz"), steps=steps)
    output = replace(config.output, log_every=10, save_every=50, sample_every=500)
    memory, files = [], []
    take_step = train.take_step

    def watched(state, *rest):
        take_step(state, *rest)
        if state.step % (steps // 10) == 0:
            memory.append(resident_bytes())
            files.append(open_files())

    train.take_step, train.write_final = watched, lambda *_: {}
    before = open_files()
    train.train(replace(config, output=output), folder / "run", device="cpu")
    log = (folder / "run" / "log.jsonl").stat().st_size
    return {
        "steps": steps,
        "memory_mib": [round(held / 2**20, 1) for held in memory],
        "growth_mib": round((memory[-1] - memory[1]) / 2**20, 1),
        "files_left_open": open_files() - before,
        "open_files": [min(files), max(files)],
        "log_bytes_per_line": round(log / (steps // 10)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = long_training(arguments.steps, Path(folder))
    print(json.dumps(found))
    assert found["growth_mib"] * 2**20 <= MAX_GROWTH, "memory grows"
    assert found["files_left_open"] == 0, "files are left open"


if __name__ == "__main__":
    main()
