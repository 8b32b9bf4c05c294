"""Samplers: from noise to images, one visible loop per algorithm.

Legend: B batch, t a level, t_prev the next one towards data, a = a[t], s = s[t], sigma = s/a.

Every loop runs from level T down to level 0, where it returns x0_hat, and starts from x ~ N(0, I). Level T
still holds a little signal, so the exact start is N(a_T E[x_0], a_T^2 Cov[x_0] + s_T^2 I): the difference is
of order a_T (0.1 for `uniform` at T = 200, 0.001 for `ot` at T = 1000) and vanishes as T grows.

The second-order samplers spread their steps evenly over log-SNR by default: on closed-form data they show
their order only there (over the level index the first steps are too long), while the others lose by it.

These samplers use `schedule`, `denoise` and `predict_x0` of a model and nothing else, so a wrapper that
changes what they return (`Guided`) needs no sampler of its own. The two of `corrected.py` use `log p_t` too.
"""

from collections.abc import Callable
from functools import partial
from math import expm1, isfinite, prod, sqrt
from typing import Literal

import torch
from torch import Tensor

from cdm_fast.corrected import CORRECTED, MoveLog, prepare
from cdm_fast.errors import UserError
from cdm_fast.host.device import upload
from cdm_fast.host.distributed import gather_rows, share
from cdm_fast.model import Denoiser, Energy, measures, prototype
from cdm_fast.model.conditioned import Guided, GuidedEnergy
from cdm_fast.model.schedule import Spacing
from cdm_fast.nn.working import cast_weights
from cdm_fast.ops.image_noise import image_normals, image_words

Noise = Callable[[], Tensor]  # each call: fresh N(0, I) of the batch's shape


def ddpm(
    model: Denoiser,
    x: Tensor,  # (B, ...) at level T
    noise: Noise,
    steps: int,
    label: Tensor | None = None,  # (B,) int64
    spacing: Spacing = "level",
) -> Tensor:
    """Ancestral sampling: x_prev ~ q(x_prev | x_t, x0_hat), the exact posterior for strides of any length.

    With `x_t = r x_prev + sqrt(v) z`, `r = a/a_prev`, `v = s^2 - r^2 s_prev^2` it is Gaussian with mean
    `a_prev (v/s^2) x0_hat + r (s_prev^2/s^2) x_t` and variance `v s_prev^2/s^2`; for a variance-preserving
    schedule, DDPM eqs. 6-7 (arXiv 2006.11239). `ddim` with eta = 1 draws from the same law.
    """
    a, s = model.schedule.a.tolist(), model.schedule.s.tolist()
    for t, t_prev in model.schedule.pairs(steps, spacing):
        x0_hat = model.predict_x0(x, t, label)
        r = a[t] / a[t_prev]
        v = s[t] ** 2 - (r * s[t_prev]) ** 2
        x = a[t_prev] * (v / s[t] ** 2) * x0_hat + r * (s[t_prev] / s[t]) ** 2 * x
        if t_prev > 0:
            x = x + sqrt(v) * (s[t_prev] / s[t]) * noise()
    return x


def ddim(
    model: Denoiser,
    x: Tensor,  # (B, ...) at level T
    noise: Noise,
    steps: int,
    label: Tensor | None = None,  # (B,) int64
    spacing: Spacing = "level",
    eta: float = 0.0,
) -> Tensor:
    """DDIM eq. 12 (arXiv 2010.02502) for any schedule; deterministic at eta = 0, as noisy as DDPM at eta = 1.

    `x_prev = a_prev x0_hat + sqrt(s_prev^2 - c^2) eps_hat + c z` with
    `c = eta s_prev sqrt(1 - (sigma_prev/sigma)^2)`.
    """
    a, s = model.schedule.a.tolist(), model.schedule.s.tolist()
    for t, t_prev in model.schedule.pairs(steps, spacing):
        eps_hat = model.denoise(x, t, label)
        x0_hat = (x - s[t] * eps_hat) / a[t]
        c = eta * s[t_prev] * sqrt(1 - (s[t_prev] * a[t] / (a[t_prev] * s[t])) ** 2)
        x = a[t_prev] * x0_hat + sqrt(s[t_prev] ** 2 - c**2) * eps_hat
        if c > 0:
            x = x + c * noise()
    return x


