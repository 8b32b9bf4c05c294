"""The trunk of the networks: stages of residual blocks, the downsampling path and the middle.

Parameter names are those of the paper's public checkpoints.

# B batch, C channels, H W pixels, K classes, E embedding width
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple, TypedDict, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cdm_fast.config.size import (
    ImageSize,
    Sides,
    attended,
    nearest_divisible,
    plain_size,
    resolutions,
    sides_of,
    size_text,
)
from cdm_fast.errors import UserError
from cdm_fast.nn.blocks import AttentionBlock, Block, ResnetBlock
from cdm_fast.nn.embedding import Embedding, class_index, sinusoids
from cdm_fast.nn.layers import Conv2d, Layer, run_adjoint
from cdm_fast.nn.resample import Downsample, Upsample
from cdm_fast.ops.backend import under_this_selection


class Resolution(nn.Module):
    """The blocks of one resolution on one side of the U-Net, their attention blocks, and the resampling."""

    def __init__(self, blocks: list[ResnetBlock], attentions: list[AttentionBlock]) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.attn = nn.ModuleList(attentions)
        self.downsample: Downsample | None = None
        self.upsample: Upsample | None = None

    def stages(self) -> list[list[Layer]]:
        """Each residual block with its attention block, if this resolution has attention."""
        stages = (
            [list(stage) for stage in zip(self.block, self.attn, strict=True)]
            if self.attn
            else [[block] for block in self.block]
        )
        return cast(list[list[Layer]], stages)


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, channels: int, num_groups: int, dropout: float, embedding_width: int | None) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, num_groups, dropout, embedding_width)
        self.attn_1 = AttentionBlock(channels, num_groups)
        self.block_2 = ResnetBlock(channels, channels, num_groups, dropout, embedding_width)

    def layers(self) -> list[Layer]:
        return [self.block_1, self.attn_1, self.block_2]


class StageInputs(NamedTuple):
    """The inputs of one stage."""

    x: Tensor  # (B, C, H, W)
    embedding: Tensor | None  # (B, E), for the blocks
    skip: Tensor | None  # (B, C2, H, W), for the first layer of a stage of the upsampling path
    seeds: Tensor | None  # (blocks, 3) int64, of the dropout masks


class Stage:
    """Consecutive layers between two uses of the skip connections.

    Args:
        layers: the layers in order; the first takes the skip connection, if there is one.
        recompute: keep only the inputs, and recompute everything else when it is needed.
    """

    def __init__(self, layers: Sequence[Layer], recompute: bool = False) -> None:
        self.layers = layers
        self.num_blocks = sum(isinstance(layer, Block) for layer in layers)
        self.recompute = recompute and self.num_blocks > 0

    def run(self, inputs: StageInputs) -> tuple[Tensor, Any]:
        """The output, and what `adjoint` needs."""
        if not self.recompute:
            return self._run(inputs)
        return checkpointed(lambda *inputs: self._run(StageInputs(*inputs))[0], *inputs), inputs

    def adjoint(self, kept: Any, g: Tensor) -> Any:
        """Gradient with respect to `x`; with a skip connection, gradients with respect to `x` and `skip`."""
        if not self.recompute:
            return run_adjoint(self.layers, kept, g)

        def adjoint(g: Tensor, *inputs: Any) -> Any:
            return run_adjoint(self.layers, self._run(StageInputs(*inputs))[1], g)

        return checkpointed(adjoint, g, *kept)

    def _run(self, inputs: StageInputs) -> tuple[Tensor, list[Any]]:
        x, embedding, skip, seeds = inputs
        seed = iter(() if seeds is None else seeds)
        residuals = []
        for layer in self.layers:
            if isinstance(layer, Block):
                joined = {} if skip is None else {"skip": skip}
                x, kept = layer(x, embedding, seed=next(seed, None), **joined)
                skip = None
            else:
                x, kept = layer(x)
            residuals.append(kept)
        return x, residuals


def checkpointed(function: Callable[..., Any], *inputs: Any) -> Any:
    """`function(*inputs)`, for which autograd keeps only the inputs. The function must not be random."""
    if not torch.compiler.is_compiling():  # a compiled graph holds the choice already
        function = under_this_selection(function)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class TrunkOptions(TypedDict, total=False):
    """The optional fields of `TrunkShape`, which the networks take by keyword."""

    base_channels: int
    multipliers: Sequence[int]
    blocks_per_level: int
    attention_resolutions: Sequence[int | float]
    dropout: float
    num_groups: int


@dataclass(frozen=True)
class TrunkShape:
    """The sizes of a trunk; the defaults are those of the paper's CIFAR-10 network.

    Args:
        image_size: H = W, or (H, W); divisible by 2 once per resolution after the first. A side of 1 stays.
        channels: C of the image.
        base_channels: width at full resolution; divisible by `num_groups`.
        multipliers: width of each resolution in units of `base_channels`.
        blocks_per_level: residual blocks per resolution of the downsampling path.
        attention_resolutions: where every block is followed by attention (the middle always is): heights H,
            as int (widths for images of one row), or shares of the full size, as float.
        dropout: probability of zeroing an activation in every residual block, in [0, 1).
        num_groups: G of every GroupNorm.

    Raises:
        UserError: a size that the resolutions cannot divide, or widths that the groups cannot.
    """

    image_size: ImageSize
    channels: int
    base_channels: int = 128
    multipliers: Sequence[int] = (1, 2, 2, 2)
    blocks_per_level: int = 2
    attention_resolutions: Sequence[int | float] = (16,)
    dropout: float = 0.0
    num_groups: int = 32

    def __post_init__(self) -> None:
        halvings = len(self.multipliers) - 1
        if halvings < 0:
            raise UserError(
                "multipliers is empty: give one width multiplier per resolution, such as (1, 2, 2)"
            )
        if min(self.sides) < 1 or resolutions(self.sides, halvings) is None:
            fits = size_text(plain_size(nearest_divisible(self.sides, halvings)))
            raise UserError(
                f"image size {size_text(self.image_size)} cannot be halved {halvings} times, as "
                f"{halvings + 1} multipliers ask: use a multiple of {2**halvings}, such as {fits}, or fewer "
                "multipliers"
            )
        if self.base_channels % self.num_groups:
            raise UserError(
                f"base_channels {self.base_channels} is not a multiple of num_groups {self.num_groups}; "
                "change one"
            )

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return self.channels, *self.sides

    @property
    def sides(self) -> Sides:
        """(H, W) of one image."""
        return sides_of(self.image_size)

    @property
    def sizes(self) -> list[Sides]:
        """(H, W) of each resolution, from full resolution down."""
        return resolutions(self.sides, len(self.multipliers) - 1) or []

    @property
    def attends(self) -> list[bool]:
        """Whether the blocks of each resolution are followed by attention."""
        return attended(self.sizes, self.attention_resolutions)

    def halves(self, index: int) -> tuple[bool, bool]:
        """Whether height and width halve after a resolution; a side of 1 does not."""
        height, width = self.sizes[index]
        return height > 1, width > 1

    @property
    def widths(self) -> list[int]:
        """Channels of each resolution, from full resolution down."""
        return [self.base_channels * multiplier for multiplier in self.multipliers]


class Trunk(nn.Module):
    """What the trunks share: the class embedding, dropout, and stages whose activations can be recomputed.

    Args:
        input_shape: (C, H, W) of one image.
        dropout: probability of zeroing an activation in every block, in [0, 1).
        num_classes: K if the label enters every block (with one extra null class), else None.
        embedding_base: channels of the class table; the embedding is four times as wide.
        timed: True if the noise level enters every block.

    Attributes:
        dropout: the rate in all blocks; it can be set at any time, 0 switches dropout off.
        recompute: keep only the input of every stage, and recompute the rest in the adjoint and in the
            backward pass: less memory, more time, the same numbers.
        first_image: if the batch is part of a larger one, the number of images before it, so that dropout
            masks are those of the larger batch.
    """

    recompute = False
    first_image = 0

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        dropout: float,
        num_classes: int | None,
        embedding_base: int,
        timed: bool = False,
    ) -> None:
        super().__init__()
        self.input_shape: tuple[int, ...] = input_shape
        self._dropout = dropout
        self.num_classes = self.embedded_classes = num_classes
        embedded = timed or num_classes is not None
        self.embedding_base = embedding_base
        self.embedding_width = 4 * embedding_base if embedded else None
        if embedded:
            self.temb = Embedding(embedding_base)
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes + 1, embedding_base)

    @property
    def dropout(self) -> float:
        return self._dropout

    @dropout.setter
    def dropout(self, rate: float) -> None:
        if not 0 <= rate < 1:
            raise UserError(f"dropout is {rate}: it must be at least 0 and less than 1")
        self._dropout = rate
        for block in self.modules():
            if isinstance(block, Block):
                block.set_dropout(rate)

    def stages(self) -> Iterable[Stage]:
        """All stages, in the order in which they run."""
        raise NotImplementedError

    def embedding(self, label: Tensor | None, time: Tensor | None, batch: int) -> Tensor | None:
        """(B, E) from time and class (the null class where there is no label); None without either."""
        weight = cast(nn.Conv2d, self.conv_in).weight
        index = class_index(label, self.embedded_classes, batch, weight.device)
        terms = []
        if time is not None:
            terms.append(sinusoids(time, self.embedding_base).to(weight.dtype))
        if index is not None:
            terms.append(self.label_emb(index))
        return self.temb(sum(terms[1:], start=terms[0])) if terms else None

    def dropout_seeds(self, device: torch.device) -> Iterator[Tensor | None]:
        """`StageInputs.seeds` of each stage, in running order, from torch's global generator."""
        if not (self.training and self.dropout > 0):
            return repeat(None)
        counts = [stage.num_blocks for stage in self.stages()]
        seeds = torch.randint(2**62, (sum(counts), 2), device=device)
        return iter(F.pad(seeds, (0, 1), value=self.first_image).split(counts))


