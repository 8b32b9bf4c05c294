"""bits/dim of one forward pass per image.

Such a figure is *unaudited*: it is as good as the normalisation that the classifier has learned.

# B batch, n images, d = C*H*W, N grey levels
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from cdm_fast.data import ImageData
from cdm_fast.data.draws import Protocol, batches, draw_generator
from cdm_fast.errors import UserError
from cdm_fast.host.device import upload
from cdm_fast.host.distributed import by_rows
from cdm_fast.likelihood.given import Given, labels_given, of_all_classes
from cdm_fast.likelihood.ratios import RatioCheck, ratio_check
from cdm_fast.likelihood.units import bits_per_dim
from cdm_fast.model import CDM, evaluation_mode
from cdm_fast.model.cdm import require_likelihood
from cdm_fast.nn.working import cast_weights
from cdm_fast.statistics import stderr

PAPER_PROTOCOL = (
    "not comparable with other bits/dim: pixels are scored as points, without dequantisation, and a density"
    " may grow without limit on a grid of grey levels, so that this figure bounds no code length"
)

PUBLIC_SCORING = (
    "the public code scores a random order of the images without its incomplete last batch, half of them"
    " flipped at random, and adds 7 bits/dim; this scores every image once, as it is, and adds log2(N/2),"
    " which is 7 for 256 grey levels"
)

COST_IMAGES = 256


@dataclass(frozen=True)
class LikelihoodReport:
    """bits/dim of a data set and how it was measured; `per_image` (n,) holds the mean over draws.

    Fields:
        bits_per_dim: mean over images and draws.
        bits_per_dim_stderr: standard error over images of that mean.
        draw_spread: standard deviation of the mean between dequantisation draws; 0 for one draw.
        warning: why the figure cannot be compared, if so.
        precision: of the network: "fp32" or "bf16".
        given: "label", each image given its label; "all", of all classes; "none", without a label.
        precision_cost: what bf16 adds to bits/dim, on the first `COST_IMAGES` images; None in fp32.
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
        fields = asdict(self)
        del fields["per_image"]
        return fields


@evaluation_mode
def evaluate(
    model: CDM,
    data: ImageData,
    level: int = 0,
    draws: int = 3,
    batch_size: int = 500,
    seed: int = 0,
    protocol: Protocol = "dequantized",
    check_levels: int | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    given: Given = "none",
) -> LikelihoodReport:
    """bits/dim of `data` under the model's one-pass likelihood at `level`.

    `bits/dim = -log2 p_t(x_t) / d + log2(N / 2)`, with `x = 2 (u + U[0,1)) / N - 1` for grey values u (or
    both with N-1 around points: see `data.pixels`). The protocol "paper" scores `x = 2u/(N-1) - 1`, without
    noise, with the same log2(N/2), as the paper's code does; see `PAPER_PROTOCOL`.

    Args:
        level: 0 for the data; above 0, `x_t = a x + s eps` is scored.
        draws: independent draws of dequantisation noise (and of eps).
        batch_size: images per forward pass.
        seed: of every draw; the result is a pure function of it.
        check_levels: at most this many levels in `ratio_check`; 0 skips the check. By default every level of
            a schedule of up to 256, or 64 levels of a longer one.
        precision: "bf16" is faster where the hardware has it; the report says what it costs.
        given: of a class-conditional model: see `LikelihoodReport`. "all" takes a pass per class.

    Raises:
        UserError: a model without likelihood, a level outside 0..T+1, draws below 1, an unknown protocol, and
            as `labels_given`.
    """
    require_likelihood(model)
    if draws < 1:
        raise UserError(f"draws is {draws}: at least one is needed")
    if protocol not in ("dequantized", "paper"):
        raise UserError(f"unknown protocol {protocol!r}: choose 'dequantized' or 'paper'")
    device = model.a.device
    labels = labels_given(model, data, given)
    units = replace(data, pixels="intervals") if protocol == "paper" else data  # theirs adds 7 to points

    def log_prob_of(x_t: Tensor, first: int) -> Tensor:
        """(n,) nats of the images from the one with index `first` on."""
        if given == "all":
            each = partial(_of_label, model, x_t, level)
            return of_all_classes(model, len(x_t), lambda label: by_rows(each(label), _rows(x_t)))
        label = None if labels is None else labels[first : first + len(x_t)]
        return by_rows(_of_label(model, x_t, level, label), _rows(x_t))

    start = time.perf_counter()
    bits = torch.empty(draws, len(data.images), dtype=torch.float64)
    first_inputs: list[Tensor] = []
    for draw in range(draws):
        generator = draw_generator(seed, draw)
        found = []
        for first, x in batches(data, batch_size, generator, protocol):
            x_t = upload(model.schedule.noise(x, level, generator=generator), device)
            with cast_weights(model, device, precision):
                found.append(log_prob_of(x_t, first))
            if draw == 0 and first < COST_IMAGES:
                first_inputs.append(x_t[: COST_IMAGES - first])
        bits[draw] = bits_per_dim(torch.cat(found).cpu(), units)
    seconds = time.perf_counter() - start
    if check_levels is None:
        check_levels = 256 if model.schedule.T < 256 else 64
    check = ratio_check(model, data, check_levels, seed=seed) if check_levels else None
    per_image = bits.mean(dim=0)
    cost = None
    if precision == "bf16":
        starts = accumulate([0, *map(len, first_inputs)])
        pairs = zip(first_inputs, starts, strict=False)
        exact = torch.cat([log_prob_of(x_t, first) for x_t, first in pairs]).cpu()
        cost = float((bits[0, : len(exact)] - bits_per_dim(exact, units)).mean())
    return LikelihoodReport(
        bits_per_dim=float(per_image.mean()),
        bits_per_dim_stderr=stderr(per_image),
        draw_spread=float(bits.mean(dim=1).std()) if draws > 1 else 0.0,
        draws=draws,
        level=level,
        method="single",
        protocol=protocol,
        num_images=len(data.images),
        seconds=seconds,
        images_per_second=draws * len(data.images) / seconds,
        data=data.name,
        split=data.split,
        ratio_check=check,
        warning=PAPER_PROTOCOL if protocol == "paper" else None,
        precision=precision,
        precision_cost=cost,
        given=given,
        per_image=per_image,
    )


def _of_label(model: CDM, x_t: Tensor, level: int, label: Tensor | None) -> Callable[[Tensor], Tensor]:
    """`log p` of some rows of a batch, by their index: processes share rows, and labels go with them."""

    def log_prob(rows: Tensor) -> Tensor:
        own = None if label is None else upload(label, x_t.device)[rows]
        return model.log_prob(x_t[rows], level, label=own).double()

    return log_prob


def _rows(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device)
