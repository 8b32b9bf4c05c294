"""bits/dim by one forward pass per image.

Such a figure is *unaudited*: it is correct only if the classifier's densities integrate to one.

# B batch, n images, d = C*H*W, N grey levels
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from cdm_fast.config.choices import Given
from cdm_fast.config.json import fields_without
from cdm_fast.data import ImageData
from cdm_fast.data.draws import Protocol, draw_generator
from cdm_fast.errors import UserError, require_at_least
from cdm_fast.host.device import upload
from cdm_fast.host.distributed import by_rows
from cdm_fast.likelihood.batches import noised_batches
from cdm_fast.likelihood.given import labels_given, of_all_classes
from cdm_fast.likelihood.ratios import RatioCheck, ratio_check
from cdm_fast.likelihood.units import bits_per_dim
from cdm_fast.model import CDM, evaluation_mode
from cdm_fast.model.cdm import require_likelihood
from cdm_fast.nn.working import cast_weights
from cdm_fast.statistics import standard_error

PAPER_PROTOCOL = (
    "not comparable with other bits/dim: pixels are scored as points, without dequantisation, and a density"
    " may grow without limit on a grid of grey levels, so that this figure bounds no code length"
)

PUBLIC_SCORING = (
    "the public code scores a random order of the images without its incomplete last batch, half of them"
    " flipped at random, and adds 7 bits/dim; this scores every image once, as it is, and adds log2(N/2),"
    " which is 7 for 256 grey levels"
)

COST_IMAGES = 256  # images on which the cost of bf16 is measured
# The ratio check takes this many levels by default, or all of a schedule with up to 256; for small images,
# with up to 256 values, all of a schedule with up to 1024.
CHECKED_LEVELS, ALL_LEVELS_UP_TO, SMALL, ALL_LEVELS_OF_SMALL = 64, 256, 256, 1024

Batches = list[tuple[int, Tensor]]  # (index of the first image, x_t (B, ...)) of each
LogProb = Callable[[Tensor, int], Tensor]  # (x_t (B, ...), index of its first image) -> log p (B,) in nats


@dataclass(frozen=True)
class LikelihoodReport:
    """bits/dim of a data set by the single pass, and how it was measured.

    Fields:
        bits_per_dim: mean over images and draws.
        bits_per_dim_stderr: standard error of that mean over images.
        draw_spread: standard deviation of the mean between dequantisation draws; 0 for one draw.
        draws, level, method, protocol, num_images, data, split: what was measured.
        seconds, images_per_second: time of the scoring; every draw counts its images.
        ratio_check: the check of neighbouring levels; None if it was skipped.
        warning: why the figure cannot be compared with others; None if it can.
        precision: arithmetic of the network, "fp32" or "bf16".
        precision_cost: increase of bits/dim by bf16, on the first `COST_IMAGES` images; None in fp32.
        given: "label": each image given its label; "all": marginal over all classes; "none": without a label.
        per_image: (n,) bits/dim of each image, mean over draws.
    """

    bits_per_dim: float
    bits_per_dim_stderr: float
    draw_spread: float
    draws: int
    level: int
    method: str
    protocol: str
    num_images: int
    seconds: float
    images_per_second: float
    data: str
    split: str
    ratio_check: RatioCheck | None
    warning: str | None
    precision: str
    precision_cost: float | None
    given: str
    per_image: Tensor

    def to_json(self) -> dict[str, Any]:
        """Everything but the per-image values, ready for `json.dumps`."""
        return fields_without(self, "per_image")


@evaluation_mode
def evaluate(
    model: CDM,
    data: ImageData,
    level: int = 0,
    *,
    draws: int = 3,
    batch_size: int = 500,
    seed: int = 0,
    protocol: Protocol = "dequantized",
    check_levels: int | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    given: Given = "none",
) -> LikelihoodReport:
    """bits/dim of `data` under the model's single-pass likelihood at `level` (CDM Thm 3.2).

    `bits/dim = -log2 p_t(x_t) / d + log2(N / 2)`, with `x = 2 (u + U[0,1)) / N - 1` for grey values u (with
    N-1 in place of N if pixels are "points", see `data.pixels`). The protocol "paper" scores
    `x = 2u/(N-1) - 1` without noise, with the same log2(N/2), as the paper's code does; see
    `PAPER_PROTOCOL`.

    Args:
        level: 0 for the data; above 0, `x_t = a x + s eps` is scored.
        draws: number of independent draws of dequantisation noise (and of eps).
        batch_size: images per forward pass.
        seed: seed of all draws; the result is a deterministic function of it.
        check_levels: at most this many levels in `ratio_check`; 0 skips the check. By default every level of
            a schedule with up to 256 levels (1024 for images of up to 256 values), or 64 levels of a longer
            one.
        precision: "bf16" is faster on hardware that supports it; the report measures its cost.
        given: conditioning of a class-conditional model, see `LikelihoodReport`. "all" takes one pass per
            class.

    Raises:
        UserError: a model without likelihood, a level outside 0..T+1, draws or batch_size below 1, an unknown
            protocol, and as in `labels_given`.

    A network with zero weights does not distinguish levels: its density is N(0, I) at every level.

    >>> from cdm_fast import MLP, NoiseSchedule
    >>> network = MLP(dim=2, num_levels=12, hidden=4, depth=1)
    >>> _ = [torch.nn.init.zeros_(parameter) for parameter in network.parameters()]
    >>> model = CDM(torch.nn.Sequential(torch.nn.Flatten(), network), NoiseSchedule.uniform(T=10))
    >>> images = torch.full((100, 1, 1, 2), 128, dtype=torch.uint8)  # at x = 0
    >>> data = ImageData(images, None, num_grey_levels=256, num_classes=None, name="grey", split="test")
    >>> report = evaluate(model, data)
    >>> round(report.bits_per_dim, 3)  # log2(2 pi) / 2 + 7
    8.326
    >>> report.per_image.shape, report.ratio_check.worst < 1e-6
    (torch.Size([100]), True)
    """
    require_likelihood(model)
    require_at_least("draws", draws, 1)
    require_at_least("batch_size", batch_size, 1)
    if protocol not in ("dequantized", "paper"):
        raise UserError(f"unknown protocol {protocol!r}: choose 'dequantized' or 'paper'")
    log_prob = _log_prob_given(model, level, labels_given(model, data, given), given)

    def batches_of(draw: int) -> Iterator[tuple[int, Tensor]]:
        return noised_batches(model, data, level, batch_size, draw_generator(seed, draw), protocol)

    units = replace(data, pixels="intervals") if protocol == "paper" else data  # the paper's code adds 7 bits
    start = time.perf_counter()
    first_images: Batches = []
    nats = [_score(model, log_prob, _keep_first(batches_of(0), COST_IMAGES, first_images), precision)]
    nats += [_score(model, log_prob, batches_of(draw), precision) for draw in range(1, draws)]
    bits = bits_per_dim(torch.stack(nats), units)  # (draws, n)
    seconds = time.perf_counter() - start
    cost = None
    if precision == "bf16":
        exact = bits_per_dim(_score(model, log_prob, first_images, "fp32"), units)
        cost = float((bits[0, : len(exact)] - exact).mean())
    if check_levels is None:
        check_levels = _levels_to_check(model.schedule.T, data.images[0].numel())
    return LikelihoodReport(
        **_statistics(bits),
        level=level,
        method="single",
        protocol=protocol,
        seconds=seconds,
        images_per_second=bits.numel() / seconds,
        data=data.name,
        split=data.split,
        ratio_check=ratio_check(model, data, check_levels, seed=seed) if check_levels else None,
        warning=PAPER_PROTOCOL if protocol == "paper" else None,
        precision=precision,
        precision_cost=cost,
        given=given,
    )


def _levels_to_check(T: int, values: int) -> int:
    """How many levels a ratio check looks at by default, for images of so many values."""
    most = ALL_LEVELS_OF_SMALL if values <= SMALL else ALL_LEVELS_UP_TO
    return most if T < most else CHECKED_LEVELS


def _score(
    model: CDM, log_prob: LogProb, batches: Iterable[tuple[int, Tensor]], precision: Literal["fp32", "bf16"]
) -> Tensor:  # (n,) nats, float64, on the CPU
    """`log_prob` of every image of `batches`, in the given precision."""
    nats = []
    for first, x_t in batches:
        with cast_weights(model, model.a.device, precision):
            nats.append(log_prob(x_t, first))
    return torch.cat(nats).cpu()


def _keep_first(
    batches: Iterable[tuple[int, Tensor]], num: int, kept: Batches
) -> Iterator[tuple[int, Tensor]]:
    """Yields `batches`, and appends their first `num` images to `kept`."""
    for first, x_t in batches:
        if first < num:
            kept.append((first, x_t[: num - first]))
        yield first, x_t


def _statistics(
    bits: Tensor,  # (draws, n) bits/dim
) -> dict[str, Any]:
    """The fields of a `LikelihoodReport` that follow from the bits/dim of every draw and image."""
    draws, num_images = bits.shape
    per_image = bits.mean(dim=0)
    return {
        "bits_per_dim": float(per_image.mean()),
        "bits_per_dim_stderr": standard_error(per_image),
        "draw_spread": float(bits.mean(dim=1).std()) if draws > 1 else 0.0,
        "draws": draws,
        "num_images": num_images,
        "per_image": per_image,
    }


def _log_prob_given(model: CDM, level: int, labels: Tensor | None, given: Given) -> LogProb:
    """`log p_level` of a batch, conditioned according to `given`; its rows are shared among processes."""

    def of_label(x_t: Tensor, label: Tensor | None) -> Tensor:
        def of_rows(rows: Tensor) -> Tensor:  # by index, so that the labels are split as the images are
            own = None if label is None else upload(label, x_t.device)[rows]
            return model.log_prob(x_t[rows], level, label=own).double()

        return by_rows(of_rows, torch.arange(len(x_t), device=x_t.device))

    def of_batch(x_t: Tensor, first: int) -> Tensor:
        if given == "all":
            return of_all_classes(model, len(x_t), partial(of_label, x_t))
        return of_label(x_t, None if labels is None else labels[first : first + len(x_t)])

    return of_batch
