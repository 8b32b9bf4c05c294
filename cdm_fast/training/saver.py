"""Writing checkpoints in a background thread."""

import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from cdm_fast.errors import DiskError
from cdm_fast.host.files import saving
from cdm_fast.runs.checkpoint import Checkpoint, save_checkpoint
from cdm_fast.training.log import Sink


class Saver:
    """Writes checkpoints in a background thread, one at a time; training waits for the copy to host memory.

    At most `every` steps are lost, however the process ends. A save starts every `every / 2` steps and has
    the next `every / 2` steps to reach the disk; on a slower disk training waits for it.

    A context manager. Leaving it by KeyboardInterrupt abandons the save in progress; otherwise the save is
    completed. A disk error is reported as a warning, and another save is tried a minute later. Any other
    error of the thread is raised by the next `after_step` or `finish`.

    Args:
        run: the run directory.
        every: largest number of steps that may be lost.
        keep: number of checkpoints to keep.
        saved: step of the newest checkpoint on the disk.
        sinks: logs that are flushed to the disk before each checkpoint.
    """

    _PATIENCE = 1.0  # seconds for cleaning up after an interrupt
    _PAUSE = 60.0  # seconds between a disk error and the next attempt
    _SLOW = 10.0  # total seconds of waiting for the disk that cause a warning

    def __init__(self, run: Path, every: int, keep: int, saved: int, sinks: Sequence[Sink] = ()) -> None:
        self.saved, self.waited = saved, 0.0
        self._run, self._every, self._keep, self._sinks = run, every, keep, sinks
        self._due, self._not_before = False, 0.0
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._given_up = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._given_up.set()
            self._join(self._PATIENCE)
        else:
            self._join()

    def after_step(self, step: int, copy: Callable[[], Checkpoint]) -> None:
        """Starts a save of `copy()` if one is due and none is in progress.

        step: number of steps taken. Waits for the save in progress if another step could exceed `every` lost
        steps.
        """
        self._due |= step % max(1, self._every // 2) == 0
        self._make_sure(step)
        if self._due and self._thread is None and time.monotonic() >= self._not_before:
            self._start(copy())
            self._make_sure(step)

    def _make_sure(self, step: int) -> None:
        """Waits for the save in progress if the next step depends on it; collects a finished save."""
        if self._thread is None or (self._thread.is_alive() and step - self.saved < self._every):
            return
        began, warned = time.monotonic(), self.waited >= self._SLOW
        self._collect()
        self.waited += time.monotonic() - began
        if self.waited >= self._SLOW and not warned:
            warnings.warn(
                f"training has waited {self.waited:.0f} s for checkpoints to reach the disk of {self._run},"
                f" which takes longer than half of --save-every {self._every}; give a larger one",
                stacklevel=3,
            )

    def finish(self, step: int, copy: Callable[[], Checkpoint]) -> None:
        """Returns once a checkpoint of the current `step` is on the disk; raises DiskError if that fails."""
        self._collect()
        if self.saved != step:
            self._start(copy())
            self._join()
            if isinstance(self._error, DiskError):
                raise DiskError(f"{self._error}; --resume {self._run} continues from step {self.saved}")
            self._collect()

    def _start(self, checkpoint: Checkpoint) -> None:
        self._due, self._error = False, None
        # A daemon thread: the interpreter does not wait for it after a second Ctrl-C.
        self._thread = threading.Thread(target=self._save, args=[checkpoint], name="saver", daemon=True)
        self._thread.start()

    def _save(self, checkpoint: Checkpoint) -> None:
        try:
            with saving(self._run):
                for sink in self._sinks:
                    sink.sync()
            save_checkpoint(self._run, checkpoint, self._keep, self._proceed)
            self.saved = checkpoint.step
        except BaseException as error:  # raised again in the training thread
            self._error = error

    def _proceed(self) -> None:
        if self._given_up.is_set():
            raise KeyboardInterrupt

    def _join(self, timeout: float | None = None) -> None:
        if self._thread is not None:
            self._thread.join(timeout)

    def _collect(self) -> None:
        """Waits for the save in progress, if any, and reports its error."""
        self._join()
        self._thread = None
        error, self._error = self._error, None
        if isinstance(error, DiskError):
            self._due, self._not_before = True, time.monotonic() + self._PAUSE
            warnings.warn(f"{error}; training goes on, the next attempt follows in a minute", stacklevel=3)
        elif error is not None:
            raise error
