"""Layers of tokens, with their adjoints: patches, norms, rotary positions, attention over heads, gated MLP.

A transformer's feature map is an image whose pixels are tokens; the layers inside a block see rows of tokens.

# B batch, C channels of an image, H W pixels, P patch, N = H W / P^2 tokens, D width of a token, h heads
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdm_fast.config.size import Sides
from cdm_fast.nn.blocks import Block
from cdm_fast.nn.layers import (
    Layer,
    Linear,
    Residuals,
    for_adjoint,
    full_precision,
    pixels,
    to_trunk_dtype,
    tokens,
)
from cdm_fast.nn.pool import EnergyPool
from cdm_fast.ops import attention, attention_vjp, rms_norm, rms_norm_vjp, swiglu_vjp, swiglu_with_input

ROTARY_BASE = 100.0  # wavelengths from 2 pi to nearly 200 pi tokens: images have tens of tokens a side


class PatchEmbedding(nn.Conv2d):
    """A convolution whose stride is its kernel, as one matrix product: (B, C, H, W) -> (B, D, H/P, W/P).

    The result is channels-last. The adjoint is the transposed convolution, in which patches do not overlap
    either. Products avoid a fault of oneDNN: its bf16 convolutions of few channels with an even kernel are
    wrong on processors with AMX (torch 2.13.0, `tests/test_transformer.py`).

    Args:
        in_channels, out_channels: C and D.
        patch: height and width of a patch.
        exact: as in `layers.Conv2d`, for patches of the image itself.
    """

    def __init__(self, in_channels: int, out_channels: int, patch: Sides, exact: bool = False) -> None:
        super().__init__(in_channels, out_channels, patch, stride=patch)
        self.patch = patch
        self.exact = exact
        self.casts = not exact

    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        if not self.exact:
            return self._embed(x), None
        with full_precision(x):
            y = self._embed(x.to(self.weight.dtype))
        return to_trunk_dtype(y), None

    def adjoint(self, residuals: None, g: Tensor) -> Tensor:
        weight = for_adjoint(self, "weight")
        if not self.exact:
            return self._image(g, weight)
        with full_precision(g):
            return self._image(g.to(weight.dtype), weight)

    def _embed(self, x: Tensor) -> Tensor:
        (p, q), C = self.patch, self.in_channels
        cut = x.permute(0, 2, 3, 1).unflatten(2, (-1, q)).unflatten(1, (-1, p))  # (B, H/P, p, W/P, q, C)
        patches = cut.transpose(2, 3).reshape(*cut.shape[:2], cut.shape[3], p * q * C)
        return F.linear(patches, self._matrix(self.weight), self.bias).permute(0, 3, 1, 2)

    def _image(self, g: Tensor, weight: Tensor) -> Tensor:
        (p, q), C = self.patch, self.in_channels
        patches = (g.permute(0, 2, 3, 1) @ self._matrix(weight)).unflatten(-1, (p, q, C))
        return patches.transpose(2, 3).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)

    @staticmethod
    def _matrix(weight: Tensor) -> Tensor:
        """(D, C, p, q) -> (D, p q C), a view of a channels-last weight."""
        return weight.permute(0, 2, 3, 1).flatten(1)


class RMSNorm(Layer):
    """RMSNorm of each token, scaled per channel, and by an embedding of the image if there is one.

    Args:
        channels: D.
        multiplier: a constant factor of the result, which the matrices that read it would have otherwise.
    """

    def __init__(self, channels: int, multiplier: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.multiplier = multiplier
        self.eps = 1e-6

    def forward(self, x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Residuals]:
        """`x` (B, N, D); `scale` (B, D), to which 1 is added, or None."""
        y, rstd = rms_norm(x, self._modulated(self.weight, scale), self.eps)
        return y, (x, rstd, scale)

    def adjoint(self, residuals: Residuals, g: Tensor) -> Tensor:
        x, rstd, scale = residuals
        return rms_norm_vjp(g, x, self._modulated(for_adjoint(self, "weight"), scale), rstd)

    def _modulated(self, weight: Tensor, scale: Tensor | None) -> Tensor:
        """The op's weight: (D,), or (B, D) with an embedding."""
        weight = weight if self.multiplier == 1 else self.multiplier * weight
        return weight if scale is None else weight * (1 + scale)


def rotary_table(grid: Sides, head_width: int) -> Tensor:
    """(2, N, D/h): cosines and signed sines of the angles by which pairs of a head's channels are turned.

    Half of the pairs turn with the token's row, half with its column, at geometric frequencies; so products
    of queries and keys depend on the tokens' distances, on a grid of any size (Su et al. 2021, eq. 15).
    """
    quarter = head_width // 4
    frequency = ROTARY_BASE ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    by_row, by_column = (torch.arange(side)[:, None] * frequency for side in grid)
    shape = *grid, quarter
    angle = torch.cat([by_row[:, None].expand(shape), by_column[None].expand(shape)], -1).flatten(0, 1)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)]).float()


