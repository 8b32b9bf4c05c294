"""The blocks of the trunks, with their adjoints: residual and attention blocks.

# B batch, C channels, H W pixels, N = H*W tokens, G groups, E embedding width
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from cdm_fast.nn.layers import Conv2d, GroupNorm, Layer, Residuals, pixels, tokens
from cdm_fast.ops import attention, attention_vjp


class Block(Layer):
    """A residual layer that may read the embedding, and may drop activations by a seed."""

    def set_dropout(self, rate: float) -> None:
        """Sets the probability of zeroing an activation."""
        raise NotImplementedError


class AttentionBlock(Layer):
    """Single-head self-attention over all pixels, with a residual connection; 1x1 q, k, v and output."""

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels, num_groups, silu=False)
        self.q = Conv2d(channels, channels, kernel_size=1)
        self.k = Conv2d(channels, channels, kernel_size=1)
        self.v = Conv2d(channels, channels, kernel_size=1)
        self.proj_out = Conv2d(channels, channels, kernel_size=1)
        self.scale = channels**-0.5

    def forward(self, x: Tensor) -> tuple[Tensor, Residuals]:
        normed, norm_residuals = self.norm(x)
        q, k, v = (tokens(layer(normed)[0]) for layer in (self.q, self.k, self.v))
        out, lse = attention(q, k, v, self.scale)
        y, _ = self.proj_out(pixels(out, *x.shape[2:]))
        return x + y, (norm_residuals, q, k, v, out, lse)

    def adjoint(self, residuals: Residuals, g: Tensor) -> Tensor:
        norm_residuals, q, k, v, out, lse = residuals
        height, width = g.shape[2:]
        g_out = tokens(self.proj_out.adjoint(None, g))
        grads = attention_vjp(g_out, q, k, v, out, lse, self.scale)
        g_q, g_k, g_v = (
            layer.adjoint(None, pixels(grad, height, width))
            for layer, grad in zip((self.q, self.k, self.v), grads, strict=True)
        )
        return g + self.norm.adjoint(norm_residuals, g_q + g_k + g_v)


class ResnetBlock(Block):
    """norm-SiLU-conv3x3-(+ embedding)-norm-SiLU-dropout-conv3x3, plus the input (through 1x1 if C changes).

    Args:
        in_channels, out_channels: C before and after; `in_channels` includes those of a skip connection.
        num_groups: G of both norms.
        dropout: probability of zeroing an activation after the second SiLU.
        embedding_width: E of the class or time embedding, or None for a block without one.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_groups: int,
        dropout: float = 0.0,
        embedding_width: int | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = GroupNorm(in_channels, num_groups)
        self.conv1 = Conv2d(in_channels, out_channels)
        if embedding_width is not None:
            self.temb_proj = nn.Linear(embedding_width, out_channels)
            self.temb_proj.casts = True  # type: ignore[assignment]
        self.norm2 = GroupNorm(out_channels, num_groups, dropout=dropout)
        self.conv2 = Conv2d(out_channels, out_channels)
        if in_channels != out_channels:
            self.nin_shortcut = Conv2d(in_channels, out_channels, kernel_size=1)
        self.has_shortcut = in_channels != out_channels

    def set_dropout(self, rate: float) -> None:
        self.norm2.dropout = rate

    def forward(
        self,
        x: Tensor,
        embedding: Tensor | None = None,
        skip: Tensor | None = None,
        seed: Tensor | None = None,
    ) -> tuple[Tensor, Residuals]:
        """`x` (B, C1, H, W) and, from a skip connection, the other input channels (B, C2, H, W).

        embedding: (B, E) after its SiLU, or None. seed: seed of the dropout mask, or None; see `GroupNorm`.
        """
        h, norm1_residuals = self.norm1(x, skip)
        h, _ = self.conv1(h)
        if embedding is not None:
            h = h + self.temb_proj(embedding).to(h.dtype)[:, :, None, None]
        h, norm2_residuals = self.norm2(h, seed=seed)
        h, _ = self.conv2(h)
        shortcut, pieces = self._shortcut(x, skip)
        return shortcut + h, (norm1_residuals, norm2_residuals, pieces)

    def adjoint(self, residuals: Residuals, g: Tensor) -> Any:
        """The gradient, like `x`; with a skip connection two, like `x` and like `skip`."""
        norm1_residuals, norm2_residuals, pieces = residuals
        h = self.norm2.adjoint(norm2_residuals, self.conv2.adjoint(None, g))
        h = self.norm1.adjoint(norm1_residuals, self.conv1.adjoint(None, h))
        if not isinstance(h, tuple):
            return h + (self.nin_shortcut.adjoint(None, g) if self.has_shortcut else g)
        return tuple(part + F.conv_transpose2d(g, weight) for part, weight in zip(h, pieces, strict=True))

    def _shortcut(self, x: Tensor, skip: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """The shortcut of the input, and its kernel's pieces for `x` and for `skip`, if there is one.

        The pieces are contiguous, because each convolution would otherwise copy them again.
        """
        if not self.has_shortcut:
            return x, None
        if skip is None:
            return self.nin_shortcut(x)[0], None
        weight, bias = self.nin_shortcut.weight, self.nin_shortcut.bias
        of_x, of_skip = (part.contiguous() for part in weight.split([x.shape[1], skip.shape[1]], dim=1))
        return F.conv2d(x, of_x, bias) + F.conv2d(skip, of_skip), (of_x, of_skip)
