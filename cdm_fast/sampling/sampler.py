"""What all samplers share: what `sample` asks of one, and what a callback is told.

# B batch
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cdm_fast.errors import UserError
from cdm_fast.model import Denoiser
from cdm_fast.model.schedule import Spacing

Noise = Callable[[], Tensor]  # each call: fresh N(0, I) of the batch's shape


class BatchNoise(Protocol):
    """Noise of a batch of images (`ImageNoise`): normals by a call, uniforms, and a generator."""

    def __call__(self) -> Tensor:
        """(B, ...) N(0, I)."""

    def uniform(self) -> Tensor:
        """(B,) float64 in (0, 1)."""

    def generator(self) -> torch.Generator:
        """For draws that concern the batch as a whole."""


@dataclass(frozen=True)
class Moves:
    """Metropolis-adjusted moves of a batch at one level.

    Fields:
        accepted: (B,) float64, the share of each image's moves that was accepted.
        count: moves of each image.
        leapfrog: steps of each move.
        step_size: h of each step, in units of x squared.
    """

    accepted: Tensor
    count: int
    leapfrog: int
    step_size: float


@dataclass(frozen=True)
class Step:
    """Where a sampler has arrived, as a callback is told after every step.

    Fields:
        level: t, 0 at the end.
        x: (B, ...) images at that level; of the batch in hand, which belongs to this process.
        moves: what a corrected sampler did at the level before it told, None where there were no moves.
    """

    level: int
    x: Tensor
    moves: Moves | None = None


Callback = Callable[[Step], None]


class Run(Protocol):
    """One batch from noise to images: the loop of an algorithm with its options set."""

    def __call__(
        self,
        model: Denoiser,
        x: Tensor,
        noise: BatchNoise,
        grid: Sequence[int],
        label: Tensor | None = None,
        /,
        *,
        callback: Callback | None = None,
    ) -> Tensor:
        """x (B, ...) at level `grid[0]`, label (B,) int64 -> (B, ...) at level 0."""


class Sampler:
    """A sampling algorithm with its options, as `sample` takes it; `SAMPLERS` has the defaults by name.

    Attributes:
        name: the key in `SAMPLERS`, and what messages call it.
        spacing: how its levels are spread where only their number is given.
        compares_densities: whether it compares values of `log p_t`, for which bf16 is too coarse.
    """

    name: str
    spacing: Spacing = "level"
    compares_densities: bool = False

    def prepare(
        self,
        model: Denoiser,
        grid: Sequence[int],  # levels from T to 0
        shape: tuple[int, ...],  # of one image
        label: Tensor | None,  # (N,) int64, of all images to come
    ) -> Run:
        """The loop, ready for batches. Raises UserError for a model that it cannot sample."""
        raise NotImplementedError


def check_range(name: str, value: int, lowest: int, bits: int) -> None:
    """UserError unless `value` is an integer from `lowest` to `2^bits - 1`."""
    if not lowest <= value < 2**bits:
        raise UserError(f"{name} is {value}: it must be an integer from {lowest} to 2^{bits} - 1")
