"""Progress of long work: messages and a progress bar."""

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


class ProgressBar:
    """Progress through a known amount of work on stderr: a bar on a terminal, a line every 10 s elsewhere.

    A context manager. Both show the time left.

    Args:
        title: what is being done.
        total: units of work.
        delay: seconds until the bar appears, so that short work shows none.
        every_process: whether all processes of a group report, for work that any one of them may do; by
            default rank 0 only.
    """

    _SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, title: str, total: int, *, delay: float = 0.0, every_process: bool = False) -> None:
        self._title, self._total, self._delay, self._done = title, total, delay, 0
        self._reports = every_process or is_main()
        self._start = self._last_line = time.monotonic()
        self._bar = terminal_bar(title)
        if self._bar is not None:
            self._bar.add_task(title, total=total)

    def __enter__(self) -> Self:
        if self._bar is not None and self._delay == 0:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int) -> None:
        """Adds `count` units to the work done."""
        self._done += count
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self._done)
            if now - self._start >= self._delay:
                self._bar.start()  # no effect on a bar that is shown already
        elif self._line_due(now):
            self._last_line = now
            self._print_line(now)

    def _line_due(self, now: float) -> bool:
        unfinished = self._done < self._total
        return self._reports and unfinished and now - self._last_line >= self._SECONDS_BETWEEN_LINES

    def _print_line(self, now: float) -> None:
        left = (now - self._start) * (self._total - self._done) / max(self._done, 1)
        line = f"{self._title}: {self._done:,} of {self._total:,}, {left:.0f} s left"
        print(line, file=sys.stderr, flush=True)


def terminal_bar(what: str, *texts: str) -> "rich.progress.Progress | None":
    """A progress bar of rich; None without a terminal, without rich, and on ranks other than 0.

    what: the title; texts: further columns, in rich's format.
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
