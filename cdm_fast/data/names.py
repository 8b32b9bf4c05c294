"""The usual names of splits, classes and labels, which readers understand."""

import re
from collections.abc import Iterable

SPLITS = ("train", "validation", "test")

_SYNONYMS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "validate", "dev", "development"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {name: split for split, names in _SYNONYMS.items() for name in names}
_SUFFIX = re.compile(r"[-_ .]?(set|split|data|images|imgs)$")

IMAGE_NAMES = frozenset({"images", "image", "imgs", "img", "x"})
LABEL_NAMES = frozenset({"labels", "label", "targets", "target", "y", "classes", "class", "fine_label"})
FILE_NAMES = (
    *("file_name", "filename", "file", "path", "file_path", "filepath", "image", "img", "image_path"),
    *("img_path", "image_name", "image_file", "image_id", "name", "picture"),
)


def split_of(name: str) -> str | None:
    """The split that a folder or value of this name denotes, ignoring case; None for other names."""
    plain = name.strip().lower()
    return _SPLIT_OF.get(plain) or _SPLIT_OF.get(_SUFFIX.sub("", plain))


def column_of(names: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """The names that are among `wanted`, ignoring case, in the order of `wanted`."""
    by_plain: dict[str, list[str]] = {}
    for name in names:
        by_plain.setdefault(name.strip().lower(), []).append(name)
    return [name for plain in wanted for name in by_plain.get(plain, ())]


def rank(names: Iterable[str]) -> list[str]:
    """Class names in label order: by number if all are numbers, else by name."""
    unique = set(names)
    numbered = all(name.isdecimal() and len(name) < 10 for name in unique)
    return sorted(unique, key=lambda name: (int(name) if numbered else 0, name))


def listed(names: Iterable[object], limit: int = 6) -> str:
    """The first names, and the number of further ones."""
    every = [str(name) for name in names]
    more = f" and {len(every) - limit} more" if len(every) > limit else ""
    return ", ".join(every[:limit]) + more
