"""Classification Diffusion Models: train, sample, and compute log p(x) in one forward pass.

Names are imported on first use, so that `import cdm_fast` and `cdm-fast --help` do not load torch.

>>> import torch
>>> from cdm_fast import CDM, MLP, NoiseSchedule, cdm_loss, sample
>>> schedule = NoiseSchedule.uniform(T=20)
>>> model = CDM(MLP(2, schedule.num_levels, hidden=32, depth=2), schedule)
>>> cdm_loss(model, torch.randn(64, 2)).loss.backward()  # cross-entropy over levels + denoising error
>>> model.log_prob(torch.zeros(3, 2)).shape  # nats, from one forward pass
torch.Size([3])
>>> sample(model, 5, sampler="ddim", steps=10).shape
torch.Size([5, 2])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cdm_fast.errors import UserError as UserError
    from cdm_fast.model import CDM as CDM
    from cdm_fast.model import DDM as DDM
    from cdm_fast.model.losses import cdm_loss as cdm_loss
    from cdm_fast.model.losses import ddm_loss as ddm_loss
    from cdm_fast.model.schedule import NoiseSchedule as NoiseSchedule
    from cdm_fast.nn import MLP as MLP
    from cdm_fast.nn import Encoder as Encoder
    from cdm_fast.nn import MLPDenoiser as MLPDenoiser
    from cdm_fast.nn import Transformer as Transformer
    from cdm_fast.nn import UNet as UNet
    from cdm_fast.nn import UNetDenoiser as UNetDenoiser
    from cdm_fast.ops import use_backend as use_backend
    from cdm_fast.ops.precision import ieee_fp32 as ieee_fp32
    from cdm_fast.runs.load import load as load
    from cdm_fast.sampling.sample import sample as sample
    from cdm_fast.tables import CDMDensity as CDMDensity
    from cdm_fast.tables import DensityRatio as DensityRatio
    from cdm_fast.tables import MutualInformation as MutualInformation
    from cdm_fast.tables import log_density_ratio as log_density_ratio

_HOME = {
    "CDM": "cdm_fast.model",
    "CDMDensity": "cdm_fast.tables",
    "DDM": "cdm_fast.model",
    "DensityRatio": "cdm_fast.tables",
    "MLP": "cdm_fast.nn",
    "MLPDenoiser": "cdm_fast.nn",
    "MutualInformation": "cdm_fast.tables",
    "NoiseSchedule": "cdm_fast.model.schedule",
    "Encoder": "cdm_fast.nn",
    "Transformer": "cdm_fast.nn",
    "UNet": "cdm_fast.nn",
    "UNetDenoiser": "cdm_fast.nn",
    "UserError": "cdm_fast.errors",
    "cdm_loss": "cdm_fast.model.losses",
    "ddm_loss": "cdm_fast.model.losses",
    "ieee_fp32": "cdm_fast.ops.precision",
    "load": "cdm_fast.runs.load",
    "log_density_ratio": "cdm_fast.tables",
    "sample": "cdm_fast.sampling.sample",
    "use_backend": "cdm_fast.ops",
}

__version__ = "0.1.0"
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'cdm_fast' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
