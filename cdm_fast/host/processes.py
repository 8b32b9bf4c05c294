"""Rank and world size of this process. Nothing here imports torch."""

import os
from dataclasses import dataclass

_FROM_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Process:
    """The position of a process among `count` that work together; by default it works alone.

    Fields:
        rank: 0..count-1; rank 0 writes, prints and decides for all.
        count: the world size, over all machines.
        local_rank, local_count: the same within this machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1


def launched() -> Process | None:
    """This process according to torchrun's environment variables; None if torchrun did not start it."""
    if not all(name in os.environ for name in _FROM_TORCHRUN):
        return None
    rank, count, local_rank = (int(os.environ[name]) for name in _FROM_TORCHRUN[:3])
    return Process(rank, count, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", count)))


def starts_again() -> bool:
    """True if torchrun restarts this command after a failure."""
    count = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    return count < int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))


_joined = Process()


def join(process: Process) -> None:
    """Makes `process` the result of `this_process`; called by `distributed.process_group`."""
    global _joined
    _joined = process


def this_process() -> Process:
    """This process in the active `distributed.process_group`; outside one, a single process."""
    return _joined


def is_main() -> bool:
    """True if this process has rank 0, which writes and prints."""
    return _joined.rank == 0
