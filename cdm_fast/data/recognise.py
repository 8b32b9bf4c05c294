"""Finds the reader for the name of a data source."""

import stat
from pathlib import Path, PurePosixPath

from cdm_fast.data.arrays import is_idx_folder, is_idx_name, read_digits, read_idx_folder
from cdm_fast.data.arrow import is_table_file, read_arrow
from cdm_fast.data.cifar import is_cifar_folder, is_cifar_name, read_cifar_folder
from cdm_fast.data.folder import read_image_folder, read_image_zip, read_table, walk
from cdm_fast.data.hub import read_hub
from cdm_fast.data.layout import is_picture
from cdm_fast.data.names import listed
from cdm_fast.data.npz import read_npz
from cdm_fast.data.source import Source
from cdm_fast.errors import UserError
from cdm_fast.host.reading import bad, error_text

TABLES = (".csv", ".tsv", ".jsonl")


def open_source(source: str | Path, hf_column: str | None = None, hf_split: str | None = None) -> Source:
    """The source with this name; see `load_data`. Pictures are not decoded yet, arrays are read."""
    if not str(source).strip():
        raise UserError(
            "--data is empty, as an unset variable leaves it; give digits, a path or hf:OWNER/NAME"
        )
    if source == "digits":
        return read_digits()
    if isinstance(source, str) and source.startswith("hf:"):
        repo = source.removeprefix("hf:")
        if repo.strip() and Path(repo).expanduser().is_dir():
            return _open_folder(Path(repo).expanduser(), hf_column)
        return read_hub(repo, hf_column, hf_split)
    remedy = "give digits, hf:OWNER/NAME, a folder, a .zip, a .csv, a .jsonl or an .npz"
    try:
        path = Path(source).expanduser()
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~NAME of an unknown user
        raise bad(source, f"cannot be found ({error_text(error)}); {remedy}") from None
    suffix = path.suffix.lower()
    if is_folder:
        return _open_folder(path, hf_column)
    if suffix == ".npz":
        return read_npz(path)
    if suffix == ".zip":
        return read_image_zip(path)
    if suffix in TABLES:
        return read_table(path)
    if is_table_file(path.name):
        return read_arrow(path.parent, [path.name], hf_column)
    raise bad(source, f"is a file of no known kind; {remedy}")


def _open_folder(path: Path, hf_column: str | None) -> Source:
    if is_idx_folder(path):
        return read_idx_folder(path)
    if is_cifar_folder(path):
        return read_cifar_folder(path)
    files = list(walk(path))
    if any(map(is_picture, files)):
        return read_image_folder(path)
    tables = [name for name in files if is_table_file(name)]
    if tables:
        return read_arrow(path, tables, hf_column)
    inner = _inner_folders(files)
    if len(inner) > 1:
        raise bad(path, f"holds several data sets ({listed(inner)}); give the path of one")
    if inner:
        return _open_folder(path / inner[0], hf_column)
    return read_image_folder(path)  # its error says what is missing


def _inner_folders(files: list[str]) -> list[str]:
    """Subfolders of known files, such as `MNIST/raw` and `cifar-10-batches-py`, made by download tools."""
    known = {
        str(PurePosixPath(name).parent)
        for name in files
        if is_idx_name(PurePosixPath(name).name) or is_cifar_name(PurePosixPath(name).name)
    }
    return sorted(known)
