"""How long calls take: medians and quartiles over rounds, two functions in turns.

Each round ends after the device has finished, and lasts at least `MIN_ROUND_SECONDS`.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

# A timed round lasts at least this long; shorter calls are repeated within the round.
MIN_ROUND_SECONDS = 0.02


def synchronise(device: torch.device) -> None:
    """Waits until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_per_call(function: Callable[[], Any], calls: int, device: torch.device) -> float:
    """Mean seconds of one of `calls` calls, the device's work with them."""
    synchronise(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    synchronise(device)
    return (time.perf_counter() - start) / calls


def calls_per_round(function: Callable[[], Any], device: torch.device) -> int:
    """How many calls make a round of `MIN_ROUND_SECONDS`, 1 to 1000."""
    seconds = seconds_per_call(function, 1, device)
    if seconds < MIN_ROUND_SECONDS:  # else one is enough, and another may cost minutes
        seconds = min(seconds, seconds_per_call(function, 1, device))
    return max(1, min(1000, round(MIN_ROUND_SECONDS / max(seconds, 1e-6))))


def timed(function: Callable[[], Any], device: torch.device, rounds: int) -> dict[str, Any]:
    """candidate_ms, the median of one call, with its quartiles; rounds and calls_per_round."""
    calls = calls_per_round(function, device)
    seconds = [seconds_per_call(function, calls, device) for _ in range(rounds)]
    return {**_median_ms(seconds), "rounds": rounds, "calls_per_round": calls}


def in_turns(
    candidate: Callable[[], Any], baseline: Callable[[], Any], device: torch.device, rounds: int
) -> dict[str, Any]:
    """As `timed`, with what `comparison` tells of a baseline that takes every other round."""
    calls, baseline_calls = (calls_per_round(function, device) for function in (candidate, baseline))
    ours, theirs = [], []
    for _ in range(rounds):
        theirs.append(seconds_per_call(baseline, baseline_calls, device))
        ours.append(seconds_per_call(candidate, calls, device))
    return {
        **_median_ms(ours),
        **comparison(ours, theirs),
        "rounds": rounds,
        "calls_per_round": calls,
    }


def comparison(candidate: list[float], baseline: list[float]) -> dict[str, float]:
    """candidate_ms and baseline_ms, medians; their ratio, and the quartiles of the ratio round by round."""
    lower, _, upper = _quartiles([b / c for b, c in zip(baseline, candidate, strict=True)])
    candidate_median, baseline_median = statistics.median(candidate), statistics.median(baseline)
    return {
        "candidate_ms": 1e3 * candidate_median,
        "baseline_ms": 1e3 * baseline_median,
        "ratio": baseline_median / candidate_median,
        "ratio_lower_quartile": lower,
        "ratio_upper_quartile": upper,
    }


def _median_ms(seconds: list[float]) -> dict[str, float]:
    lower, median, upper = (1e3 * value for value in _quartiles(seconds))
    return {"candidate_ms": median, "ms_lower_quartile": lower, "ms_upper_quartile": upper}


def _quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