def dpm_solver_pp_2m(
    model: Denoiser,
    x: Tensor,  # (B, ...) at level T
    noise: Noise,
    steps: int,
    label: Tensor | None = None,  # (B,) int64
    spacing: Spacing = "log_snr",
) -> Tensor:
    """DPM-Solver++(2M), arXiv 2211.01095, algorithm 2: second order, one evaluation a step; deterministic.

    With `lambda = log(a/s)` and `h = lambda_prev - lambda` a step is
    `x_prev = (s_prev/s) x - a_prev (exp(-h) - 1) D`, `D = x0_hat + h/(2 h_before) (x0_hat - x0_hat_before)`.
    The first step has no x0_hat before it and the last has h = inf: both use D = x0_hat.
    """
    a, s, log_snr = (table.tolist() for table in (model.schedule.a, model.schedule.s, model.schedule.log_snr))
    x0_before, h_before = None, 0.0
    for t, t_prev in model.schedule.pairs(steps, spacing):
        x0_hat = model.predict_x0(x, t, label)
        h = (log_snr[t_prev] - log_snr[t]) / 2
        data = x0_hat
        if x0_before is not None and t_prev > 0:
            data = x0_hat + (x0_hat - x0_before) * (h / (2 * h_before))
        x = (s[t_prev] / s[t]) * x - a[t_prev] * expm1(-h) * data
        x0_before, h_before = x0_hat, h
    return x


def heun(
    model: Denoiser,
    x: Tensor,  # (B, ...) at level T
    noise: Noise,
    steps: int,
    label: Tensor | None = None,  # (B,) int64
    spacing: Spacing = "log_snr",
) -> Tensor:
    """Heun's method on the probability-flow ODE, arXiv 2206.00364, algorithm 1; deterministic.

    In `y = x/a` and sigma the ODE is `dy/dsigma = eps_hat(a y, t)`. Two evaluations a step, one in the last.
    """
    a, sigma = model.schedule.a.tolist(), model.schedule.sigma.tolist()
    y = x / a[model.schedule.T]
    for t, t_prev in model.schedule.pairs(steps, spacing):
        slope = model.denoise(a[t] * y, t, label)
        y_prev = y + (sigma[t_prev] - sigma[t]) * slope
        if t_prev > 0:
            slope_prev = model.denoise(a[t_prev] * y_prev, t_prev, label)
            y_prev = y + (sigma[t_prev] - sigma[t]) * (slope + slope_prev) / 2
        y = y_prev
    return y


def euler_ot(
    model: Denoiser,
    x: Tensor,  # (B, ...) at level T
    noise: Noise,
    steps: int,
    label: Tensor | None = None,  # (B,) int64
    spacing: Spacing = "level",
) -> Tensor:
    """Euler steps along `dx/ds = eps_hat - x0_hat`, the velocity of straight paths (arXiv 2210.02747).

    The same map as `ddim` with eta = 0, which takes any schedule. Raises UserError unless a + s = 1.
    """
    a, s = model.schedule.a, model.schedule.s
    if not torch.allclose(a + s, torch.ones_like(s), rtol=0, atol=1e-9):
        raise UserError(
            f"sampler 'euler_ot' needs the schedule 'ot', and this model has {model.schedule.name!r}: "
            "choose another sampler, such as 'ddim'"
        )
    for t, t_prev in model.schedule.pairs(steps, spacing):
        eps_hat = model.denoise(x, t, label)
        x0_hat = (x - float(s[t]) * eps_hat) / float(a[t])
        x = x + float(s[t_prev] - s[t]) * (eps_hat - x0_hat)
    return x


SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpm_solver_pp_2m": dpm_solver_pp_2m,
    "heun": heun,
    "euler_ot": euler_ot,
    **CORRECTED,
}


@measures
def sample(
    model: Denoiser,
    num: int,
    sampler: str = "ddim",
    steps: int = 50,
    seed: int = 0,
    *,
    label: int | Tensor | None = None,
    guidance: float = 0.0,
    eta: float = 0.0,
    batch_size: int = 256,
    shape: tuple[int, ...] | None = None,
    spacing: Spacing | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    moves: int = 2,
    leapfrog: int = 1,
    log: MoveLog | None = None,
) -> Tensor:
    """`num` images drawn from the model, (num, *shape), in the dtype and on the device of its parameters.

    Arguments: `sampler`, one of `SAMPLERS`; `steps`, 1..T, the number of levels it visits; `label`, one class
    for all or (num,) int64; `guidance`, w in `(1 + w) eps_hat(x, label) - w eps_hat(x)`; `eta`, 0..1, the
    noise of `ddim`; `shape` of one image, by default `model.input_shape`; `spacing` of the levels visited,
    the sampler's own by default; `precision` of the network ("bf16": under autocast, images stay fp32);
    `moves` of `mala` and `smc` at each level, each of `leapfrog` steps (Langevin moves with one, HMC with
    more), and `log`, to which they add the acceptance of each level.
    Image i depends on the seed, i and its label alone: any `batch_size` gives the same result up to rounding,
    and so does any number of processes (see `distributed.joined`), which share the images. Not so for `smc`,
    where a batch is one population. The step sizes of moves come from a pilot of a fixed seed.
    Global random generators are neither read nor changed; dropout is off while sampling.
    Raises UserError for an argument out of range.
    """
    run = _sampler(sampler, eta, spacing)
    shape = _image_shape(model, shape)
    _check_range("num", num, 0, bits=32)
    _check_range("batch_size", batch_size, 1, bits=32)
    _check_range("seed", seed, 0, bits=64)
    like = prototype(model)
    labels = _labels(label, num, like.device)
    if guidance:
        model = _guided(model, guidance, labels)
    if sampler in CORRECTED:
        _check_range("moves", moves, 1, bits=32)
        if precision == "bf16":
            raise UserError(
                f"sampler {sampler!r} compares log-densities, for which bf16 is too coarse: use fp32"
            )
        _check_range("leapfrog", leapfrog, 1, bits=32)
        log = MoveLog() if log is None else log
        log.leapfrog = leapfrog
        log.step_size = prepare(model, sampler, steps, shape, labels, spacing, leapfrog)
        run = partial(run, moves=moves, log=log)
    elif leapfrog != 1:
        raise UserError(
            f"leapfrog is {leapfrog}, but sampler {sampler!r} makes no moves: choose 'mala' or 'smc'"
        )
    images = [like.new_empty((0, *shape))]
    mine = share(num)
    with cast_weights(model, like.device, precision):
        for start in range(mine.start, mine.stop, batch_size):
            batch = slice(start, min(start + batch_size, mine.stop))
            noise = ImageNoise(seed, batch, shape, like)
            label_b = None if labels is None else labels[batch]
            images.append(run(model, noise(), noise, steps, label_b))
    return gather_rows(torch.cat(images), num)


