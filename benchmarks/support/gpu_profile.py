"""Where the time of a step goes on the device: its kernels, their launches, and the gaps between them."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.support.timing import synchronise

MOST_ROWS = 30
NAME_LENGTH = 100


class Launch(NamedTuple):
    """One kernel or copy on the device, in microseconds of the profiler's clock."""

    name: str
    start: float
    end: float


def launches_of(function: Callable[[], Any], calls: int, device: torch.device) -> list[Launch]:
    """What `calls` calls launch; on the CPU the ops that they call, which have no gaps to speak of."""
    on_gpu = device.type == "cuda"
    function()
    synchronise(device)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        for _ in range(calls):
            function()
        synchronise(device)
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    return [
        Launch(event.name, event.time_range.start, event.time_range.end)
        for event in found.events()
        if event.device_type == kind and event.cpu_parent is None and not event.is_user_annotation
    ]


def table(launches: list[Launch], calls: int) -> list[dict[str, Any]]:
    """Rows for the kernels that take most of a call, after one for the whole of it.

    The whole: launches a call, busy_ms (at least one kernel runs), span_ms (first start to last end) and
    gap_share, the part of the span in which nothing runs. A kernel: launches a call, ms a call, its share of
    the sum over all kernels.
    """
    if not launches:
        return [{"profile": "whole", "launches": 0, "busy_ms": 0.0, "span_ms": 0.0, "gap_share": 0.0}]
    span = max(launch.end for launch in launches) - min(launch.start for launch in launches)
    busy = _covered(launches)
    whole = {
        "profile": "whole",
        "launches": len(launches) / calls,
        "kernels": len({launch.name for launch in launches}),
        "busy_ms": 1e-3 * busy / calls,
        "span_ms": 1e-3 * span / calls,
        "gap_share": 1 - busy / span if span else 0.0,
    }
    of_kernel: dict[str, list[float]] = defaultdict(list)
    for launch in launches:
        of_kernel[launch.name].append(launch.end - launch.start)
    total = sum(map(sum, of_kernel.values())) or 1.0
    longest = sorted(of_kernel.items(), key=lambda item: -sum(item[1]))[:MOST_ROWS]
    rows = [
        {
            "profile": "kernel",
            "name": name[:NAME_LENGTH],
            "launches": len(times) / calls,
            "ms": 1e-3 * sum(times) / calls,
            "share": sum(times) / total,
        }
        for name, times in longest
    ]
    return [whole, *rows]


def _covered(launches: list[Launch]) -> float:
    """Microseconds in which at least one of them runs."""
    covered, reached = 0.0, float("-inf")
    for launch in sorted(launches, key=lambda launch: launch.start):
        covered += max(0.0, launch.end - max(launch.start, reached))
        reached = max(reached, launch.end)
    return covered
