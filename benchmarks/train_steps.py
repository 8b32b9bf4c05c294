"""The training steps that `bench_train_step.py` compares, each a function of no arguments.

Run as a program, it measures one step's peak memory in a process of its own:

    python -m benchmarks.train_steps plain|adjoint-fp32|adjoint-bf16 [--small]
"""

import resource
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.plain_unet import PlainUNet, double_backward_loss
from cdm_fast import CDM, NoiseSchedule, UNet, cdm_loss

CIFAR10 = (32, 3, 1002, 128, (1, 2, 2, 2), 2, (16,))  # the paper's network, 33.4 M parameters
SMALL = (16, 3, 52, 32, (1, 2), 1, (8,))


class Batch:
    """One pinned batch for every variant: x0, eps, level, x_t and s_t."""

    def __init__(self, sizes: tuple, batch_size: int, schedule: NoiseSchedule) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (batch_size, sizes[1], sizes[0], sizes[0])
        self.x0 = torch.rand(shape, generator=generator) * 2 - 1
        self.eps = torch.randn(shape, generator=generator)
        self.level = torch.randint(1, schedule.T + 1, (batch_size,), generator=generator)
        a, self.s_t = schedule.gather(self.level, self.x0)
        self.x_t = a * self.x0 + self.s_t * self.eps


class Steps:
    """Loss and parameter gradients of one network, with the optimizer's share left out.

    Args:
        small: a tiny network instead of the 33.4 M one.
        batch_size: B.
    """

    def __init__(self, small: bool, batch_size: int) -> None:
        sizes = SMALL if small else CIFAR10
        self.schedule = NoiseSchedule.uniform(T=sizes[2] - 2)
        self.batch = Batch(sizes, batch_size, self.schedule)
        self.sizes = sizes

    def plain(self) -> Callable[[], Tensor]:
        """fp32, eager, denoiser by `autograd.grad(create_graph=True)`, materialised attention."""
        torch.manual_seed(0)
        network, batch = PlainUNet(*self.sizes), self.batch
        return gradient_step(
            network, lambda: double_backward_loss(network, batch.x_t, batch.eps, batch.s_t, batch.level)
        )

    def adjoint(self, dtype: torch.dtype) -> Callable[[], Tensor]:
        """The explicit adjoint, channels-last, in fp32 or under bf16 autocast."""
        torch.manual_seed(0)
        network, batch = UNet(*self.sizes), self.batch
        torch.manual_seed(0)
        network.load_state_dict(PlainUNet(*self.sizes).state_dict())
        model = CDM(network.to(memory_format=torch.channels_last), self.schedule)
        x0, eps = (x.to(memory_format=torch.channels_last) for x in (batch.x0, batch.eps))

        def loss() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                return cdm_loss(model, x0, batch.level, eps).loss

        return gradient_step(network, loss)


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
}


def peak_megabytes(variant: str, small: bool) -> float:
    """Growth of this process's peak resident memory while the variant is built and runs three steps."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = VARIANTS[variant](Steps(small, batch_size=8))
    for _ in range(3):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


if __name__ == "__main__":
    print(peak_megabytes(sys.argv[1], "--small" in sys.argv[2:]))
