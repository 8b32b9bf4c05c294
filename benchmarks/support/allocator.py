"""Evaluations and training steps in a process of its own, whose C library keeps or returns freed memory.

    python -m benchmarks.support.allocator kept|returned [--small]

reads names of tasks from standard input, a line each, and answers each with a line. `Worker` starts it: how
memory is returned cannot be changed back within a process.
"""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.support.train_steps import WholeStep
from cdm_fast.config import preset
from cdm_fast.host.allocator import keep_freed_memory

PRESET, BATCH_SIZE = "fashion-mnist-encoder", 250
TASKS = ("step", "log-prob", "denoise")


class Worker:
    """A process that does tasks when it is told.

    Args:
        memory: "kept" or "returned".
        small: a tiny network.
    """

    def __init__(self, memory: str, small: bool) -> None:
        command = [sys.executable, "-m", __name__, memory, *(["--small"] if small else [])]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def do(self, task: str) -> float:
        """Does the task once; the sum of its result."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(task, file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


def tasks(small: bool) -> dict[str, Callable[[], Any]]:
    """What a worker can do, on noise; results are tensors."""
    torch.manual_seed(0)
    whole = WholeStep(small, torch.device("cpu"), config=None if small else preset(PRESET))
    model, x = whole.state.model, torch.randn(BATCH_SIZE, *whole.shape[1:])
    level = torch.arange(BATCH_SIZE) % model.schedule.num_levels
    found = whole.step, lambda: model.log_prob(x), lambda: model.denoise(x, level)
    return dict(zip(TASKS, found, strict=True))


def main() -> None:
    if sys.argv[1] == "kept":
        assert keep_freed_memory()
    known = tasks("--small" in sys.argv)
    for line in sys.stdin:
        print(float(known[line.strip()]().detach().sum()), flush=True)


if __name__ == "__main__":
    main()
