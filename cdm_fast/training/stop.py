"""Stopping a training run on a signal or at a time limit."""

import math
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self


class Stopper:
    """Reports that training should stop: after SIGINT or SIGTERM, or at the time limit.

    A context manager. A second SIGINT (Ctrl-C) raises KeyboardInterrupt at once; a second SIGTERM does not,
    because launchers and queues send several. Once `all_saved` is set, the first signal raises too.

    Args:
        max_time: seconds from now; None for no limit.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, max_time: float | None) -> None:
        self.all_saved = False
        self._deadline = math.inf if max_time is None else time.monotonic() + max_time
        self._signalled = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            self._before = {number: signal.signal(number, self._handle) for number in self._SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.all_saved or (self._signalled and number == signal.SIGINT):
            raise KeyboardInterrupt
        self._signalled = True

    @property
    def reason(self) -> str | None:
        """Why to stop now: "signal", "max_time" or None."""
        if self._signalled:
            return "signal"
        return "max_time" if time.monotonic() >= self._deadline else None
