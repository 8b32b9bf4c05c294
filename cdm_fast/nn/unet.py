"""The CDM paper's U-Net, as a noise-level classifier with an adjoint and as a plain noise predictor.

Parameter names are those of the paper's public checkpoints.

# B batch, C channels, H W pixels, L = T+2 noise levels, K classes, E embedding width
"""

from collections.abc import Iterable, Iterator
from typing import Any, Unpack, cast

from torch import Tensor, nn

from cdm_fast.config.size import ImageSize
from cdm_fast.nn.heads import Conditioning, embedded_classes, noise_head
from cdm_fast.nn.layers import Conv2d, GroupNorm, full_precision
from cdm_fast.nn.network import AdjointNetwork
from cdm_fast.nn.pool import ConvMeanPool
from cdm_fast.nn.resample import Upsample
from cdm_fast.nn.trunk import (
    DownTrunk,
    Resolution,
    Stage,
    StageInputs,
    TrunkOptions,
    TrunkShape,
    check_input,
)


class UNetTrunk(DownTrunk):
    """The U-Net without its head: image (B, C, H, W) -> feature map (B, base, H, W).

    Each resolution has one residual block more in the upsampling path than in the downsampling path. The
    output of every stage of the downsampling path is kept for a skip connection. Arguments as in `DownTrunk`.
    """

    def __init__(self, shape: TrunkShape, num_classes: int | None, timed: bool = False) -> None:
        super().__init__(shape, num_classes, timed)
        skips = [shape.base_channels]
        for after in shape.widths:
            skips += [after] * (shape.blocks_per_level + 1)  # the last is the downsampled one
        skips.pop()
        width = shape.widths[-1]
        ups: list[Resolution] = []
        for i, after in reversed(list(enumerate(shape.widths))):
            befores = [width] + [after] * shape.blocks_per_level
            up = self._resolution(i, [(before + skips.pop(), after) for before in befores])
            if i > 0:
                up.upsample = Upsample(after, shape.halves(i - 1))
            ups.append(up)
            width = after
        self.up = nn.ModuleList(reversed(ups))
        self.norm_out = GroupNorm(width, shape.num_groups)
        self.out_channels = width

    def up_stages(self) -> Iterator[Stage]:
        """The stages of the upsampling path; each takes one skip connection."""
        for up in reversed(list(cast(Iterable[Resolution], self.up))):
            *stages, last = up.stages()
            yield from (Stage(layers, self.recompute) for layers in stages)
            yield Stage(last if up.upsample is None else [*last, up.upsample], self.recompute)

    def stages(self) -> list[Stage]:
        return [*super().stages(), *self.up_stages()]

    def run(
        self, x: Tensor, embedding: Tensor | None, keep_residuals: bool = True
    ) -> tuple[Tensor, list[Any]]:
        """`x` (B, C, H, W) -> (B, base, H, W), and the residuals of the stages in the order they ran.

        Without `keep_residuals` the list is empty, and each stage's memory is freed as soon as it has run.
        """
        h, _ = self.conv_in(x)
        skips, residuals = [h], []
        seeds = self.dropout_seeds(x.device)

        def apply(stage: Stage, h: Tensor, skip: Tensor | None = None) -> Tensor:
            h, kept = stage.run(StageInputs(h, embedding, skip, next(seeds)))
            if keep_residuals:
                residuals.append(kept)
            return h

        for stage in self.down_stages():
            h = apply(stage, h)
            skips.append(h)
        h = apply(self.middle(), h)
        for stage in self.up_stages():
            h = apply(stage, h, skips.pop())
        h, kept = self.norm_out(h)
        return h, [*residuals, kept] if keep_residuals else []

    def run_adjoint(self, residuals: list[Any], g: Tensor) -> Tensor:
        """The adjoint of `run`: gradient of `<g, run(x)>` with respect to `x`."""
        residuals = list(residuals)
        g = self.norm_out.adjoint(residuals.pop(), g)
        skip_grads = []
        for stage in reversed(list(self.up_stages())):
            g, skip_grad = stage.adjoint(residuals.pop(), g)
            skip_grads.append(skip_grad)
        g = self.middle().adjoint(residuals.pop(), g)
        for stage in reversed(list(self.down_stages())):
            g = stage.adjoint(residuals.pop(), g + skip_grads.pop())
        return self.conv_in.adjoint(None, g + skip_grads.pop())


