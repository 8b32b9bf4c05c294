"""Many processes, one result: how they join, share work, agree, and fail together.

Everything here costs nothing in a process that is alone. Between `joined` and its end every process must make
the same calls in the same order; each then holds the same results, and the one of rank 0 writes them.

# n rows, W processes
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

_TIMEOUT = timedelta(hours=1)  # rank 0 may write and draw for a while; a process that died is noticed at once
_FAILURE = "failure"  # key of the store under which the first to fail says why
_LAST_WORDS = timedelta(seconds=2)  # to wait for that


@contextlib.contextmanager
def joined(device: str) -> Iterator[None]:
    """Joins the processes that torchrun started while the block runs; does nothing where it started one.

    Processes on a GPU talk by NCCL, by Gloo otherwise and about whatever lives in host memory. When one fails
    the others, which would wait for it forever, raise a UserError that says what it said.
    """
    process = launched()
    if process is None or process.count == 1:
        yield
        return
    join(process)
    try:
        place = pick_device(device)
        if place.type == "cuda":
            torch.cuda.set_device(place)
        store, rank, count = next(dist.rendezvous("env://", process.rank, process.count))
        # torchrun may keep its store over a restart, with the addresses of processes that are gone.
        store = dist.PrefixStore(f"cdm_fast/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=count,
            timeout=_TIMEOUT,
        )
        with _failing_together(store, process):
            yield
        dist.destroy_process_group()
    finally:
        join(Process())


@contextlib.contextmanager
def _failing_together(store: dist.Store, process: Process) -> Iterator[None]:
    """Leaves the reason of a failure for the others, and finds the one that another has left."""
    try:
        yield
    except Exception as error:
        if not lost_another(error):
            words = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            with contextlib.suppress(RuntimeError):  # the store may be gone
                store.compare_set(_FAILURE, "", f"process {process.rank}: {words}")
            raise
        try:
            store.wait([_FAILURE], _LAST_WORDS)
            reason = store.get(_FAILURE).decode()
        except RuntimeError:
            reason = "another process of this run has died; torchrun tells which"
        raise UserError(reason) from error


def lost_another(error: BaseException) -> bool:
    """Whether an error came from talking to a process that is no longer there."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and ("gloo" in str(error).lower() or "NCCL" in str(error))


def share(count: int) -> range:
    """This process's part of `count` things: contiguous, in the order of ranks, as even as can be."""
    process = this_process()
    return range(*(count * rank // process.count for rank in (process.rank, process.rank + 1)))


def gather_rows(rows: Tensor, count: int) -> Tensor:
    """(n, ...) from the (len(share(n)), ...) of every process."""
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
    """`function(x)`, (n, ...), of a function that treats the rows of `x` (n, ...) one by one: each process
    takes its share of them."""
    if this_process().count == 1:
        return function(x)
    rows = share(len(x))
    # Without rows of its own a process still has to know of what shape and type they are.
    mine = function(x[rows.start : rows.stop] if rows else x[:1])
    return gather_rows(mine[: len(rows)], len(x))


def in_turn(function: Callable[[Item], Value], items: Sequence[Item]) -> list[Value]:
    """`[function(item) for item in items]`: the processes take one item each, and again, until none is left.

    The values travel by pickle: they should live in host memory.
    """
    process = this_process()
    mine = [function(item) for item in items[process.rank :: process.count]]
    if process.count == 1:
        return mine
    every: list[Any] = [None] * process.count
    dist.all_gather_object(every, mine)
    return [every[number % process.count][number // process.count] for number in range(len(items))]


def own_rows(batch: Tensor, parts: int) -> Tensor:
    """(B/W, ...): this process's rows of a batch (B, ...) that is worked on in `parts` equal parts.

    Of each part every process has an equal piece, in the order of ranks.
    """
    process = this_process()
    if process.count == 1:
        return batch
    return batch.unflatten(0, (parts, process.count, -1))[:, process.rank].flatten(0, 1)


def whole(tensor: Tensor) -> Tensor:
    """In one piece a tensor that FSDP2 has split over the processes, which must all ask; another as it is."""
    gather = getattr(tensor, "full_tensor", None)  # of a DTensor, whose import takes a while
    return tensor if gather is None else gather()


def mean_over_processes(values: Tensor) -> Tensor:
    """The mean of every process's `values`."""
    count = this_process().count
    if count == 1:
        return values
    dist.all_reduce(values)
    return values / count


def from_main(value: Value) -> Value:
    """What rank 0 gave."""
    if this_process().count == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def largest(value: int) -> int:
    """The largest of what every process gave. On the host: it does not wait for a GPU."""
    if this_process().count == 1:
        return value
    box = torch.tensor(value)
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return int(box)


_REASONS = (None, "max_time", "signal")


def agreed(reason: str | None) -> str | None:
    """Why all processes stop now, if one of them has a reason; see `stop.Stopper`."""
    return _REASONS[largest(_REASONS.index(reason))]
