"""What gives the lowest *audited* bits/dim on 8x8 digits for one training budget, the digits preset's steps.

    python -m benchmarks.studies.likelihood_study run             # every configuration that has no row yet
    python -m benchmarks.studies.likelihood_study run base ot     # these
    python -m benchmarks.studies.likelihood_study show            # the rows so far, as a Markdown table
    python -m benchmarks.studies.likelihood_study dropout RUN  # ratio check of a run with and without its
        dropout
    python -m benchmarks.studies.likelihood_study bound RUN  # by fewer levels, and with one variance at each
    python -m benchmarks.studies.likelihood_study flow RUN 65 105  # noise along the ODE of these test images

Every configuration appends one JSON line to `--out`. Choices look at the validation images; the test images
are there for the last line. `--log-z` adds the cheap setting of log Z, which takes longest.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.studies.rows import add_row, read_rows
from cdm_fast import CDM
from cdm_fast.config import RunConfig, preset
from cdm_fast.config.size import ImageSize
from cdm_fast.data import ImageData
from cdm_fast.data.draws import choose_images, draw_images
from cdm_fast.data.pixels import dequantize
from cdm_fast.likelihood import evaluate, evaluate_elbo, measure_log_z, ratio_check
from cdm_fast.likelihood.elbo import GROUPS, variational_bound
from cdm_fast.likelihood.units import bits_per_dim, nats_per_bit_per_dim
from cdm_fast.model.losses import LossTerms, Noised
from cdm_fast.nn import UNet
from cdm_fast.nn.heads import CumulativeHead
from cdm_fast.nn.layers import Conv2d, full_precision
from cdm_fast.runs.checkpoint import create_run, load_checkpoint, read_config
from cdm_fast.runs.data import run_data
from cdm_fast.runs.load import load
from cdm_fast.statistics import standard_error
from cdm_fast.training.ema import Ema
from cdm_fast.training.loop import take_step
from cdm_fast.training.prepare import resolve
from cdm_fast.training.state import TrainingState, new_state, to_checkpoint
from cdm_fast.training.step import derived_seed, make_loss, make_optimizer
from cdm_fast.training.validation import check_classes, check_levels

DEVICE = torch.device("cpu")
ELBO_IMAGES = {"validation": 180, "test": 359}
RATIO_IMAGES = 128
LEVEL_ROWS = 2872  # noised images for the calibration of levels, 8 of each test image
CHEAP_LOG_Z = {"particles": 48, "runs": 3, "moves": 1}
PAIRS = 64  # products of the image with a feature map, for `EnergyUNet`


@dataclass(frozen=True)
class Variant:
    """How one configuration differs from `configured`.

    Fields:
        data, schedule, network, train: settings that replace the preset's.
        energy: features `<x, g_m(x)>` beside the pooled ones; see `EnergyUNet`.
        ratio_weight: of the penalty on adjacent-level ratios; see `with_ratio_penalty`.
    """

    data: dict[str, Any] = field(default_factory=dict)
    schedule: dict[str, Any] = field(default_factory=dict)
    network: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    energy: bool = False
    ratio_weight: float = 0.0


def variant(
    network: dict[str, Any] | None = None, train: dict[str, Any] | None = None, **rest: Any
) -> Variant:
    return Variant(network=network or {}, train=train or {}, **rest)


class EnergyUNet(UNet):
    """The U-Net with features `<x, g_m(x)> / sqrt(d)` beside the pooled ones: a path of full resolution.

    Their gradient `g_m(x) + J_m(x)^T x` holds a feature map itself, as a plain denoiser's output does. The
    head's rows for them start at zero.
    """

    def __init__(self, image_size: ImageSize, channels: int, num_levels: int, **trunk: Any) -> None:
        super().__init__(image_size, channels, num_levels, **trunk)
        self.pair = Conv2d(self.out_channels, PAIRS * channels)
        pooled = self.linear_layer.in_features
        self.linear_layer = CumulativeHead(pooled + PAIRS, num_levels)
        torch.nn.init.zeros_(self.linear_layer.weight[:, pooled:])
        self.scale = math.prod(self.input_shape) ** -0.5

    def features(
        self, x: Tensor, label: Tensor | None = None, keep_residuals: bool = True
    ) -> tuple[Tensor, Any]:
        h, trunk_residuals = self.run(x, None, keep_residuals)
        pooled, pool_residuals = self.conv_out(h)
        maps = self.pair(h)[0]
        with full_precision(x):
            maps = self.scale * maps.to(x.dtype).unflatten(1, (PAIRS, -1))  # (B, M, C, H, W)
            paired = torch.einsum("bmchw,bchw->bm", maps, x)
        return torch.cat([pooled, paired], dim=1), (trunk_residuals, pool_residuals, maps, x)

    def adjoint(self, residuals: Any, g: Tensor) -> Tensor:
        trunk_residuals, pool_residuals, maps, x = residuals
        g_pooled, g_paired = g.split([g.shape[1] - PAIRS, PAIRS], dim=1)
        with full_precision(x):
            direct = torch.einsum("bm,bmchw->bchw", g_paired, maps)
            g_maps = torch.einsum("bm,bchw->bmchw", self.scale * g_paired, x).flatten(1, 2)
        g_h = self.conv_out.adjoint(pool_residuals, g_pooled)
        g_h = g_h + self.pair.adjoint(None, g_maps.to(g_h.dtype)).to(g_h.dtype)
        return self.run_adjoint(trunk_residuals, g_h) + direct


def energy_state(config: RunConfig) -> TrainingState:
    """As `new_state`, with an `EnergyUNet`."""
    state = new_state(config, DEVICE)
    model = state.model
    torch.manual_seed(derived_seed(config.train.seed, 0, "weights"))
    image, network = config.image, config.network
    model.network = EnergyUNet(
        image.sides,
        image.channels,
        model.schedule.num_levels,
        base_channels=network.base_channels,
        multipliers=network.multipliers,
        blocks_per_level=network.blocks_per_level,
        attention_resolutions=network.attention_resolutions,
        dropout=network.dropout,
        num_groups=network.num_groups,
    ).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    ema = Ema(model, config.train.ema_decay)
    return replace(state, ema=ema, optimizer=make_optimizer(config.train, model))


def with_ratio_penalty(config: RunConfig, weight: float) -> Callable[[CDM, Noised], LossTerms]:
    """The loss and `weight (E_t[p_{t-1}/p_t] - E_t[log p_t/p_{t+1}])`, means over the batch.

    Least where every adjacent ratio is the true one (the f-divergence bound of arXiv 0809.0853): it pulls on
    the very means that the ratio check looks at. For a uniform p(t) and logits without classes.
    """
    plain = make_loss(config.train)

    def loss(model: CDM, batch: Noised) -> LossTerms:
        terms = plain(model, batch)
        logits = model.logits(batch.x_t)
        step = logits[:, :-1] - logits[:, 1:]  # log p_t / p_{t+1}, t = 0..T
        level, last = batch.level, step.shape[1]
        below = step.gather(1, (level - 1).clamp(min=0)[:, None])[:, 0].exp()
        above = step.gather(1, level.clamp(max=last - 1)[:, None])[:, 0]
        penalty = below[level > 0].sum() - above[level < last].sum()
        return terms._replace(loss=terms.loss + weight * penalty / len(level))

    return loss


def trained(config: RunConfig, change: Variant, run: Path | None = None) -> tuple[CDM, float]:
    """The averaged model after the config's steps, and the seconds they took; kept as `run`, if given.

    A run that is there already is taken as it is.
    """
    if run is not None and run.exists():
        seconds = load_checkpoint(run, ()).state["seconds"]
        return load(run, calibrated=False), seconds  # type: ignore[return-value]
    data = run_data(config, "train")
    config = resolve(config, data, DEVICE)
    state = energy_state(config) if change.energy else new_state(config, DEVICE)
    loss = with_ratio_penalty(config, change.ratio_weight) if change.ratio_weight else make_loss(config.train)
    began = time.perf_counter()
    for _ in range(config.train.steps):
        take_step(state, data, config, loss)
    state.seconds = time.perf_counter() - began
    if run is not None:
        create_run(run, config, to_checkpoint(state, config))
    return state.ema.model, state.seconds  # type: ignore[return-value]


def measured(model: CDM, config: RunConfig, log_z: bool) -> dict[str, Any]:
    """The figures of one trained model on validation and test images, bits/dim."""
    row: dict[str, Any] = {}
    normalised = config.train.ce_weight > 0
    for split, images in ELBO_IMAGES.items():
        data = run_data(config, split)
        if normalised:
            single = evaluate(model, data, check_levels=0)
            row |= {
                f"{split}_single": single.bits_per_dim,
                f"{split}_single_stderr": single.bits_per_dim_stderr,
            }
        elbo = evaluate_elbo(model, data, images)
        row |= {f"{split}_elbo": elbo.bits_per_dim, f"{split}_elbo_stderr": elbo.bits_per_dim_stderr}
    if normalised:
        check = ratio_check(model, data, model.schedule.T + 1, RATIO_IMAGES)  # of the test images
        row |= level_and_class_checks(model, data)
        row |= {"test_ratio": check.sum_bits_per_dim, "test_ratio_stderr": check.sum_bits_per_dim_stderr}
    if log_z and normalised:
        row |= cheap_log_z(model, run_data(config, "test"))
    return row


def level_and_class_checks(model: CDM, data: ImageData) -> dict[str, Any]:
    """The worst level in nats, the share of miscalibrated ones, and the accuracy where there are classes."""
    checks, classes = check_levels(model, data, LEVEL_ROWS), check_classes(model, data)
    row = {"test_level_worst": checks.worst, "test_level_miscalibrated": checks.miscalibrated}
    return row if classes is None else {**row, "test_accuracy": classes[1]}


def cheap_log_z(model: CDM, data: ImageData) -> dict[str, Any]:
    """log Z of level 0 by walks both ways, bits/dim."""
    found = measure_log_z(model, data, **CHEAP_LOG_Z)
    unit = math.log(2) * data.images[0].numel()
    return {
        f"log_z_{name}": getattr(found, key)[-1] / unit
        for name, key in (
            ("down", "log_z"),
            ("down_stderr", "log_z_stderr"),
            ("up", "log_z_up"),
            ("up_stderr", "log_z_up_stderr"),
        )
    }


@torch.no_grad()
def ratios_under_dropout(run: Path, num_images: int = 512) -> str:
    """Sum over levels of `log E[p_t / p_{t+1}]` in bits/dim, as used and as trained; a table."""
    model = load(run, calibrated=False)
    lines = ["| images | without dropout | with dropout |", "|---|---|---|"]
    for split in ("train", "validation"):
        data, sums = run_data(read_config(run), split), []
        for training in (False, True):
            model.train(training)
            torch.manual_seed(0)
            generator = torch.Generator().manual_seed(0)
            total = 0.0
            for t in range(model.schedule.T + 1):
                x = model.schedule.noise(draw_images(data, num_images, generator), t + 1, generator=generator)
                log_prob = model.log_prob_levels(x).double()  # type: ignore[operator]
                ratio = log_prob[:, t] - log_prob[:, t + 1]
                total += float(ratio.logsumexp(0)) - math.log(num_images)
            sums.append(total / nats_per_bit_per_dim(data))
        lines.append(f"| {split} | {sums[0]:+.3f} | {sums[1]:+.3f} |")
    return "\n".join(lines)


def bound_by_levels(run: Path, num_images: int = 160) -> str:
    """The bound with every level, every second and every fourth, on test and on training images; a table.

    Halving the levels doubles what the bound loses to their distance; training images show what is learned
    by heart. The second row has one variance at each level instead of one for each group of values.
    """
    model, config = load(run, calibrated=False), read_config(run)
    lines = ["| levels | groups | test | train |", "|---|---|---|---|"]
    images = {split: run_data(config, split) for split in ("test", "train")}
    for stride, groups in ((1, GROUPS), (1, 1), (2, GROUPS), (4, GROUPS)):
        levels, cells = sorted({1, *range(stride, model.schedule.T + 1, stride)}), []
        for data in images.values():
            _, x = choose_images(data, num_images, torch.Generator().manual_seed(0))
            bits = bits_per_dim(-variational_bound(model, x, levels=levels, groups=groups).nats, data)
            cells.append(f"{float(bits.mean()):.3f} +- {standard_error(bits):.3f}")
        lines.append(f"| {len(levels)} | {groups} | {' | '.join(cells)} |")
    return "\n".join(lines)


JOINT = {"conditioning": "joint"}
UNET = {"architecture": "unet"}
REGULARISED: dict[str, Any] = {"weight_decay": 0.3, "dropout_until": 0.7}
DEFORMED = {**REGULARISED, "deform": 0.5, "deform_until": 0.7}


@torch.no_grad()
def noise_along_the_flow(run: Path, numbers: list[int]) -> str:
    """The noise that a network sees in test images on their way to noise by the ODE, a table in Markdown.

    Heun's method from level 1 on, one step a level. The mean of `p(t | x)` over t, and the mean square of
    eps_hat; both belong to inputs with the noise of their level if they agree with it and are near 1.
    """
    model, config = load(run), read_config(run)
    assert isinstance(model, CDM)
    data, generator = run_data(config, "test"), torch.Generator().manual_seed(0)
    x = dequantize(data.images[numbers], data.num_grey_levels, generator, data.pixels)
    schedule, T = model.schedule, model.schedule.T
    a, s = schedule.a.to(x), schedule.s.to(x)
    r = (a.square() + s.square()).sqrt()
    zeta, log_snr, every = s / r, 2 * (a / s).log(), torch.arange(schedule.num_levels)

    def rate(u: Tensor, level: int) -> Tensor:
        return zeta[level] / 2 * (zeta[level] * u - model.denoise(r[level] * u, level))

    u = schedule.noise(x, 1, generator=generator) / r[1]
    names = " | ".join(f"image {number}" for number in numbers)
    lines = [f"| level | {names} |", "|---" * (len(numbers) + 1) + "|"]
    for level in range(1, T):
        if level % (T // 8) == 0:
            seen = (model.log_posterior(r[level] * u).exp() * every).sum(1)
            power = model.denoise(r[level] * u, level).square().flatten(1).mean(1)
            cells = [f"{t:.0f}, {p:.2f}" for t, p in zip(seen.tolist(), power.tolist(), strict=True)]
            lines.append(f"| {level} | {' | '.join(cells)} |")
        step = log_snr[level + 1] - log_snr[level]
        first = rate(u, level)
        u = u + step * (first + rate(u + step * first, level + 1)) / 2
    return "\n".join(lines)


def even(T: int = 200, split_seed: int = 0, **train: Any) -> Variant:
    """The joint head for 2500 steps, with levels even in log-SNR and stratified."""
    return variant(
        network=JOINT,
        train={"steps": 2500, "level_draws": "stratified", **train},
        schedule={"level_distribution": "log-snr", "T": T},
        data={"split_seed": split_seed},
    )


VARIANTS: dict[str, Variant] = {
    "base": variant(),
    "dropout throughout": variant(train={"dropout_until": 1.0}),
    "dropout until 0.7": variant(train={"dropout_until": 0.7}),
    "no dropout": variant(network={"dropout": 0.0}),
    "CE only": variant(train={"ce_weight": 1.0, "mse_weight": 0.0}),
    "MSE only": variant(train={"ce_weight": 0.0}),
    "CE weight 0.1": variant(train={"ce_weight": 0.1}),
    "CE weight 0.001": variant(train={"ce_weight": 0.001}),
    "linear": variant(schedule={"schedule": "linear"}),
    "ot": variant(schedule={"schedule": "ot"}),
    "levels even in log-SNR": variant(schedule={"level_distribution": "log-snr"}),
    "T 100": variant(schedule={"T": 100}),
    "ratio penalty 0.01": variant(ratio_weight=0.01),
    "dropout 0.3": variant(network={"dropout": 0.3}),
    "weight decay 0.3": variant(train={"weight_decay": 0.3}),
    "joint": variant(network=JOINT),
    "joint, label dropout 0.5": variant(network=JOINT, train={"label_dropout": 0.5}),
    "joint, 2000 steps": variant(network=JOINT, train={"steps": 2000}),
    "joint, 2500 steps": variant(network=JOINT, train={"steps": 2500}),
    "even": even(),
    "even, T 400, regularised": even(400, **REGULARISED),
    "even, T 400, deformed": even(400, **DEFORMED),
    "even, T 400, deformed, split 1, seed 1": even(400, 1, seed=1, **DEFORMED),
    "even, T 400, deformed, split 2, seed 2": even(400, 2, seed=2, **DEFORMED),
    "U-Net": variant(network=UNET),
    "U-Net, dropout until 0.85": variant(network=UNET, train={"dropout_until": 0.85}),
    "U-Net, joint": variant(network={**UNET, **JOINT}),
    "U-Net with energy features": variant(network=UNET, energy=True),
}


def configured(change: Variant) -> RunConfig:
    """The encoder by the digits preset, without classes, with the changes of a variant.

    Its precision is what the preset would choose here.
    """
    config = preset("digits")
    return replace(
        config,
        data=replace(config.data, **change.data),
        schedule=replace(config.schedule, **change.schedule),
        network=replace(
            config.network, **{"architecture": "encoder", "conditioning": "none", **change.network}
        ),
        train=replace(config.train, **change.train),
    )


def show(rows: list[dict[str, Any]]) -> str:
    """The table in Markdown; figures in bits/dim."""

    def figure(row: dict[str, Any], key: str, sign: str = "") -> str:
        return f"{row[key]:{sign}.3f} +- {row[key + '_stderr']:.3f}" if key in row else "-"

    lines = [
        "| configuration | validation bound | test bound | single pass | ratio check | log Z up | down"
        " | worst level | accuracy | s |",
        "|" + "---|" * 10,
    ]
    for row in sorted(rows, key=lambda row: row["validation_elbo"]):
        cells = [
            row["name"],
            figure(row, "validation_elbo"),
            figure(row, "test_elbo"),
            figure(row, "test_single"),
            *(figure(row, key, "+") for key in ("test_ratio", "log_z_up", "log_z_down")),
            f"{row['test_level_worst']:.2f}" if "test_level_worst" in row else "-",
            f"{100 * row['test_accuracy']:.2f}" if "test_accuracy" in row else "-",
            f"{row['seconds']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("run", "show", "dropout", "bound", "flow"))
    parser.add_argument(
        "names", nargs="*", help="configurations, all by default; or a run directory and images"
    )
    parser.add_argument("--log-z", action="store_true")
    parser.add_argument("--runs", type=Path, help="keep the trained models as run directories in this folder")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/likelihood_study.jsonl"))
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(arguments.threads)
    if arguments.what in ("dropout", "bound"):
        table = ratios_under_dropout if arguments.what == "dropout" else bound_by_levels
        print(table(Path(arguments.names[0])))
        return
    if arguments.what == "flow":
        print(noise_along_the_flow(Path(arguments.names[0]), list(map(int, arguments.names[1:]))))
        return
    unknown = sorted(set(arguments.names) - VARIANTS.keys())
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; choose among {', '.join(VARIANTS)}")
    rows = read_rows(arguments.out)
    if arguments.what == "show":
        print(show(rows))
        return
    for name in arguments.names or VARIANTS:
        if any(row["name"] == name for row in rows):
            continue
        config = configured(VARIANTS[name])
        run = None if VARIANTS[name].energy or not arguments.runs else arguments.runs / name.replace(" ", "-")
        model, seconds = trained(config, VARIANTS[name], run)
        row = {"name": name, "seconds": seconds, **measured(model, config, arguments.log_z)}
        print(show([add_row(arguments.out, row)]), flush=True)


if __name__ == "__main__":
    main()
