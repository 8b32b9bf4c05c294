"""The additive constants of a CDM's logits, fitted to noised rows with all weights fixed.

The last batches of training leave noise in the constant of every logit, and so in every density and ratio.
Given the weights, the mean log posterior is concave in the constants; at its maximum the posteriors of each
logit, summed over the rows, equal the number of rows that belong to it. These are the equations of MBAR
(doi 10.1063/1.2978177), the maximum-likelihood estimate of normalisation from samples of all levels.

# n rows, L = T+2 noise levels, K classes, N = (L-1) K + 1 logits, P constants per level
"""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_fast.model.cdm import CDM
from cdm_fast.model.denoiser import like_network
from cdm_fast.nn import AdjointNetwork

Draw = Callable[[int, torch.Generator], tuple[Tensor, Tensor | None]]  # n -> x (n, d), label (n,) or None


class Rows(NamedTuple):
    """Logits of noised rows, and the true logit of each."""

    logits: Tensor  # (n, N)
    own: Tensor  # (n,) int64, the logit that each row belongs to


class Compared(NamedTuple):
    """Noised rows of levels t <= T, evaluated given every class."""

    score: Tensor  # (n, K) nats, `log p_t(x|c) + log p(c)` at the row's level, up to a constant for each row
    level: Tensor  # (n,) int64
    own: Tensor  # (n,) int64, the row's class


class Fit(NamedTuple):
    """Constants at the maximum of the log posterior of rows."""

    shift: Tensor  # (L-1, P) float64, nats
    stored: list[Rows]  # those of the rows that are kept


Scored = Callable[[int], Iterator[Rows]]  # number of rows -> the rows, chunk by chunk

# Rows whose logits are stored, rows evaluated at a time, and the fewest rows per logit.
STORED_ROWS, CHUNK, FEWEST_ROWS = 100_000, 4096, 10
NEWTON_STEPS, CONVERGED, LONGEST = 50, 1e-6, 1.0  # the last two in nats
LBFGS_STEPS = 500


@torch.no_grad()
def fit_constants(model: CDM, draw: Draw, num: int, generator: torch.Generator) -> None:
    """Refits only the biases of the head to `num` fresh rows, all levels equally often.

    Distant densities are compared through the levels between them, whose errors add up, so many rows are
    needed. Does nothing if a logit would have fewer than `FEWEST_ROWS` rows on average.

    Args:
        model: with an `AdjointNetwork`; changed in place.
        draw: returns fresh rows, (n, d) and their labels (n,) or None, for a batch size and a generator.
            Without labels the logits of a level share one constant, whatever the head.
        num: rows to draw.
        generator: of rows, levels and noise.
    """
    assert isinstance(model.network, AdjointNetwork)
    head = model.network.linear_layer
    if num < FEWEST_ROWS * head.out_features:
        return
    each = torch.ones(1, 1, dtype=torch.float64)
    shift = fit_shift(lambda n: _scored(model, draw, n, generator), num, each, STORED_ROWS).shift
    constants = torch.cat([shift[:, 0], shift.new_zeros(1)])
    if len(constants) == model.schedule.num_levels:
        head.shift(constants)
    else:
        head.shift_each(constants)


def fit_shift(
    score: Scored,
    num: int,
    basis: Tensor,  # (K, P); (1, 1) for a constant of each logit
    stored_rows: int,
) -> Fit:
    """The constants at the maximum of the log posterior of `num` rows, by Newton's method.

    The logits of up to `stored_rows` rows are kept and iterated over until convergence; further rows are
    evaluated once, for one last step over all rows, which from so close a start reaches the maximum.
    """
    first = min(num, stored_rows)
    stored = list(score(first))
    levels = (stored[0].logits.shape[1] - 1) // len(basis)
    shift = torch.zeros(levels, basis.shape[1], dtype=torch.float64)
    for _ in range(NEWTON_STEPS):
        step = newton_step(stored, shift, basis)
        shift += step
        if bool((step @ basis.T).abs().max() < CONVERGED):
            break
    if num > first:
        shift += newton_step(chain(stored, score(num - first)), shift, basis)
    return Fit(shift, stored)


