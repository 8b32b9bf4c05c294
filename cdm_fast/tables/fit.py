"""Training of a small CDM on rows: two losses, early stopping on held-out rows, refitted constants.

# n rows, d columns, B batch, L = T+2 noise levels, K classes
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cdm_fast.model import CDM
from cdm_fast.model.constants import Draw, fit_constants
from cdm_fast.model.denoiser import like_network
from cdm_fast.model.losses import cdm_loss
from cdm_fast.tables.columns import Array
from cdm_fast.tables.mixture import Mixture
from cdm_fast.tables.network import table_network

Loss = Callable[[CDM, torch.Generator], Tensor]
Validate = Callable[[CDM], float]

# Most rows for the final fit of the logits' constants, and how often each row is used at most.
MOST_ROWS, MOST_VISITS = 2_000_000, 100
# The share of level 0 where two sets of rows are told apart, because that is where their ratio is read, and
# the weight of the contrast between rows and mixture.
LEVEL_0_SHARE, CONTRAST = 0.3, 0.3
# Warm-up steps of the learning rate, and the share of `max_iter` over which it decays to 0 at the end.
WARM_UP, FALL = 50, 0.3
# The share of the learning rate at which training resumes from the best weights, and the validation loss, in
# nats, below which it does not: two sets are then almost separable, and larger ratios always lower the loss.
CUT, SEPARABLE = 0.2, 0.1
# Validation uses weights averaged over about the last tenth of the steps.
AVERAGE = 0.1
# Steps between two validations, about an epoch, within these bounds.
FEWEST_STEPS, MOST_STEPS = 50, 100


@dataclass(frozen=True)
class Budget:
    """Sizes of network and training: the estimators' arguments, with defaults resolved."""

    hidden: int
    depth: int
    num_levels: int
    max_iter: int
    batch_size: int
    learning_rate: float
    alpha: float
    tol: float
    n_iter_no_change: int
    verbose: int


@dataclass
class History:
    """The history of one training.

    Fields:
        n_iter: steps taken.
        best_iter: step of the weights that were kept; 0 for the initial weights.
        loss_curve: mean training loss between two validations.
        validation_scores: minus the validation loss at every validation, the first before any step; empty
            without validation.
    """

    n_iter: int = 0
    best_iter: int = 0
    loss_curve: list[float] = field(default_factory=list)
    validation_scores: list[float] = field(default_factory=list)


def density_loss(draw: Draw, batch_size: int, level_weight: float, dim: int) -> Loss:
    """`level_weight / d` times the cross-entropy over levels, plus the denoising error (CDM Alg. 1)."""

    def loss(model: CDM, generator: torch.Generator) -> Tensor:
        x, label = draw(batch_size, generator)
        return cdm_loss(model, x, label=label, ce_weight=level_weight / dim, generator=generator).loss

    return loss


def with_contrast(loss: Loss, draw: Draw, mixture: Mixture, batch_size: int) -> Loss:
    """`loss` plus `CONTRAST` times that of telling rows from draws of the mixture by the learned correction.

    It is the logistic loss at random levels (Gutmann and Hyvarinen, 2010), for a network with a
    `MixtureHead`. Between the rows the loss of a CDM says little, and a correction that grows there makes
    mass where there is none.
    """

    def contrasted(model: CDM, generator: torch.Generator) -> Tensor:
        value = loss(model, generator)
        both = torch.cat([draw(batch_size, generator)[0], mixture.draw(batch_size, generator).float()])
        level = torch.randint(model.schedule.num_levels - 1, (len(both),), generator=generator)
        at_data = torch.rand(len(both), generator=generator) < LEVEL_0_SHARE
        level = torch.where(at_data, 0, level)
        correction = table_network(model).correction(_noised(model, both, level, generator))
        of_rows, of_mixture = correction.gather(1, level[:, None])[:, 0].split(batch_size)
        return value + CONTRAST * (F.softplus(-of_rows).mean() + F.softplus(of_mixture).mean()) / 2

    return contrasted


