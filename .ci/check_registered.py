"""Checks that the extension on PYTHONPATH registers every op for the CPU and for CUDA.

Run with Python's -P, so that the working directory's own package is not imported in its place.
"""

import torch

import cdm_fast.ops  # noqa: F401  (defines the ops)
from cdm_fast import _C

# On GPUs these run on Triton, compose other ops, or are plain PyTorch.
WITHOUT_CUDA = {
    "attention",
    "attention_vjp",
    "attention_vjp_backward",
    "from_noise_down",
    "level_logits",
    "swiglu_vjp_plus",
}

names = {
    name.removeprefix("cdm_fast::")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("cdm_fast::") and not name.endswith("_triton")
}
lacking = {
    key: sorted(
        name for name in names if not torch._C._dispatch_has_kernel_for_dispatch_key(f"cdm_fast::{name}", key)
    )
    for key in ("CPU", "CUDA")
}
print(f"{_C.__file__}: {_C.build_info()}")
print(f"torch {torch.__version__}, {len(names)} ops; without CUDA: {', '.join(lacking['CUDA'])}")
if not names or lacking["CPU"] or set(lacking["CUDA"]) - WITHOUT_CUDA or not _C.build_info()["cuda"]:
    raise SystemExit(f"ops that are not registered: {lacking}")
