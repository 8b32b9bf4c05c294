"""Standard output and standard error that may be closed, full, or unable to hold a character."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from cdm_fast.errors import UserError

BROKEN_PIPE = 141  # 128 + SIGPIPE, the status of a program that is killed by it


class OutputGone(Exception):
    """The reader of standard output has gone, so nothing more is printed; `status` is the exit status."""

    status = BROKEN_PIPE


def open_standard_streams() -> None:
    """Replaces standard streams that were closed before the start (`>&-`), which are None, by /dev/null."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))


@contextlib.contextmanager
def writing_result() -> Iterator[None]:
    """A block that prints to standard output, flushed at its end, also when it ends by SystemExit.

    Characters that the encoding of standard output lacks are escaped. Raises OutputGone if the reader has
    gone (`| head`), and UserError if writing fails for another reason (`> /dev/full`).
    """
    escape = getattr(sys.stdout, "reconfigure", None)  # a test's replacement has none
    if escape is not None:
        escape(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        _discard(sys.stdout)
        raise OutputGone from None
    except OSError as error:
        _discard(sys.stdout)
        reason = error.strerror or str(error)
        raise UserError(f"cannot write to standard output: {reason}; send it elsewhere") from None


class Lossy:
    """A text stream whose writes never fail: text that cannot be written is lost, and the work continues.

    For progress and warnings, which must not stop the command that prints them.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Writes what can be written; returns the length of the text."""
        try:
            self._stream.write(text)
        except OSError:
            _discard(self._stream)
        return len(text)

    def flush(self) -> None:
        """Flushes what can be flushed."""
        try:
            self._stream.flush()
        except OSError:
            _discard(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _discard(stream: TextIO) -> None:
    """Discards all further output, including the flush at the end of the process."""
    with contextlib.suppress(OSError, ValueError):  # a stream without a descriptor
        descriptor = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