def ratio_loss(draw: Draw, batch_size: int) -> Loss:
    """Cross-entropy over (level, class) pairs, plus that over classes given the level.

    There is no denoising error: the ratio of two classes needs no sampler, and a step without input gradients
    costs half as much.
    """

    def loss(model: CDM, generator: torch.Generator) -> Tensor:
        x, label = draw(batch_size, generator)
        assert label is not None
        level = model.draw_levels(len(x), generator)
        logits, classes = model.network(_noised(model, x, level, generator)), model.joint_classes
        entry = (level * classes + label).clamp(max=logits.shape[1] - 1)
        joint = logits[:, :-1].unflatten(1, (-1, classes))
        at_level = joint[torch.arange(len(x)), level.clamp(max=model.schedule.T)]
        known = torch.where(level <= model.schedule.T, label, -1)
        of_class = F.cross_entropy(at_level, known, ignore_index=-1, reduction="sum") / len(x)
        return F.cross_entropy(logits, entry) + of_class

    return loss


def _noised(model: CDM, x: Tensor, level: Tensor, generator: torch.Generator) -> Tensor:
    return model.schedule.noise(x, level, generator=generator)


def level_validation(rows: Tensor, generator: torch.Generator, num: int = 4096) -> Validate:
    """Mean cross-entropy of the level over about `num` fixed noised copies of `rows` (m, d), in nats.

    All levels have equal weight. The minimum is at the true densities, and normalisation counts as well as
    shape: a diverged network has a large loss, however high its densities are.
    """
    seed = int(torch.randint(2**62, (1,), generator=generator))

    @torch.no_grad()
    def validate(model: CDM) -> float:
        draws = torch.Generator().manual_seed(seed)
        repeats = max(1, num // len(rows))
        x = rows.float().repeat(repeats, 1)
        level = torch.randperm(len(x), generator=draws) % model.schedule.num_levels
        logits = model.level_logits(like_network(model, _noised(model, x, level, draws)))
        return float(F.cross_entropy(logits, level))

    return validate


@dataclass(frozen=True)
class ClassValidation:
    """Logistic loss of the class at level 0, in nats, with equal total weight for both sets (m, d)."""

    numerator: Tensor
    denominator: Tensor
    numerator_weights: Array | None = None
    denominator_weights: Array | None = None

    @torch.no_grad()
    def __call__(self, model: CDM) -> float:
        first, second = (_level_0_log_ratio(model, z.float()) for z in (self.numerator, self.denominator))
        missed = np.average(F.softplus(-first).numpy(), weights=self.numerator_weights)
        mistaken = np.average(F.softplus(second).numpy(), weights=self.denominator_weights)
        return float(missed + mistaken) / 2

    def margin(self, loss: float) -> float:
        """What an initial loss must be lowered by: for almost separable sets its standard error, else 0.

        Such a loss is that of few rows, of about one nat each, and the lowest of many validations is a matter
        of chance.
        """
        rows = 2 * min(len(self.numerator), len(self.denominator))
        return math.sqrt(loss / rows) if loss < SEPARABLE else 0.0


def _level_0_log_ratio(model: CDM, z: Tensor) -> Tensor:
    logits = model.network(z)
    return logits[:, 1] - logits[:, 0]


@torch.inference_mode(False)
@torch.enable_grad()
def train(
    model: CDM,
    loss: Loss,
    validate: Validate | None,
    budget: Budget,
    generator: torch.Generator,
    rows: int,
    cuts: int = 0,
) -> History:
    """Adam on `loss`; leaves the best weights in `model`, in fp64.

    The result is a running average of the weights. With `validate` the average is validated about once an
    epoch, first before any step. After `n_iter_no_change` validations without an improvement by `tol`
    training ends, but the first `cuts` times it resumes from the best weights at a fifth of the learning
    rate, unless the loss is below `SEPARABLE`. The best weights are kept, which may be the initial ones, also
    if the others are better by less than `ClassValidation.margin`.
    Without `validate`, all `max_iter` steps are taken. The result depends only on the arguments, not on
    torch's global generator or grad mode.
    """
    parameters = list(model.network.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=budget.learning_rate, betas=(0.9, 0.99), weight_decay=budget.alpha, fused=True
    )
    average, judge = _Average(parameters), _Judge(model, validate, budget)
    history = judge.history
    judge(0)
    every = min(max(rows // budget.batch_size, FEWEST_STEPS), MOST_STEPS, budget.max_iter)
    total, rate = 0.0, budget.learning_rate
    for step in range(1, budget.max_iter + 1):
        optimizer.param_groups[0]["lr"] = rate * _rate(step, budget.max_iter)
        optimizer.zero_grad()
        value = loss(model, generator)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update(step)
        total += float(value.detach())
        if step % every and step < budget.max_iter:
            continue
        history.loss_curve.append(total / (step % every or every))
        total = 0.0
        with average.in_place():
            judge(step)
        if budget.verbose:
            _tell(step, budget.max_iter, history)
        over = judge.stalled and (not cuts or judge.lowest < SEPARABLE)
        if over or not math.isfinite(history.loss_curve[-1]):
            break
        if judge.stalled:
            cuts, rate = cuts - 1, rate * CUT
            judge.resume_best()
            average.restart()
    history.n_iter = step
    if validate is None:
        history.best_iter = step
        average.copy_to(parameters)
    else:
        judge.keep_best()
    model.eval().double()
    return history


def _rate(step: int, max_iter: int) -> float:
    """The factor of the learning rate at a step, 1..max_iter."""
    fall = min(1.0, (max_iter - step + 1) / (FALL * max_iter))
    return min(1.0, step / WARM_UP) * fall


def _tell(step: int, max_iter: int, history: History) -> None:
    judged = f"  validation {-history.validation_scores[-1]:.4f}" if history.validation_scores else ""
    print(f"step {step}/{max_iter}  loss {history.loss_curve[-1]:.4f}{judged}", file=sys.stderr)


class _Average:
    """Weights averaged over about the last tenth of the steps: `w <- w + (new - w) / (1 + AVERAGE step)`."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.parameters = parameters
        self.mean = [p.detach().clone() for p in parameters]
        self.kept: list[Tensor] = []

    @torch.no_grad()
    def update(self, step: int) -> None:
        torch._foreach_lerp_(self.mean, [p.detach() for p in self.parameters], 1 / (1 + AVERAGE * step))

    @torch.no_grad()
    def restart(self) -> None:
        """Sets the averages to the parameters."""
        for value, parameter in zip(self.mean, self.parameters, strict=True):
            value.copy_(parameter)

    def in_place(self) -> "_Average":
        """A context in which the parameters are the averages."""
        return self

    @torch.no_grad()
    def __enter__(self) -> None:
        self.kept = [p.detach().clone() for p in self.parameters]
        self.copy_to(self.parameters)

    @torch.no_grad()
    def __exit__(self, *raised: object) -> None:
        for parameter, value in zip(self.parameters, self.kept, strict=True):
            parameter.copy_(value)

    @torch.no_grad()
    def copy_to(self, parameters: list[torch.nn.Parameter]) -> None:
        for parameter, value in zip(parameters, self.mean, strict=True):
            parameter.copy_(value)


class _Judge:
    """The weights with the lowest validation loss, and the number of validations without improvement."""

    def __init__(self, model: CDM, validate: Validate | None, budget: Budget) -> None:
        self.model, self.validate, self.budget = model, validate, budget
        self.parameters = list(model.network.parameters())
        self.history, self.waited = History(), 0
        self.lowest = self.milestone = self.ceiling = math.inf
        self.weights: list[Tensor] = []

    def __call__(self, step: int) -> None:
        """Validates the weights after `step` steps."""
        if self.validate is None:
            return
        loss = self.validate(self.model)
        self.history.validation_scores.append(-loss)
        self.waited = 0 if loss < self.milestone - self.budget.tol else self.waited + 1
        self.milestone = loss if self.waited == 0 else self.milestone
        if loss < min(self.lowest, self.ceiling) or not self.weights:
            if not self.weights and isinstance(self.validate, ClassValidation):
                self.ceiling = loss - self.validate.margin(loss)
            self.lowest = min(self.lowest, loss)  # the first may be NaN, which leaves it as it is
            self.history.best_iter = step
            self.weights = [p.detach().clone() for p in self.parameters]

    @property
    def stalled(self) -> bool:
        """True after `n_iter_no_change` validations without improvement."""
        return self.waited >= self.budget.n_iter_no_change

    def resume_best(self) -> None:
        """Puts the best weights into the model and counts anew."""
        self.keep_best()
        self.waited = 0

    @torch.no_grad()
    def keep_best(self) -> None:
        for parameter, value in zip(self.parameters, self.weights, strict=True):
            parameter.copy_(value)


def refit_constants(
    model: CDM, draw: Draw, history: History, budget: Budget, rows: int, generator: torch.Generator
) -> None:
    """`fit_constants` on as many rows as training saw, unless the initial weights were kept.

    Each row of a small table is used at most `MOST_VISITS` times.
    """
    num = min(MOST_ROWS, history.best_iter * budget.batch_size, MOST_VISITS * rows)
    if num:
        fit_constants(model, draw, num, generator)
