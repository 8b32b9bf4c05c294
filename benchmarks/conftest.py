"""What all benchmarks share: options, rows with device and versions, and the interleaved comparison.

    pytest benchmarks/ --benchmark-only [--small] [--threads N] [--device cpu|cuda] [--results FILE]

A ratio is only reported for two functions timed in turns in one process: on a shared machine, figures taken
minutes apart differ by more than most of what is measured here.
"""

import re
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.support import results
from benchmarks.support.environment import facts
from benchmarks.support.networks import Models
from benchmarks.support.timing import calls_per_round, comparison, seconds_per_call
from cdm_fast.host.allocator import keep_freed_memory

_lines: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("cdm_fast benchmarks")
    group.addoption("--small", action="store_true", help="small sizes, few rounds: a smoke run, no figures")
    group.addoption("--threads", type=int, default=None, help="CPU threads (default: torch's own choice)")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where to run (default: cpu)")
    group.addoption("--rounds", type=int, default=None, help="rounds of each comparison (default: 15)")
    group.addoption("--results", type=Path, help="write each figure to this file, a JSON object a line")


def pytest_configure(config: pytest.Config) -> None:
    keep_freed_memory()
    threads = config.getoption("--threads")
    if threads is not None:
        torch.set_num_threads(threads)
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: this torch sees no CUDA device; leave the option out")
    if config.getoption("--results") is not None:
        small, device = bool(config.getoption("--small")), config.getoption("--device")
        environment = {**facts(device), "small": small, "command": _command(config)}
        results.start(config.getoption("--results"), environment)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Writes the row of a benchmark that has passed."""
    report = yield
    path, benchmark = item.config.getoption("--results"), getattr(item, "funcargs", {}).get("benchmark")
    if path is not None and report.when == "call" and report.passed and benchmark and benchmark.extra_info:
        results.add(path, {**_named(item.nodeid), **benchmark.extra_info})
    return report


def _named(test: str) -> dict[str, str]:
    """{benchmark, case}, in words, from a test's identifier."""
    file, _, name = test.partition("::")
    function, _, parameters = name.partition("[")
    words = [function.removeprefix("test_").replace("_", " "), *parameters.rstrip("]").split("-")]
    return {"benchmark": Path(file).stem.removeprefix("bench_"), "case": " ".join(words).strip()}


@pytest.fixture(scope="session")
def small(request: pytest.FixtureRequest) -> bool:
    """True in a smoke run: benchmarks choose sizes that take milliseconds."""
    return bool(request.config.getoption("--small"))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device chosen with --device."""
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def compare(request: pytest.FixtureRequest, device: torch.device, small: bool) -> Callable[..., None]:
    """compare(benchmark, candidate, baseline, check, rounds=None).

    Runs `check(candidate(), baseline())`, which raises when the answers differ; then times both in turns,
    synchronising inside the timed call. The table of pytest-benchmark shows the candidate; `extra_info` holds
    candidate_ms, baseline_ms (medians of one call), ratio (baseline / candidate, of medians), the lower and
    upper quartile of the ratio round by round, calls_per_round, rounds, threads.
    """

    def run(
        benchmark: Any,
        candidate: Callable[[], Any],
        baseline: Callable[[], Any],
        check: Callable[[Any, Any], None],
        rounds: int | None = None,
    ) -> None:
        check(candidate(), baseline())
        if benchmark.disabled:
            benchmark(candidate)
            return
        rounds = 2 if small else rounds or request.config.getoption("--rounds") or 15
        calls, baseline_calls = (calls_per_round(function, device) for function in (candidate, baseline))
        baseline_seconds: list[float] = []
        candidate_seconds: list[float] = []
        # pytest-benchmark calls `setup` untimed before each round of the candidate: the baseline's turn.
        benchmark.pedantic(
            lambda: candidate_seconds.append(seconds_per_call(candidate, calls, device)),
            setup=lambda: baseline_seconds.append(seconds_per_call(baseline, baseline_calls, device)),
            rounds=rounds,
        )
        benchmark.extra_info.update(comparison(candidate_seconds, baseline_seconds))
        benchmark.extra_info.update(calls_per_round=calls, rounds=rounds, threads=torch.get_num_threads())
        _lines.append(_line(request.node.name, benchmark.extra_info))

    return run


@pytest.fixture
def models(small: bool, device: torch.device) -> Models:
    """The networks whose evaluations are timed."""
    return Models(small, device)


@pytest.fixture
def relative_error_below() -> Callable[[float], Callable[[Any, Any], None]]:
    """relative_error_below(limit) is a `check` of two tensors."""

    def checked(limit: float) -> Callable[[Any, Any], None]:
        def check(got: torch.Tensor, expected: torch.Tensor) -> None:
            error = float((got - expected).norm() / expected.norm())
            assert error < limit, f"relative error {error}"

        return check

    return checked


def _line(name: str, info: dict[str, Any]) -> str:
    return (
        f"{name}: {info['candidate_ms']:.3f} ms, baseline {info['baseline_ms']:.3f} ms, "
        f"ratio {info['ratio']:.2f} ({info['ratio_lower_quartile']:.2f}-{info['ratio_upper_quartile']:.2f}), "
        f"{info['threads']} threads"
    )


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _lines:
        return
    terminalreporter.section("candidate against baseline, timed in turns")
    for line in _lines:
        terminalreporter.write_line(line)


def _command(config: pytest.Config) -> str:
    """The command line without its --results option."""
    line = " ".join(["pytest", *config.invocation_params.args])
    return re.sub(r" --results[ =]\S+", "", line)
