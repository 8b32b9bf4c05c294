"""Residual multi-layer perceptrons for vectors.

# B batch, d input dimension, W hidden width, L = T+2 noise levels, K classes
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdm_fast.errors import UserError
from cdm_fast.nn.embedding import class_index, sinusoids
from cdm_fast.nn.heads import Conditioning, embedded_classes, noise_head
from cdm_fast.nn.layers import Layer, Linear, SiLU, full_precision, run_adjoint
from cdm_fast.nn.network import AdjointNetwork


class MLPBlock(Layer):
    """`x + W_2 silu(W_1 silu(x) (+ embedding))`."""

    def __init__(self, hidden: int, embedding_width: int | None = None) -> None:
        super().__init__()
        self.act_1 = SiLU()
        self.linear_1 = Linear(hidden, hidden)
        if embedding_width is not None:
            self.embedding = nn.Linear(embedding_width, hidden)
        self.act_2 = SiLU()
        self.linear_2 = Linear(hidden, hidden)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> tuple[Tensor, Any]:
        h, residuals_1 = self.act_1(x)
        h, _ = self.linear_1(h)
        if embedding is not None:
            h = h + self.embedding(embedding)
        h, residuals_2 = self.act_2(h)
        h, _ = self.linear_2(h)
        return x + h, (residuals_1, residuals_2)

    def adjoint(self, residuals: Any, g: Tensor) -> Tensor:
        residuals_1, residuals_2 = residuals
        h = self.act_2.adjoint(residuals_2, self.linear_2.adjoint(None, g))
        return g + self.act_1.adjoint(residuals_1, self.linear_1.adjoint(None, h))


class MLP(AdjointNetwork):
    """A noise-level classifier of vectors, with squares of linear features beside the learned ones.

    With the squares the network can represent every Gaussian exactly: its log density ratios are quadratic.

    Args:
        dim: d, the dimension of the data.
        num_levels: L = T+2, `schedule.num_levels`.
        hidden: W.
        depth: number of residual blocks.
        num_squares: number of squared linear features; d by default.
        num_classes: K for a class-conditional network, else None.
        conditioning: "embedding": the label enters every block, with one extra null class; "joint": the head
            has a logit for every (level, class) pair.
        head_rank: rank of a joint head over many classes; 0 for a full head.

    Raises:
        UserError: a width or depth below 1, or a conditioning without its classes.

    Example:
        >>> import torch
        >>> from cdm_fast import MLP
        >>> MLP(2, 102, hidden=16)(torch.zeros(3, 2)).shape
        torch.Size([3, 102])
    """

    def __init__(
        self,
        dim: int,
        num_levels: int,
        *,
        hidden: int = 256,
        depth: int = 3,
        num_squares: int | None = None,
        num_classes: int | None = None,
        conditioning: Conditioning = "embedding",
        head_rank: int = 0,
    ) -> None:
        super().__init__()
        _check_widths(dim, hidden, depth)
        self.input_shape = (dim,)
        self.num_classes = num_classes
        self.conditioning = conditioning
        self.embedded_classes = embedded_classes(num_classes, conditioning)
        if self.embedded_classes is not None:
            self.label_emb = nn.Embedding(self.embedded_classes + 1, hidden)
        self.linear_in = Linear(dim, hidden)
        embedding_width = hidden if self.embedded_classes is not None else None
        self.blocks = nn.ModuleList([MLPBlock(hidden, embedding_width) for _ in range(depth)])
        self.act_out = SiLU()
        num_squares = dim if num_squares is None else num_squares
        self.square = Linear(dim, num_squares)
        self.linear_layer = noise_head(hidden + num_squares, num_levels, num_classes, conditioning, head_rank)

    def features(
        self, x: Tensor, label: Tensor | None = None, keep_residuals: bool = True
    ) -> tuple[Tensor, Any]:
        """`x` (B, d) -> (B, W + num_squares) and residuals, which are small enough to be kept always."""
        _check_input(x, self.input_shape)
        embedding = self._embedding(label, x.shape[0])
        h, _ = self.linear_in(x)
        residuals = []
        for block in self.blocks:
            h, kept = block(h, embedding)
            residuals.append(kept)
        h, act_residuals = self.act_out(h)
        with full_precision(x):
            root, _ = self.square(x)
        return torch.cat([h.to(root.dtype), root.square()], dim=1), (residuals, act_residuals, root)

    def adjoint(self, residuals: Any, g: Tensor) -> Tensor:
        block_residuals, act_residuals, root = residuals
        g_learned, g_squares = g.split_with_sizes([self.linear_in.out_features, root.shape[1]], dim=1)
        h = self.act_out.adjoint(act_residuals, g_learned)
        h = run_adjoint(list(self.blocks), block_residuals, h)  # type: ignore[arg-type]
        with full_precision(g):
            from_squares = self.square.adjoint(None, 2 * root * g_squares)
        return self.linear_in.adjoint(None, h) + from_squares

    def _embedding(self, label: Tensor | None, batch: int) -> Tensor | None:
        index = class_index(label, self.embedded_classes, batch, self.linear_in.weight.device)
        return None if index is None else F.silu(self.label_emb(index))


class MLPDenoiser(nn.Module):
    """A plain diffusion model's noise predictor for vectors: level in, eps_hat out.

    Args:
        dim, hidden, depth, num_classes: as in `MLP`.
    """

    def __init__(
        self, dim: int, *, hidden: int = 256, depth: int = 3, num_classes: int | None = None
    ) -> None:
        super().__init__()
        _check_widths(dim, hidden, depth)
        self.input_shape = (dim,)
        self.num_classes = num_classes
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes + 1, hidden)
        self.time = nn.Sequential(nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.linear_in = Linear(dim, hidden)
        self.blocks = nn.ModuleList([MLPBlock(hidden, embedding_width=hidden) for _ in range(depth)])
        self.linear_out = Linear(hidden, dim)

    def forward(self, x: Tensor, level: Tensor, label: Tensor | None = None) -> Tensor:
        """`x` (B, d), `level` (B,) -> eps_hat (B, d)."""
        _check_input(x, self.input_shape)
        embedding = self.time(sinusoids(level, self.linear_in.out_features).to(x.dtype))
        index = class_index(label, self.num_classes, x.shape[0], x.device)
        if index is not None:
            embedding = embedding + self.label_emb(index)
        h, _ = self.linear_in(x)
        for block in self.blocks:
            h, _ = block(h, F.silu(embedding))
        return self.linear_out(F.silu(h))[0]


def _check_input(x: Tensor, shape: tuple[int, ...]) -> None:
    if x.shape[1:] != shape:
        raise UserError(f"the network takes vectors of shape (B, {shape[0]}), not {tuple(x.shape)}")


def _check_widths(dim: int, hidden: int, depth: int) -> None:
    for name, value in (("dim", dim), ("hidden", hidden), ("depth", depth)):
        if value < 1:
            raise UserError(f"{name} is {value}: it must be at least 1")
