"""One input of a reader: the files of a folder, and what is asked of it."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

OUTSIDE = "../outside"  # what hostile links point at, beside the folder of the case


@dataclass
class Case:
    """Files by relative name (None: a folder), links, pipes, and options of the reader."""

    files: dict[str, bytes | None] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    pipes: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    def write(self, root: Path) -> None:
        """Makes the folder `root` anew with these files; names that the file system refuses are left out."""
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        for name, content in self.files.items():
            self._put(root / name, _folder if content is None else _writer(content))
        for name, target in self.links.items():
            self._put(root / name, _linker(target))
        for name in self.pipes:
            self._put(root / name, os.mkfifo)

    @staticmethod
    def _put(path: Path, make: Callable[[Path], Any]) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.is_dir():
                path.unlink(missing_ok=True)
            make(path)
        except (OSError, ValueError):
            pass


def _folder(path: Path) -> None:
    path.mkdir(exist_ok=True)


def _writer(content: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(content)


def _linker(target: str) -> Callable[[Path], Any]:
    return lambda path: path.symlink_to(target)


def unusual_files(rng: Random, case: Case, named: bool = False) -> None:
    """Puts a link, a pipe or a folder in the place of one of the files, or takes one away.

    named: the file is what the user names, and may be a link to anywhere; here it becomes one to a device.
    """
    if not case.files:
        return
    name = rng.choice(sorted(case.files))
    kind = rng.randrange(5)
    if named and kind in (0, 3):
        case.links[name] = "/dev/zero"
    elif kind == 0:
        case.links[name] = rng.choice(
            (OUTSIDE, "/dev/zero", "/etc/passwd", name.split("/")[-1], "/", "..", "gone")
        )
    elif kind == 1:
        case.pipes.append(name)
    elif kind == 2:
        case.files[name] = None
    elif kind == 3:
        case.links[f"{name}.{rng.choice(('png', 'jpg', 'gz'))}"] = rng.choice(
            (OUTSIDE, name, ".", "/dev/zero")
        )
    else:
        del case.files[name]
