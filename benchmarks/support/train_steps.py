"""The training steps that `bench_train_step.py` compares, each a function of no arguments.

Run as a program, it measures one step's peak memory in a process of its own:

    python -m benchmarks.support.train_steps VARIANT cpu|cuda [--small]
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.support.memory import peak_resident_mib
from benchmarks.support.plain_unet import PlainUNet, double_backward_loss
from benchmarks.support.timing import seconds_per_call
from cdm_fast import CDM, DDM, NoiseSchedule, UNet, UNetDenoiser, cdm_loss, ddm_loss
from cdm_fast.config import PRESETS, Compile, ImageShape, Precision, RunConfig
from cdm_fast.data import ImageData
from cdm_fast.model.losses import Noised, draw_other_classes
from cdm_fast.runs.build import build_model
from cdm_fast.training.state import new_state
from cdm_fast.training.step import accumulate_gradient, draw_batch, make_loss, training_step
from cdm_fast.training.tuning import compiled, pick_precision

CIFAR10 = (32, 3, 1002, 128, (1, 2, 2, 2), 2, (16,))  # the paper's network, 33.4 M parameters
SMALL = (16, 3, 52, 32, (1, 2), 1, (8,))
BATCH_SIZE = {"cpu": 8, "cuda": 128}  # the paper's on a GPU
PRESET = {"cpu": "fashion-mnist", "cuda": "cifar10"}


def trunk_options(sizes: tuple) -> dict[str, Any]:
    """Of `CIFAR10` or another tuple like it, what networks take by keyword."""
    names = ("base_channels", "multipliers", "blocks_per_level", "attention_resolutions")
    return dict(zip(names, sizes[3:], strict=True))


class Batch:
    """One pinned batch for every variant: x0, eps, level, x_t and s_t, drawn on the CPU for any device."""

    def __init__(self, sizes: tuple, device: torch.device, schedule: NoiseSchedule, batch_size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (batch_size, sizes[1], sizes[0], sizes[0])
        self.x0 = torch.rand(shape, generator=generator) * 2 - 1
        self.eps = torch.randn(shape, generator=generator)
        self.level = torch.randint(1, schedule.T + 1, (batch_size,), generator=generator)
        _, s_t = schedule.amplitudes(self.level, self.x0)
        x_t = schedule.noise(self.x0, self.level, self.eps)
        self.x0, self.eps, self.level = (x.to(device) for x in (self.x0, self.eps, self.level))
        self.x_t, self.s_t = x_t.to(device), s_t.to(device)


def one_step(config: RunConfig, batch_size: int | None = None) -> Callable[[], Tensor]:
    """A call that computes loss and gradient of a run for one batch of noise, on the CPU."""
    torch.manual_seed(0)
    model = build_model(config).to(memory_format=torch.channels_last)
    precision, size = pick_precision(config, torch.device("cpu")), batch_size or config.train.batch_size
    x = torch.randn(size, *config.image.shape).contiguous(memory_format=torch.channels_last)
    level = torch.arange(size) % model.schedule.num_levels
    classes = None if config.network.conditioning == "none" else config.image.num_classes
    label = None if classes is None else level % classes
    other = draw_other_classes(model, label, config.train.class_weight)
    batch, loss = Noised(x, torch.randn_like(x), level, label, other=other), make_loss(config.train)

    def step() -> torch.Tensor:
        model.zero_grad()
        return accumulate_gradient(model, batch, loss, precision=precision)

    return step


class Steps:
    """Loss and parameter gradients of one network, with the optimizer's share left out.

    Args:
        small: a tiny network instead of the 33.4 M one.
        device: where it runs.
        sizes: another network.
        batch_size: images at a time; by default `BATCH_SIZE`.
    """

    def __init__(
        self,
        small: bool,
        device: torch.device,
        sizes: tuple | None = None,
        batch_size: int | None = None,
    ) -> None:
        sizes = sizes or (SMALL if small else CIFAR10)
        self.schedule = NoiseSchedule.uniform(T=sizes[2] - 2)
        self.batch = Batch(sizes, device, self.schedule, batch_size or BATCH_SIZE[device.type])
        self.sizes, self.device = sizes, device

    def plain(self) -> Callable[[], Tensor]:
        """fp32, eager, denoiser by `autograd.grad(create_graph=True)`, materialised attention."""
        torch.manual_seed(0)
        network, batch = PlainUNet(*self.sizes).to(self.device), self.batch
        return gradient_step(
            network, lambda: double_backward_loss(network, batch.x_t, batch.eps, batch.s_t, batch.level)
        )

    def adjoint(
        self, dtype: torch.dtype, recompute: bool = False, compile: Compile = "off"
    ) -> Callable[[], Tensor]:
        """The explicit adjoint, channels-last, in fp32 or under bf16 autocast."""
        torch.manual_seed(0)
        network, batch = UNet(*self.sizes[:3], **trunk_options(self.sizes)), self.batch
        torch.manual_seed(0)
        network.load_state_dict(PlainUNet(*self.sizes).state_dict())
        network = network.to(memory_format=torch.channels_last)
        network.recompute = recompute
        model = CDM(network, self.schedule).to(self.device)
        x0, eps = (x.to(memory_format=torch.channels_last) for x in (batch.x0, batch.eps))

        loss_function = compiled(cdm_loss, compile, self.device)

        def loss() -> Tensor:
            with autocast(self.device, dtype):
                return loss_function(model, x0, batch.level, eps).loss

        return gradient_step(network, loss)

    def ddm(self, dtype: torch.dtype) -> Callable[[], Tensor]:
        """A plain diffusion model on the same trunk, tuned as `adjoint` is: half of its multiplications."""
        torch.manual_seed(0)
        network = UNetDenoiser(*self.sizes[:2], **trunk_options(self.sizes))
        network = network.to(memory_format=torch.channels_last)
        model, batch = DDM(network, self.schedule).to(self.device), self.batch
        x0, eps = (x.to(memory_format=torch.channels_last) for x in (batch.x0, batch.eps))

        def loss() -> Tensor:
            with autocast(self.device, dtype):
                return ddm_loss(model, x0, batch.level, eps).loss

        return gradient_step(network, loss)


class WholeStep:
    """The step of a preset from the data on: batch, loss, gradient, optimizer, average.

    Args:
        small: a tiny network instead of the preset's.
        device: where it runs; the preset is `fashion-mnist` on a CPU, `cifar10` on a GPU.
        precision: of the network; by default what `--precision auto` picks.
        compile: torch.compile of the loss.
        config: another run's.
    """

    def __init__(
        self,
        small: bool,
        device: torch.device,
        precision: Precision = "auto",
        compile: Compile = "auto",
        config: RunConfig | None = None,
    ) -> None:
        config = config or (_tiny() if small else PRESETS[PRESET[device.type]])
        config = replace(config, train=replace(config.train, precision=precision))
        precision = pick_precision(config, device)
        self.config = replace(config, train=replace(config.train, precision=precision))
        image = config.image
        pixels = (4096, *image.shape)
        images = torch.randint(image.num_grey_levels, pixels, dtype=torch.uint8, device=device)
        labels = None if image.num_classes is None else torch.arange(4096, device=device) % image.num_classes
        self.data = ImageData(images, labels, image.num_grey_levels, image.num_classes, "random", "train")
        self.state = new_state(self.config, device)
        self.loss = compiled(make_loss(config.train), compile, device)
        self.shape = (config.train.batch_size, *pixels[1:])
        self._numbers = count()

    def draw(self) -> Noised:
        """The next batch."""
        return draw_batch(self.data, self.state.model, self.config, next(self._numbers))

    def step_on(self, batch: Noised) -> Tensor:
        """A step on a batch that lies ready; its loss."""
        state, train = self.state, self.config.train
        return training_step(
            state.model,
            state.optimizer,
            state.ema,
            batch,
            self.loss,
            clip_norm=train.clip_norm,
            precision=train.precision,
        ).loss

    def step(self) -> Tensor:
        """A step on the next batch; its loss."""
        return self.step_on(self.draw())


def step_seconds(configs: dict[str, RunConfig], rounds: int = 9) -> dict[str, float]:
    """Median seconds of a whole step of each run on the CPU, timed in turns."""
    device = torch.device("cpu")
    runs = {name: WholeStep(False, device, config=config) for name, config in configs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(rounds + 1):
        for name, run in runs.items():
            seconds = seconds_per_call(run.step, 1, device)
            if repeat:  # the first step also builds what later ones reuse
                times[name].append(seconds)
    return {name: statistics.median(found) for name, found in times.items()}


def _tiny() -> RunConfig:
    digits = PRESETS["digits"]
    return replace(
        digits,
        image=ImageShape(8, 8, 1, 17, None),
        network=replace(digits.network, conditioning="none"),
        train=replace(digits.train, batch_size=8),
    )


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """What the library's `--precision` does: bf16 by autocast, fp32 as it is."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def gradient_step(network: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A step that returns the whole parameter gradient as one vector, ordered by name."""

    def step() -> Tensor:
        network.zero_grad(set_to_none=True)
        loss().backward()
        return torch.cat([p.grad.flatten() for _, p in sorted(network.named_parameters())])

    return step


