"""bits/dim of one forward pass per image.

Such a figure is *unaudited*: it is as good as the normalisation that the classifier has learned.

# B batch, n images, d = C*H*W, N grey levels
"""

import time
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cdm_fast.data import ImageData
from cdm_fast.devices import upload
from cdm_fast.distributed import by_rows
from cdm_fast.errors import UserError
from cdm_fast.likelihood.images import (
    Protocol,
    add_noise,
    batches,
    bits_per_dim,
    draw_generator,
    require_likelihood,
    stderr,
)
from cdm_fast.likelihood.ratios import RatioCheck, ratio_check
from cdm_fast.model import CDM, measures
from cdm_fast.nn.working import cast_weights

PAPER_PROTOCOL = (
    "not comparable with other bits/dim: pixels are scored as points, without dequantisation, and a density"
    " may grow without limit on a grid of grey levels, so that this figure bounds no code length"
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
    per_image: Tensor

    def to_json(self) -> dict[str, Any]:
        """Everything but the per-image values, ready for `json.dumps`."""
        fields = asdict(self)
        del fields["per_image"]
        return fields


@measures
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
) -> LikelihoodReport:
    """bits/dim of `data` under the model's one-pass likelihood at `level`.

    `bits/dim = -log2 p_t(x_t) / d + log2(N / 2)`, with `x = 2 (u + U[0,1)) / N - 1` for grey values u (the
    protocol "paper" leaves the noise U out, as the paper's code does; see `PAPER_PROTOCOL`).

    Args:
        level: 0 for the data; above 0, `x_t = a x + s eps` is scored.
        draws: independent draws of dequantisation noise (and of eps).
        batch_size: images per forward pass.
        seed: of every draw; the result is a pure function of it.
        check_levels: at most this many levels in `ratio_check`; 0 skips the check. By default every level of
            a schedule of up to 256, or 64 levels of a longer one.
        precision: "bf16" is faster where the hardware has it; the report says what it costs.

    Raises:
        UserError: a model without likelihood, a level outside 0..T+1, draws below 1, or an unknown protocol.
    """
    require_likelihood(model)
    if draws < 1:
        raise UserError(f"draws is {draws}: at least one is needed")
    if protocol not in ("dequantized", "paper"):
        raise UserError(f"unknown protocol {protocol!r}: choose 'dequantized' or 'paper'")
    device = model.a.device

    def log_prob_of(x_t: Tensor) -> Tensor:
        return model.log_prob(x_t, level).double()

    start = time.perf_counter()
    bits = torch.empty(draws, len(data.images), dtype=torch.float64)
    first_inputs: list[Tensor] = []
    for draw in range(draws):
        generator = draw_generator(seed, draw)
        found = []
        for first, x in batches(data, batch_size, generator, protocol):
            x_t = upload(add_noise(model.schedule, x, level, generator), device)
            with cast_weights(model, device, precision):
                found.append(by_rows(log_prob_of, x_t))
            if draw == 0 and first < COST_IMAGES:
                first_inputs.append(x_t[: COST_IMAGES - first])
        bits[draw] = bits_per_dim(torch.cat(found).cpu(), data)
    seconds = time.perf_counter() - start
    if check_levels is None:
        check_levels = 256 if model.schedule.T < 256 else 64
    check = ratio_check(model, data, check_levels, seed=seed) if check_levels else None
    per_image = bits.mean(dim=0)
    cost = None
    if precision == "bf16":
        exact = torch.cat([by_rows(log_prob_of, x_t) for x_t in first_inputs]).cpu()
        cost = float((bits[0, : len(exact)] - bits_per_dim(exact, data)).mean())
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
        per_image=per_image,
    )
