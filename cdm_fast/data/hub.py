"""Reader of image data sets of the Hugging Face hub, through the optional package `datasets`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cdm_fast.data.folder import picture_part
from cdm_fast.data.source import SPLITS, Part, Source, check_labels, make_source
from cdm_fast.errors import UserError
from cdm_fast.host.reading import MAX_PICTURE_BYTES, bad, error_text, read_bytes


def read_hub(repo: str) -> Source:
    """The data set `repo` ("owner/name"): its only image column, and its class label column if it has one.

    Data sets that need a script of their own to load are refused by `datasets` itself. Raises UserError if
    that package is missing, the data set cannot be had, has no training split, or its columns are ambiguous.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(
            "hf: sources need the package datasets; pip install 'cdm_fast[huggingface]'"
        ) from None
    try:
        tables = datasets.load_dataset(repo)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise bad(
            f"hf:{repo}", f"cannot be loaded ({error_text(error)}); check the name and the network"
        ) from None
    shipped = [split for split in SPLITS if split in tables]
    if "train" not in shipped:
        raise bad(f"hf:{repo}", f"has no train split (it has {', '.join(tables)}); choose another data set")
    features = tables["train"].features
    image_column = _only(
        repo, "image", [key for key, kind in features.items() if isinstance(kind, datasets.Image)]
    )
    label_column, num_classes = _label_column(repo, features, datasets.ClassLabel)
    parts: dict[str, Part] = {}
    for split in shipped:
        table = tables[split].cast_column(image_column, datasets.Image(decode=False))
        labels = None if label_column is None else np.asarray(table[label_column])
        keys = [str(row) for row in range(len(table))]
        name = f"hf:{repo}/{split}"
        checked = check_labels(name, labels, len(table))
        parts[split] = picture_part(
            name, keys, checked, _opener(table, image_column, name), parts.get("train")
        )
    return make_source(f"hf:{repo}", parts, num_classes=num_classes)


def _only(repo: str, kind: str, columns: list[str]) -> str:
    if len(columns) != 1:
        raise bad(
            f"hf:{repo}",
            f"has {len(columns)} {kind} columns ({', '.join(columns)}); choose a data set with one",
        )
    return columns[0]


def _label_column(repo: str, features: dict[str, Any], class_label: type) -> tuple[str | None, int | None]:
    """The column `label`, or the only one of class labels: its name and number of classes."""
    columns = [key for key, kind in features.items() if isinstance(kind, class_label)]
    if not columns:
        return None, None
    column = "label" if "label" in columns else _only(repo, "label", columns)
    return column, features[column].num_classes


def _opener(table: Any, column: str, name: str) -> Callable[[], Any]:
    @contextmanager
    def opener() -> Iterator[Callable[[str], bytes]]:
        def fetch(key: str) -> bytes:
            cell = table[int(key)][column]
            if cell is None:
                raise bad(f"{name}/{key}", "holds no image; choose another data set")
            # A table keeps either the file's content or the path of its local copy.
            content = cell["bytes"]
            return read_bytes(Path(cell["path"]), MAX_PICTURE_BYTES) if content is None else content

        yield fetch

    return opener
