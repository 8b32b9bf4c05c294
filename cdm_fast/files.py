"""Files that are either complete or absent."""

import os
from pathlib import Path

from cdm_fast.errors import UserError


def write_atomically(path: str | Path, data: bytes) -> Path:
    """Writes a file that is seen under its name only when it is complete and on the disk; returns its path.

    Missing folders are made. What stood under the name before stays until then, and stays on failure.
    Raises UserError naming the file where the system refuses (no space, no permission).
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.unfinished-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(unfinished, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot write {path}: {reason}; make room there or name another path") from error
    return path
