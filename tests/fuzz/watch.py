"""Watches a reader at one input: what it may do is to return, or to raise UserError with one clear line."""

import io
import os
import resource
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

from cdm_fast.errors import UserError
from tests.fuzz.case import Case
from tests.fuzz.readers import Reader

MAX_SECONDS = 5.0  # of processor time for one input
MAX_BYTES = 6 * 10**8  # resident, for one input; with the interpreter and torch that is 1 GB
_ADDRESS_SPACE = 2**32  # on top of what the process has: beyond this an allocation fails
_FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "subprocess.Popen",
    "socket.connect",
    "pickle.find_class",
)
_HARMLESS = (
    "/dev/null",
    "/proc/",
    "/sys/",
    "/dev/urandom",
    sys.prefix,
    sys.base_prefix,
    str(Path(__file__).parents[2]),
)


@dataclass(frozen=True)
class Finding:
    """What a reader did that it must not; `place` tells findings of one cause from others."""

    kind: str
    place: str
    detail: str


class Watch:
    """Runs inputs in a folder of its own, in this process."""

    def __init__(self, reader: Reader, root: Path) -> None:
        self.reader, self.root = reader, root
        self._opened: list[str] | None = None
        tempfile.gettempdir()  # tries once, by writing a file, which is no reader's doing
        sys.addaudithook(self._audit)

    def limit_memory(self) -> None:
        """Lets allocations fail that no machine would survive. For a process of its own."""
        limit = _pages(0) * resource.getpagesize() + _ADDRESS_SPACE
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def run(self, case: Case) -> Finding | None:
        """Writes the case and reads it; the first rule that is broken, or None."""
        case.write(self.root)
        told: list[str] = []
        began = time.process_time()
        resident = _resident_bytes()
        _forget_peak(resident)
        self._opened, output, error = [], sys.stdout, sys.stderr
        sys.stdout = sys.stderr = io.StringIO()
        try:
            with warnings.catch_warnings(action="always"):
                warnings.showwarning = lambda message, *_args, **_kwargs: told.append(str(message))
                self.reader.read(self.root, case)
            found = None
        except UserError as problem:
            found = self._judge_message(problem)
        except Exception as problem:
            found = Finding("exception", _place(problem), f"{type(problem).__name__}: {problem}"[:300])
        finally:
            printed, sys.stdout, sys.stderr = sys.stdout.getvalue(), output, error
            opened, self._opened = self._opened, None
        used = _peak_bytes() - resident
        return found or self._judge_effects(
            time.process_time() - began, used, told + [printed] * bool(printed), opened
        )

    def _audit(self, event: str, arguments: tuple) -> None:
        if self._opened is None:
            return
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            self._opened.append(os.path.realpath(os.fsdecode(arguments[0])))
        elif event.startswith(_FORBIDDEN):
            self._opened.append(event)

    def _judge_message(self, problem: UserError) -> Finding | None:
        text, place = str(problem), _place(problem)
        if not text.isprintable() or "; " not in text or len(text) > 1000:
            return Finding("message", place, f"not one clear line with a remedy: {text[:300]!r}")
        if str(self.root) not in text and "--" not in text:
            return Finding("message", place, f"names no file: {text[:300]!r}")
        cause: BaseException | None = problem
        while cause is not None:
            if isinstance(cause, MemoryError) or "allocate memory" in str(cause):
                return Finding("memory", _place(cause), f"tried to allocate: {str(cause)[:300]!r}")
            cause = cause.__cause__ or cause.__context__
        return None

    def _judge_effects(self, seconds: float, used: int, told: list[str], opened: list[str]) -> Finding | None:
        if used > MAX_BYTES:
            return Finding("memory", "peak", f"{used / 1e9:.2f} GB more than before")
        if seconds > MAX_SECONDS:
            return Finding("time", "slow", f"{seconds:.1f} s")
        for text in told:
            usual = text.startswith(("checkpoint ", "resuming with ")) or ": not read: " in text
            if not (usual and text.isprintable() and len(text) <= 1000):
                return Finding("output", text.split(":")[0][:60], f"printed: {text[:300]!r}")
        for path in opened:
            if not path.startswith((str(self.root), *_HARMLESS)):
                return Finding("escape", path[:60], f"opened or ran {path}")
        return None


def _pages(column: int) -> int:
    """Memory of this process in pages: 0, all of its addresses; 1, what is resident."""
    return int(Path("/proc/self/statm").read_text().split()[column])


def _resident_bytes() -> int:
    return _pages(1) * resource.getpagesize()


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _forget_peak(resident: int) -> None:
    """Makes the kernel count the highest resident size anew, where what came before would hide an input's."""
    if _peak_bytes() - resident > MAX_BYTES / 2:
        Path("/proc/self/clear_refs").write_text("5")


def _place(error: BaseException) -> str:
    """The innermost lines of the traceback: our own, and the last."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [
        frame for frame in frames if "cdm_fast" in frame.filename or not frame.filename.startswith(sys.prefix)
    ]
    chosen = ([ours[-1]] if ours else []) + frames[-1:]
    return (
        type(error).__name__
        + " "
        + " <- ".join(f"{Path(f.filename).name}:{f.name}:{f.lineno}" for f in chosen)
    )
