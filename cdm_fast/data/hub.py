"""Reader of image data sets of the Hugging Face hub, through the optional package `datasets`."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdm_fast.data.columns import as_labels, classes_of, image_column, label_column
from cdm_fast.data.folder import picture_part
from cdm_fast.data.names import SPLITS, listed, split_of
from cdm_fast.data.source import Part, Source, make_source
from cdm_fast.errors import UserError
from cdm_fast.host.reading import MAX_PICTURE_BYTES, bad, error_text, read_bytes

_NUMBERS_AND_TEXT = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "string", "large_string")


def read_hub(repo: str, column: str | None = None, train_split: str | None = None) -> Source:
    """The data set `repo` ("owner/name"): an image column, and a label column if it has one.

    column: the image column, if there are several; train_split: the split to train on, by default "train".
    Labels are class labels, or a column of whole numbers or text with a usual name. `datasets` itself refuses
    data sets that need their own loading script. Raises UserError if this package is missing, or if the data
    set cannot be loaded, has no training split or ambiguous columns.
    """
    name = f"hf:{repo}"
    tables = _load_tables(name, repo)
    chosen = _splits(name, list(tables), train_split)
    found = _columns(name, tables[chosen["train"]], column)
    parts: dict[str, Part] = {}
    for split, key in chosen.items():
        parts[split] = _part(f"{name}/{key}", tables[key], found, parts.get("train"))
    marks = [getattr(tables[key], "_fingerprint", None) for key in chosen.values()]
    rest = [key for key in tables if key not in chosen.values()]
    return make_source(
        name,
        parts,
        f"a data set of the hub, column {found.image}"
        + (f" with labels of column {found.label}" if found.label is not None else " without labels"),
        num_classes=found.num_classes,
        unread=(
            *((f"splits {listed(rest)}",) if rest else ()),
            *((f"columns {listed(found.unread)}",) if found.unread else ()),
        ),
        encoded=True,
        class_names=found.class_names,
        mark=None if None in marks else f"{chosen} {marks} {found.image} {found.label}",
    )


def _load_tables(name: str, repo: str) -> Any:
    """The data set's tables by split, as `datasets` loads them."""
    if not repo.strip():
        raise UserError("--data hf: names no data set; give digits, a path or hf:OWNER/NAME")
    try:
        import datasets
    except ImportError:
        raise UserError(
            "hf: sources need the package datasets; pip install 'cdm_fast[huggingface]'"
        ) from None
    try:
        return datasets.load_dataset(repo)
    except (
        OSError,
        ValueError,
        RuntimeError,
        LookupError,
        datasets.exceptions.DatasetsError,
    ) as error:
        raise bad(name, f"cannot be loaded ({error_text(error)}); check the name and the network") from None


@dataclass(frozen=True)
class _Columns:
    """The roles of a table's columns, and the meaning of its labels.

    `classes`: class names in label order if the label column is text, else None. `class_names`: these, or the
    names that the table itself gives its class labels.
    """

    image: str
    label: str | None
    unread: list[str]
    classes: tuple[str, ...] | None
    num_classes: int | None
    class_names: tuple[str, ...] | None


def _columns(name: str, table: Any, column: str | None) -> _Columns:
    """The columns of the training split; `column` is the image column if there are several."""
    import datasets

    features = table.features
    image = image_column(
        name, [key for key, kind in features.items() if isinstance(kind, datasets.Image)], column
    )
    named = [key for key, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    plain = [key for key, kind in features.items() if getattr(kind, "dtype", None) in _NUMBERS_AND_TEXT]
    label = label_column(name, named, [key for key in plain if key not in named])
    classes = None if label is None else classes_of(name, list(table[label]))
    own = features[label] if label in named else None
    return _Columns(
        image,
        label,
        [key for key in features if key not in (image, label)],
        classes,
        len(classes) if classes else None if own is None else own.num_classes,
        classes or (None if own is None else tuple(own.names)),
    )


def _part(title: str, table: Any, columns: _Columns, train: Part | None) -> Part:
    """One split, with pictures that are still encoded."""
    import datasets

    label, image = columns.label, columns.image
    table = table.cast_column(image, datasets.Image(decode=False))
    labels = None if label is None else as_labels(title, label, list(table[label]), columns.classes)
    keys = [str(row) for row in range(len(table))]
    return picture_part(title, keys, labels, _opener(table, image, title), train)


def _splits(name: str, held: list[str], train_split: str | None) -> dict[str, str]:
    """The data set's own name of each split; "train" first."""
    if train_split is not None:
        if train_split not in held:
            raise bad(name, f"has no split {train_split} (it has {listed(held)}); give one by --hf-split")
        rest = [key for key in held if key != train_split]
    else:
        rest = held
    found = {} if train_split is None else {"train": train_split}
    for split in SPLITS:
        keys = [key for key in rest if split_of(key) == split]
        plain = [key for key in keys if key == split] or keys
        if split not in found and plain:
            if len(plain) > 1:
                raise bad(name, f"has {listed(plain)}, which all mean {split}; choose another data set")
            found[split] = plain[0]
    if "train" not in found:
        raise bad(name, f"has no train split (it has {listed(held)}); choose one by --hf-split")
    return found


def _opener(table: Any, column: str, name: str) -> Callable[[], Any]:
    @contextmanager
    def opener() -> Iterator[Callable[[str, int], bytes]]:
        lock = threading.Lock()  # `datasets` is not documented as thread-safe

        def fetch(key: str, limit: int) -> bytes:
            with lock:
                cell = table[int(key)][column]
            return cell_bytes(cell, f"{name}/{key}", limit)

        yield fetch

    return opener


def cell_bytes(cell: Any, name: str, limit: int = MAX_PICTURE_BYTES) -> bytes:
    """The picture file in a cell, which holds its content or its path."""
    if cell is None:
        raise bad(name, "holds no image; choose another data set")
    content = cell["bytes"]
    return read_bytes(Path(cell["path"]), limit) if content is None else content