class ImageNoise:
    """Standard normal noise keyed by (seed, image, draw): each call is the next draw for images `batch`.

    A call returns (B, *shape) in `like`'s dtype, on its device. The counter of a Philox block is
    (block within the image, stream, image, draw), so neither batch nor device changes an image's noise.
    """

    def __init__(self, seed: int, batch: slice, shape: tuple[int, ...], like: Tensor) -> None:
        self.seed, self.first = seed, batch.start
        self.image = torch.arange(batch.start, batch.stop, device=like.device)
        self.shape, self.dtype, self.draws = shape, like.dtype, 0

    def __call__(self) -> Tensor:
        normals = image_normals(self.image, prod(self.shape), self.seed, self._next())
        return normals.view(-1, *self.shape).to(self.dtype)

    def uniform(self) -> Tensor:
        """The next draw as one number in (0, 1) for each image, (B,) float64."""
        return (image_words(self.image, 1, self.seed, self._next())[:, 0].double() + 0.5) * 2.0**-32

    def generator(self) -> torch.Generator:
        """For what concerns a batch as a whole, such as resampling; seeded by the first image's next draw."""
        first = torch.tensor([self.first])  # on the host: nothing there waits for a device
        low, high = image_words(first, 2, self.seed, self._next())[0].tolist()
        return torch.Generator().manual_seed(low | high << 32)

    def _next(self) -> int:
        self.draws += 1
        return self.draws - 1


def _sampler(name: str, eta: float, spacing: Spacing | None) -> Callable[..., Tensor]:
    if name not in SAMPLERS:
        raise UserError(f"unknown sampler {name!r}: choose one of {', '.join(SAMPLERS)}")
    if not 0 <= eta <= 1:
        raise UserError(f"eta is {eta}: it must lie between 0 (deterministic) and 1 (as noisy as DDPM)")
    if eta and name != "ddim":
        raise UserError(f"eta is {eta}, but sampler {name!r} takes none: leave it out, or choose 'ddim'")
    options: dict[str, float | Spacing] = {"eta": eta} if name == "ddim" else {}
    if spacing is not None:
        options["spacing"] = spacing
    return partial(SAMPLERS[name], **options)


def _guided(model: Denoiser, guidance: float, labels: Tensor | None) -> Denoiser:
    if not isfinite(guidance):
        raise UserError(f"guidance is {guidance}: it must be a finite number")
    if labels is None:
        raise UserError(f"guidance is {guidance}, but towards no class: pass label= too")
    return (GuidedEnergy if isinstance(model, Energy) else Guided)(model, guidance)


def _check_range(name: str, value: int, lowest: int, bits: int) -> None:
    if not lowest <= value < 2**bits:
        raise UserError(f"{name} is {value}: it must be an integer from {lowest} to 2^{bits} - 1")


def _image_shape(model: Denoiser, shape: tuple[int, ...] | None) -> tuple[int, ...]:
    shape = model.input_shape if shape is None else shape
    if shape is None:
        raise UserError("the model does not know the shape of one image: pass shape=, such as (1, 8, 8)")
    return tuple(shape)


def _labels(label: int | Tensor | None, num: int, device: torch.device) -> Tensor | None:
    if isinstance(label, int):
        return torch.full((num,), label, device=device)
    if label is not None and (label.dtype != torch.int64 or label.shape != (num,)):
        raise UserError(
            f"label is {label.dtype} of shape {tuple(label.shape)}: pass int64 ({num},) or one int"
        )
    return label if label is None else upload(label, device)
