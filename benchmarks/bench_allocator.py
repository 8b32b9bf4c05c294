"""Memory that the C library keeps for the next call, as in `cdm-fast`, against memory that it returns.

Training step, likelihood and denoiser of `fashion-mnist-encoder`, each in two processes that take turns.
"""

import pytest

from benchmarks.support.allocator import TASKS, Worker


@pytest.mark.parametrize("task", TASKS)
def test_kept_memory_against_returned(benchmark, compare, small, device, task):
    if device.type != "cpu":
        pytest.skip("memory of the CPU")
    workers = [Worker(task, memory, small) for memory in ("kept", "returned")]

    def check(kept: float, returned: float) -> None:
        assert kept == returned

    try:
        compare(benchmark, *workers, check)
    finally:
        for worker in workers:
            worker.close()