def turned(x: Tensor, table: Tensor, sign: float = 1.0) -> Tensor:
    """The pairs (i, i + D/2h) of the last dimension of (..., N, D/h) turned by the table's angles, or back.

    sign: 1, or -1 for the inverse, which is the adjoint.
    """
    return _Turn.apply(x, table.to(x.dtype), sign)


class _Turn(torch.autograd.Function):
    """`turned`, whose derivative turns back; autograd would add one gradient for each of its uses of x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, table: Tensor, sign: float) -> Tensor:
        cos, sin = table.unbind()
        return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin, value=sign)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, table, ctx.sign = inputs
        ctx.save_for_backward(table)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (table,) = ctx.saved_tensors
        return _Turn.apply(g, table, -ctx.sign), None, None


def matrix(in_features: int, out_features: int, std: float) -> Linear:
    """A linear layer without bias, with normal weights of this standard deviation, that autocast casts."""
    layer = Linear(in_features, out_features, bias=False)
    nn.init.normal_(layer.weight, std=std)
    layer.casts = True  # type: ignore[assignment]
    return layer


@dataclass(frozen=True)
class WidthRule:
    """How weights and factors follow from the width D, so that a learning rate carries over to another.

    Adam changes every weight by about the learning rate, whatever the gradient. The change of a product with
    D inputs thus grows like D. Here a matrix that reads D channels is drawn `D / BASE` times as large, and
    its product multiplied by `BASE / D`: at the start the outputs are those of the usual initialisation, and
    a step changes them equally at all widths (Yang and Hu 2021, table 8, scaled to equal rates).
    """

    BASE: ClassVar[int] = 128
    width: int

    @property
    def multiplier(self) -> float:
        """The factor of a product with D inputs."""
        return self.BASE / self.width

    def std(self, inputs: int, branches: int = 1) -> float:
        """Standard deviation of weights with so many inputs; of several branches whose results are added."""
        return 1 / math.sqrt(inputs * branches) / self.multiplier


class SelfAttention(Layer):
    """`x + W_o attention(norm(x) W_qkv)`, with rotary positions.

    Args:
        width, head_width: D, and D/h; the second is a multiple of 4.
        grid: height and width in tokens.
        branches: residual branches of the network, for the initial scale.
    """

    def __init__(self, width: int, head_width: int, grid: Sides, branches: int) -> None:
        super().__init__()
        rule = WidthRule(width)
        self.multiplier = rule.multiplier
        self.norm = RMSNorm(width, rule.multiplier)
        self.qkv = matrix(width, 3 * width, rule.std(width))
        self.proj_out = matrix(width, width, rule.std(width, branches))
        self.num_heads, self.scale = width // head_width, head_width**-0.5
        self.register_buffer("table", rotary_table(grid, head_width), persistent=False)
        self.table: Tensor

    def forward(self, x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Residuals]:
        """`x` (B, N, D); `scale` (B, D) of the norm, or None."""
        normed, norm_residuals = self.norm(x, scale)
        q, k, v = self._heads(self.qkv(normed)[0])
        out, lse = attention(q, k, v, self.scale)
        joined = out.unflatten(0, (-1, self.num_heads)).transpose(1, 2).flatten(2)
        y, _ = self.proj_out(joined)
        return torch.add(x, y, alpha=self.multiplier), (norm_residuals, q, k, v, out, lse)

    def adjoint(self, residuals: Residuals, g: Tensor) -> Tensor:
        norm_residuals, q, k, v, out, lse = residuals
        g_joined = self.proj_out.adjoint(None, g)
        g_out = g_joined.unflatten(-1, (self.num_heads, -1)).transpose(1, 2).flatten(0, 1)
        g_q, g_k, g_v = attention_vjp(g_out, q, k, v, out, lse, self.scale)
        g_qk = turned(torch.stack([g_q, g_k]), self.table, sign=-1)
        g_qkv = torch.cat([g_qk, g_v[None]]).unflatten(1, (-1, self.num_heads))  # (3, B, h, N, D/h)
        g_normed = self.qkv.adjoint(None, g_qkv.permute(1, 3, 0, 2, 4).flatten(2))
        return torch.add(g, self.norm.adjoint(norm_residuals, g_normed), alpha=self.multiplier)

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, 3 D) -> queries and keys, turned, and values, (B h, N, D/h) each; one copy of all."""
        heads = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, h, N, D/h)
        heads = heads.contiguous()
        q, k = turned(heads[:2], self.table).flatten(1, 2).unbind()
        return q, k, heads[2].flatten(0, 1)


