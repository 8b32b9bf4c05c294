"""The additive constants of a CDM's logits, fitted after training with all weights fixed.

# B batch, L = T+2 noise levels, K classes
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import torch
from torch import Tensor

from cdm_fast.model.cdm import CDM
from cdm_fast.model.denoiser import like_network
from cdm_fast.nn import AdjointNetwork

Draw = Callable[[int, torch.Generator], tuple[Tensor, Tensor | None]]  # B -> x (B, d), label (B,) or None

# Rows whose logits are stored, rows evaluated at a time, and the fewest rows per logit.
STORED_ROWS, CHUNK, FEWEST_ROWS = 100_000, 4096, 10
NEWTON_STEPS = 20


@torch.no_grad()
def fit_constants(model: CDM, draw: Draw, num: int, generator: torch.Generator) -> None:
    """Refits only the biases of the head, by maximising the mean log posterior of `num` fresh rows.

    The last batches of training leave noise in the constant of every logit, and so in every density and
    ratio. With the weights fixed the problem is concave, and Newton's method solves it over many rows at
    once. At the solution each logit's posteriors, summed over all rows, equal the number of rows drawn from
    it. These are the equations of MBAR (doi 10.1063/1.2978177), the maximum-likelihood estimate of the
    levels' normalisation from samples of all levels.

    Newton's method runs to convergence on up to `STORED_ROWS` rows, followed by one step on all rows, each
    evaluated once; from so close a start one step reaches the maximum. Distant densities are compared through
    the levels between them, whose errors add up, so many rows are needed.

    Does nothing if a logit would have fewer than `FEWEST_ROWS` rows on average.

    Args:
        model: with an `AdjointNetwork`; changed in place.
        draw: returns fresh rows, (B, d) and their labels (B,) or None, for a batch size and a generator.
            Without labels the logits of a level share one constant, whatever the head.
        num: rows to draw.
        generator: of rows, levels and noise.
    """
    assert isinstance(model.network, AdjointNetwork)
    head = model.network.linear_layer
    if num < FEWEST_ROWS * head.out_features:
        return
    first = min(num, STORED_ROWS)
    stored = list(_scored(model, draw, first, generator))
    constants = torch.zeros(stored[0][0].shape[1], dtype=torch.float64)
    for _ in range(NEWTON_STEPS):
        step = _newton_step(stored, constants)
        constants += step
        if bool(step.abs().max() < 1e-6):
            break
    if num > first:
        constants += _newton_step(chain(stored, _scored(model, draw, num - first, generator)), constants)
    if len(constants) == model.schedule.num_levels:
        head.shift(constants)
    else:
        head.shift_each(constants)


def _scored(model: CDM, draw: Draw, num: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """(logits, index of the true logit) for `num` fresh rows, `CHUNK` at a time, all levels equally often."""
    for first in range(0, num, CHUNK):
        x, label = draw(min(CHUNK, num - first), generator)
        level = torch.randperm(len(x), generator=generator) % model.schedule.num_levels
        noised = like_network(model, model.schedule.noise(x, level, generator=generator))
        if label is None:
            yield model.level_logits(noised), level
            continue
        logits = model.logits(noised)
        yield logits, (level * model.joint_classes + label).clamp(max=logits.shape[1] - 1)


def _newton_step(scored: Iterable[tuple[Tensor, Tensor]], constants: Tensor) -> Tensor:
    """The step of every constant, (outputs,), clipped to [-1, 1]; that of pure noise is fixed at 0."""
    gradient, curvature = torch.zeros_like(constants), constants.new_zeros(2 * [len(constants)])
    for logits, own in scored:
        posterior = (logits + constants.to(logits.dtype)).softmax(1)
        expected = posterior.sum(0).double()
        gradient += torch.bincount(own, minlength=len(constants)) - expected
        curvature += expected.diag() - (posterior.T @ posterior).double()
    step = torch.linalg.lstsq(curvature[:-1, :-1], gradient[:-1], driver="gelsd").solution
    return torch.cat([step.clamp(-1, 1), step.new_zeros(1)])