class DownTrunk(Trunk):
    """Downsampling path and middle: image (B, C, H, W) -> feature map at the lowest resolution.

    Args:
        shape: the sizes.
        num_classes: K if the label enters every block (with one extra null class), else None.
        timed: True if the noise level enters every block.
    """

    def __init__(self, shape: TrunkShape, num_classes: int | None, timed: bool = False) -> None:
        base_channels = shape.base_channels
        super().__init__(shape.input_shape, shape.dropout, num_classes, base_channels, timed)
        self.shape = shape
        self.conv_in = Conv2d(shape.channels, base_channels, exact=True)
        width = base_channels
        self.down = nn.ModuleList()
        for i, after in enumerate(shape.widths):
            befores = ([width] + [after] * shape.blocks_per_level)[: shape.blocks_per_level]
            down = self._resolution(i, [(before, after) for before in befores])
            if i < len(shape.widths) - 1:
                down.downsample = Downsample(after, shape.halves(i))
            self.down.append(down)
            width = after
        self.mid = Middle(width, shape.num_groups, shape.dropout, self.embedding_width)

    def _resolution(self, index: int, widths: list[tuple[int, int]]) -> Resolution:
        """Blocks from and to these widths, with attention if this resolution has it."""
        shape, attends = self.shape, self.shape.attends[index]
        blocks = [
            ResnetBlock(*pair, shape.num_groups, shape.dropout, self.embedding_width) for pair in widths
        ]
        return Resolution(blocks, [AttentionBlock(after, shape.num_groups) for _, after in widths if attends])

    def stages_of(self, down: Resolution) -> Iterator[Stage]:
        """The stages of one resolution of the downsampling path, the downsampling itself last."""
        yield from (Stage(layers, self.recompute) for layers in down.stages())
        if down.downsample is not None:
            yield Stage([down.downsample])

    def down_stages(self) -> Iterator[Stage]:
        """The stages of the downsampling path after `conv_in`."""
        for down in cast(Iterable[Resolution], self.down):
            yield from self.stages_of(down)

    def middle(self) -> Stage:
        """The stage after the downsampling path."""
        return Stage(self.mid.layers(), self.recompute)

    def stages(self) -> list[Stage]:
        """All stages after `conv_in`, in the order in which they run."""
        return [*self.down_stages(), self.middle()]


def check_input(x: Tensor, shape: tuple[int, ...]) -> None:
    """Raises UserError for a batch whose images have another shape."""
    if x.shape[1:] != shape:
        raise UserError(
            f"the network takes images of shape (B, {', '.join(map(str, shape))}), not {tuple(x.shape)}"
        )