class UNet(UNetTrunk, AdjointNetwork):
    """The CDM paper's noise-level classifier (arXiv 2402.10095): U-Net, mean over pixels, cumulated logits.

    `UNet(32, 3, 1002, dropout=0.1)` is the paper's CIFAR-10 network, with 33.4 M parameters.

    Args:
        image_size: H = W of the images, or (H, W); divisible by 2 once per resolution after the first. A side
            of 1 stays as it is, so signals (B, C, 1, W) are images too.
        channels: C of the images.
        num_levels: L = T+2, `schedule.num_levels`.
        num_classes: K for a class-conditional network, else None.
        conditioning: "embedding": the label enters every block; "joint": the head has a logit for every
            (level, class) pair.
        head_rank: rank of a joint head over many classes; 0 for a full head.
        base_channels: width at full resolution, 128 by default; divisible by `num_groups`.
        multipliers: width of each resolution in units of `base_channels`, (1, 2, 2, 2) by default.
        blocks_per_level: residual blocks per resolution of the downsampling path, 2 by default; the
            upsampling path has one more.
        attention_resolutions: where every block is followed by attention, (16,) by default: heights H, as int
            (widths for images of one row), or shares of the full size, as float, such as 0.5.
        dropout: probability of zeroing an activation in every residual block, 0 by default.
        num_groups: groups of every GroupNorm, 32 by default.

    Raises:
        UserError: sizes that do not fit together; the message names them.

    Example:
        >>> import torch
        >>> from cdm_fast import UNet
        >>> network = UNet(8, 1, 102, base_channels=32, multipliers=(1, 2), attention_resolutions=(4,))
        >>> x = torch.zeros(2, 1, 8, 8)
        >>> network(x).shape  # a logit for each noise level
        torch.Size([2, 102])
        >>> network.ratio_gradient(x, torch.tensor([0, 50])).shape
        torch.Size([2, 1, 8, 8])
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
        width = 2 * shape.base_channels
        self.conv_out = ConvMeanPool(self.out_channels, width)
        self.linear_layer = noise_head(width, num_levels, num_classes, conditioning, head_rank)

    def features(
        self, x: Tensor, label: Tensor | None = None, keep_residuals: bool = True
    ) -> tuple[Tensor, Any]:
        """`x` (B, C, H, W) -> pooled features (B, 2 base channels) in fp32 or wider, and residuals."""
        check_input(x, self.input_shape)
        h, trunk_residuals = self.run(x, self.embedding(label, None, x.shape[0]), keep_residuals)
        h, pool_residuals = self.conv_out(h)
        return h, (trunk_residuals, pool_residuals)

    def adjoint(self, residuals: Any, g: Tensor) -> Tensor:
        trunk_residuals, pool_residuals = residuals
        return self.run_adjoint(trunk_residuals, self.conv_out.adjoint(pool_residuals, g))


class UNetDenoiser(UNetTrunk):
    """The same trunk as a plain diffusion model's noise predictor: level in, eps_hat out (arXiv 2006.11239).

    Args:
        image_size: H = W of the images, or (H, W), as in `UNet`.
        channels: C of the images.
        num_classes: K for a class-conditional network, else None.
        trunk: `base_channels` and the other options of `UNet`, which also lists the errors.
    """

    def __init__(
        self,
        image_size: ImageSize,
        channels: int,
        *,
        num_classes: int | None = None,
        **trunk: Unpack[TrunkOptions],
    ) -> None:
        super().__init__(TrunkShape(image_size, channels, **trunk), num_classes, timed=True)
        self.conv_out = Conv2d(self.out_channels, channels, exact=True)

    def forward(self, x: Tensor, level: Tensor, label: Tensor | None = None) -> Tensor:
        """`x` (B, C, H, W), `level` (B,) -> eps_hat like `x`."""
        check_input(x, self.input_shape)
        h, _ = self.run(x, self.embedding(label, level, x.shape[0]), keep_residuals=False)
        with full_precision(h):
            return self.conv_out(h)[0]
