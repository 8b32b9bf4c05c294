"""Where training images are stored, and how the images of a step reach the device.

The images of step n are a function of (seed, n), wherever they are stored.

# N images, B batch, C channels, H W pixels
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from cdm_fast.data import ImageData
from cdm_fast.data.copies import expect_random_reads
from cdm_fast.host.device import upload

SHARE_OF_DEVICE = 4  # a data set may take a quarter of a device's free memory


class HostFeed:
    """Images in host memory, or mapped from a file; a thread gathers each batch one step ahead of the device.

    images: (N,C,H,W) uint8; pin: use pinned memory for batches, from which a GPU copies asynchronously.
    """

    def __init__(self, images: Tensor, pin: bool) -> None:
        self._images, self._pin = images, pin
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feed")
        self._ahead: tuple[list[int], Future[Tensor]] | None = None

    def take(self, index: Tensor, following: Callable[[], Tensor]) -> Tensor:
        """The images of `index` (B,) in host memory; starts gathering those of `following()`."""
        wanted = index.tolist()
        ahead, self._ahead = self._ahead, None
        images = ahead[1].result() if ahead is not None and ahead[0] == wanted else self._gather(index)
        coming = following()
        self._ahead = coming.tolist(), self._thread.submit(self._gather, coming)
        return images

    def _gather(self, index: Tensor) -> Tensor:
        batch = self._images[index]
        return batch.pin_memory() if self._pin else batch


def on_device(data: ImageData, device: torch.device) -> ImageData:
    """The data where training reads them: on the device, if they take at most a quarter of its free memory.

    Larger data stay in host memory or in their file, and a thread gathers each step's images.
    """
    labels = None if data.labels is None else data.labels.to(device)
    if device.type == "cpu":
        expect_random_reads(data.images)
        return replace(data, labels=labels)
    free, _ = torch.cuda.mem_get_info(device)
    if data.images.numel() * SHARE_OF_DEVICE > free:
        expect_random_reads(data.images)
        return replace(data, labels=labels, feed=HostFeed(data.images, pin=device.type == "cuda"))
    return replace(data, images=data.images.to(device), labels=labels)


def images_of(data: ImageData, on_host: Tensor, index: Tensor, following: Callable[[], Tensor]) -> Tensor:
    """The images of a step, (B,C,H,W) uint8 on the device of `index`.

    on_host, index: (B,) their indices in `data`, on the host and on the device; following: returns `on_host`
    of the next step.
    """
    if data.feed is not None:
        return upload(data.feed.take(on_host, following), index.device)
    if data.images.device == index.device:
        return data.images[index]
    return upload(data.images[on_host], index.device)
