"""The network for rows of a table: an MLP with additional features that a plain MLP is slow to learn.

# B batch, d columns, G groups of columns, W hidden width, S squared features, L = T+2 noise levels, K classes
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdm_fast.model import CDM
from cdm_fast.model.schedule import NoiseSchedule
from cdm_fast.nn.heads import JointHead, noise_head
from cdm_fast.nn.layers import Layer, Linear, SiLU, run_adjoint
from cdm_fast.nn.mlp import MLPBlock
from cdm_fast.nn.network import AdjointNetwork


class EvenFeatures(Layer):
    """`x -> (x, size, length)`: the columns, smooth absolute values, and the norm of each group of columns.

    `size_i = sqrt(1 + x_i^2) - 1` and `length_g = sqrt(1 + |x_g|^2) - sqrt(1 + d_g)`. Heavy tails and other
    properties that depend on the distance from the centre are even functions of the columns, which hidden
    units are slow to learn.

    Args:
        groups: number of columns in each group, d in total.
    """

    member: Tensor  # (d, G), 1 if the column belongs to the group

    def __init__(self, groups: list[int]) -> None:
        super().__init__()
        self.groups = groups
        self.out_features = 2 * sum(groups) + len(groups)
        self.register_buffer("member", torch.empty(sum(groups), len(groups)))

    def reset(self) -> None:
        """Fills the buffer: `new_model` first builds networks on the meta device."""
        group = torch.repeat_interleave(torch.arange(len(self.groups)), torch.tensor(self.groups))
        self.member.copy_(F.one_hot(group, len(self.groups)))

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        squares = x.square()
        size = (1 + squares).sqrt()
        length = (1 + squares @ self.member).sqrt()
        expanded = torch.cat([x, size - 1, length - (1 + self.member.sum(0)).sqrt()], dim=1)
        return expanded, (x, size, length)

    def adjoint(self, residuals: Any, g: Tensor) -> Tensor:
        x, size, length = residuals
        g_x, g_size, g_length = g.split_with_sizes([x.shape[1], x.shape[1], length.shape[1]], dim=1)
        return g_x + x * (g_size / size + (g_length / length) @ self.member.t())


class TableMLP(AdjointNetwork):
    """A noise-level classifier of rows: learned features, squared linear features, and the columns.

    With the last two it can represent any Gaussian exactly, including its mean.

    Args:
        groups: see `EvenFeatures`.
        num_levels: L.
        hidden, depth: W and the number of residual blocks.
        num_squares: S, the number of squared features.
        num_classes: K for joint (level, class) logits, else None.
    """

    def __init__(
        self,
        groups: list[int],
        num_levels: int,
        hidden: int,
        depth: int,
        num_squares: int,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        dim = sum(groups)
        self.input_shape = (dim,)
        self.num_classes = num_classes
        self.conditioning = "embedding" if num_classes is None else "joint"
        self.even = EvenFeatures(groups)
        self.linear_in = Linear(self.even.out_features, hidden)
        self.blocks = nn.ModuleList([MLPBlock(hidden) for _ in range(depth)])
        self.act_out = SiLU()
        self.square = Linear(dim, num_squares)
        self.linear_layer = noise_head(hidden + num_squares + dim, num_levels, num_classes, self.conditioning)

    def features(
        self, x: Tensor, label: Tensor | None = None, keep_residuals: bool = True
    ) -> tuple[Tensor, Any]:
        """`x` (B, d) -> (B, W + S + d) and residuals."""
        expanded, even_residuals = self.even(x)
        h, _ = self.linear_in(expanded)
        residuals = []
        for block in self.blocks:
            h, kept = block(h)
            residuals.append(kept)
        h, act_residuals = self.act_out(h)
        root, _ = self.square(x)
        return torch.cat([h, root.square(), x], dim=1), (even_residuals, residuals, act_residuals, root)

    def adjoint(self, residuals: Any, g: Tensor) -> Tensor:
        even_residuals, block_residuals, act_residuals, root = residuals
        widths = [self.linear_in.out_features, root.shape[1], self.input_shape[0]]
        g_learned, g_squares, g_x = g.split_with_sizes(widths, dim=1)
        h = self.act_out.adjoint(act_residuals, g_learned)
        h = run_adjoint(list(self.blocks), block_residuals, h)  # type: ignore[arg-type]
        from_learned = self.even.adjoint(even_residuals, self.linear_in.adjoint(None, h))
        return from_learned + self.square.adjoint(None, 2 * root * g_squares) + g_x


def new_model(
    groups: list[int],
    schedule: NoiseSchedule,
    hidden: int,
    depth: int,
    num_squares: int,
    num_classes: int | None,
    level_prior: Tensor | None,
    generator: torch.Generator,
) -> CDM:
    """A `CDM` with a new `TableMLP` in fp32, initialised from `generator`.

    The result does not depend on torch's default dtype, device and generator: the network is built on the
    meta device, then filled.
    """
    with torch.device("meta"):
        network = TableMLP(groups, schedule.num_levels, hidden, depth, num_squares, num_classes)
    network = network.to(torch.float32).to_empty(device="cpu")
    network.even.reset()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Linear):
                bound = 1 / math.sqrt(module.in_features)
                module.weight.uniform_(-bound, bound, generator=generator)
                module.bias.uniform_(-bound, bound, generator=generator)
    return CDM(network, schedule, level_prior=level_prior)


@torch.no_grad()
def start_at_gaussians(
    model: CDM,
    means: Tensor,  # (K, d) fp64
    covariances: Tensor,  # (K, d, d) fp64
) -> None:
    """Sets the head so that the model is the exact CDM of Gaussian classes; needs S >= K d squares.

    With `x_t = a x_0 + s eps`, class c at level t is `N(a m, U (a^2 lam + s^2) U^T)`, so its log density
    minus that of `N(0, I)` is, in the coordinates `r = U^T x` and with `v = a^2 lam + s^2`,
    `sum_i (1 - 1/v_i) r_i^2 / 2 + a m_i r_i / v_i - a^2 m_i^2 / (2 v_i) - log(v_i) / 2`.
    Training starts from there, so a few rows need not teach the network what a covariance describes.
    """
    network = model.network
    assert isinstance(network, TableMLP)
    head = network.linear_layer
    K, dim = means.shape
    a, s = model.schedule.a[:-1, None, None], model.schedule.s[:-1, None, None]
    variances, axes = torch.linalg.eigh(covariances)  # (K, d), (K, d, d)
    m = torch.einsum("kdi,kd->ki", axes, means)
    v = a**2 * variances.clamp(min=1e-10) + s**2  # (L-1, K, d)
    learned = network.linear_in.out_features
    weight = torch.zeros(len(a) + 1, K, head.in_features, dtype=torch.float64)
    for c in range(K):
        squares = slice(learned + c * dim, learned + (c + 1) * dim)
        weight[:-1, c, squares] = (1 - 1 / v[:, c]) / 2
        weight[:-1, c, -dim:] = (a[:, 0] * m[c] / v[:, c]) @ axes[c].T
        network.square.weight[c * dim : (c + 1) * dim] = axes[c].T.float()
    network.square.bias.zero_()
    constant = -(a**2 * m**2 / v + v.log()).sum(2) / 2 - math.log(K)
    prior = model.log_level_prior
    constant = constant + (prior[:-1] - prior[-1])[:, None]
    _set_head(head, weight, torch.cat([constant, constant.new_zeros(1, K)]))


def _set_head(head: nn.Linear, weight: Tensor, constant: Tensor) -> None:
    """Sets a head such that its logits are `weight` (L, K, D) times features plus `constant` (L, K)."""
    if isinstance(head, JointHead):  # z[t] = z_N - sum_{u >= t} w[u]
        rows, biases = weight.diff(dim=0).flatten(0, 1), constant.diff(dim=0).flatten()
        head.weight.copy_(torch.cat([rows, weight[-1:, 0]]))
        head.bias.copy_(torch.cat([biases, constant[-1:, 0]]))
    else:  # f = cumsum(w)
        head.weight.copy_(weight[:, 0].diff(dim=0, prepend=torch.zeros_like(weight[:1, 0])))
        head.bias.copy_(constant[:, 0].diff(dim=0, prepend=torch.zeros_like(constant[:1, 0])))