class GatedMLP(Layer):
    """`x + W_2 dropout(silu(a) b)`, where (a, b) = norm(x) W_1; the hidden layer is 8/3 as wide as a token.

    Args:
        width: D.
        branches: residual branches of the network, for the initial scale.
    """

    def __init__(self, width: int, branches: int, dropout: float = 0.0) -> None:
        super().__init__()
        rule = WidthRule(width)
        self.multiplier = rule.multiplier
        hidden = -(-8 * width // 96) * 32
        self.norm = RMSNorm(width, rule.multiplier)
        self.linear_1 = matrix(width, 2 * hidden, rule.std(width))
        self.linear_2 = matrix(hidden, width, rule.std(hidden, branches))
        self.dropout = dropout

    def forward(
        self, x: Tensor, scale: Tensor | None = None, seed: Tensor | None = None
    ) -> tuple[Tensor, Residuals]:
        """`x` (B, N, D); `scale` (B, D) of the norm; `seed` of the dropout mask, or None for no dropout."""
        normed, norm_residuals = self.norm(x, scale)
        h, _ = self.linear_1(normed)
        gated, h = swiglu_with_input(h, dropout=self._rate(seed), seed=seed)
        y, _ = self.linear_2(gated)
        return torch.add(x, y, alpha=self.multiplier), (norm_residuals, h, seed)

    def adjoint(self, residuals: Residuals, g: Tensor) -> Tensor:
        norm_residuals, h, seed = residuals
        g_gated = self.linear_2.adjoint(None, g)
        g_normed = self.linear_1.adjoint(None, swiglu_vjp(g_gated, h, dropout=self._rate(seed), seed=seed))
        return torch.add(g, self.norm.adjoint(norm_residuals, g_normed), alpha=self.multiplier)

    def _rate(self, seed: Tensor | None) -> float:
        return 0.0 if seed is None else self.dropout


class TransformerBlock(Block):
    """Attention and gated MLP; an embedding scales the channels of both norms.

    Args:
        width, head_width, grid, branches: as in `SelfAttention`.
        dropout: probability of zeroing a hidden activation of the MLP.
        embedding_width: E of the class embedding, or None for a block without one.
    """

    def __init__(
        self,
        width: int,
        head_width: int,
        grid: Sides,
        branches: int,
        dropout: float = 0.0,
        embedding_width: int | None = None,
    ) -> None:
        super().__init__()
        self.attention = SelfAttention(width, head_width, grid, branches)
        self.mlp = GatedMLP(width, branches, dropout)
        if embedding_width is not None:
            self.temb_proj = nn.Linear(embedding_width, 2 * width)
            self.temb_proj.casts = True  # type: ignore[assignment]
            nn.init.zeros_(self.temb_proj.weight)  # at the start the label changes nothing
            nn.init.zeros_(self.temb_proj.bias)

    def set_dropout(self, rate: float) -> None:
        self.mlp.dropout = rate

    def forward(
        self, x: Tensor, embedding: Tensor | None = None, seed: Tensor | None = None
    ) -> tuple[Tensor, Residuals]:
        """`x` (B, D, H/P, W/P), channels-last; `embedding` (B, E) and `seed` as in `ResnetBlock`."""
        scales: Sequence[Tensor | None] = (None, None)
        if embedding is not None:
            scales = self.temb_proj(embedding).to(self.mlp.norm.weight.dtype).chunk(2, 1)
        h, of_attention = self.attention(tokens(x), scales[0])
        h, of_mlp = self.mlp(h, scales[1], seed)
        return pixels(h, *x.shape[2:]), (of_attention, of_mlp)

    def adjoint(self, residuals: Residuals, g: Tensor) -> Tensor:
        of_attention, of_mlp = residuals
        h = self.attention.adjoint(of_attention, self.mlp.adjoint(of_mlp, tokens(g)))
        return pixels(h, *g.shape[2:])


class TokenPool(EnergyPool):
    """`EnergyPool` of tokens: D/2 means and D/4 squares, scaled by the rule of the width.

    The scale includes that of the head, which reads a number of features proportional to D.
    """

    def __init__(self, width: int, num_groups: int) -> None:
        super().__init__(width, num_groups, width // 2, width // 4)
        factor = WidthRule(width).multiplier
        for convolution in (self.means, self.squares):
            with torch.no_grad():
                convolution.weight.div_(factor)
                assert convolution.bias is not None
                convolution.bias.div_(factor)
        factors = [torch.full((width // 2,), factor**2), torch.full((width // 4,), factor**3)]
        self.register_buffer("factors", torch.cat(factors), persistent=False)
        self.factors: Tensor

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        features, residuals = super().forward(x)
        return features * self.factors, residuals

    def adjoint(self, residuals: Any, g: Tensor) -> Tensor:
        return super().adjoint(residuals, g * self.factors)


class SquaresPool(Layer):
    """Means over pixels of the squares of a feature map, (B, D, H, W) -> (B, D): the map has no norm yet.

    Of the first layer's result these are quadratic forms of the image, which know its scale and whose
    gradient is linear in it at full resolution.
    """

    def __init__(self, channels: int, factor: float = 1.0) -> None:
        super().__init__()
        self.out_features, self.factor = channels, factor

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with full_precision(x):
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            return self.factor * wide.square().mean((2, 3)), x

    def adjoint(self, residuals: Tensor, g: Tensor) -> Tensor:
        x = residuals
        scale = (g * (2 * self.factor / (x.shape[2] * x.shape[3]))).to(x.dtype)
        return scale[:, :, None, None] * x
