"""The models whose evaluations are timed: ours, our plain diffusion model, the paper's in its plain form."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.support.plain_unet import PlainUNet
from benchmarks.support.train_steps import CIFAR10, SMALL, trunk_options
from cdm_fast import CDM, DDM, NoiseSchedule, UNet, UNetDenoiser
from cdm_fast.model import Denoiser

CLASSES = 10


class Models:
    """One trunk, four ways, with the same random weights where they share them.

    Args:
        small: a tiny network instead of the paper's 33.4 M one.
        device: where they run.
    """

    def __init__(self, small: bool, device: torch.device) -> None:
        self.sizes, self.device = SMALL if small else CIFAR10, device
        self.schedule = NoiseSchedule.uniform(T=self.sizes[2] - 2)

    def plain(self) -> "PlainDenoiser":
        """fp32, eager, NCHW, denoiser by `autograd.grad`."""
        size, channels = self.sizes[:2]
        model = PlainDenoiser(self._plain_network(), self.schedule, (channels, size, size))
        return model.to(self.device)

    def cdm(self) -> CDM:
        """The library's, channels-last, with the plain network's weights."""
        network = self._unet()
        network.load_state_dict(self._plain_network().state_dict())
        return self._ready(CDM(network, self.schedule))

    def joint(self) -> CDM:
        """With a logit for every (level, class) pair."""
        torch.manual_seed(0)
        return self._ready(CDM(self._unet(num_classes=CLASSES, conditioning="joint"), self.schedule))

    def ddm(self) -> DDM:
        """The plain diffusion model on the same trunk."""
        torch.manual_seed(0)
        network = UNetDenoiser(*self.sizes[:2], **trunk_options(self.sizes))
        return self._ready(DDM(network, self.schedule))

    def images(self, num: int) -> Tensor:
        """(num, C, H, W) of N(0, I), channels-last."""
        size, channels = self.sizes[:2]
        x = torch.randn(num, channels, size, size, generator=torch.Generator().manual_seed(1))
        return x.to(self.device).contiguous(memory_format=torch.channels_last)

    def _unet(self, **classes) -> UNet:
        return UNet(*self.sizes[:3], **trunk_options(self.sizes), **classes)

    def _plain_network(self) -> PlainUNet:
        torch.manual_seed(0)
        return PlainUNet(*self.sizes)

    def _ready(self, model):
        return model.to(self.device).to(memory_format=torch.channels_last).eval()


class PlainDenoiser(Denoiser):
    """Thm 3.1 with autograd, as anyone would write it: what our samplers drive for comparison."""

    def denoise(self, x: Tensor, level: int | Tensor, label: Tensor | None = None) -> Tensor:
        level = self.schedule.levels(level, x)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            logits = self.network(x)
            ratio = logits[:, -1] - logits.gather(1, level[:, None])[:, 0]
            (grad_x,) = torch.autograd.grad(ratio.sum(), x)
        return self.amplitudes(level, x)[1] * (grad_x + x.detach())


def without_gradients(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same call where nothing is differentiated."""

    def run() -> Tensor:
        with torch.no_grad():
            return function()

    return run
