"""From the name of a data source to the images of one split."""

# N images, C channels, H W pixels, K classes

import stat
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cdm_fast.config import PixelMap
from cdm_fast.data.arrays import (
    is_cifar_folder,
    is_idx_folder,
    read_cifar_folder,
    read_digits,
    read_idx_folder,
)
from cdm_fast.data.folder import read_image_folder, read_image_zip
from cdm_fast.data.hub import read_hub
from cdm_fast.data.npz import read_npz
from cdm_fast.data.order import Indices, split_indices
from cdm_fast.data.pictures import check_shape
from cdm_fast.data.source import SPLITS, Part, Source
from cdm_fast.errors import UserError
from cdm_fast.host.reading import bad, error_text


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

    def __len__(self) -> int:
        return len(self.images)

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
) -> ImageData:
    """Load one split of a data source.

    Args:
        source: "digits"; "hf:OWNER/NAME"; or the path of an IDX folder (MNIST family), a CIFAR-10 or
            CIFAR-100 folder (binary version), an image folder, a zip of one, or an .npz.
        split: "train", "validation" or "test". Splits that the source does not ship are cut out of its
            training images, stratified by class: 20 % for test, 10 % for validation.
        image_size: resample the shorter side to this and crop the centre; None keeps the size.
        split_seed: which images are cut out; the same seed gives the same ones on every machine.
        channels: 1 or 3 converts to grey or colour; None keeps what the source has.

    Raises UserError, naming file and remedy, for a source that is missing, damaged, hostile or ambiguous.
    """
    if split not in SPLITS:
        raise UserError(f"no split {split!r}; choose one of {', '.join(SPLITS)}")
    check_shape(image_size, channels)
    found = _open(source)
    part, indices = _choose(found, split, split_seed)
    images = part.read(indices, image_size, channels)
    labels = None if part.labels is None else torch.from_numpy(part.labels[indices])
    return ImageData(
        torch.from_numpy(images),
        labels,
        found.num_grey_levels,
        found.num_classes,
        name=found.name,
        split=split,
    )


def _open(source: str | Path) -> Source:
    if source == "digits":
        return read_digits()
    remedy = "give digits, hf:OWNER/NAME, a folder, a .zip or an .npz"
    if source in ("", "hf:"):  # an empty path would be the current folder
        raise UserError(f"{source!r} names no data; {remedy}")
    if isinstance(source, str) and source.startswith("hf:"):
        return read_hub(source.removeprefix("hf:"))
    try:
        path = Path(source).expanduser()
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except (OSError, ValueError, RuntimeError) as error:  # the last for ~NAME of an unknown user
        raise bad(source, f"cannot be found ({error_text(error)}); {remedy}") from None
    if is_folder:
        if is_idx_folder(path):
            return read_idx_folder(path)
        return read_cifar_folder(path) if is_cifar_folder(path) else read_image_folder(path)
    if path.suffix.lower() == ".npz":
        return read_npz(path)
    if path.suffix.lower() == ".zip":
        return read_image_zip(path)
    raise bad(source, f"is a file of no known kind; {remedy}")


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