VARIANTS: dict[str, Callable[[Steps], Callable[[], Tensor]]] = {
    "plain": Steps.plain,
    "adjoint-fp32": lambda steps: steps.adjoint(torch.float32),
    "adjoint-bf16": lambda steps: steps.adjoint(torch.bfloat16),
    "recompute-bf16": lambda steps: steps.adjoint(torch.bfloat16, recompute=True),
    "ddm-fp32": lambda steps: steps.ddm(torch.float32),
    "ddm-bf16": lambda steps: steps.ddm(torch.bfloat16),
}


def peak_mib(variant: str, small: bool, device: torch.device) -> float:
    """Memory by which building the variant and three steps of it raise the peak, in MiB (CPU: resident)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    before = _peak_so_far(device)
    step = VARIANTS[variant](Steps(small, device))
    for _ in range(3):
        step()
    return _peak_so_far(device) - before


def _peak_so_far(device: torch.device) -> float:
    """Peak of this process in MiB: resident, or allocated on the GPU since the last reset."""
    if device.type == "cpu":
        return peak_resident_mib()
    return torch.cuda.max_memory_allocated() / 2**20


if __name__ == "__main__":
    print(peak_mib(sys.argv[1], "--small" in sys.argv[3:], torch.device(sys.argv[2])))
