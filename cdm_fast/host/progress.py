"""Progress messages of long measurements."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from cdm_fast.host.processes import is_main

if TYPE_CHECKING:
    import rich.progress

Progress = Callable[[str], None]


def silent(message: str) -> None:
    """Discards the message."""


def to_stderr(message: str) -> None:
    """Prints a line on stderr and flushes it; rank 0 only."""
    if is_main():
        print(message, file=sys.stderr, flush=True)


class Countdown:
    """How much of a known amount of work is done, and how long the rest takes, on stderr.

    A bar on a terminal, a line every ten seconds elsewhere; nothing at all of work that takes less than two.
    A context manager. Every process that works tells, whatever its rank.
    """

    _SILENT, _BETWEEN = 2.0, 10.0

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done = title, total, 0
        self._began = self._told = time.monotonic()
        self._bar: rich.progress.Progress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int) -> None:
        """Counts some more of the work as done."""
        self._done += count
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done)
        elif now - self._began >= self._SILENT and self._told == self._began:
            self._told = now
            self._bar = terminal_bar("reading")
            if self._bar is None:
                self._line(now)
            else:
                self._bar.add_task(self._title, total=self._total, completed=self._done)
                self._bar.start()
        elif now - self._told >= self._BETWEEN and self._told > self._began:
            self._told = now
            self._line(now)

    def _line(self, now: float) -> None:
        left = (now - self._began) * (self._total - self._done) / max(self._done, 1)
        line = f"{self._title}: {self._done:,} of {self._total:,}, {left:.0f} s left"
        print(line, file=sys.stderr, flush=True)


def terminal_bar(what: str, *texts: str) -> "rich.progress.Progress | None":
    """A progress bar of rich; None without a terminal or without rich, and in all processes but one.

    what: what it counts; texts: further columns, in rich's format.
    """
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        return None
    console = Console(stderr=True, highlight=False)
    if not (console.is_terminal and is_main()):
        return None
    return Progress(
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        *map(TextColumn, texts),
        TextColumn("ETA"),
        TimeRemainingColumn(elapsed_when_finished=True, compact=True),
        console=console,
    )
