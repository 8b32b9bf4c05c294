"""The progress of a training run on the terminal."""

import sys
import time
from types import TracebackType
from typing import Self

from cdm_fast.host.processes import is_main
from cdm_fast.host.progress import terminal_bar
from cdm_fast.training.log import Numbers


class Display:
    """Progress on stderr: a bar with loss, CE, MSE, images/s and ETA on a terminal, plain lines elsewhere.

    A context manager. Computing the numbers waits for the device, so do it only when `due` is true.
    """

    _SECONDS_BETWEEN = 1.0

    def __init__(self, start: int, total: int) -> None:
        self._total = total
        self._shown = 0.0
        self._bar = terminal_bar("training", "{task.fields[numbers]}")
        if self._bar is not None:
            self._task = self._bar.add_task("training", total=total, completed=start, numbers="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def due(self) -> bool:
        """True if the bar should be refreshed: once per second; never without a bar."""
        return self._bar is not None and time.monotonic() - self._shown >= self._SECONDS_BETWEEN

    def advance(self, step: int) -> None:
        """Moves the bar to `step`."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def show(self, step: int, numbers: Numbers) -> None:
        """Shows the numbers beside the bar."""
        self._shown = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=_text(numbers))

    def line(self, step: int, numbers: Numbers) -> None:
        """Prints the numbers if there is no bar."""
        if self._bar is None:
            self.say(f"step {step}/{self._total}  {_text(numbers)}")

    def say(self, message: str) -> None:
        """Prints one line, above the bar if there is one; only on rank 0."""
        if self._bar is not None:
            self._bar.console.print(message, soft_wrap=True, markup=False)
        elif is_main():
            print(message, file=sys.stderr, flush=True)


_FORMATS = {
    "loss": "loss {:.4f}",
    "ce": "CE {:.3f}",
    "mse": "MSE {:.4f}",
    "images_per_second": "{:.0f} images/s",
}


def _text(numbers: Numbers) -> str:
    known = ((form, numbers.get(key)) for key, form in _FORMATS.items())
    return "  ".join(form.format(value) for form, value in known if value is not None)
