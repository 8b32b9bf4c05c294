"""Reads the rows of a part on all cores, in order."""

# n chosen images, C channels, H W pixels

import math
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from cdm_fast.data.order import Indices
from cdm_fast.data.pictures import Pixels
from cdm_fast.data.source import Rows
from cdm_fast.host.progress import ProgressBar
from cdm_fast.host.reading import check_size

_CHUNK_BYTES = 2**20  # of pixels that a thread reads at once
_CHUNK_IMAGES = 64


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_chunks(rows: Rows, indices: Indices, progress: ProgressBar) -> Iterator[Pixels]:
    """Yields the chosen images in order, in chunks (m,C,H,W) uint8; needs memory for a few chunks.

    Decoders and filters release Python's lock, so threads use all cores. Of several damaged pictures the
    first in order is reported.
    """
    size = max(1, min(_CHUNK_IMAGES, _CHUNK_BYTES // math.prod(rows.shape)))
    pending: deque[Future[Pixels]] = deque()
    pool = ThreadPoolExecutor(cores())
    try:
        for first in range(0, len(indices), size):
            pending.append(pool.submit(rows.read, indices[first : first + size]))
            if len(pending) > 3 * cores():
                yield _next(pending, progress)
        while pending:
            yield _next(pending, progress)
    finally:
        pool.shutdown(cancel_futures=True)


def _next(pending: deque[Future[Pixels]], progress: ProgressBar) -> Pixels:
    chunk = pending.popleft().result()
    progress.advance(len(chunk))
    return chunk


def read_into_memory(name: str, rows: Rows, indices: Indices) -> Pixels:
    """The chosen images, (n,C,H,W) uint8; UserError for more than fit into memory."""
    check_size(name, len(indices) * math.prod(rows.shape))
    out = np.empty((len(indices), *rows.shape), np.uint8)
    filled = 0
    with ProgressBar(f"reading {name}", len(indices), delay=2.0, every_process=True) as progress:
        for chunk in read_chunks(rows, indices, progress):
            out[filled : filled + len(chunk)] = chunk
            filled += len(chunk)
    return out
