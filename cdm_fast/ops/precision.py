"""In which precision the ops accumulate, and IEEE fp32 on GPUs."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

# (library, kind of operation). PyTorch's older switch `allow_tf32` cannot be read where conv and rnn differ.
_OPERATIONS = (("cuda", "conv"), ("cuda", "rnn"), ("cuda", "matmul"))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the ops compute with and accumulate values of `dtype`: fp32, or fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)


@contextmanager
def ieee_fp32() -> Iterator[None]:
    """Runs fp32 convolutions and matrix products in IEEE fp32, not TF32, on a GPU inside the block.

    PyTorch computes fp32 convolutions there in TF32 by default, with 10 bits of mantissa, which changes the
    single-pass log-likelihood of a digits network by 0.02 to 0.03 nats. Samplers, likelihoods,
    classification, training in any precision and exact layers already do this; a direct call of
    `model.log_prob` or `model.denoise` follows PyTorch's settings. Nothing else changes, and the settings are
    restored afterwards. On a CPU there is no effect; a compiled graph uses the settings in force where it is
    called.
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
