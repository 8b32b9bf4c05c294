"""From the name of a data source to the images of one split."""

# N images, C channels, H W pixels, K classes

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cdm_fast.config import PixelMap
from cdm_fast.config.choices import Resample
from cdm_fast.config.size import ImageSize
from cdm_fast.data.copies import (
    Chosen,
    Copy,
    cache_folder,
    find,
    is_worth_it,
    key_of,
    mark_of,
    prepare,
)
from cdm_fast.data.names import SPLITS
from cdm_fast.data.order import Indices, split_indices
from cdm_fast.data.parallel import read_into_memory
from cdm_fast.data.pictures import Fit, Pixels, parse_crop, pillow_version
from cdm_fast.data.recognise import TABLES, open_source
from cdm_fast.data.source import Part, Source
from cdm_fast.errors import DiskError, UserError
from cdm_fast.host.reading import bad, shown


class Feed(Protocol):
    """Gathers the images of a step during the previous step; see `training.feed`."""

    def take(self, index: Tensor, following: Callable[[], Tensor]) -> Tensor:
        """The images of `index` (B,), (B,C,H,W) uint8; those of `following()` are needed next."""


@dataclass(frozen=True)
class ImageData:
    """One split of a data set, in memory or mapped from a prepared copy."""

    images: Tensor  # (N,C,H,W) uint8, values 0..num_grey_levels-1
    labels: Tensor | None  # (N,) int64 in 0..num_classes-1
    num_grey_levels: int
    num_classes: int | None  # None without labels
    name: str
    split: str
    pixels: PixelMap = "intervals"  # position of grey levels in [-1, 1]
    kind: str = "a data set"  # the recognised kind of source
    class_names: tuple[str, ...] | None = None  # in label order, if the source names its classes
    feed: Feed | None = field(default=None, compare=False, repr=False)  # if a thread gathers batches

    def __len__(self) -> int:
        return len(self.images)

    def describe(self) -> str:
        """A description of the data in words."""
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


@dataclass(frozen=True)
class Request:
    """A source and the options of reading it, for all splits; see `load_data`."""

    source: str | Path
    fit: Fit = Fit()
    split_seed: int = 0
    hf_column: str | None = None
    hf_split: str | None = None

    def open(self) -> Source:
        """The source, recognised but not read; warns of content that is not read."""
        found = open_source(self.source, self.hf_column, self.hf_split)
        tell_unread(found.name, found.unread)
        return found

    def mark(self) -> str | None:
        """A mark that identifies the content of a file or folder; None if it must be opened for that."""
        path = Path(str(self.source).removeprefix("hf:")).expanduser()
        if str(self.source).strip() in ("", "digits", "hf:"):
            return None
        if str(self.source).startswith("hf:") and not path.is_dir():
            return None
        if path.suffix.lower() in TABLES:
            return None
        mark = mark_of(path)
        return None if mark is None else f"{mark} {path.suffix.lower()} {self.hf_column}"

    def key(self, mark: str) -> str:
        """The name of the prepared copy."""
        return key_of(mark, self.fit, self.split_seed, pillow_version())


