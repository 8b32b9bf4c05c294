"""Progress messages of long measurements."""

import sys
from collections.abc import Callable

from cdm_fast.host.processes import is_main

Progress = Callable[[str], None]


def silent(message: str) -> None:
    """Discards the message."""


def to_stderr(message: str) -> None:
    """Prints a line on stderr and flushes it; rank 0 only."""
    if is_main():
        print(message, file=sys.stderr, flush=True)
