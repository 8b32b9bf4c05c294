"""Checkpoints written behind the training's back."""

import threading
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from cdm_fast.checkpoint import Checkpoint, save_checkpoint
from cdm_fast.errors import DiskError
from cdm_fast.files import saving
from cdm_fast.runlog import Sink


class Saver:
    """Writes checkpoints in a thread, one at a time: training only waits for the copy to host memory.

    A context manager. Leaving it by KeyboardInterrupt gives up the save in flight; otherwise it is completed.
    A disk that refuses is told in a warning, and a minute later another save is tried; anything else that a
    save raises comes out of the next `after_step` or `finish`.

    Args:
        run: the run directory.
        keep: newest checkpoints to keep.
        saved: step of the newest checkpoint on the disk.
        sinks: logs that must be on the disk before a checkpoint that follows their lines.
    """

    _PATIENCE = 1.0  # seconds that leaving at once may take, to tidy up
    _PAUSE = 60.0  # seconds until the next attempt on a disk that refused

    def __init__(self, run: Path, keep: int, saved: int, sinks: Sequence[Sink] = ()) -> None:
        self.saved = saved
        self._run, self._keep, self._sinks = run, keep, sinks
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

    def after_step(self, due: bool, copy: Callable[[], Checkpoint]) -> None:
        """Starts a save of `copy()` if one is due, now or since an earlier step, and none is in flight."""
        self._due |= due
        if self._thread is not None and not self._thread.is_alive():
            self._collect()
        if self._due and self._thread is None and time.monotonic() >= self._not_before:
            self._start(copy())

    def finish(self, step: int, copy: Callable[[], Checkpoint]) -> None:
        """Returns once a checkpoint of the present `step` is on the disk; raises DiskError if that fails."""
        self._collect()
        if self.saved != step:
            self._start(copy())
            self._join()
            if isinstance(self._error, DiskError):
                raise DiskError(f"{self._error}; --resume {self._run} continues from step {self.saved}")
            self._collect()

    def _start(self, checkpoint: Checkpoint) -> None:
        self._due, self._error = False, None
        # A daemon, for the interpreter would wait for any other when the user leaves at once.
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
        """Waits for the save in flight, if any, and tells what became of it."""
        self._join()
        self._thread = None
        error, self._error = self._error, None
        if isinstance(error, DiskError):
            self._due, self._not_before = True, time.monotonic() + self._PAUSE
            warnings.warn(f"{error}; training goes on, the next attempt follows in a minute", stacklevel=3)
        elif error is not None:
            raise error
