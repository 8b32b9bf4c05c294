"""The base of a network: a mixture of Gaussians, whose densities at every noise level are closed forms.

At large noise the data are nearly a mixture of Gaussians, and a network needs many steps to find that out.
With a base it learns only the remainder.

# B batch, d values of an input, L = T+2 noise levels, K classes, G = K M Gaussians, R directions of each
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cdm_fast.nn.layers import full_precision

# The noise sigma = s/a, in units of the data, at which half of the base is left. Below it images are far from
# Gaussian.
FADE = 0.4


class Read(NamedTuple):
    """An input as the base reads it."""

    x: Tensor  # (B, d) fp32 or wider
    along: Tensor  # (B, G, R+1): its products with the directions and with the mean of each Gaussian
    terms: Tensor  # (B, G, 2R+3): squares and products along the directions, with the mean, |x|^2, and 1


class Tables(NamedTuple):
    """What evaluations read of a base."""

    rows: Tensor  # (G (R+1), d), directions and mean of each Gaussian
    coefficients: Tensor  # (L, G, 2R+3), those of `Read.terms` in Q
    sharpness: Tensor  # (L,), k_t


class MixtureBase(nn.Module):
    """Logits of levels and classes under a mixture of Gaussians, to which a network adds its own.

    Under the mixture `sum_g w_g N(m_g, S_g)` with `S_g = U_g^T diag(v_g) U_g + r_g (I - U_g^T U_g)`, the
    inputs of level t have the density `sum_g w_g N(a m_g, a^2 S_g + s^2 I)`. Let `q_tg` be the log ratio of
    its g-th part to pure noise. The base is

        Q_tg = log w_g + sum_{u >= t} fade_u (q_ug - q_u+1,g),   fade_u = sigma_u^4 / (sigma_u^4 + 0.4^4),
        b_t = log sum_g exp Q_tg,   b_tc = log sum_{g in c} exp Q_tg,
        z[t, c] = b_t + log softmax_c (k_t b_tc),   k_t = sigma_t^2 / (sigma_t^2 + temper).

    It follows the mixture from pure noise down to about sigma = 0.4, and stays as it is below. The classes of
    single images are far less certain than the mixture says, and the less noise the more so. With factors of
    1 it would be the log ratio of the mixture itself. It is 0 at pure noise.

    It has no trainable weights. Until `set` it is N(0, I). Probabilistic PCA: Tipping and Bishop, 1999.

    `folds` are the tables of further bases, each fitted without a part of the training data. Evaluations read
    those of one of them from `use_fold(number)` to `use_fold(None)`. They are not in the state dict.

    Args:
        a, s: (L,) amplitudes of signal and noise.
        dim: d.
        components: M, Gaussians of each class.
        rank: R, at most d.
        num_classes: K of joint logits, with the Gaussians of the first class first; 1 for logits of levels.
    """

    means: Tensor  # (G, d)
    directions: Tensor  # (G, R, d), orthonormal, or zero where there are fewer than R
    variances: Tensor  # (G, R) along the directions
    rest: Tensor  # (G,), the variance along all others
    log_weights: Tensor  # (G,)
    temper: Tensor  # (), a variance
    amplitudes: Tensor  # (2, L) float64
    folds: tuple[Tables, ...]
    # Those of `Tables`:
    _rows: Tensor
    _coefficients: Tensor
    _sharpness: Tensor

    def __init__(
        self, a: Tensor, s: Tensor, dim: int, components: int, rank: int, num_classes: int = 1
    ) -> None:
        super().__init__()
        rank, num, self.num_classes = min(rank, dim), components * num_classes, num_classes
        self.register_buffer("means", torch.zeros(num, dim))
        self.register_buffer("directions", torch.zeros(num, rank, dim))
        self.register_buffer("variances", torch.ones(num, rank))
        self.register_buffer("rest", torch.ones(num))
        self.register_buffer("log_weights", torch.full((num,), -math.log(num)))
        self.register_buffer("temper", torch.ones(()))
        self.register_buffer("_rows", torch.zeros(num * (rank + 1), dim), persistent=False)
        self.register_buffer("_coefficients", torch.zeros(len(a), num, 2 * rank + 3), persistent=False)
        self.register_buffer("_sharpness", torch.zeros(len(a)), persistent=False)
        self.amplitudes = torch.stack([a, s]).double()
        self.folds = ()
        self._tabulate()

    @torch.no_grad()
    def set(self, **tensors: Tensor) -> None:
        """Sets `means`, `directions`, `variances`, `rest`, `log_weights` or `temper`, as above."""
        for name, value in tensors.items():
            getattr(self, name).copy_(value)
        self._tabulate()

    def tables(self) -> Tables:
        """A copy of the tables that evaluations read."""
        return Tables(self._rows.clone(), self._coefficients.clone(), self._sharpness.clone())

    @torch.no_grad()
    def use_fold(self, number: int | None) -> None:
        """Lets evaluations read the tables of `folds[number]`; None for those of the base itself."""
        if number is None:
            return self._tabulate()
        for own, value in zip(
            (self._rows, self._coefficients, self._sharpness), self.folds[number], strict=True
        ):
            own.copy_(value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MixtureBase":
        super()._apply(fn, recurse)
        self.folds = tuple(Tables(*map(fn, tables)) for tables in self.folds)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._tabulate()

    def _tabulate(self) -> None:
        """Computes what evaluations read, the coefficients in fp64."""
        if self.means.device.type == "meta":
            return
        self._rows = torch.cat([self.directions, self.means[:, None]], 1).flatten(0, 1)
        a, s = (table[:, None].to(self.means.device) for table in self.amplitudes)  # (L, 1)
        means, directions, variances, rest = (
            tensor.double() for tensor in (self.means, self.directions, self.variances, self.rest)
        )
        along = a[:, :, None].square() * variances + s[:, :, None].square()  # (L, G, R)
        across = a.square() * rest + s.square()  # (L, G)
        excess = 1 / along - 1 / across[:, :, None]
        mean = torch.einsum("grd,gd->gr", directions, means)
        square = (mean.square() * excess).sum(2) + means.square().sum(1) / across
        log_volume = along.log().sum(2) + (means.shape[1] - variances.shape[1]) * across.log()
        terms = [
            -excess / 2,
            a[:, :, None] * mean * excess,
            (a / across)[:, :, None],
            (1 - 1 / across)[:, :, None] / 2,
            -(a.square() * square + log_volume)[:, :, None] / 2,
        ]
        fourth = (s / a)[:-1].pow(4)
        fade = fourth / (fourth + FADE**4)
        steps = fade[:, :, None] * torch.cat(terms, 2).diff(dim=0).neg()
        table = steps.flip(0).cumsum(0).flip(0)
        table = torch.cat([table, torch.zeros_like(table[:1])])
        table[:, :, -1] += self.log_weights.double()
        self._coefficients = table.to(self.means)
        variance = (s / a)[:-1, 0].square()
        sharpness = variance / (variance + self.temper.double())
        self._sharpness = torch.cat([sharpness, torch.ones_like(sharpness[:1])]).to(self.means)

    def read(self, x: Tensor) -> Read:
        """`x` (B, ...) as the base reads it."""
        with full_precision(x):
            x = x.flatten(1).to(self.means.dtype)
            along = (x @ self._rows.t()).unflatten(1, (len(self.means), -1))
            length = x.square().sum(1)[:, None, None].expand(-1, len(self.means), 1)
            terms = [along[:, :, :-1].square(), along, length, torch.ones_like(length)]
            return Read(x, along, torch.cat(terms, 2))

    def logits(self, read: Read) -> Tensor:
        """Logits in nats, (B, L), or (B, (L-1) K + 1) for several classes."""
        with full_precision(read.x):
            parts = torch.bmm(read.terms.transpose(0, 1), self._coefficients.permute(1, 2, 0))  # (G, B, L)
            of_class = parts.unflatten(0, (self.num_classes, -1)).logsumexp(1)  # (K, B, L)
            marginal = of_class.logsumexp(0)
            if self.num_classes == 1:
                return marginal
            joint = marginal + (self._sharpness * of_class).log_softmax(0)
            return torch.cat([joint[:, :, :-1].permute(1, 2, 0).flatten(1), marginal[:, -1:]], 1)

    def at_level(self, read: Read, level: Tensor) -> Tensor:
        """z[level], (B, K); meaningless at pure noise."""
        with full_precision(read.x):
            of_class = self.of_class(read, level)
            sharpness = self._sharpness[level][:, None]
            return of_class.logsumexp(1, keepdim=True) + (sharpness * of_class).log_softmax(1)

    def of_class(self, read: Read, level: Tensor) -> Tensor:
        """b_tc of `level` (B,) int64, (B, K)."""
        return self._of_class(self._parts(read, level))

    def gradient(self, read: Read, level: Tensor, class_weight: Tensor | None = None) -> Tensor:
        """`grad_x sum_c class_weight[c] (z_N - z[level, c])`, (B, d).

        `level` (B,) int64; `class_weight` (B, K); None for a weight of 1 on a single class.
        """
        with full_precision(read.x):
            parts = self._parts(read, level)
            of_class = self._of_class(parts)
            share = of_class.softmax(1)
            if class_weight is not None:
                sharpness, total = self._sharpness[level][:, None], class_weight.sum(1, keepdim=True)
                tempered = (sharpness * of_class).softmax(1)
                share = total * share + sharpness * (class_weight.to(share) - total * tempered)
            share = share[:, :, None] * parts.unflatten(1, (self.num_classes, -1)).softmax(2)
            share = share.flatten(1)
            table, rank = self._coefficients[level], self.variances.shape[1]  # (B, G, 2R+3)
            slope = table[:, :, rank:-2]
            quadratic = 2 * table[:, :, :rank] * read.along[:, :, :-1]
            slope = torch.cat([slope[:, :, :-1] + quadratic, slope[:, :, -1:]], 2)
            of_length = 2 * (share * table[:, :, -2]).sum(1, keepdim=True)
            return -((share[:, :, None] * slope).flatten(1) @ self._rows + of_length * read.x)

    def _parts(self, read: Read, level: Tensor) -> Tensor:
        """Q[level], (B, G)."""
        return (self._coefficients[level] * read.terms).sum(2)

    def _of_class(self, parts: Tensor) -> Tensor:
        """(..., G) -> (..., K): the log of the sum over the Gaussians of each class."""
        return parts.unflatten(-1, (self.num_classes, -1)).logsumexp(-1)
