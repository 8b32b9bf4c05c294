"""Settings that depend on the machine and change results only by rounding: precision and compilation.

Legend: B batch, C channels.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_fast.config import Compile, Precision, RunConfig
from cdm_fast.config.size import patch_grid
from cdm_fast.model import Denoiser
from cdm_fast.nn import AdjointNetwork
from cdm_fast.ops import linear
from cdm_fast.ops.precision import multiplies_bf16, warn_of_emulation

Function = TypeVar("Function", bound=Callable[..., Any])

_CHECK_IMAGES = 32  # images in the measurement: a few milliseconds of work
_CHECK_ROUNDS = 5


def pick_precision(config: RunConfig, device: torch.device) -> Precision:
    """The run's precision, with "auto" resolved.

    Hardware without bf16 instructions: fp32. A GPU with them: bf16. A CPU with them: bf16 if a product of the
    network, with its gradients, is measured to be faster. Warns where the run asks for bf16 all the same.
    """
    if config.train.precision != "auto":
        warn_of_emulation(device, config.train.precision)
        return config.train.precision
    if not multiplies_bf16(device):
        return "fp32"
    if device.type == "cuda":
        return "bf16"
    seconds = {dtype: product_seconds(config, dtype, device) for dtype in (torch.bfloat16, torch.float32)}
    return "bf16" if seconds[torch.bfloat16] < seconds[torch.float32] else "fp32"


def product_seconds(config: RunConfig, dtype: torch.dtype, device: torch.device) -> float:
    """Shortest time in seconds of the network's most frequent product, forward and backward.

    It is a 3x3 convolution at full resolution, or in a transformer a matrix that all tokens pass.
    """
    product, x, weight = _product(config, dtype, device)
    g = torch.zeros_like(product(x, weight))
    best = float("inf")
    for _ in range(_CHECK_ROUNDS):
        began = time.perf_counter()
        torch.autograd.grad(product(x, weight), (x, weight), g)
        best = min(best, time.perf_counter() - began)
    return best


def _product(
    config: RunConfig, dtype: torch.dtype, device: torch.device
) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor]:
    """The product, and an input and a weight of zeros."""
    network, batch = config.network, min(config.train.batch_size, _CHECK_IMAGES)
    zeros = partial(torch.zeros, dtype=dtype, device=device)
    if network.architecture == "transformer":
        rows, columns = patch_grid(config.image.sides, network.patch_size)
        width = network.width
        x, weight = zeros(batch, rows * columns, width), zeros(width, width)
        return linear, x.requires_grad_(), weight.requires_grad_()
    channels = network.base_channels
    image = zeros(batch, channels, *config.image.sides).contiguous(memory_format=torch.channels_last)
    kernel = zeros(channels, channels, 3, 3)
    return partial(F.conv2d, padding=1), image.requires_grad_(), kernel.requires_grad_()


def compiled(function: Function, mode: Compile, device: torch.device) -> Function:
    """`function` compiled by torch.compile as one graph; `function` itself for "off".

    mode: "auto" is "default" on a GPU and "off" on a CPU, where compiling takes minutes and gains little.
            "reduce-overhead" also records CUDA graphs, for small batches whose time is spent on launches.
    """
    if mode == "auto":
        mode = "default" if device.type == "cuda" else "off"
    if mode == "off":
        return function
    return cast(Function, torch.compile(function, fullgraph=True, mode=mode))


def compile_network(model: Denoiser, mode: Compile) -> None:
    """Compiles the network of a model and its input gradient, which samplers and likelihoods call."""
    network, device = model.network, model.a.device
    network.forward = compiled(network.forward, mode, device)
    if isinstance(network, AdjointNetwork):
        network.ratio_gradient = compiled(network.ratio_gradient, mode, device)  # type: ignore[method-assign]
