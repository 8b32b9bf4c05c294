"""One evaluation or training step at a time in a process of its own, whose C library keeps or returns memory.

    python -m benchmarks.support.allocator step|log-prob|denoise kept|returned [--small]

runs one for each line of standard input and answers with a line. `Worker` starts it: how memory is returned
cannot be changed back within a process.
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
    """A process that does one task when it is called."""

    def __init__(self, task: str, memory: str, small: bool) -> None:
        command = [sys.executable, "-m", __name__, task, memory, *(["--small"] if small else [])]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self) -> float:
        """Does the task once; the sum of its result."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(file=self._process.stdin, flush=True)
        return float(self._process.stdout.readline())

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


def task_of(name: str, small: bool) -> Callable[[], Any]:
    """What a worker repeats, on noise; its result is a tensor."""
    torch.manual_seed(0)
    whole = WholeStep(small, torch.device("cpu"), config=None if small else preset(PRESET))
    if name == "step":
        return whole.step
    model, x = whole.state.model.eval(), torch.randn(BATCH_SIZE, *whole.shape[1:])
    level = torch.arange(BATCH_SIZE) % model.schedule.num_levels
    return lambda: model.log_prob(x) if name == "log-prob" else model.denoise(x, level)


def main() -> None:
    name, memory = sys.argv[1:3]
    if memory == "kept":
        assert keep_freed_memory()
    task = task_of(name, "--small" in sys.argv)
    for _ in sys.stdin:
        print(float(task().detach().sum()), flush=True)


if __name__ == "__main__":
    main()
