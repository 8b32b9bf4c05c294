"""A long training of a small network: its memory, open files and log must not grow with the steps.

    python -m tests.long_training [--steps 5000]     # about two minutes; prints one JSON object

Checkpoints every 25 steps (`--save-every 50`), a log line every 10, samples and loss curves every 500. Memory
is what the process holds at the end of each tenth of the run. Fails when, after the second tenth, it grows by
more than 8 MiB, or there are more open files at the end than after the second tenth, or one of the run's own.
"""

import argparse
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cdm_fast.training import finish, loop, train
from tests.tiny_run import tiny_config, write_images

MAX_GROWTH = 8 << 20


def resident_bytes() -> int:
    """What the process holds in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> list[str]:
    """Files that the process has open; matplotlib keeps its fonts open from the first picture on."""
    links = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    return [os.readlink(link) for link in links if os.path.islink(link)]


def long_training(steps: int, folder: Path) -> dict[str, Any]:
    """Trains, and returns what was held over the run."""
    config = tiny_config(write_images(folder / "images.npz"), steps=steps)
    output = replace(config.output, log_every=10, save_every=50, sample_every=500)
    memory, files = [], []
    take_step = loop.take_step

    def watched(state, *rest):
        take_step(state, *rest)
        if state.step % (steps // 10) == 0:
            memory.append(resident_bytes())
            files.append(len(open_files()))

    loop.take_step, finish.write_final = watched, lambda *_: {}
    train.train(replace(config, output=output), folder / "run", device="cpu")
    log = (folder / "run" / "log.jsonl").stat().st_size
    return {
        "steps": steps,
        "memory_mib": [round(held / 2**20, 1) for held in memory],
        "growth_mib": round((memory[-1] - memory[1]) / 2**20, 1),
        "left_open_in_run": [name for name in open_files() if name.startswith(str(folder))],
        "open_files": files,
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
    assert not found["left_open_in_run"] and found["open_files"][-1] <= found["open_files"][1], "left open"


if __name__ == "__main__":
    main()
