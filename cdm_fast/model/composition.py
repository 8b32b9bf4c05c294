"""Compositions of densities: products, mixtures and negations of models, or of the classes of one model.

A composition is an `Energy` like a CDM: it has `denoise`, `score` and `log_prob` at every level, up to a
constant per level, but no logits. Adding noise and composing do not commute: the product of two noised
densities is not the noised density of the product, so no combination of the parts' denoisers is the denoiser
of the product, and a plain sampler draws from a different density (arXiv 2302.11552). The densities that a
composition defines at the levels form a path from N(0, I) to the composition itself at level 0. The samplers
`mala` and `smc` are exact on this path.

# B batch, L = T+2 noise levels, N parts
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cdm_fast.errors import UserError
from cdm_fast.host.device import upload
from cdm_fast.model.cdm import CDM
from cdm_fast.model.conditioned import OfClass, refuse_label
from cdm_fast.model.energy import Energy, log_normal

WeightedScore = Callable[[Tensor], Tensor]  # weights (B, n) of n densities -> sum_i w_i score_i, like x


class Composition(Energy):
    """The base of `Product` and `Mixture`: N parts on one schedule, with a weight for each.

    Args:
        parts: N densities: CDMs, single classes of a CDM (`OfClass`), or other compositions.
        weights: N numbers.

    Raises:
        UserError: no parts, parts of different schedules or shapes, or not one finite weight for each.
    """

    weights: Tensor

    def __init__(self, parts: Sequence[Energy], weights: Sequence[float]) -> None:
        if not parts:
            raise UserError("a composition needs at least one part")
        first = parts[0]
        super().__init__(nn.ModuleList(parts), first.schedule, first.input_shape)
        for part in parts:
            if not isinstance(part, Energy):
                raise UserError(
                    f"a {type(part).__name__} knows no log p(x) and cannot be composed: give CDMs"
                )
            same = torch.equal(part.schedule.a, first.schedule.a) and torch.equal(
                part.schedule.s, first.schedule.s
            )
            if not same or part.input_shape != first.input_shape:
                raise UserError(
                    "the parts of a composition must share the noise schedule and the input shape"
                )
        if len(weights) != len(parts) or not all(math.isfinite(w) for w in weights):
            raise UserError(f"weights {tuple(weights)}: give a finite one for each of the {len(parts)} parts")
        self.parts = list(parts)
        self.register_buffer("weights", torch.tensor(weights, dtype=torch.float64))

    def log_prob_levels(self, x: Tensor, *, label: Tensor | None = None) -> Tensor:
        """Log-density of the composition at every level in nats, up to a constant per level, (B, L) float64.

        Raises UserError for a label.
        """
        refuse_label(label)
        return self._of_leaves(x, _read(self._leaves(), x)[0])

    def log_prob_levels_and_score(
        self, x: Tensor, level: int | Tensor, label: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As in `Energy`. Each model is evaluated once, even if several of its joint classes take part.

        Raises UserError for a label.
        """
        refuse_label(label)
        level = self.schedule.levels(level, x)
        log_prob, weighted_score = _read(self._leaves(), x, level)

        def at_level(x: Tensor, log_prob: Tensor) -> tuple[Tensor, Tensor]:
            composed = self._of_leaves(x, log_prob)
            return composed.gather(1, level[:, None]).sum(), composed

        # The chain rule: autograd sees only the few numbers per image that are composed, not the networks.
        (own, weight), composed = torch.func.grad(at_level, argnums=(0, 1), has_aux=True)(x, log_prob)
        weight = weight.gather(1, level[:, None, None].expand(-1, 1, weight.shape[2])).squeeze(1)
        return composed, weighted_score(weight) + own

    def _leaves(self) -> list[Energy]:
        """The N' parts that are not compositions themselves, in order."""
        each = (part._leaves() if isinstance(part, Composition) else [part] for part in self.parts)
        return [leaf for leaves in each for leaf in leaves]

    def _of_leaves(self, x: Tensor, log_prob: Tensor) -> Tensor:
        """(B, L) log-density at every level, from those of the leaves (B, L, N')."""
        counts = [len(part._leaves()) if isinstance(part, Composition) else 1 for part in self.parts]
        each = zip(self.parts, log_prob.split(counts, dim=2), strict=True)
        found = [
            part._of_leaves(x, own) if isinstance(part, Composition) else own[:, :, 0] for part, own in each
        ]
        return self._compose(x, torch.stack(found, dim=2))

    def _compose(self, x: Tensor, log_prob: Tensor) -> Tensor:
        """(B, L) log-density at every level, from those of the parts (B, L, N)."""
        raise NotImplementedError


