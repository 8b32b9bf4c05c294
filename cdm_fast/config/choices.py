"""Options with named values that the command line and the library share."""

from typing import Literal

Architecture = Literal["unet", "encoder", "transformer"]
CorrectedSampler = Literal["mala", "smc"]
Split = Literal["train", "validation", "test"]
Parallel = Literal["ddp", "fsdp"]
AttackName = Literal[
    "fgsm", "pgd", "deepfool", "cw", "square", "apgd-ce", "apgd-t", "apgd-undetected", "auto"
]
AttackNorm = Literal["linf", "l2"]
RestoreTask = Literal["inpaint", "denoise", "super-resolution"]
ClassifyMethod = Literal["joint", "embedding", "denoising", "ode", "discriminative"]
Sampler = Literal["auto", "ddpm", "ddim", "dpm_solver_pp_2m", "heun", "euler_ot", "blind"]
Objective = Literal["cdm", "ddm", "classifier"]
Precision = Literal["auto", "fp32", "bf16"]
Given = Literal["label", "none", "all"]  # an image's own label, no label, all classes together
Compile = Literal["auto", "off", "default", "reduce-overhead"]
Resample = Literal["bicubic", "bilinear", "lanczos", "box"]

PARTICLES = 128  # per walk that measures log Z
