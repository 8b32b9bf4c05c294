"""Reader of local parquet and arrow files of images, in the Hugging Face hub's format, through pyarrow."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from cdm_fast.data.columns import as_labels, classes_of, image_column, label_column
from cdm_fast.data.folder import picture_part
from cdm_fast.data.names import SPLITS, listed, split_of
from cdm_fast.data.source import Part, Source, make_source
from cdm_fast.host.optional import need
from cdm_fast.host.reading import bad, error_text, open_regular

SUFFIXES = (".parquet", ".arrow")


def is_table_file(name: str) -> bool:
    """Whether a file of this name is a parquet or arrow file."""
    return PurePosixPath(name).suffix.lower() in SUFFIXES


def read_arrow(path: Path, files: Sequence[str], column: str | None = None) -> Source:
    """The images of a folder's parquet or arrow files.

    files: their names below the folder. The split of a file follows from its name or folder, such as
    `train-00000-of-00002.parquet` or `test/data.arrow`; files without a split name are for training.
    column: the image column (structs of `bytes` and `path`, or binary), if there are several.
    Raises UserError for damage, columns that are missing or ambiguous, and files that contradict each other.
    """
    by_split: dict[str, list[str]] = {}
    for name in sorted(files):
        by_split.setdefault(_split_of_file(name) or "train", []).append(name)
    if "train" not in by_split:
        raise bad(path, f"holds {listed(files)}, none of them for training; add the training files")
    tables = {split: _read_tables(path, by_split[split]) for split in SPLITS if split in by_split}
    train = tables["train"]
    named = _class_names(train)
    column = image_column(path, _image_columns(train), column)
    label = label_column(path, list(named), [key for key in _plain_columns(train) if key not in named])
    classes = None
    if label is not None and label not in named:
        classes = classes_of(path, train[label].to_pylist())
    parts: dict[str, Part] = {}
    for split, table in tables.items():
        title = f"{path}/{split}"
        missing = [key for key in (column, label) if key is not None and key not in table.column_names]
        if missing:
            raise bad(title, f"has no column {missing[0]}, as train has; give files of the same columns")
        labels = None if label is None else as_labels(title, label, table[label].to_pylist(), classes)
        keys = [str(row) for row in range(len(table))]
        parts[split] = picture_part(title, keys, labels, _opener(table[column], title), parts.get("train"))
    rest = [key for key in train.column_names if key not in (column, label)]
    names = classes if label not in named else named[str(label)]
    return make_source(
        path,
        parts,
        f"{PurePosixPath(files[0]).suffix[1:]} files, column {column}"
        + (f" with labels of column {label}" if label is not None else " without labels"),
        num_classes=len(names) if names else None,
        unread=(f"columns {listed(rest)}",) if rest else (),
        encoded=True,
        class_names=names,
    )


def _split_of_file(name: str) -> str | None:
    """The split named by the first word of the file's name, or else by a folder in its path."""
    place = PurePosixPath(name)
    word = place.stem.split("-")[0]
    return next((split for part in (word, *reversed(place.parts[:-1])) if (split := split_of(part))), None)


def _read_tables(path: Path, names: Sequence[str]) -> Any:
    """The rows of several files, in the order of their names, as one pyarrow table."""
    arrow = need("pyarrow", "reading parquet and arrow files")
    tables = []
    for name in names:
        try:
            tables.append(_read_file(path / name, path))
        except (arrow.ArrowException, OSError, ValueError, KeyError) as error:
            raise bad(f"{path}/{name}", f"is damaged ({error_text(error)}); fetch it again") from None
    try:
        table = arrow.concat_tables(tables)
    except (arrow.ArrowException, ValueError):
        raise bad(path, f"holds {listed(names)} of different columns; give files of the same kind") from None
    if len(table) == 0:
        raise bad(path, f"holds {listed(names)} without rows; give at least one image")
    return table


def _read_file(path: Path, folder: Path) -> Any:
    with open_regular(path, folder):
        if path.suffix.lower() == ".parquet":
            return need("pyarrow.parquet", "reading parquet files").read_table(path, memory_map=True)
    ipc = need("pyarrow.ipc", "reading arrow files")
    source = need("pyarrow", "reading arrow files").memory_map(str(path))
    try:
        return ipc.open_stream(source).read_all()  # what `datasets` writes
    except ValueError:
        source.seek(0)
        return ipc.open_file(source).read_all()


def _features(table: Any) -> dict[str, Any]:
    """The description of the columns that `datasets` puts into the schema; {} if there is none."""
    try:
        noted = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
        features = noted["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _class_names(table: Any) -> dict[str, tuple[str, ...]]:
    found = {}
    for key, kind in _features(table).items():
        if (
            isinstance(kind, dict)
            and kind.get("_type") == "ClassLabel"
            and isinstance(kind.get("names"), list)
        ):
            found[key] = tuple(map(str, kind["names"]))
    return {key: names for key, names in found.items() if key in table.column_names}


def _image_columns(table: Any) -> list[str]:
    types = need("pyarrow.types", "reading parquet files")
    found = []
    for field in table.schema:
        kind = field.type
        held = {kind.field(i).name for i in range(kind.num_fields)} if types.is_struct(kind) else set()
        if held >= {"bytes", "path"} or types.is_binary(kind) or types.is_large_binary(kind):
            found.append(field.name)
    return found


def _plain_columns(table: Any) -> list[str]:
    types = need("pyarrow.types", "reading parquet files")
    tests = (types.is_integer, types.is_string, types.is_large_string)
    return [field.name for field in table.schema if any(test(field.type) for test in tests)]


def _opener(column: Any, name: str) -> Callable[[], Any]:
    @contextmanager
    def opener() -> Iterator[Callable[[str, int], bytes]]:
        def fetch(key: str, limit: int) -> bytes:
            cell = column[int(key)].as_py()
            content = cell["bytes"] if isinstance(cell, dict) else cell
            if not isinstance(content, bytes):
                raise bad(
                    f"{name}/{key}", "holds no picture, only where one was; save the pictures themselves"
                )
            return content

        yield fetch

    return opener
