"""Scores of every class for every image, and the methods that a model supports.

# B batch, n images, K classes, d = C*H*W
"""

from functools import partial
from typing import get_args

import torch
from torch import Tensor

from cdm_fast.config.choices import ClassifyMethod
from cdm_fast.errors import UserError
from cdm_fast.host.distributed import by_rows, in_turn
from cdm_fast.likelihood.given import num_classes_of
from cdm_fast.likelihood.ode import flow_log_prob
from cdm_fast.model import CDM, Denoiser, evaluation_mode
from cdm_fast.model.cdm import require_likelihood
from cdm_fast.model.classifier import Classifier
from cdm_fast.model.schedule import evenly_spaced


@evaluation_mode
def ode_log_prob_classes(
    model: Denoiser,
    x: Tensor,  # (B, C, H, W), dequantised
    num_classes: int,
    tolerance: float = 1e-5,
    probes: int | None = None,
    seed: int = 0,
) -> Tensor:  # (B, K)
    """`log p(x|c)` in nats, float64, by the probability-flow ODE of each class, with the same probes for all.

    Arguments and errors as in `flow_log_prob` (arXiv 2110.00473).
    """

    def of_class(c: int) -> Tensor:
        label = torch.full((len(x),), c, device=x.device)
        flow = flow_log_prob(model, x, tolerance=tolerance, probes=probes, seed=seed, label=label)
        return flow.log_prob.cpu()

    return torch.stack(in_turn(of_class, range(num_classes)), dim=1)


@evaluation_mode
def denoising_scores(
    model: Denoiser,
    x: Tensor,  # (B, C, H, W), dequantised
    num_classes: int,
    trials: int,
    generator: torch.Generator,
) -> Tensor:  # (B, K)
    """`-mean_i |eps_hat(x_i, t_i, c) - eps_i|^2` of each class, over `trials` pairs of level and noise.

    The levels are evenly spaced over 1..T with equal weights, and every class uses the same pairs, so that
    the error common to all classes cancels (arXiv 2303.16203, section 3).
    """
    levels = evenly_spaced(1, model.schedule.T, trials)
    total = torch.zeros(len(x), num_classes, dtype=torch.float64, device=x.device)
    for trial in range(trials):
        t = levels[trial % len(levels)]
        eps = torch.randn(x.shape, generator=generator).to(x)
        total += by_rows(partial(_class_errors, model, num_classes, t), torch.stack([x, eps], dim=1))
    return -total / trials


def _class_errors(model: Denoiser, num_classes: int, t: int, x_and_eps: Tensor) -> Tensor:
    """`|eps_hat(x_t, t, c) - eps|^2` (B, K) from pairs of x and eps (B, 2, C, H, W)."""
    x, eps = x_and_eps.unbind(1)
    label = torch.arange(num_classes, device=x.device).repeat_interleave(len(x))
    noisy = model.schedule.noise(x, t, eps).repeat(num_classes, *[1] * (x.dim() - 1))
    error = model.denoise(noisy, t, label).unflatten(0, (num_classes, -1)) - eps
    return error.double().square().flatten(2).sum(2).T


def require_classes(model: Denoiser) -> int:
    """K, the number of the model's classes; raises UserError for a model without classes."""
    num_classes = num_classes_of(model)
    if num_classes is None:
        raise UserError(
            "this model was trained without classes: train with --conditioning joint or embedding"
        )
    return num_classes


def require_posterior(model: CDM | Classifier) -> None:
    """Raises UserError unless the model gives `log p(c|x)`: a CDM with classes, or a `Classifier`."""
    if not isinstance(model, Classifier):
        require_likelihood(model)
    require_classes(model)


def fitting_method(model: Denoiser, method: ClassifyMethod | None = None) -> ClassifyMethod:
    """`method`, or by default the model's own.

    Raises UserError for an unknown method, and for one that the model does not support.
    """
    own: ClassifyMethod = model.conditioning if isinstance(model, CDM) else "denoising"
    if isinstance(model, Classifier):
        own = "discriminative"
    if method is None:
        return own
    if method not in get_args(ClassifyMethod):
        raise UserError(f"unknown method {method!r}: choose one of {', '.join(get_args(ClassifyMethod))}")
    if method != own and "discriminative" in (method, own):
        raise UserError(
            f"--method {method} does not fit: a run of --objective classifier takes discriminative, and no"
            " other run does"
        )
    if method in ("joint", "embedding") and method != own:
        if own == "denoising":
            raise UserError(
                f"--method {method} reads likelihoods off logits, and this is a plain denoising model (DDM):"
                " give denoising or ode"
            )
        raise UserError(
            f"--method {method} does not fit a run of --conditioning {own}: give {own}, denoising or ode"
        )
    return method