def error_root(fit: Fit, num: int) -> Tensor:
    """(L-1, L-1) S, where `S S^T` is the covariance of the constants of a fit to `num` rows with P = 1.

    The covariance is `C^-1 J C^-1` with the curvature C and the covariance J of the gradient, whose rows were
    drawn at fixed numbers for each level (MBAR, see above).
    """
    levels, added = len(fit.shift), torch.cat([fit.shift[:, 0], fit.shift.new_zeros(1)])
    square = torch.zeros(levels, levels, dtype=torch.float64)
    total = torch.zeros(levels + 1, levels, dtype=torch.float64)  # of the rows of each level
    count = torch.zeros(levels + 1, dtype=torch.float64)
    for logits, own in fit.stored:
        posterior = (logits.double() + added).softmax(1)[:, :-1]
        square += posterior.T @ posterior
        total.index_add_(0, own, posterior)
        count += torch.bincount(own, minlength=levels + 1)
    curvature = torch.diag(total.sum(0)) - square
    gradient = square - (total.T / count.clamp(min=1)) @ total
    value, direction = torch.linalg.eigh(gradient)
    root = direction * value.clamp(min=0).sqrt()
    return torch.linalg.solve(curvature, root) * math.sqrt(float(count.sum()) / num)


def compare_classes(
    shift: Tensor,  # (K, L-1) float64
    errors: Tensor,  # (K, L-1, L-1) float64
    rows: Compared,
) -> Tensor:  # (K, L-1) float64
    """The constants of K classes, each fitted by itself, moved until rows are divided rightly among them.

    The errors of a class's own fit add up over the levels, to nats between small and large noise where they
    hardly overlap, and different ones in each class. So the log posterior of the classes given the level,
    summed over `rows`, is maximised together with the log density of the fits' errors, by L-BFGS.

    Args:
        shift: the constants of each class.
        errors: `error_root` of each class.
        rows: of all these classes, without these constants.
    """

    def loss() -> Tensor:
        optimizer.zero_grad()
        joined = score + moved()[:, rows.level].T
        total = F.cross_entropy(joined, rows.own, reduction="sum") + free.square().sum() / 2
        total.backward()
        return total

    def moved() -> Tensor:
        return start + (root @ free[:, :, None])[:, :, 0]

    with torch.inference_mode(False), torch.enable_grad():
        start, root, score = shift.clone(), errors.clone(), rows.score.double().clone()
        free = torch.zeros_like(start, requires_grad=True)
        optimizer = torch.optim.LBFGS([free], max_iter=LBFGS_STEPS, line_search_fn="strong_wolfe")
        optimizer.step(loss)
        return moved().detach()


def newton_step(rows: Iterable[Rows], shift: Tensor, basis: Tensor) -> Tensor:
    """The Newton step (L-1, P) at `shift`; the ratios of neighbouring levels change by at most `LONGEST`.

    The gradient is `B^T (own - p)` and the curvature `B^T (diag p - p p^T) B`, summed over rows, where p are
    the posteriors of all logits except pure noise, whose constant is fixed, and B is the basis of each level.
    """
    levels, size = shift.shape
    added = torch.cat([(shift @ basis.T).flatten(), shift.new_zeros(1)])
    count, expected = torch.zeros(2, len(added), dtype=torch.float64).unbind()
    square = torch.zeros(levels * size, levels * size, dtype=torch.float64)
    for logits, own in rows:
        posterior = (logits + added.to(logits)).softmax(1)
        count += torch.bincount(own, minlength=len(added))
        expected += posterior.sum(0, dtype=torch.float64)
        mean = (posterior[:, :-1].unflatten(1, (levels, len(basis))) @ basis.to(posterior)).flatten(1)
        square += (mean.T @ mean).double()
    gradient = (count - expected)[:-1].view(levels, len(basis)) @ basis
    blocks = torch.einsum("tc,ci,cj->tij", expected[:-1].view(levels, len(basis)), basis, basis)
    curvature = torch.block_diag(*blocks) - square
    solution = torch.linalg.lstsq(curvature, gradient.flatten(), driver="gelsd").solution.view(levels, size)
    longest = float((solution @ basis.T).diff(dim=0, append=shift.new_zeros(1, len(basis))).abs().max())
    return solution * min(1.0, LONGEST / longest) if longest > 0 else solution


def _scored(model: CDM, draw: Draw, num: int, generator: torch.Generator) -> Iterator[Rows]:
    """`num` fresh rows, `CHUNK` at a time, all levels equally often."""
    for first in range(0, num, CHUNK):
        x, label = draw(min(CHUNK, num - first), generator)
        level = torch.randperm(len(x), generator=generator) % model.schedule.num_levels
        noised = like_network(model, model.schedule.noise(x, level, generator=generator))
        if label is None:
            yield Rows(model.level_logits(noised), level)
            continue
        logits = model.logits(noised)
        own = level * model.joint_classes + label
        yield Rows(logits, own.clamp(max=logits.shape[1] - 1))
