"""Finds the columns of a table that hold images and labels, and converts labels of any usual type."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from cdm_fast.data.names import LABEL_NAMES, column_of, listed, rank
from cdm_fast.data.order import Indices
from cdm_fast.data.source import check_labels
from cdm_fast.host.reading import bad, shown


def image_column(name: object, images: Sequence[str], wanted: str | None) -> str:
    """The column of images: the requested one (--hf-column), or the only one."""
    if wanted is not None:
        if wanted not in images:
            raise bad(
                name, f"has no image column {shown(wanted, 60)} (it has {listed(images) or 'none'}); give one"
            )
        return wanted
    if len(images) != 1:
        remedy = "choose one by --hf-column" if images else "choose a data set with one"
        raise bad(name, f"has {len(images)} image columns ({listed(images)}); {remedy}")
    return images[0]


def label_column(name: object, named: Sequence[str], plain: Sequence[str]) -> str | None:
    """The column of labels; None if there is none.

    named: columns of class labels with class names; plain: columns of whole numbers or text, which count only
    if they have a usual name. The column `label` has precedence, then the only one. Raises UserError if the
    choice is ambiguous.
    """
    for columns in (list(named), column_of(plain, LABEL_NAMES)):
        label = column_of(columns, ["label"])
        if label or len(columns) == 1:
            return (label or columns)[0]
        if columns:
            raise bad(
                name, f"has {len(columns)} label columns ({listed(columns)}); choose a data set with one"
            )
    return None


def classes_of(name: object, values: Sequence[Any]) -> tuple[str, ...] | None:
    """Class names in label order if the training labels are text; None if they are numbers."""
    if all(isinstance(value, str) for value in values):
        return tuple(rank(values))
    return None


def as_labels(
    name: object, column: str, values: Sequence[Any], classes: tuple[str, ...] | None
) -> Indices | None:
    """(n,) int64 labels from a column's values; UserError for a missing label and an unknown class."""
    if classes is not None:
        number_of = {label: number for number, label in enumerate(classes)}
        for row, value in enumerate(values):
            if value not in number_of:
                said = shown(ascii(value), 60)
                raise bad(
                    name, f"row {row} of column {column} is {said}, a class without training images; add some"
                )
        return np.array([number_of[value] for value in values], np.int64)
    for row, value in enumerate(values):
        if type(value) is bool or not isinstance(value, int | np.integer) or abs(int(value)) >= 2**62:
            said = shown(ascii(value), 60)
            raise bad(name, f"row {row} of column {column} is {said}; give whole numbers from 0, or names")
    return check_labels(name, np.array(values, np.int64), len(values))
