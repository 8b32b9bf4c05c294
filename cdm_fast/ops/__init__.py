"""The ops: each has a plain-PyTorch reference, and most have kernels for several backends."""

from cdm_fast.ops.attention import attention, attention_vjp
from cdm_fast.ops.backend import set_backend, use_attention_method, use_backend
from cdm_fast.ops.denoise import denoise_epilogue, denoise_loss, denoise_x0, head_cotangent
from cdm_fast.ops.from_noise_down import from_noise_down
from cdm_fast.ops.group_norm_silu import group_norm_silu, group_norm_silu_vjp
from cdm_fast.ops.head_noise_level_ce import head_noise_level_ce
from cdm_fast.ops.linear import linear
from cdm_fast.ops.noise_level_ce import level_logits, noise_level_ce
from cdm_fast.ops.noising import noising
from cdm_fast.ops.rms_norm import rms_norm, rms_norm_vjp
from cdm_fast.ops.swiglu import swiglu, swiglu_vjp, swiglu_with_input

__all__ = [
    "attention",
    "attention_vjp",
    "denoise_epilogue",
    "denoise_loss",
    "denoise_x0",
    "from_noise_down",
    "group_norm_silu",
    "group_norm_silu_vjp",
    "head_cotangent",
    "head_noise_level_ce",
    "level_logits",
    "linear",
    "noise_level_ce",
    "noising",
    "rms_norm",
    "rms_norm_vjp",
    "set_backend",
    "swiglu",
    "swiglu_vjp",
    "swiglu_with_input",
    "use_attention_method",
    "use_backend",
]
