"""Per-image values as an .npz or .csv file."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cdm_fast.data import ImageData
from cdm_fast.errors import UserError
from cdm_fast.host.files import write_atomically

SUFFIXES = (".npz", ".csv")


def check_name(path: Path) -> None:
    """UserError unless the name ends in .npz or .csv; called before the images are scored."""
    if path.suffix not in SUFFIXES:
        raise UserError(f"--out {path}: give a name that ends in {' or '.join(SUFFIXES)}")


def write_per_image(
    path: Path,
    data: ImageData,
    columns: Mapping[str, tuple[Tensor, Tensor]],  # name -> (index (m,) int64, value (m,))
) -> Path:
    """Writes one row per image of the split: `index`, `label` if there are labels, and every column.

    NaN marks images without a value in a column. Raises UserError as in `check_name`, and if the file cannot
    be written.
    """
    check_name(path)
    num = len(data.images)
    arrays = {"index": np.arange(num)}
    if data.labels is not None:
        arrays["label"] = data.labels.numpy()
    for name, (index, value) in columns.items():
        full = torch.full((num,), torch.nan, dtype=torch.float64)
        full[index] = value.double()
        arrays[name] = full.numpy()
    if path.suffix == ".npz":
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
        return write_atomically(path, buffer.getvalue())
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(arrays)
    table.writerows(zip(*(column.tolist() for column in arrays.values()), strict=True))
    return write_atomically(path, text.getvalue().encode())
