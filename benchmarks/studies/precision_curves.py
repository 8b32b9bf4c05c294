"""Do bf16 and fp32 train alike? The first steps of one run in both, on real images, and a second fp32 run.

    python -m benchmarks.studies.precision_curves [--preset digits] [--data SOURCE] [--steps 200] [--out
        curves.png]

The two precisions see the same batches, noise and dropout; the second fp32 run has another seed, so its
distance to the first is the noise that the distance of bf16 is to be held against. Prints one JSON object:
mean loss of the last quarter of the steps of each run, and both distances.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.support.environment import facts
from cdm_fast.config import RunConfig, preset
from cdm_fast.host.device import pick_device
from cdm_fast.host.optional import need
from cdm_fast.runs.data import run_data
from cdm_fast.training.base import begin_from_base
from cdm_fast.training.prepare import resolve
from cdm_fast.training.state import new_state
from cdm_fast.training.step import begin_step, draw_batch, learning_rate, make_loss, training_step

RUNS = {"fp32": ("fp32", 0), "bf16": ("bf16", 0), "fp32, another seed": ("fp32", 1)}


def losses(config: RunConfig, steps: int, device: torch.device) -> list[float]:
    """The loss of each of the first `steps` steps."""
    data = run_data(config, "train")
    config = resolve(config, data, device)
    state, loss_function, train = new_state(config, device), make_loss(config.train), config.train
    begin_from_base(config, state, data)
    data = replace(data, images=data.images.to(device), labels=None)
    results = []
    for step in range(steps):
        begin_step(state.model, config, step)
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(train, step)
        batch = draw_batch(data, state.model, config, step)
        options = {"step": step, "clip_norm": train.clip_norm, "precision": train.precision}
        result = training_step(state.model, state.optimizer, state.ema, batch, loss_function, **options)
        results.append(float(result.loss))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.precision_curves")
    parser.add_argument("--preset", default="digits")
    parser.add_argument("--data", default=None)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    base, device = preset(options.preset), pick_device(options.device)
    if options.data is not None:
        base = replace(base, data=replace(base.data, source=options.data))
    curves = {}
    for name, (precision, seed) in RUNS.items():
        train = replace(base.train, precision=precision, seed=seed, compile="off")
        curves[name] = losses(replace(base, train=train), options.steps, device)
    ends = {
        name: sum(curve[-(options.steps // 4) :]) / (options.steps // 4) for name, curve in curves.items()
    }
    summary = {
        "steps": options.steps,
        "mean_loss_of_last_quarter": ends,
        "bf16_distance": abs(ends["bf16"] / ends["fp32"] - 1),
        "seed_distance": abs(ends["fp32, another seed"] / ends["fp32"] - 1),
        **facts(device.type),
    }
    print(json.dumps(summary, indent=1))
    if options.out is not None:
        need("matplotlib", "drawing").use("Agg")
        plt = need("matplotlib.pyplot", "drawing")
        plt.figure(layout="constrained")
        for name, curve in curves.items():
            plt.plot(curve, label=name, lw=1)
        plt.gca().set(yscale="log", xlabel="step", ylabel="loss")
        plt.legend()
        plt.savefig(options.out, dpi=120)


if __name__ == "__main__":
    main()
