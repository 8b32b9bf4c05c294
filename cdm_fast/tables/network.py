"""The network for rows of a table: an MLP with additional features that a plain MLP is slow to learn.

# B batch, d columns, G groups of columns, W hidden width, S squared features, L = T+2 noise levels, K classes
# or components, U units of the gates
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cdm_fast.errors import UserError
from cdm_fast.model import CDM
from cdm_fast.model.schedule import NoiseSchedule
from cdm_fast.nn.heads import CumulativeHead, JointHead, noise_head
from cdm_fast.nn.layers import Layer, Linear, SiLU, run_adjoint
from cdm_fast.nn.mlp import MLPBlock
from cdm_fast.nn.network import AdjointNetwork
from cdm_fast.tables.mixture import Mixture


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


class LengthGates(Layer):
    """`lengths (B, G) -> (B, S)`: a factor for each squared feature, `1 + W_2 silu(W_1 lengths)`.

    A dependence between columns that changes with the distance from the centre, as its direction does on a
    spiral and its strength under a common volatility, is a product of squares and functions of lengths.
    Hidden units need more rows for it the more columns there are.

    Args:
        num_groups: G.
        units: U.
        num_squares: S.
    """

    def __init__(self, num_groups: int, units: int, num_squares: int) -> None:
        super().__init__()
        self.linear_in = Linear(num_groups, units)
        self.act = SiLU()
        self.linear_out = Linear(units, num_squares)

    @torch.no_grad()
    def open(self) -> None:
        """Sets all factors to 1."""
        self.linear_out.weight.zero_()
        self.linear_out.bias.zero_()

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        h, residuals = self.act(self.linear_in(x)[0])
        return 1 + self.linear_out(h)[0], residuals

    def adjoint(self, residuals: Any, g: Tensor) -> Tensor:
        h = self.act.adjoint(residuals, self.linear_out.adjoint(None, g))
        return self.linear_in.adjoint(None, h)


class TableMLP(AdjointNetwork):
    """A noise-level classifier of rows: learned features, squared linear features, and the columns.

    With the last two it can represent any Gaussian exactly, including its mean. With `gates` each squared
    feature is multiplied by a learned function of the lengths of `EvenFeatures`.

    Args:
        groups: see `EvenFeatures`.
        num_levels: L.
        hidden, depth: W and the number of residual blocks.
        num_squares: S, the number of squared features.
        num_classes: K for joint (level, class) logits, else None.
        components: K of a `MixtureHead`, whose components are the classes; 0 for another head.
        gates: U of `LengthGates`; 0 for none.
    """

    axes: Tensor  # (K d, d), the scaled axes of the components

    def __init__(
        self,
        groups: list[int],
        num_levels: int,
        hidden: int,
        depth: int,
        num_squares: int,
        num_classes: int | None = None,
        components: int = 0,
        gates: int = 0,
    ) -> None:
        super().__init__()
        dim = sum(groups)
        self.input_shape = (dim,)
        self.num_classes = num_classes = components or num_classes
        self.conditioning = "embedding" if num_classes is None else "joint"
        self.even = EvenFeatures(groups)
        self.linear_in = Linear(self.even.out_features, hidden)
        self.blocks = nn.ModuleList([MLPBlock(hidden) for _ in range(depth)])
        self.act_out = SiLU()
        self.square = Linear(dim, num_squares)
        self.gates = LengthGates(len(groups), gates, num_squares) if gates else None
        self.register_buffer("axes", torch.empty(components * dim, dim))
        learned = hidden + num_squares + dim
        self.linear_layer = (
            MixtureHead(learned, num_levels, components, dim)
            if components
            else noise_head(learned, num_levels, num_classes, self.conditioning)
        )

    def features(
        self, x: Tensor, label: Tensor | None = None, keep_residuals: bool = True
    ) -> tuple[Tensor, Any]:
        """`x` (B, d) -> (B, W + S + d), with components (B, W + S + d + K d), and residuals."""
        expanded, even_residuals = self.even(x)
        h, _ = self.linear_in(expanded)
        residuals = []
        for block in self.blocks:
            h, kept = block(h)
            residuals.append(kept)
        h, act_residuals = self.act_out(h)
        root, _ = self.square(x)
        gated = root.square()
        gate_residuals = None
        if self.gates is not None:
            gate, kept = self.gates(expanded[:, -len(self.even.groups) :])
            gated, gate_residuals = gated * gate, (gate, kept)
        of_component = x @ self.axes.t()
        features = torch.cat([h, gated, x, of_component.square()], dim=1)
        return features, (even_residuals, residuals, act_residuals, root, gate_residuals, of_component)

    def adjoint(self, residuals: Any, g: Tensor) -> Tensor:
        even_residuals, block_residuals, act_residuals, root, gate_residuals, of_component = residuals
        widths = [self.linear_in.out_features, root.shape[1], self.input_shape[0], of_component.shape[1]]
        g_learned, g_squares, g_x, g_components = g.split_with_sizes(widths, dim=1)
        h = self.act_out.adjoint(act_residuals, g_learned)
        h = run_adjoint(list(self.blocks), block_residuals, h)  # type: ignore[arg-type]
        g_expanded = self.linear_in.adjoint(None, h)
        if self.gates is not None:
            gate, kept = gate_residuals
            g_lengths = self.gates.adjoint(kept, g_squares * root.square())
            g_expanded = g_expanded + F.pad(g_lengths, (g_expanded.shape[1] - g_lengths.shape[1], 0))
            g_squares = g_squares * gate
        from_learned = self.even.adjoint(even_residuals, g_expanded)
        from_squares = self.square.adjoint(None, 2 * root * g_squares)
        return from_learned + from_squares + g_x + (2 * of_component * g_components) @ self.axes

    def correction(self, x: Tensor) -> Tensor:
        """`f(x)[t] - f(x)[T+1]` of a `MixtureHead`, (B, L): log of density over mixture at every level."""
        head = self.linear_layer
        assert isinstance(head, MixtureHead)
        return head.correction(self.features(x, keep_residuals=False)[0])


class MixtureHead(JointHead):
    """Logits `z[t, c] = log w_c N_c,t(x) + f[t]`: components of a fixed mixture, and a learned correction.

    The correction is that of a `CumulativeHead` and the same for all components, so the marginal is the
    noised mixture's density times `exp f[t]`. Trained components would be unstable: a step that changes a
    narrow Gaussian little near its centre changes it by many nats further away.

    Args:
        in_features: D, the number of features of the correction; those of the components follow.
        num_levels: L.
        num_components: K.
        dim: d, the number of columns and of features of a component.
    """

    component_weight: Tensor  # (L-1, K, D + K d)
    component_bias: Tensor  # (L-1, K)

    def __init__(self, in_features: int, num_levels: int, num_components: int, dim: int) -> None:
        CumulativeHead.__init__(self, in_features, num_levels)
        self.num_classes = self.rows_per_level = self.common_rows = num_components
        shape = num_levels - 1, num_components
        self.register_buffer("component_weight", torch.empty(*shape, in_features + num_components * dim))
        self.register_buffer("component_bias", torch.empty(shape))

    def cumulated(self) -> tuple[Tensor, Tensor]:
        weight, bias = CumulativeHead.cumulated(self)
        weight = F.pad(weight, (0, self.component_weight.shape[2] - weight.shape[1]))
        below_noise = weight[:-1, None] + self.component_weight, bias[:-1, None] + self.component_bias
        return tuple(  # type: ignore[return-value]
            torch.cat([joint.flatten(0, 1), common[-1:]])
            for joint, common in zip(below_noise, (weight, bias), strict=True)
        )

    def correction(self, h: Tensor) -> Tensor:
        """`f[t] - f[T+1]`, (B, L), of features (B, D + K d)."""
        weight, bias = CumulativeHead.cumulated(self)
        f = F.linear(h[:, : self.in_features], weight, bias)
        return f - f[:, -1:]

    def shift(self, by: Tensor) -> None:
        CumulativeHead.shift(self, by)

    def shift_each(self, by: Tensor) -> None:
        """Not possible: the components are fixed. Raises UserError."""
        raise UserError("the components of a mixture have no constants of their own")


def new_model(
    groups: list[int],
    schedule: NoiseSchedule,
    hidden: int,
    depth: int,
    num_squares: int,
    num_classes: int | None,
    level_prior: Tensor | None,
    generator: torch.Generator,
    components: int = 0,
    gates: int = 0,
    input_scale: float = 1.0,
) -> CDM:
    """A `CDM` with a new `TableMLP` in fp32, initialised from `generator`.

    input_scale: a factor of the initial weights and biases in front of the blocks. The larger it is, the
    finer the structure that training finds first (spectral bias: Rahaman et al., 2019; Tancik et al., 2020),
    and the more it overfits.

    The result does not depend on torch's default dtype, device and generator: the network is built on the
    meta device, then filled.
    """
    with torch.device("meta"):
        network = TableMLP(
            groups, schedule.num_levels, hidden, depth, num_squares, num_classes, components, gates
        )
    network = network.to(torch.float32).to_empty(device="cpu")
    network.even.reset()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Linear):
                bound = 1 / math.sqrt(module.in_features)
                module.weight.uniform_(-bound, bound, generator=generator)
                module.bias.uniform_(-bound, bound, generator=generator)
        for parameter in network.linear_in.parameters():
            parameter.mul_(input_scale)
    if network.gates is not None:
        network.gates.open()
    return CDM(network, schedule, level_prior=level_prior)


class Gaussians(NamedTuple):
    """The logits of Gaussian classes at every noise level, as functions of a row x.

    `z[t, c] = squares[t, c] . (axes[c]^T x)^2 + linear[t, c] . x + constants[t, c]`, and 0 at pure noise.

    Fields:
        axes (K, d, d): the eigenvectors of each covariance, one per column.
        variances (K, d): its eigenvalues.
        squares, linear (L-1, K, d) and constants (L-1, K): the weights. All fp64.
    """

    axes: Tensor
    variances: Tensor
    squares: Tensor
    linear: Tensor
    constants: Tensor

    @classmethod
    def of(
        cls,
        model: CDM,
        means: Tensor,  # (K, d) fp64
        covariances: Tensor,  # (K, d, d) fp64
        log_weights: Tensor,  # (K,) fp64, log p(c)
    ) -> "Gaussians":
        """Of a model's levels and their prior.

        With `x_t = a x_0 + s eps`, class c at level t is `N(a m, U (a^2 lam + s^2) U^T)`, so its log density
        minus that of `N(0, I)` is, in the coordinates `r = U^T x` and with `v = a^2 lam + s^2`,
        `sum_i (1 - 1/v_i) r_i^2 / 2 + a m_i r_i / v_i - a^2 m_i^2 / (2 v_i) - log(v_i) / 2`.
        """
        a, s = model.schedule.a[:-1, None, None], model.schedule.s[:-1, None, None]
        variances, axes = torch.linalg.eigh(covariances)
        variances = variances.clamp(min=1e-10)
        m = torch.einsum("kdi,kd->ki", axes, means)
        v = a**2 * variances + s**2  # (L-1, K, d)
        linear = torch.einsum("kdi,lki->lkd", axes, a * m / v)
        prior = model.log_level_prior
        constants = log_weights - (a**2 * m**2 / v + v.log()).sum(2) / 2 + (prior[:-1] - prior[-1])[:, None]
        return cls(axes, variances, (1 - 1 / v) / 2, linear, constants)


@torch.no_grad()
def start_at_gaussians(
    model: CDM,
    means: Tensor,  # (K, d) fp64
    covariances: Tensor,  # (K, d, d) fp64
) -> None:
    """Sets the head so that the model is the exact CDM of equally likely Gaussian classes; needs S >= K d.

    Training starts from there, so a few rows need not teach the network what a covariance describes.
    """
    network, (K, dim) = table_network(model), means.shape
    head = network.linear_layer
    classes = Gaussians.of(model, means, covariances, means.new_full((K,), -math.log(K)))
    learned = network.linear_in.out_features
    weight = torch.zeros(model.schedule.num_levels, K, head.in_features, dtype=torch.float64)
    for c in range(K):
        squares = slice(learned + c * dim, learned + (c + 1) * dim)
        weight[:-1, c, squares] = classes.squares[:, c]
        weight[:-1, c, -dim:] = classes.linear[:, c]
        network.square.weight[c * dim : (c + 1) * dim] = classes.axes[c].T.float()
    network.square.bias.zero_()
    _set_head(head, weight, F.pad(classes.constants, (0, 0, 0, 1)))


@torch.no_grad()
def start_at_mixture(model: CDM, mixture: Mixture) -> None:
    """Sets the components of a `MixtureHead` and no correction: the model is the exact CDM of the mixture."""
    network, (K, dim) = table_network(model), mixture.means.shape
    head = network.linear_layer
    assert isinstance(head, MixtureHead)
    components = Gaussians.of(model, *mixture)
    head.weight.zero_()
    head.bias.zero_()
    head.component_weight.zero_()
    head.component_weight[..., head.in_features - dim : head.in_features] = components.linear
    scale = components.variances.sqrt()  # the features have about unit variance under their component
    for c in range(K):
        squares = slice(head.in_features + c * dim, head.in_features + (c + 1) * dim)
        head.component_weight[:, c, squares] = components.squares[:, c] * components.variances[c]
        network.axes[c * dim : (c + 1) * dim] = (components.axes[c] / scale[c]).T
    head.component_bias.copy_(components.constants)


def table_network(model: CDM) -> TableMLP:
    """The model's network."""
    assert isinstance(model.network, TableMLP)
    return model.network


def _set_head(head: nn.Linear, weight: Tensor, constant: Tensor) -> None:
    """Sets a head such that its logits are `weight` (L, K, D) times features plus `constant` (L, K)."""
    if isinstance(head, JointHead):  # z[t] = z_N - sum_{u >= t} w[u]
        rows, biases = weight.diff(dim=0).flatten(0, 1), constant.diff(dim=0).flatten()
        head.weight.copy_(torch.cat([rows, weight[-1:, 0]]))
        head.bias.copy_(torch.cat([biases, constant[-1:, 0]]))
    else:  # f = cumsum(w)
        head.weight.copy_(weight[:, 0].diff(dim=0, prepend=torch.zeros_like(weight[:1, 0])))
        head.bias.copy_(constant[:, 0].diff(dim=0, prepend=torch.zeros_like(constant[:1, 0])))
