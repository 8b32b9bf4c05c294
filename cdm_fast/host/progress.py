"""Progress messages of long measurements."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

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
