"""Which of the processes of a run this one is. Nothing here imports torch."""

import os
from dataclasses import dataclass

_FROM_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Process:
    """One of `count` processes that do a piece of work together; alone by default.

    Fields:
        rank: 0..count-1; the process of rank 0 writes, prints and decides for all.
        count: in all, on every machine.
        local_rank, local_count: the same among those of this machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1


def launched() -> Process | None:
    """What torchrun says about this process; None where it did not start it."""
    if not all(name in os.environ for name in _FROM_TORCHRUN):
        return None
    rank, count, local_rank = (int(os.environ[name]) for name in _FROM_TORCHRUN[:3])
    return Process(rank, count, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", count)))


def starts_again() -> bool:
    """Whether torchrun would start this command once more if it failed."""
    count = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    return count < int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))


_joined = Process()


def join(process: Process) -> None:
    """From now on this process is one of several; see `distributed.joined`, which calls this."""
    global _joined
    _joined = process


def this_process() -> Process:
    """This process among those it has joined; alone unless `distributed.joined` is active."""
    return _joined


def is_main() -> bool:
    """Whether this process writes and prints."""
    return _joined.rank == 0