def load_data(
    source: str | Path,
    split: str = "train",
    image_size: ImageSize | None = None,
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
        split: "train", "validation" or "test". Splits that the source does not have are taken from its
            training images, stratified by class: 20 % for test, 10 % for validation.
        image_size: resample to a square of this side, or to (height, width); None keeps the size.
        split_seed: seed of these splits; the same seed gives the same splits on every machine.
        channels: 1 or 3 converts to grey or colour; None keeps the channels of the source.
        crop: "centre", the largest central box with the proportions of `image_size`; "none", the whole
            picture; or "LEFT,TOP,WIDTH,HEIGHT" in pixels, applied before resampling.
        resample: the filter: "bicubic", "bilinear", "lanczos" or "box", antialiased.
        hf_column, hf_split: image column and training split of an hf: source.

    A source of many pictures is decoded once, by all cores, into a prepared copy that later calls and other
    processes map (see `copies`). Content of a source that is not read is named in a warning. Raises
    UserError, naming file and remedy, for a source that is missing, damaged, hostile or ambiguous.

    >>> digits = load_data("digits", "test")
    >>> digits.images.shape, digits.num_grey_levels, digits.num_classes
    (torch.Size([359, 1, 8, 8]), 17, 10)
    """
    if split not in SPLITS:
        raise UserError(f"no split {split!r}; choose one of {', '.join(SPLITS)}")
    fit = Fit(image_size, channels, parse_crop(crop), resample)
    request = Request(source, fit, split_seed, hf_column, hf_split)
    mark, copy = ready_copy(request)
    if copy is not None:
        tell_unread(str(source), copy.about.unread)
        return _from_copy(request, copy, split)
    found = request.open()
    part, indices = _choose(found, split, split_seed)
    copy = _new_copy(request, found, mark)
    if copy is not None:
        return _from_copy(request, copy, split)
    with part.open(fit) as rows:
        images = read_into_memory(found.name, rows, indices)
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


def _from_copy(request: Request, copy: Copy, split: str) -> ImageData:
    images, labels = copy.split(split)
    about = copy.about
    if not len(images):
        raise _too_few(str(request.source), about.train, split)
    return ImageData(
        images,
        labels,
        about.num_grey_levels,
        about.num_classes,
        name=str(request.source),
        split=split,
        kind=about.kind,
        class_names=about.class_names,
    )


def ready_copy(request: Request) -> tuple[str | None, Copy | None]:
    """The source's mark, and its prepared copy if there is one; found without opening the source."""
    cache = cache_folder()
    mark = None if cache is None else request.mark()
    if cache is None or mark is None:
        return mark, None
    return mark, find(cache, request.key(mark))


def _new_copy(request: Request, found: Source, mark: str | None) -> Copy | None:
    """A prepared copy, if it is worthwhile and the disk has room; a failure is reported."""
    cache = cache_folder()
    if cache is None:
        return None
    with found.parts["train"].open(request.fit) as rows:
        row_bytes = int(np.prod(rows.shape))
    num_bytes = row_bytes * sum(part.count for part in found.parts.values())
    if not is_worth_it(found, num_bytes):
        return None
    try:
        return make_copy(request, found, mark, cache)
    except DiskError as error:
        warnings.warn(f"{error}; reading into memory, as at every start", stacklevel=3)
        return None


def make_copy(request: Request, found: Source, mark: str | None, cache: Path) -> Copy | None:
    """The prepared copy of a source, made if needed; None for a source whose content has no mark.

    mark: the mark of the request before the source was opened. Raises DiskError if writing fails, and
    UserError as in the source, or if it changes meanwhile.
    """
    own = mark or found.mark
    if own is None:
        return None
    chosen: Chosen = {}
    for split in SPLITS:
        part, indices = _indices(found, split, request.split_seed)
        if len(indices):
            chosen[split] = part, indices

    def unchanged() -> bool:
        if mark is None and Path(request.source).suffix.lower() in TABLES:
            return open_source(request.source).mark == own
        return mark is None or request.mark() == mark

    return prepare(cache, request.key(own), found, chosen, request.fit, unchanged)


def data_digest(data: ImageData) -> str:
    """A digest of the number of images, the labels, and 4096 evenly spaced images."""
    return _digest(data.images.shape, lambda index: data.images[index].numpy(), data.labels)


def source_digest(request: Request) -> str:
    """`data_digest` of the training split, without reading other images."""
    _, copy = ready_copy(request)
    if copy is not None:
        return data_digest(_from_copy(request, copy, "train"))
    found = request.open()
    part, indices = _choose(found, "train", request.split_seed)
    labels = None if part.labels is None else torch.from_numpy(part.labels[indices])
    with part.open(request.fit) as rows:
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


def tell_unread(name: str, unread: Sequence[str]) -> None:
    """Warns of content of a source that is not read."""
    if unread:
        warnings.warn(f"{shown(name, 300)}: not read: {shown('; '.join(unread), 600)}", stacklevel=4)


def split_counts(source: Source, split_seed: int) -> dict[str, int]:
    """The number of images in each split."""
    return {split: len(_indices(source, split, split_seed)[1]) for split in SPLITS}


def _choose(source: Source, split: str, split_seed: int) -> tuple[Part, Indices]:
    """The source's part that contains a split, and the split's indices in it; UserError if it is empty."""
    part, indices = _indices(source, split, split_seed)
    if len(indices) == 0:
        raise _too_few(source.name, part.count, split)
    return part, indices


def _indices(source: Source, split: str, split_seed: int) -> tuple[Part, Indices]:
    if split != "train" and split in source.parts:
        part = source.parts[split]
        return part, np.arange(part.count, dtype=np.int64)
    part = source.parts["train"]
    return part, split_indices(part.count, part.labels, frozenset(source.parts), split_seed)[split]


def _too_few(name: str, count: int, split: str) -> UserError:
    return bad(name, f"has {count} training images, too few to cut a {split} split from; add some")