class Product(Composition):
    """A product of powers of densities: at level 0, `q(x) = prod_i p_i(x)^{w_i}` up to a constant.

    At level t, `log q_t(x) = sum_i w_i log p_i,t(x) + (1 - sum_i w_i) s_t^2 log N(x; 0, I)`, up to a constant
    per level. The last term only chooses the path to level 0: it makes level T+1 N(0, I), whatever the
    weights, and keeps quotients integrable. A negative weight divides by the density; see `negation`.

    See also `Mixture`, and `sampling.MALA`, which draws from a product.

    Args:
        parts: the densities.
        weights: w_i, 1 by default.

    Raises:
        UserError: no parts, parts of different schedules or shapes, or not one finite weight for each.

    >>> from cdm_fast import CDM, MLP, NoiseSchedule
    >>> schedule = NoiseSchedule.uniform(T=10)
    >>> one, two = (CDM(MLP(2, schedule.num_levels, hidden=8), schedule) for _ in range(2))
    >>> x = torch.zeros(3, 2)
    >>> both = Product([one, two]).log_prob(x)
    >>> torch.allclose(both, (one.log_prob(x) + two.log_prob(x)).double())
    True
    """

    def __init__(self, parts: Sequence[Energy], weights: Sequence[float] | None = None) -> None:
        super().__init__(parts, [1.0] * len(parts) if weights is None else weights)

    def _compose(self, x: Tensor, log_prob: Tensor) -> Tensor:
        log_prob = log_prob.double()
        reference = log_normal(x.double())[:, None] * self.s.double() ** 2
        return log_prob @ self.weights.double() + (1 - float(self.weights.sum())) * reference


class Mixture(Composition):
    """The mixture of densities, `q_t(x) = sum_i w_i p_i,t(x)`.

    Its density at each level is exactly that of the noised mixture; no other composition has this property.
    The normalisation of the parts matters: a model whose density integrates to 2 gets twice its weight.

    Args:
        parts: the densities.
        weights: w_i, positive, up to a common factor; equal by default.

    Raises:
        UserError: as in `Product`, or for a weight that is not positive.

    >>> from cdm_fast import CDM, MLP, NoiseSchedule
    >>> schedule = NoiseSchedule.uniform(T=10)
    >>> model = CDM(MLP(2, schedule.num_levels, hidden=8), schedule)
    >>> x = torch.zeros(3, 2)
    >>> torch.allclose(Mixture([model, model]).log_prob(x).float(), model.log_prob(x))
    True
    """

    def __init__(self, parts: Sequence[Energy], weights: Sequence[float] | None = None) -> None:
        weights = [1.0] * len(parts) if weights is None else weights
        if not all(weight > 0 for weight in weights):
            raise UserError(f"weights {tuple(weights)}: those of a mixture must be positive")
        super().__init__(parts, [weight / sum(weights) for weight in weights])

    def _compose(self, x: Tensor, log_prob: Tensor) -> Tensor:
        return (log_prob.double() + self.weights.double().log()).logsumexp(2)


def negation(keep: Energy, avoid: Energy, strength: float = 1.0) -> Product:
    """`keep` but not `avoid`: `p_keep(x) / p_avoid(x)^strength` (arXiv 2206.01714), up to a constant.

    It is integrable only if `avoid` has heavier tails than `keep`, or `strength` is small enough.
    Raises UserError unless `strength` is positive, and as in `Product`.
    """
    if not strength > 0:
        raise UserError(f"strength is {strength}: give a positive number")
    return Product([keep, avoid], [1.0, -strength])


def _read(leaves: Sequence[Energy], x: Tensor, level: Tensor | None = None) -> tuple[Tensor, WeightedScore]:
    """The leaves' log-densities (B, L, N') and their weighted scores at `level`; without a level, no scores.

    Classes of one joint model, and that model itself, share one evaluation.
    """
    columns: dict[Energy, list[int]] = {}
    for column, leaf in enumerate(leaves):
        columns.setdefault(_source(leaf), []).append(column)
    read = [_read_source(source, [leaves[i] for i in own], x, level) for source, own in columns.items()]
    order = [column for own in columns.values() for column in own]
    back = sorted(range(len(order)), key=order.__getitem__)

    def weighted_score(weight: Tensor) -> Tensor:
        pieces = weight[:, order].to(x.dtype).split([len(own) for own in columns.values()], dim=1)
        scores = (of_source(piece) for (_, of_source), piece in zip(read, pieces, strict=True))
        return sum(scores, torch.zeros_like(x))

    return torch.cat([log_prob for log_prob, _ in read], dim=2)[:, :, back], weighted_score


def _source(leaf: Energy) -> Energy:
    """The model to evaluate for a leaf: the joint model for each of its classes, else the leaf."""
    model = leaf.model if isinstance(leaf, OfClass) else leaf
    return model if isinstance(model, CDM) and model.conditioning == "joint" else leaf


def _read_source(
    source: Energy, leaves: Sequence[Energy], x: Tensor, level: Tensor | None
) -> tuple[Tensor, WeightedScore]:
    """`_read` of leaves with the same source."""
    if isinstance(source, CDM) and source.conditioning == "joint":
        each, pull = source.log_prob_levels_each_and_pullback(x)
        marginal = source.joint_classes  # the column after those of the classes
        columns = [leaf.label if isinstance(leaf, OfClass) else marginal for leaf in leaves]

        def of_classes(weight: Tensor) -> Tensor:
            assert level is not None
            of_columns = weight.new_zeros(len(x), marginal + 1)
            return pull(level, of_columns.index_add(1, upload(torch.tensor(columns), x.device), weight))

        return each[:, :, columns], of_classes
    if level is None:
        log_prob, score = source.log_prob_levels(x), torch.zeros_like(x)
    else:
        log_prob, score = source.log_prob_levels_and_score(x, level)
    return (
        log_prob[:, :, None].expand(-1, -1, len(leaves)),
        lambda weight: weight.sum(1).view(-1, *[1] * (x.dim() - 1)) * score,
    )
