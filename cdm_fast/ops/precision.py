"""The precision in which the ops accumulate, bf16 hardware, and IEEE fp32 on GPUs."""

import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# (library, kind of operation). PyTorch's older switch `allow_tf32` cannot be read where conv and rnn differ.
_OPERATIONS = (("cuda", "conv"), ("cuda", "rnn"), ("cuda", "matmul"))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the ops compute with and accumulate values of `dtype`: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


def multiplies_bf16(device: torch.device) -> bool:
    """Whether the hardware has instructions for products of bf16: on a CPU AMX or AVX-512 BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def warn_of_emulation(device: torch.device, precision: str) -> None:
    """Warns if the precision asked for is bf16 and a GPU or an x86 CPU has no instructions for it."""
    known = device.type == "cuda" or device.type == "cpu" and platform.machine() == "x86_64"
    if precision == "bf16" and known and not multiplies_bf16(device):
        warnings.warn(
            f"this {'GPU' if device.type == 'cuda' else 'CPU'} has no bf16 instructions: products in bf16 are"
            " emulated, which can take many times as long as fp32; leave the precision to its default",
            stacklevel=3,
        )


@contextmanager
def ieee_fp32() -> Iterator[None]:
    """Runs fp32 convolutions and matrix products in IEEE fp32, not TF32, on a GPU inside the block.

    By default PyTorch computes fp32 convolutions on a GPU in TF32, with 10 bits of mantissa, which changes
    the single-pass log-likelihood of a digits network by 0.02 to 0.03 nats. Samplers, likelihoods,
    classification, training in any precision and exact layers use this context already; a direct call of
    `model.log_prob` or `model.denoise` follows PyTorch's settings. The settings are restored afterwards.
    There is no effect on a CPU; a compiled graph uses the settings at the time of the call.
    """
    if torch.compiler.is_compiling():
        yield
        return
    before = [torch._C._get_fp32_precision_getter(*operation) for operation in _OPERATIONS]
    try:
        for operation in _OPERATIONS:
            torch._C._set_fp32_precision_setter(*operation, "ieee")
        yield
    finally:
        for operation, precision in zip(_OPERATIONS, before, strict=True):
            torch._C._set_fp32_precision_setter(*operation, precision)
