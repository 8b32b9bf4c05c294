"""A transformer of patches as a noise-level classifier: its adjoint is the decoder.

Patches are embedded, pass through blocks of attention and gated MLP, and features are averaged over the
tokens at several depths. The adjoint leads from these averages back through the blocks to the pixels of each
patch, at about the cost of the forward pass. A stem of convolutions at full resolution, which overlap the
borders of the patches, and the squares of the first layer give small noise a path of its own.

# B batch, C channels, H W pixels, F features, D width of a token, L = T+2 noise levels, K classes
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict, Unpack, cast

import torch
from torch import Tensor, nn

from cdm_fast.config.size import ImageSize, Sides, check_stem, patch_grid, patch_sides, sides_of
from cdm_fast.errors import UserError
from cdm_fast.nn.blocks import ResnetBlock
from cdm_fast.nn.heads import Conditioning, embedded_classes, noise_head
from cdm_fast.nn.layers import Conv2d, Layer
from cdm_fast.nn.network import AdjointNetwork
from cdm_fast.nn.pool import EnergyPool
from cdm_fast.nn.resample import Downsample
from cdm_fast.nn.tokens import PatchEmbedding, SquaresPool, TokenPool, TransformerBlock, WidthRule
from cdm_fast.nn.trunk import Stage, StageInputs, Trunk, check_input

EMBEDDING_BASE = 64  # channels of the class table: the same for every width
POOLED_DEPTHS = 3  # at most


class TransformerOptions(TypedDict, total=False):
    """The optional fields of `TransformerShape`, which the network takes by keyword."""

    patch_size: int
    width: int
    depth: int
    head_width: int
    stem_channels: int
    stem_resolutions: int
    stem_blocks: int
    dropout: float
    num_groups: int


@dataclass(frozen=True)
class TransformerShape:
    """The sizes of a transformer; the defaults are those of the preset `cifar10-transformer`.

    Args:
        image_size: H = W, or (H, W); divisible by `patch_size`, except a side of 1.
        channels: C of the image.
        patch_size: side of a patch in pixels; along a side of 1 it is 1.
        width: D, a multiple of `head_width`, 4 and `num_groups`.
        depth: number of blocks.
        head_width: channels of an attention head, a multiple of 4.
        stem_channels: channels of the convolutions at full resolution, a multiple of `num_groups`; 0 for
            patches of the image itself.
        stem_resolutions: number of resolutions of the stem. Each after the first halves height and width and
            doubles the channels; `patch_size` is a multiple of the last one's factor.
        stem_blocks: residual blocks of each resolution of the stem.
        dropout: probability of zeroing an activation in every block, in [0, 1).
        num_groups: G of every GroupNorm.

    Raises:
        UserError: sizes that do not fit together; the message names them.
    """

    image_size: ImageSize
    channels: int
    patch_size: int = 4
    width: int = 512
    depth: int = 9
    head_width: int = 64
    stem_channels: int = 64
    stem_resolutions: int = 1
    stem_blocks: int = 1
    dropout: float = 0.0
    num_groups: int = 32

    def __post_init__(self) -> None:
        patch_grid(self.sides, self.patch_size)
        if self.depth < 1 or self.head_width < 4 or self.head_width % 4:
            raise UserError(
                f"depth is {self.depth} and head_width {self.head_width}: give a depth of 1 or more and a"
                " head width that is a multiple of 4"
            )
        for unit in (self.head_width, 4, self.num_groups):
            if self.width < 1 or self.width % unit:
                raise UserError(
                    f"width {self.width} is not a multiple of {unit} (head_width {self.head_width},"
                    f" num_groups {self.num_groups}); change one"
                )
        if self.stem_channels < 0 or self.stem_channels % self.num_groups:
            raise UserError(
                f"stem_channels {self.stem_channels} is not a multiple of num_groups {self.num_groups};"
                " change one, or give 0"
            )
        check_stem(self.patch_size, self.stem_channels, self.stem_resolutions)
        if self.stem_blocks < 1:
            raise UserError(f"stem_blocks is {self.stem_blocks}: it must be at least 1")

    @property
    def sides(self) -> Sides:
        """(H, W) of one image."""
        return sides_of(self.image_size)

    @property
    def grid(self) -> Sides:
        """Height and width in tokens."""
        return patch_grid(self.sides, self.patch_size)

    @property
    def pooled_depths(self) -> list[int]:
        """Numbers of blocks after which features are pooled: evenly spaced, the last one included."""
        count = min(POOLED_DEPTHS, self.depth)
        return [-(-self.depth * (i + 1) // count) for i in range(count)]


class StemResolution(nn.Module):
    """The convolutions of one resolution of the stem, and their pool.

    Args:
        shape: the sizes of the network.
        index: 0 at full resolution; each further one halves height and width and doubles the channels.
        embedding_width: E of the class embedding, or None.
    """

    def __init__(self, shape: TransformerShape, index: int, embedding_width: int | None) -> None:
        super().__init__()
        base, channels = shape.stem_channels, shape.stem_channels << index
        before = channels
        self.downsample: Downsample | None = None
        if index:
            before = channels // 2
            self.downsample = Downsample(before, (shape.sides[0] > 1, shape.sides[1] > 1))
        self.block = nn.ModuleList(
            ResnetBlock(width, channels, shape.num_groups, shape.dropout, embedding_width)
            for width in [before, *[channels] * (shape.stem_blocks - 1)]
        )
        self.pool = EnergyPool(channels, shape.num_groups, 2 * base, base)


class Part(NamedTuple):
    """What runs up to one pool: a layer that changes the resolution, if any, and stages."""

    entry: Conv2d | Downsample | PatchEmbedding | None
    stages: list[Stage]
    pool: EnergyPool | SquaresPool


class Transformer(Trunk, AdjointNetwork):
    """A transformer of patches with features pooled at several depths.

    `Transformer(32, 3, 1002)` is the network of the preset `cifar10-transformer`, with about 34 M parameters.

    Args:
        image_size, channels, num_levels, num_classes, conditioning, head_rank: as in `UNet`; H and W are
            divisible by the patch size. The weights fit every size of image.
        patch_size: side of a patch in pixels, 4 by default.
        width: channels of a token, 512 by default; a multiple of `head_width`, 4 and `num_groups`.
        depth: number of blocks, 9 by default.
        head_width: channels of an attention head, 64 by default.
        stem_channels: channels of the convolutions at full resolution, 64 by default; 0 for none.
        stem_resolutions: number of resolutions of the stem, 1 by default; each after the first halves height
            and width and doubles the channels.
        stem_blocks: residual blocks of each resolution of the stem, 1 by default.
        dropout, num_groups: as in `UNet`.

    Raises:
        UserError: sizes that do not fit together; the message names them.

    Example:
        >>> import torch
        >>> from cdm_fast import Transformer
        >>> network = Transformer(8, 1, 102, patch_size=2, width=64, depth=2, head_width=32, stem_channels=32)
        >>> network(torch.zeros(2, 1, 8, 8)).shape  # a logit for each noise level
        torch.Size([2, 102])
    """

    def __init__(
        self,
        image_size: ImageSize,
        channels: int,
        num_levels: int,
        *,
        num_classes: int | None = None,
        conditioning: Conditioning = "embedding",
        head_rank: int = 0,
        **options: Unpack[TransformerOptions],
    ) -> None:
        shape = TransformerShape(image_size, channels, **options)
        embedded = embedded_classes(num_classes, conditioning)
        super().__init__((channels, *shape.sides), shape.dropout, embedded, EMBEDDING_BASE)
        self.num_classes, self.conditioning, self.shape = num_classes, conditioning, shape
        self._add_entry(shape)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                shape.width,
                shape.head_width,
                shape.grid,
                2 * shape.depth,
                shape.dropout,
                self.embedding_width,
            )
            for _ in range(shape.depth)
        )
        self.pool = nn.ModuleList(TokenPool(shape.width, shape.num_groups) for _ in shape.pooled_depths)
        num_features = sum(part.pool.out_features for part in self._parts())
        self.linear_layer = noise_head(num_features, num_levels, num_classes, conditioning, head_rank)
        of_tokens = sum(pool.out_features for pool in cast(Iterable[TokenPool], self.pool))
        with torch.no_grad():  # undone by the factors of `TokenPool`
            self.linear_layer.weight[:, -of_tokens:] /= WidthRule(shape.width).multiplier

    def _add_entry(self, shape: TransformerShape) -> None:
        """The layers from pixels to tokens."""
        self.conv_in: Conv2d | PatchEmbedding
        stem, patch = shape.stem_channels, patch_sides(shape.sides, shape.patch_size)
        if not stem:
            self.conv_in = PatchEmbedding(shape.channels, shape.width, patch, exact=True)
            self.squares = SquaresPool(shape.width, WidthRule(shape.width).multiplier)
            return
        self.conv_in = Conv2d(shape.channels, stem, exact=True)
        self.squares = SquaresPool(stem)
        self.stem = nn.ModuleList(
            StemResolution(shape, index, self.embedding_width) for index in range(shape.stem_resolutions)
        )
        halvings = shape.stem_resolutions - 1
        patch = max(1, patch[0] >> halvings), max(1, patch[1] >> halvings)
        self.patches = PatchEmbedding(stem << halvings, shape.width, patch)

    def _parts(self) -> list[Part]:
        """From the image to the last block."""
        shape, first = self.shape, 0
        parts = [Part(self.conv_in, [], self.squares)]
        entry: PatchEmbedding | None = None
        if shape.stem_channels:
            for part in cast(Iterable[StemResolution], self.stem):
                layers = cast(Iterable[Layer], part.block)
                stages = [Stage([layer], self.recompute) for layer in layers]
                parts.append(Part(part.downsample, stages, part.pool))
            entry = self.patches
        blocks = cast(list[Layer], list(self.blocks))
        for last, pool in zip(shape.pooled_depths, cast(Iterable[TokenPool], self.pool), strict=True):
            stages = [Stage([block], self.recompute) for block in blocks[first:last]]
            parts.append(Part(entry, stages, pool))
            entry, first = None, last
        return parts

    def stages(self) -> Iterator[Stage]:
        for part in self._parts():
            yield from part.stages

    def features(
        self, x: Tensor, label: Tensor | None = None, keep_residuals: bool = True
    ) -> tuple[Tensor, Any]:
        """`x` (B, C, H, W) -> pooled features (B, F) in fp32 or wider, and residuals."""
        check_input(x, self.input_shape)
        embedding, seeds = self.embedding(label, None, x.shape[0]), self.dropout_seeds(x.device)
        residuals, pooled = [], []
        h = x
        for entry, stages, pool in self._parts():
            h = h if entry is None else entry(h)[0]
            for stage in stages:
                h, kept = stage.run(StageInputs(h, embedding, None, next(seeds)))
                if keep_residuals:
                    residuals.append(kept)
            features, kept = pool(h)
            pooled.append(features)
            if keep_residuals:
                residuals.append(kept)
        return torch.cat(pooled, dim=1), residuals

    def adjoint(self, residuals: Any, g: Tensor) -> Tensor:
        residuals, parts = list(residuals), self._parts()
        of_pools = g.split([part.pool.out_features for part in parts], dim=1)
        gradient: Any = 0.0
        for (entry, stages, pool), g_pooled in reversed(list(zip(parts, of_pools, strict=True))):
            gradient = gradient + pool.adjoint(residuals.pop(), g_pooled)
            for stage in reversed(stages):
                gradient = stage.adjoint(residuals.pop(), gradient)
            gradient = gradient if entry is None else entry.adjoint(None, gradient)
        return gradient
