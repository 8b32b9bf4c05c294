"""Tables of file names and labels: dataset.json of StyleGAN and EDM, metadata.jsonl, CSV files."""

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from cdm_fast.config.json import parse_json
from cdm_fast.data.names import FILE_NAMES, LABEL_NAMES, column_of, listed, split_of
from cdm_fast.data.pictures import SUFFIXES
from cdm_fast.host.reading import bad, error_text, shown

MAX_TABLE_BYTES = 2**27
DATASET_JSON = "dataset.json"
# These are read if they lie beside or above pictures; other tables only if given as the source.
KNOWN_TABLES = frozenset(
    {DATASET_JSON, *(f"{s}.{k}" for s in ("metadata", "labels") for k in ("jsonl", "csv"))}
)

Label = int | str


@dataclass
class Table:
    """The content of a table of pictures, by file names relative to its folder."""

    name: str
    labels: dict[str, Label] | None  # None without labels
    files: list[str] = field(default_factory=list)  # in its order
    splits: dict[str, str] | None = None
    unread: tuple[str, ...] = ()  # columns
    edm: bool = False


def parse_table(name: str, content: bytes) -> Table | None:
    """The table in a file, parsed by its suffix; None for a JSON file that is not a dataset.json.

    Raises UserError for damage, a duplicate file name, or columns that are missing or ambiguous.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise bad(name, "is not UTF-8 text; save it as UTF-8") from None
    suffix = PurePosixPath(name).suffix.lower()
    if suffix == ".json":
        return _dataset_json(name, content)
    if suffix == ".jsonl":
        return _from_rows(name, *_json_lines(name, text))
    return _from_rows(name, *_csv_rows(name, text))


def _dataset_json(name: str, content: bytes) -> Table | None:
    try:
        found = parse_json(content)
    except ValueError as error:
        raise bad(name, f"is damaged ({error_text(error)}); write it again") from None
    if not isinstance(found, dict) or "labels" not in found:
        return None
    labels = found["labels"]
    if labels is None:
        return Table(name, None, edm=True)
    pairs = list(labels.items()) if isinstance(labels, dict) else labels
    if not isinstance(pairs, list) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
        raise bad(name, 'holds labels of another form; write {"labels": [["file.png", 0], ...]}')
    return Table(name, _labels_by_file(name, pairs), [str(file) for file, _ in pairs], edm=True)


def _labels_by_file(name: str, pairs: list[Any]) -> dict[str, Label]:
    """Label by file name; UserError unless all labels are whole numbers, or all are names."""
    labels: dict[str, Label] = {}
    for file, label in pairs:
        if not isinstance(file, str):
            raise bad(name, f"names a file by {shown(ascii(file), 60)}; give its name as text")
        if isinstance(label, bool) or not isinstance(label, int | str):
            kind = "nothing" if label is None else f"a {type(label).__name__}"
            raise bad(name, f"labels {shown(file, 100)} by {kind}; give each file one whole number or name")
        file = _plain(file)
        if file in labels:
            raise bad(name, f"names {shown(file, 100)} twice; remove one of the lines")
        labels[file] = label
    if len({type(label) for label in labels.values()}) > 1:
        raise bad(name, "labels some files by numbers and others by names; use one of the two")
    return labels


def _plain(file: str) -> str:
    return str(PurePosixPath(file.replace("\\", "/")))


Row = dict[str, Any]


def _json_lines(name: str, text: str) -> tuple[list[str], list[Row]]:
    rows, columns = [], {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise bad(name, f"line {number} is no JSON; write one object a line") from None
        if not isinstance(row, dict):
            raise bad(name, f"line {number} is no object; write one object a line")
        rows.append(row)
        columns.update(dict.fromkeys(row))
    return list(columns), rows


def _csv_rows(name: str, text: str) -> tuple[list[str], list[Row]]:
    try:
        lines = [line for line in _csv_lines(text) if line]
    except csv.Error as error:
        raise bad(name, f"is no CSV ({error_text(error)}); save it again") from None
    if not lines:
        raise bad(name, "is empty; give lines of a file name and a label")
    header = [cell.strip() for cell in lines[0]]
    if PurePosixPath(header[0]).suffix.lower() in SUFFIXES:  # a file name, not the name of a column
        header, lines = ["file_name", "label"][: len(header)], [header, *lines]
    for number, line in enumerate(lines[1:], 2):
        if len(line) != len(header):
            raise bad(name, f"line {number} has {len(line)} cells, the first {len(header)}; make them equal")
    if len(set(header)) < len(header):
        raise bad(name, "has two columns of one name; rename one")
    return header, [dict(zip(header, map(str.strip, line), strict=True)) for line in lines[1:]]


def _csv_lines(text: str) -> Iterator[list[str]]:
    first = text.partition("\n")[0]
    separator = max(",;\t", key=first.count)
    return csv.reader(io.StringIO(text, newline=""), delimiter=separator)


def _from_rows(name: str, columns: list[str], rows: list[Row]) -> Table:
    files = column_of(columns, FILE_NAMES)
    if not files:
        raise bad(name, f"has no column of file names (there is {listed(columns)}); call it file_name")
    file_column = files[0]
    labels, splits = (
        column_of(columns, sorted(LABEL_NAMES - {file_column.lower()})),
        column_of(columns, ["split"]),
    )
    if len(labels) > 1 and "label" in map(str.lower, labels):
        labels = [column for column in labels if column.lower() == "label"]
    if len(labels) > 1:
        raise bad(name, f"has {len(labels)} columns of labels ({listed(labels)}); call one of them label")
    used = {file_column, *labels, *splits}
    for number, row in enumerate(rows, 1):
        if not isinstance(row.get(file_column), str):
            raise bad(name, f"row {number} has no {file_column}; give each row the name of a file")
    found = None
    if labels:
        found = _labels_by_file(name, [(row[file_column], row.get(labels[0])) for row in rows])
        found = _numbers(found)
    return Table(
        name,
        found,
        [_plain(row[file_column]) for row in rows],
        _splits(name, file_column, splits[0], rows) if splits else None,
        tuple(column for column in columns if column not in used),
    )


def _numbers(labels: dict[str, Label]) -> dict[str, Label]:
    """Converts labels that are all whole numbers, as in CSV files, to numbers."""
    if all(isinstance(label, str) and label.isascii() and label.isdecimal() for label in labels.values()):
        return {file: min(int(str(label)[:20]), 2**62) for file, label in labels.items()}
    return labels


def _splits(name: str, file_column: str, column: str, rows: list[Row]) -> dict[str, str]:
    found = {}
    for row in rows:
        split = split_of(str(row.get(column)))
        if split is None:
            said = shown(str(row.get(column)), 60)
            raise bad(
                name, f"puts {shown(row[file_column], 100)} into split {said}; give train, validation or test"
            )
        found[_plain(row[file_column])] = split
    return found
