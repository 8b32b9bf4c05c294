"""Where long measurements tell how far they are."""

import sys
from collections.abc import Callable

from cdm_fast.host.processes import is_main

Progress = Callable[[str], None]


def silent(message: str) -> None:
    """Says nothing."""


def to_stderr(message: str) -> None:
    """One line on stderr, at once, from one process."""
    if is_main():
        print(message, file=sys.stderr, flush=True)
