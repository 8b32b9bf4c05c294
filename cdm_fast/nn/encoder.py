"""An encoder-only noise-level classifier: its adjoint is the decoder.

The upsampling path of a U-Net computes a map at full resolution, which a CDM then averages over its pixels.
Here features are averaged at every resolution of the downsampling path instead. The gradient of these
averages returns to full resolution through transposed convolutions, gated by the derivatives of the forward
pass: the adjoint acts as a decoder. Forward pass and adjoint together cost less than the forward pass of the
U-Net.

# B batch, C channels, H W pixels, D features, L = T+2 noise levels, K classes
"""

from typing import Any, Unpack, cast

import torch
from torch import Tensor, nn

from cdm_fast.config.size import ImageSize
from cdm_fast.nn.heads import Conditioning, embedded_classes, noise_head
from cdm_fast.nn.network import AdjointNetwork
from cdm_fast.nn.pool import EnergyPool
from cdm_fast.nn.trunk import (
    DownTrunk,
    Resolution,
    Stage,
    StageInputs,
    TrunkOptions,
    TrunkShape,
    check_input,
)


class Encoder(DownTrunk, AdjointNetwork):
    """The U-Net's downsampling path and middle, with features pooled at every resolution (`EnergyPool`).

    `Encoder(32, 3, 1002, dropout=0.1)` has the downsampling path of the paper's CIFAR-10 network.

    Args:
        image_size and all others: as in `UNet`, which also lists the errors.

    Example:
        >>> import torch
        >>> from cdm_fast import Encoder
        >>> network = Encoder(8, 1, 102, base_channels=32, multipliers=(1, 2), attention_resolutions=(4,))
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
        **trunk: Unpack[TrunkOptions],
    ) -> None:
        shape = TrunkShape(image_size, channels, **trunk)
        super().__init__(shape, embedded_classes(num_classes, conditioning))
        self.num_classes, self.conditioning = num_classes, conditioning
        base, widths = shape.base_channels, shape.widths
        self.pool = nn.ModuleList(EnergyPool(width, shape.num_groups, 2 * base, base) for width in widths)
        num_features = 3 * base * len(widths)
        self.linear_layer = noise_head(num_features, num_levels, num_classes, conditioning, head_rank)

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
        parts = list(zip(self._resolutions(), g.chunk(len(self.pool), dim=1), strict=True))
        gradient: Any = 0.0
        for (before, after, pool), g_pooled in reversed(parts):
            for stage in reversed(after):
                gradient = stage.adjoint(residuals.pop(), gradient)
            gradient = gradient + pool.adjoint(residuals.pop(), g_pooled)
            for stage in reversed(before):
                gradient = stage.adjoint(residuals.pop(), gradient)
        return self.conv_in.adjoint(None, gradient)
