"""Memory that the C library keeps for the next call, as in `cdm-fast`, against memory that it returns.

Training step, likelihood and denoiser of `fashion-mnist-encoder`, in two processes that take turns.
"""

from collections.abc import Iterator
from functools import partial

import pytest
import torch

from benchmarks.support.allocator import TASKS, Worker


@pytest.fixture(scope="module")
def workers(small: bool, device: torch.device) -> Iterator[list[Worker]]:
    """The process that keeps memory and the one that returns it."""
    if device.type != "cpu":
        pytest.skip("memory of the CPU")
    both = [Worker(memory, small) for memory in ("kept", "returned")]
    yield both
    for worker in both:
        worker.close()


@pytest.mark.parametrize("task", TASKS)
def test_kept_memory_against_returned(benchmark, compare, workers, task):
    def check(kept: float, returned: float) -> None:
        assert kept == pytest.approx(returned, rel=1e-4)

    compare(benchmark, *(partial(worker.do, task) for worker in workers), check)
