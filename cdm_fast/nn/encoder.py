"""An encoder-only noise-level classifier: its adjoint is the decoder.

A U-Net's way up computes a full-resolution map, which a CDM then averages away. Here the features are
averaged where they arise, at every resolution on the way down. The gradient of those averages climbs back to
full resolution by itself: transposed convolutions, gated by the derivatives of what was computed on the way
down. Forward pass and adjoint together then cost less than one forward pass of the U-Net.

# B batch, C channels, H W pixels, D features, L = T+2 noise levels, K classes
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from cdm_fast.nn.heads import Conditioning, embedded_classes, noise_head
from cdm_fast.nn.layers import Conv2d, ConvMeanPool, GroupNorm, Layer, full_precision
from cdm_fast.nn.network import AdjointNetwork
from cdm_fast.nn.trunk import DownTrunk, Resolution, Stage, StageInputs, check_input


class EnergyPool(Layer):
    """Means over pixels of a 3x3 convolution, and of the squares of a 1x1 one: (B, C, H, W) -> (B, D).

    The derivative of a square is the map itself, so that the gradient has a linear path at full resolution,
    which the mean of a gated map has not.
    """

    def __init__(self, channels: int, num_groups: int, num_means: int, num_squares: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels, num_groups)
        self.means = ConvMeanPool(channels, num_means)
        self.squares = Conv2d(channels, num_squares, kernel_size=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        h, norm_residuals = self.norm(x)
        means, mean_residuals = self.means(h)
        root, _ = self.squares(h)
        with full_precision(x):
            squares = root.to(means.dtype).square().mean((2, 3))
        return torch.cat([means, squares], dim=1), (norm_residuals, mean_residuals, root)

    def adjoint(self, residuals: Any, g: Tensor) -> Tensor:
        norm_residuals, mean_residuals, root = residuals
        g_means, g_squares = g.split([self.means.out_channels, self.squares.out_channels], dim=1)
        h = self.means.adjoint(mean_residuals, g_means)
        scale = (g_squares * (2 / (root.shape[2] * root.shape[3]))).to(root.dtype)
        h = h + self.squares.adjoint(None, scale[:, :, None, None] * root)
        return self.norm.adjoint(norm_residuals, h)


class Encoder(DownTrunk, AdjointNetwork):
    """The U-Net's way down and middle, with features pooled at every resolution (`EnergyPool`).

    `Encoder(32, 3, 1002, 128, (1, 2, 2, 2), 2, (16,), dropout=0.1)` has the way down of the paper's CIFAR-10
    network.

    Args:
        image_size and the others: see `UNet`.

    Raises:
        UserError: sizes that do not fit together; the message names them.
    """

    def __init__(
        self,
        image_size: int,
        channels: int,
        num_levels: int,
        base_channels: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 2),
        blocks_per_level: int = 2,
        attention_resolutions: Sequence[int] = (16,),
        dropout: float = 0.0,
        num_classes: int | None = None,
        num_groups: int = 32,
        conditioning: Conditioning = "embedding",
        head_rank: int = 0,
    ) -> None:
        super().__init__(
            image_size,
            channels,
            base_channels,
            multipliers,
            blocks_per_level,
            attention_resolutions,
            dropout,
            embedded_classes(num_classes, conditioning),
            num_groups,
        )
        self.num_classes, self.conditioning = num_classes, conditioning
        self.pool = nn.ModuleList(
            EnergyPool(width, num_groups, 2 * base_channels, base_channels) for width in self.widths
        )
        self.linear_layer = noise_head(
            3 * base_channels * len(self.widths),
            num_levels,
            num_classes,
            conditioning,
            head_rank,
        )

    def _resolutions(self) -> list[tuple[list[Stage], list[Stage], EnergyPool]]:
        """From full resolution down: the stages before the pool, those after it, and the pool."""
        parts: list[Any] = []
        for down, pool in zip(self.down, self.pool, strict=True):
            *before, last = self.stages_of(cast(Resolution, down))
            if cast(Resolution, down).downsample is None:
                parts.append(([*before, last, self.middle()], [], pool))
            else:
                parts.append((before, [last], pool))
        return parts

    def features(
        self, x: Tensor, label: Tensor | None = None, keep_residuals: bool = True
    ) -> tuple[Tensor, Any]:
        """`x` (B, C, H, W) -> pooled features (B, D) in fp32 or wider, and residuals."""
        check_input(x, self.input_shape)
        embedding, seeds = self.embedding(label, None, x.shape[0]), self.dropout_seeds(x.device)
        h, _ = self.conv_in(x)
        residuals, pooled = [], []

        def apply(stages: list[Stage], h: Tensor) -> Tensor:
            for stage in stages:
                h, kept = stage.run(StageInputs(h, embedding, None, next(seeds)))
                if keep_residuals:
                    residuals.append(kept)
            return h

        for before, after, pool in self._resolutions():
            h = apply(before, h)
            features, kept = pool(h)
            pooled.append(features)
            if keep_residuals:
                residuals.append(kept)
            h = apply(after, h)
        return torch.cat(pooled, dim=1), residuals

    def adjoint(self, residuals: Any, g: Tensor) -> Tensor:
        residuals = list(residuals)
        parts = list(zip(self._resolutions(), g.chunk(len(self.widths), dim=1), strict=True))
        gradient: Any = 0.0
        for (before, after, pool), g_pooled in reversed(parts):
            for stage in reversed(after):
                gradient = stage.adjoint(residuals.pop(), gradient)
            gradient = gradient + pool.adjoint(residuals.pop(), g_pooled)
            for stage in reversed(before):
                gradient = stage.adjoint(residuals.pop(), gradient)
        return self.conv_in.adjoint(None, gradient)
