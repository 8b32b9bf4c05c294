"""The arithmetic that a method asks for, and the rate at which this device does it."""

import time

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.support.plain_unet import PlainUNet

CHANNELS, SIZE, ROUNDS = 256, 32, 7


def forward_flops(sizes: tuple) -> float:
    """Multiplications and additions of one image's forward pass through the plain network."""
    with torch.device("meta"):
        network, x = PlainUNet(*sizes), torch.empty(1, sizes[1], sizes[0], sizes[0])
    with FlopCounterMode(display=False) as counter:
        network(x)
    return float(counter.get_total_flops())


def convolution_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Multiplications and additions per second of one 3x3 convolution: the best of a few calls."""
    batch = 8 if device.type == "cpu" else 128
    x = torch.randn(batch, CHANNELS, SIZE, SIZE, device=device, dtype=dtype)
    weight = torch.randn(CHANNELS, CHANNELS, 3, 3, device=device, dtype=dtype)
    x, weight = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, weight))
    best = float("inf")
    for _ in range(ROUNDS):
        _wait(device)
        began = time.perf_counter()
        F.conv2d(x, weight, padding=1)
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * 9 * CHANNELS**2 * batch * SIZE**2 / best


def share(
    figures: dict, passes: int, images: int, sizes: tuple, dtype: torch.dtype, device: torch.device
) -> None:
    """Adds `share_of_convolution` to the figures of `compare`: how near the candidate is to its arithmetic.

    passes: forward passes' worth of arithmetic per image: 6 for a CDM step, 3 DDM step, 2 evaluation, 1 NLL.
    """
    if "candidate_ms" not in figures:
        return
    least_ms = 1e3 * passes * images * forward_flops(sizes) / convolution_rate(dtype, device)
    figures["share_of_convolution"] = least_ms / figures["candidate_ms"]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
