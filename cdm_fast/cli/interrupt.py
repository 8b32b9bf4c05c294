"""Ctrl-C at the command line: at once during imports, as KeyboardInterrupt in a command."""

import contextlib
import signal
import threading
from collections.abc import Iterator

INTERRUPTED = 130  # 128 + SIGINT, the status of a program that is killed by it

_ends_process = False  # whether Ctrl-C ends the process at the moment


@contextlib.contextmanager
def dies_of_interrupt() -> Iterator[None]:
    """Ctrl-C ends the process without a traceback until `interruptible` is called, and after the block.

    An interrupted import may raise any error, and libraries print their own tracebacks.
    """
    global _ends_process
    if threading.current_thread() is not threading.main_thread() or (
        signal.getsignal(signal.SIGINT) is not signal.default_int_handler  # nohup and the like ignore it
    ):
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _ends_process = True
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _ends_process = False


def interruptible() -> None:
    """Makes Ctrl-C raise KeyboardInterrupt again, if `dies_of_interrupt` has changed that."""
    if _ends_process:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[None]:
    """A block that Ctrl-C does not interrupt: KeyboardInterrupt is raised at the end of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received = []
    before = signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if received:
        raise KeyboardInterrupt
