"""From the name of a data source to the images of one split."""

# N images, C channels, H W pixels, K classes

import hashlib
import stat
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch import Tensor

from cdm_fast.config import PixelMap
from cdm_fast.config.choices import Resample
from cdm_fast.data.arrays import is_idx_folder, is_idx_name, read_digits, read_idx_folder
from cdm_fast.data.arrow import is_table_file, read_arrow
from cdm_fast.data.cifar import is_cifar_folder, is_cifar_name, read_cifar_folder
from cdm_fast.data.folder import read_image_folder, read_image_zip, read_table, walk
from cdm_fast.data.hub import read_hub
from cdm_fast.data.layout import is_picture
from cdm_fast.data.names import SPLITS, listed
from cdm_fast.data.npz import read_npz
from cdm_fast.data.order import Indices, split_indices
from cdm_fast.data.pictures import Fit, Pixels, parse_crop
from cdm_fast.data.source import Part, Source
from cdm_fast.errors import UserError
from cdm_fast.host.reading import bad, error_text, shown


@dataclass(frozen=True)
class ImageData:
    """One split of a data set, in memory."""

    images: Tensor  # (N,C,H,W) uint8, values 0..num_grey_levels-1
    labels: Tensor | None  # (N,) int64 in 0..num_classes-1
    num_grey_levels: int
    num_classes: int | None  # None without labels
    name: str
    split: str
    pixels: PixelMap = "intervals"  # where grey levels stand in [-1, 1]
    kind: str = "a data set"  # what the source was recognised as
    class_names: tuple[str, ...] | None = None  # of each label, where the source names its classes

    def __len__(self) -> int:
        return len(self.images)

    def describe(self) -> str:
        """What was recognised, for a person."""
        channels, height, width = self.images.shape[1:]
        classes = "" if self.num_classes is None else f", {self.num_classes} classes"
        return (
            f"{shown(self.name, 200)}: {self.kind}; {len(self):,} {self.split} images of {height}x{width}, "
            f"{channels} channel{'s' * (channels > 1)}{classes}"
        )

    def take(self, index: Tensor | slice) -> "ImageData":
        """Some of the images, with their labels."""
        labels = None if self.labels is None else self.labels[index]
        return replace(self, images=self.images[index], labels=labels)


def load_data(
    source: str | Path,
    split: str = "train",
    image_size: int | None = None,
    split_seed: int = 0,
    channels: int | None = None,
    *,
    crop: str = "centre",
    resample: Resample = "bicubic",
    hf_column: str | None = None,
    hf_split: str | None = None,
) -> ImageData:
    """Load one split of a data source.

    Args:
        source: "digits"; "hf:OWNER/NAME"; or the path of an IDX folder (MNIST family), a CIFAR-10 or
            CIFAR-100 folder (binary or Python version), an image folder, a zip of one, a CSV or JSONL of file
            names and labels, a folder of parquet or arrow files, or an .npz.
        split: "train", "validation" or "test". Splits that the source does not ship are cut out of its
            training images, stratified by class: 20 % for test, 10 % for validation.
        image_size: resample to a square of this side; None keeps the size.
        split_seed: which images are cut out; the same seed gives the same ones on every machine.
        channels: 1 or 3 converts to grey or colour; None keeps what the source has.
        crop: "centre", the central square; "none", the whole picture; or "LEFT,TOP,WIDTH,HEIGHT" in pixels,
            cut out before resampling.
        resample: the filter: "bicubic", "bilinear", "lanczos" or "box", antialiased.
        hf_column, hf_split: of an hf: source, the image column and the split to train on.

    What lies in a source and is not read is named in a warning. Raises UserError, naming file and remedy, for
    a source that is missing, damaged, hostile or ambiguous.
    """
    if split not in SPLITS:
        raise UserError(f"no split {split!r}; choose one of {', '.join(SPLITS)}")
    fit = Fit(image_size, channels, parse_crop(crop), resample)
    found = _open(source, hf_column, hf_split)
    _tell_unread(found)
    part, indices = _choose(found, split, split_seed)
    with part.open(fit) as rows:
        images = rows.read(indices)
    labels = None if part.labels is None else torch.from_numpy(part.labels[indices])
    return ImageData(
        torch.from_numpy(images),
        labels,
        found.num_grey_levels,
        found.num_classes,
        name=found.name,
        split=split,
        kind=found.kind,
        class_names=found.class_names,
    )


def data_digest(data: ImageData) -> str:
    """A digest of the number of images, the labels, and 4096 images spread evenly over them."""
    return _digest(data.images.shape, lambda index: data.images[index].numpy(), data.labels)


def source_digest(
    source: str | Path, split_seed: int, fit: Fit, hf_column: str | None = None, hf_split: str | None = None
) -> str:
    """`data_digest` of the training split, for which no other image is read; arguments as of `load_data`."""
    found = _open(source, hf_column, hf_split)
    part, indices = _choose(found, "train", split_seed)
    labels = None if part.labels is None else torch.from_numpy(part.labels[indices])
    with part.open(fit) as rows:
        shape = (len(indices), *rows.shape)
        return _digest(shape, lambda index: rows.read(indices[index.numpy()]), labels)


def _digest(shape: Sequence[int], read: Callable[[Tensor], Pixels], labels: Tensor | None) -> str:
    """See `data_digest`; read: gives the images of some indices."""
    digest = hashlib.blake2b(torch.tensor(shape).numpy().tobytes(), digest_size=16)
    spread = torch.linspace(0, shape[0] - 1, min(shape[0], 4096)).long()
    for index in spread.split(64):
        digest.update(read(index).tobytes())
    if labels is not None:
        digest.update(labels.numpy().tobytes())
    return digest.hexdigest()


def _tell_unread(source: Source) -> None:
    if source.unread:
        told = shown("; ".join(source.unread), 600)
        warnings.warn(f"{shown(source.name, 300)}: not read: {told}", stacklevel=3)


def _open(source: str | Path, hf_column: str | None = None, hf_split: str | None = None) -> Source:
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
    path = Path(source).expanduser()
    remedy = "give digits, hf:OWNER/NAME, a folder, a .zip, a .csv, a .jsonl or an .npz"
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except (OSError, ValueError) as error:
        raise bad(source, f"cannot be found ({error_text(error)}); {remedy}") from None
    suffix = path.suffix.lower()
    if is_folder:
        return _open_folder(path, hf_column)
    if suffix == ".npz":
        return read_npz(path)
    if suffix == ".zip":
        return read_image_zip(path)
    if suffix in (".csv", ".tsv", ".jsonl"):
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
    return read_image_folder(path)  # which says what is missing


def _inner_folders(files: list[str]) -> list[str]:
    """Folders of known files further in, as `MNIST/raw` and `cifar-10-batches-py`, where tools leave them."""
    known = {
        str(PurePosixPath(name).parent)
        for name in files
        if is_idx_name(PurePosixPath(name).name) or is_cifar_name(PurePosixPath(name).name)
    }
    return sorted(known)


def _choose(source: Source, split: str, split_seed: int) -> tuple[Part, Indices]:
    """The shipped part that holds a split, and the split's indices in it."""
    if split != "train" and split in source.parts:
        part = source.parts[split]
        return part, np.arange(part.count, dtype=np.int64)
    part = source.parts["train"]
    indices = split_indices(part.count, part.labels, frozenset(source.parts), split_seed)[split]
    if len(indices) == 0:
        raise bad(
            source.name, f"has {part.count} training images, too few to cut a {split} split from; add some"
        )
    return part, indices
