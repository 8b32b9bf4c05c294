"""The fused ops. Each exists as a plain-PyTorch reference and as kernels for several backends."""

from cdm_fast.ops._backend import set_backend, use_backend
from cdm_fast.ops.attention import attention, attention_vjp
from cdm_fast.ops.group_norm_silu import group_norm_silu, group_norm_silu_vjp

__all__ = [
    "attention",
    "attention_vjp",
    "group_norm_silu",
    "group_norm_silu_vjp",
    "set_backend",
    "use_backend",
]
