"""The progress of a command that draws many images."""

import time
from types import TracebackType
from typing import Self

from cdm_fast.host.progress import terminal_bar, to_stderr

_SECONDS_BETWEEN_LINES = 10.0


class Bar:
    """Progress on standard error: a bar with the time left on a terminal, a line every 10 s elsewhere.

    A context manager.

    Args:
        what: what is counted, in the plural.
        total: how many there are to be.
    """

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done = what, total, 0
        self._told = time.monotonic()
        self._bar = terminal_bar(what)
        if self._bar is not None:
            self._task = self._bar.add_task(what, total=total)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int) -> None:
        """Adds `count` to what is done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(self._task, advance=count)
        elif self._done < self._total and time.monotonic() - self._told >= _SECONDS_BETWEEN_LINES:
            self._told = time.monotonic()
            to_stderr(f"{self._done} of {self._total} {self._what}")
