"""The labels of pictures: from class folders, or from tables among the pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from cdm_fast.data.layout import is_numbered_archive, part_of
from cdm_fast.data.names import listed, rank
from cdm_fast.data.order import Indices
from cdm_fast.data.source import check_labels
from cdm_fast.data.tables import Label, Table
from cdm_fast.host.reading import bad, shown


@dataclass(frozen=True)
class Labelling:
    """The labels of a source's pictures, and where they come from.

    Fields:
        labels: a number or a class name for each picture; None without labels.
        class_names: in label order, if classes have names.
        how: a description, such as "in 10 class folders".
        unread: files and columns that were found but are not read.
    """

    path: Path
    labels: dict[str, Label] | None
    class_names: tuple[str, ...] | None
    how: str
    unread: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int | None:
        """K if classes have names; None for numbers, from which K follows."""
        return None if self.class_names is None else len(self.class_names)

    def numbers(self, names: Sequence[str]) -> Indices | None:
        """(n,) int64 labels of the pictures; UserError for a class that no training picture has."""
        if self.labels is None:
            return None
        found = [self.labels[name] for name in names]
        if self.class_names is not None:
            number_of = {name: number for number, name in enumerate(self.class_names)}
            for name, label in zip(names, found, strict=True):
                if label not in number_of:
                    raise _untrained(self.path, name)
            found = [number_of[str(label)] for label in found]
        elif any(not -(2**62) < int(label) < 2**62 for label in found):
            raise bad(self.path, "holds labels beyond 64 bits; number the classes from 0")
        return check_labels(self.path, np.array(found, np.int64), len(names))

    @staticmethod
    def of_tables(
        path: Path,
        names: Sequence[str],
        tables: Sequence[tuple[str, Table]],
        train: Sequence[str] | None = None,
    ) -> "Labelling":
        """Labels from tables, each for the pictures below its folder.

        train: the training pictures, which determine the named classes; all by default.
        Raises UserError for a picture without a label or with two labels, and for names of missing files.
        """
        labels: dict[str, Label] = {}
        unread: list[str] = []
        for place, table in tables:
            if table.unread:
                unread.append(f"columns {listed(table.unread)} of {PurePosixPath(table.name).name}")
            if table.labels is not None:
                _add(labels, place, table, set(names))
        if not any(table.labels is not None for _, table in tables):
            return Labelling(path, None, None, "without labels", tuple(unread))
        bare = [name for name in names if name not in labels]
        if bare:
            named = listed(dict.fromkeys(PurePosixPath(table.name).name for _, table in tables))
            raise bad(
                f"{path}/{bare[0]}",
                f"has no label in {named}, nor have {len(bare) - 1} more; label all pictures or none",
            )
        if len({type(label) for label in labels.values()}) > 1:
            raise bad(path, "has tables that label by numbers and by names; use one of the two")
        classes = None
        if any(isinstance(label, str) for label in labels.values()):
            classes = tuple(rank(str(labels[name]) for name in train or names))
        files = listed(dict.fromkeys(PurePosixPath(table.name).name for _, table in tables if table.labels))
        return Labelling(path, labels, classes, f"with labels of {files}", tuple(unread))


def _add(labels: dict[str, Label], place: str, table: Table, names: set[str]) -> None:
    """The labels of one table, by names relative to the source."""
    assert table.labels is not None
    own = {f"{place}{name}": label for name, label in table.labels.items()}
    missing = [name for name in own if name not in names]
    if missing:
        raise bad(
            table.name,
            f"labels {len(missing)} files that are not there or not read ({shown(listed(missing, 3), 200)});"
            " restore them, or remove their lines",
        )
    twice = own.keys() & labels.keys()
    if twice:
        raise bad(table.name, f"labels {shown(min(twice), 100)} once more; keep one of the tables")
    labels.update(own)


def _untrained(path: Path, name: str) -> Exception:
    return bad(f"{path}/{name}", "is of a class that has no training pictures; add some or remove it")


def label_pictures(
    path: Path,
    splits: dict[str, list[str]],
    depth: int,
    tables: Sequence[tuple[str, Table]],
    lost: Sequence[str],
) -> Labelling:
    """How the pictures of a folder or zip are labelled: by tables that have labels, else by class folders.

    depth: the depth of class folders; lost: pictures in formats that are not read.
    Raises UserError as in `Labelling.of_tables`, for a picture beside class folders, for a class without
    training pictures, and for a class of which all pictures are lost.
    """
    every = [name for names in splits.values() for name in names]
    by_table = Labelling.of_tables(path, every, tables, splits["train"])
    if by_table.labels is not None or any(table.edm for _, table in tables):
        return by_table
    if is_numbered_archive(every, depth):
        return Labelling(path, None, None, "in numbered folders, without labels", by_table.unread)
    classes = _class_folders(path, splits["train"], depth)
    _require_classes_read(path, every, lost, depth)
    if not classes:
        _refuse_test_classes(path, splits, depth)
        return Labelling(path, None, None, "without labels", by_table.unread)
    labels: dict[str, Label] = {name: part_of(name, depth) for name in every}
    return Labelling(path, labels, tuple(classes), f"in {len(classes)} class folders", by_table.unread)


def _class_folders(path: Path, names: Sequence[str], depth: int) -> list[str]:
    """Class names in label order: the sub-folders at `depth`.

    Pictures that all lie in one folder have no labels, since a single class carries no information.
    """
    found = {part_of(name, depth) for name in names}
    if len(found) == 1:
        return []
    if "" in found:
        stray = next(name for name in names if not part_of(name, depth))
        raise bad(
            f"{path}/{stray}", "lies beside class sub-folders; move it into one, or all into one folder"
        )
    return rank(found)


def _refuse_test_classes(path: Path, splits: dict[str, list[str]], depth: int) -> None:
    """UserError if all training pictures have one class and other splits have further classes."""
    (own,) = {part_of(name, depth) for name in splits["train"]}
    for names in splits.values():
        classes = {part_of(name, depth) for name in names} - {own}
        if len(classes) > 1 or (classes and own):
            raise _untrained(path, next(name for name in names if part_of(name, depth) != own))


def _require_classes_read(path: Path, names: Sequence[str], lost: Sequence[str], depth: int) -> None:
    """UserError for a class folder, or a split's part of it, none of whose pictures can be read."""

    def place(name: str) -> tuple[str, ...]:
        return PurePosixPath(name).parts[:-1][: depth + 1]

    read = {place(name) for name in names}
    for name in lost:
        if place(name) not in read:
            folder = "/".join(place(name)) or "this folder"
            raise bad(
                f"{path}/{name}",
                f"is a picture of a kind that is not read, as are all of {folder}; convert them to PNG",
            )
