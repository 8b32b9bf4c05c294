"""Collective operations of the processes that torchrun starts: work is split by rank, results are gathered.

In a single process every function here returns at once. Inside `process_group` every process must make the
same calls in the same order. Each then holds the same results, and rank 0 writes them.

# n rows, W processes, B global batch
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from cdm_fast.errors import UserError
from cdm_fast.host.device import pick_device
from cdm_fast.host.processes import Process, join, launched, this_process

Value = TypeVar("Value")
Item = TypeVar("Item")

_TIMEOUT = timedelta(hours=1)  # rank 0 may write for long; the end of a process is noticed at once
_FAILURE = "failure"  # key of the store under which the first process to fail leaves its message
_FAILURE_WAIT = timedelta(seconds=2)  # for that message


@contextlib.contextmanager
def process_group(device: str) -> Iterator[None]:
    """Initialises the default process group of torchrun's processes, and destroys it when the block ends.

    Without torchrun, or with a single process, it does nothing. Tensors on a GPU are sent by NCCL, tensors in
    host memory by Gloo. When one process fails, the others raise a UserError with its message instead of
    waiting for it.

    Args:
        device: as in `pick_device`.
    """
    process = launched()
    if process is None or process.count == 1:
        yield
        return
    join(process)
    try:
        on_cuda = (chosen := pick_device(device)).type == "cuda"
        if on_cuda:
            torch.cuda.set_device(chosen)
        store, rank, count = next(dist.rendezvous("env://", process.rank, process.count))
        # torchrun may keep its store over a restart, with the addresses of the previous processes.
        store = dist.PrefixStore(f"cdm_fast/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
            store=store,
            rank=rank,
            world_size=count,
            timeout=_TIMEOUT,
        )
        with _propagate_failure(store, process):
            yield
        dist.destroy_process_group()
    finally:
        join(Process())


@contextlib.contextmanager
def _propagate_failure(store: dist.Store, process: Process) -> Iterator[None]:
    """Stores the message of the first failure, and raises it in the other processes."""
    try:
        yield
    except Exception as error:
        if not lost_peer(error):
            message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            with contextlib.suppress(RuntimeError):  # the store may have gone with rank 0
                store.compare_set(_FAILURE, "", f"process {process.rank}: {message}")
            raise
        try:
            store.wait([_FAILURE], _FAILURE_WAIT)
            reason = store.get(_FAILURE).decode()
        except RuntimeError:
            reason = "another process of this run has died; the output of torchrun names it"
        raise UserError(reason) from error


def lost_peer(error: BaseException) -> bool:
    """True if an error was raised by a collective operation because another process has ended."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and ("gloo" in str(error).lower() or "NCCL" in str(error))


def rank_range(count: int) -> range:
    """This rank's indices of 0..count-1: contiguous, in the order of ranks, in nearly equal numbers.

    >>> rank_range(5)  # alone
    range(0, 5)
    """
    process = this_process()
    return range(*(count * rank // process.count for rank in (process.rank, process.rank + 1)))


def gather_rows(rows: Tensor, count: int) -> Tensor:
    """Gathers the rows of all processes: (len(rank_range(n)), ...) of each -> (n, ...); `count` is n."""
    processes = this_process().count
    if processes == 1:
        return rows
    longest = -(-count // processes)
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows
    every = [torch.empty_like(padded) for _ in range(processes)]
    dist.all_gather(every, padded)
    ends = [count * rank // processes for rank in range(processes + 1)]
    return torch.cat([part[: end - start] for part, start, end in zip(every, ends, ends[1:], strict=False)])


def by_rows(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function(x)`, (n, ...), with the rows of `x` (n, ...) split over the processes.

    `function` must treat rows independently of each other.
    """
    if this_process().count == 1:
        return function(x)
    rows = rank_range(len(x))
    # A rank without rows of its own still needs their shape and dtype for the all-gather.
    mine = function(x[rows.start : rows.stop] if rows else x[:1])
    return gather_rows(mine[: len(rows)], len(x))


def in_turn(function: Callable[[Item], Value], items: Sequence[Item]) -> list[Value]:
    """`[function(item) for item in items]`, with item i computed by the process of rank i mod W.

    The values are pickled, so tensors among them should be in host memory.
    """
    process = this_process()
    mine = [function(item) for item in items[process.rank :: process.count]]
    if process.count == 1:
        return mine
    every: list[Any] = [None] * process.count
    dist.all_gather_object(every, mine)
    return [every[number % process.count][number // process.count] for number in range(len(items))]


def rank_rows(batch: Tensor, parts: int) -> Tensor:
    """This rank's rows, (B/W, ...), of a batch (B, ...) that is processed in `parts` equal parts.

    Each part is divided evenly over the ranks, in their order. W `parts` must divide B.
    """
    process = this_process()
    if process.count == 1:
        return batch
    return batch.unflatten(0, (parts, process.count, -1))[:, process.rank].flatten(0, 1)


def gather_full(tensor: Tensor) -> Tensor:
    """The full tensor of a DTensor sharded by FSDP2; any other tensor unchanged.

    A collective operation: every process must call it.
    """
    gather = getattr(tensor, "full_tensor", None)  # duck typing: importing DTensor takes a second
    return tensor if gather is None else gather()


def all_reduce_mean(values: Tensor) -> Tensor:
    """The mean of `values` over the processes, in each of them; `values` is overwritten by their sum."""
    count = this_process().count
    if count == 1:
        return values
    dist.all_reduce(values)
    return values / count


def broadcast_from_main(value: Value) -> Value:
    """The value of rank 0, in every process; it is pickled."""
    if this_process().count == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_reduce_max(value: int) -> int:
    """The maximum of `value` over the processes; computed in host memory, without waiting for a GPU."""
    if this_process().count == 1:
        return value
    box = torch.tensor(value)
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return int(box)


_REASONS = (None, "max_time", "signal")  # later ones take precedence


def agree_on_stop(reason: str | None) -> str | None:
    """The common reason for all processes to stop now, or None; a signal precedes the time limit.

    reason: this process's reason, as in `stop.Stopper`.
    """
    return _REASONS[all_reduce_max(_REASONS.index(reason))]
