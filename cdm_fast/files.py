"""Files that are either complete or absent."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cdm_fast.errors import UserError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path in the folder of `path` (made when missing) to write to; it becomes `path` at the end.

    When the body raises, the temporary file is removed and what stood under `path` before stays as it was.
    Raises UserError that names `path` where the system refuses (no space, no permission).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        remedy = "free space there or name another path"
        raise UserError(f"cannot write {path}: {error.strerror or error}; {remedy}") from error
    finally:
        # A folder that could not be made, or a file in its place, has no temporary to remove.
        with suppress(OSError):
            temporary.unlink()
