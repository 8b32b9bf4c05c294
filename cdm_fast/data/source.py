"""The result of a reader: the splits of its source, checked, with pixels decoded on demand."""

# n chosen images, C channels, H W pixels, K classes

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cdm_fast.data.order import Indices
from cdm_fast.data.pictures import MAX_SIDE, Fit, Pixels, reshape
from cdm_fast.host.reading import bad

MAX_CLASSES = 2**16


@dataclass(frozen=True)
class Rows:
    """A part that is open for reading with a given fit.

    `read(indices)` returns the chosen images, (n, *shape) uint8; several threads may call it at once.
    """

    shape: tuple[int, int, int]  # (C,H,W)
    read: Callable[[Indices], Pixels]


@dataclass(frozen=True)
class Part:
    """One split of a source."""

    count: int
    labels: Indices | None  # (count,)
    open: Callable[[Fit], AbstractContextManager[Rows]]
    shape: tuple[int, ...] | None = None  # (C,H,W) as stored, if known before reading


@dataclass(frozen=True)
class Source:
    """A readable data set: its parts ("train", and optionally "validation" and "test").

    Fields:
        kind: the recognised kind, in a few words.
        unread: content that is not read, one sentence each.
        encoded: True if its images are decoded every time they are read.
        class_names: in label order, if the source names its classes.
        mark: for a source that is not a file, a mark that identifies its content.
    """

    name: str
    parts: dict[str, Part]
    num_grey_levels: int
    num_classes: int | None
    kind: str = "a data set"
    unread: tuple[str, ...] = ()
    encoded: bool = False
    class_names: tuple[str, ...] | None = None
    mark: str | None = None


def array_part(name: object, images: Pixels, labels: Indices | None, num_grey_levels: int = 256) -> Part:
    """A part in memory; (N,C,H,W) uint8, C 1 or 3. Raises UserError if empty, too large or out of range."""
    if 0 in images.shape:
        raise bad(name, f"holds no images (shape {images.shape}); give at least one")
    if max(images.shape[2:]) > MAX_SIDE:
        height, width = images.shape[2:]
        raise bad(name, f"holds images of {height}x{width} pixels; scale them down to {MAX_SIDE} a side")
    if num_grey_levels < 256 and images.max() >= num_grey_levels:
        raise bad(
            name, f"holds grey level {images.max()}; {num_grey_levels} levels end at {num_grey_levels - 1}"
        )

    @contextmanager
    def opened(fit: Fit) -> Iterator[Rows]:
        def read(indices: Indices) -> Pixels:
            return reshape(np.ascontiguousarray(images[indices]), num_grey_levels, fit, name)

        _, channels, height, width = read(FIRST).shape
        yield Rows((channels, height, width), read)

    return Part(len(images), labels, opened, images.shape[1:])


FIRST: Indices = np.zeros(1, np.int64)


def check_labels(name: object, labels: NDArray | None, count: int) -> Indices | None:
    """Labels as (count,) int64; UserError for another number or type, or values out of range."""
    if labels is None:
        return None
    labels = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if labels.dtype.kind not in "iu":
        raise bad(name, f"holds labels of type {labels.dtype}; save them as whole numbers (int64)")
    if labels.shape != (count,):
        raise bad(name, f"holds labels of shape {labels.shape} for {count} images; give one label an image")
    outside = (labels < 0) | (labels >= MAX_CLASSES)
    if outside.any():
        index = int(np.argmax(outside))
        raise bad(name, f"label {labels[index]} of image {index} is out of range; number the classes from 0")
    return labels.astype(np.int64)


def make_source(
    name: object,
    parts: dict[str, Part],
    kind: str,
    num_grey_levels: int = 256,
    num_classes: int | None = None,
    unread: tuple[str, ...] = (),
    encoded: bool = False,
    class_names: tuple[str, ...] | None = None,
    mark: str | None = None,
) -> Source:
    """A source with consistent parts: images of one shape, all labelled or none, and labels below K.

    `num_classes`: K if the format fixes it; otherwise it is one more than the highest training label. The
    other arguments: see `Source`.
    Raises UserError for differing shapes, a label of K or more, or labels in some parts only.
    """
    train = parts["train"]
    if train.labels is None:
        num_classes = None
    elif num_classes is None:
        num_classes = int(train.labels.max()) + 1
    for split, part in parts.items():
        if part.shape != train.shape:
            raise bad(name, f"{split} images have shape {part.shape}, train {train.shape}; make them equal")
        if (part.labels is None) != (train.labels is None):
            raise bad(name, f"only one of train and {split} has labels; give both or neither")
        if part.labels is not None and num_classes is not None and part.labels.max() >= num_classes:
            index = int(part.labels.argmax())
            raise bad(
                name,
                f"label {part.labels[index]} of {split} image {index} is out of range; "
                f"the {num_classes} training classes are 0 to {num_classes - 1}",
            )
    if num_classes is None:
        class_names = None
    return Source(str(name), parts, num_grey_levels, num_classes, kind, unread, encoded, class_names, mark)
