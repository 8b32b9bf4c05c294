"""The best checkpoint of a run by a validation criterion, in RUN/best, which is a run directory itself.

RUN/best/config.json  checkpoints/step-NNNNNNNN/  score.json
"""

import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

from cdm_fast.config import RunConfig
from cdm_fast.config.json import parse_json
from cdm_fast.errors import DiskError
from cdm_fast.host.distributed import broadcast_from_main
from cdm_fast.host.files import remove, saving
from cdm_fast.host.processes import is_main
from cdm_fast.runs.checkpoint import Checkpoint, checkpoint_folders, save_checkpoint, write_config, write_json

FOLDER, SCORE = "best", "score.json"


class BestCheckpoint:
    """Keeps the checkpoint with the lowest value of a validation criterion.

    A resumed run continues with the value that it finds in RUN/best.

    Args:
        run: the run directory.
        config: the config of the run; `config.output.keep_best` is the criterion, a key of
            `validation.validate`.
    """

    def __init__(self, run: Path, config: RunConfig) -> None:
        self.folder, self._config = run / FOLDER, config
        self._criterion = config.output.keep_best
        self.value = broadcast_from_main(self._stored() if is_main() else math.inf)

    def offer(self, numbers: Mapping[str, float], copy: Callable[[], Checkpoint]) -> bool:
        """Saves `copy()` if `numbers` are better than all before; returns whether they are.

        Every process of a run must call it at the same step. A disk that is full causes a warning.
        """
        value = numbers.get(self._criterion, math.inf)
        if not value < self.value:  # NaN is not better either
            return False
        self.value = value
        checkpoint = copy()
        if is_main():
            try:
                self._save(checkpoint)
            except DiskError as error:
                warnings.warn(f"{error}; training goes on without this best checkpoint", stacklevel=2)
        return True

    def _save(self, checkpoint: Checkpoint) -> None:
        with saving(self.folder):
            self.folder.mkdir(exist_ok=True)
        write_config(self.folder, self._config)
        saved = save_checkpoint(self.folder, checkpoint, keep=1)
        for other in checkpoint_folders(self.folder):  # a later one, from a part of the run that was repeated
            if other != saved:
                remove(other)
        score = {"criterion": self._criterion, "value": self.value, "step": checkpoint.step}
        write_json(self.folder / SCORE, score)

    def _stored(self) -> float:
        """The value of the checkpoint in RUN/best; infinity if there is none of this criterion."""
        try:
            score = parse_json((self.folder / SCORE).read_bytes())
        except (OSError, ValueError):
            return math.inf
        if not isinstance(score, dict) or score.get("criterion") != self._criterion:
            return math.inf
        value = score.get("value")
        return float(value) if isinstance(value, int | float) else math.inf
