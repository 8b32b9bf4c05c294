"""The interfaces between `sample` and the samplers, and between samplers and callbacks.

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

Noise = Callable[[], Tensor]  # each call returns new N(0, I) noise of the batch's shape


class BatchNoise(Protocol):
    """Random numbers for a batch of images (`ImageNoise`): normal, uniform, and a generator."""

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
        accepted: (B,) float64, the fraction of each image's moves that were accepted.
        count: moves per image.
        leapfrog: leapfrog steps per move.
        step_size: h of each step, in units of x squared.
    """

    accepted: Tensor
    count: int
    leapfrog: int
    step_size: float


@dataclass(frozen=True)
class Step:
    """The state of a sampler after a step, as its callback receives it.

    Plain samplers report each level that they reach. Corrected samplers report each level after its moves,
    and level 0.

    Fields:
        level: t; 0 at the end.
        x: (B, ...) images of the current batch at that level.
        moves: the moves of a corrected sampler at that level; None for other samplers, and at level 0.
    """

    level: int
    x: Tensor
    moves: Moves | None = None


Callback = Callable[[Step], None]


class Run(Protocol):
    """The loop of a sampler with its options set: one batch from noise to images."""

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
    """The base of all samplers: an algorithm with its options, as `sample` takes it.

    `SAMPLERS` maps names to samplers with default options. Subclass this for a sampler of your own.

    Attributes:
        name: its key in `SAMPLERS`, used in messages.
        spacing: spacing of the levels if only their number is given, see `NoiseSchedule.grid`.
        compares_densities: True if it compares values of `log p_t`, for which bf16 is too coarse.
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
        """The loop that draws each batch. Raises UserError for a model that does not suit the sampler."""
        raise NotImplementedError


def check_range(name: str, value: int, lowest: int, bits: int) -> None:
    """UserError unless `value` is an integer from `lowest` to `2^bits - 1`."""
    if not lowest <= value < 2**bits:
        raise UserError(f"{name} is {value}: it must be an integer from {lowest} to 2^{bits} - 1")
