"""A pytest plugin for `run_gpu.sh`: each failure, as it happens, and the counts, as records.

pytest -p benchmarks.support.gpu_test_records --records FILE
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--records", type=Path, help="append failures and counts to this file, one JSON a line")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--records")
    if path is not None and not hasattr(config, "workerinput"):  # with pytest-xdist, not in its workers
        config.pluginmanager.register(_Recorder(path))


class _Recorder:
    """Writes to the file `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.failed:
            message = getattr(getattr(report.longrepr, "reprcrash", None), "message", str(report.longrepr))
            self._write({"test": report.nodeid, "outcome": "failed", "message": message[:600]})

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write({"test": report.nodeid, "outcome": "failed", "message": str(report.longrepr)[-600:]})

    def pytest_sessionfinish(self) -> None:
        counts = {outcome: self.counts[outcome] for outcome in ("passed", "failed", "skipped")}
        self._write({"tests": counts})

    def _write(self, record: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
