"""Constants of a CDM's logits, fitted last with all weights held.

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

# Rows that are stored, rows at a time, and the fewest for each logit.
STORED_ROWS, CHUNK, FEWEST_ROWS = 100_000, 4096, 10
NEWTON_STEPS = 20


@torch.no_grad()
def fit_constants(model: CDM, draw: Draw, num: int, generator: torch.Generator) -> None:
    """Refits the head's biases alone, to `num` fresh rows: the maximum of their mean log posterior.

    The last batches leave their noise in the constant of every logit, and so in every density and ratio. With
    the weights held the problem is concave, and Newton's method solves it over many rows at once. Then the
    posteriors of a logit, summed over rows, are the number of rows that are its own: the equations of MBAR
    (doi 10.1063/1.2978177), the best that samples of all levels say of the levels' normalisation.

    Newton's method converges on up to `STORED_ROWS` rows; one more step looks at all of them, each once. From
    so near a start a single step is as good as the maximum itself. Densities far apart meet only through the
    levels between them, whose errors add up, so the rows must be many.

    Does nothing where a logit would have fewer than `FEWEST_ROWS` rows of its own on average.
    """
    assert isinstance(model.network, AdjointNetwork)
    head = model.network.linear_layer
    if num < FEWEST_ROWS * head.out_features:
        return
    first = min(num, STORED_ROWS)
    stored = list(_scored(model, draw, first, generator))
    constants = torch.zeros(head.out_features, dtype=torch.float64)
    for _ in range(NEWTON_STEPS):
        step = _newton_step(stored, constants)
        constants += step
        if bool(step.abs().max() < 1e-6):
            break
    if num > first:
        constants += _newton_step(chain(stored, _scored(model, draw, num - first, generator)), constants)
    head.shift_each(constants)


def _scored(model: CDM, draw: Draw, num: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """(logits, own entry) of `num` fresh rows, each level as often as any other, `CHUNK` at a time."""
    for first in range(0, num, CHUNK):
        x, label = draw(min(CHUNK, num - first), generator)
        level = torch.randperm(len(x), generator=generator) % model.schedule.num_levels
        a, s = model.amplitudes(level, x)
        noise = torch.randn(x.shape, generator=generator)
        logits = model.logits(like_network(model, a * x + s * noise))
        entry = level if label is None else level * model.joint_classes + label
        yield logits, entry.clamp(max=logits.shape[1] - 1)


def _newton_step(scored: Iterable[tuple[Tensor, Tensor]], constants: Tensor) -> Tensor:
    """The step of every constant, (outputs,), in [-1, 1]; pure noise keeps 0, for one constant is free."""
    gradient, curvature = torch.zeros_like(constants), constants.new_zeros(2 * [len(constants)])
    for logits, own in scored:
        posterior = (logits + constants.to(logits.dtype)).softmax(1)
        expected = posterior.sum(0).double()
        gradient += torch.bincount(own, minlength=len(constants)) - expected
        curvature += expected.diag() - (posterior.T @ posterior).double()
    step = torch.linalg.lstsq(curvature[:-1, :-1], gradient[:-1], driver="gelsd").solution
    return torch.cat([step.clamp(-1, 1), step.new_zeros(1)])
