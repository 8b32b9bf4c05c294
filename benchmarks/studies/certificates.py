"""Certified accuracy by randomized smoothing, of five classifiers: docs/measurements/certification.md.

    python -m benchmarks.studies.certificates digits --runs RUNS [--kinds joint noised] [--images 359]
    python -m benchmarks.studies.certificates fashion-mnist-encoder --source DIR --runs RUNS --images 1000 \\
        --steps 2500
    python -m benchmarks.studies.certificates show  # results/certificates.jsonl as a table

- joint, embedding: a CDM's class logits at the level whose noise is sigma;
- clean: an ordinary classifier on the same trunk, or that of `--trunk`, trained on clean images;
- noised: the same trained under the noise of each sigma, a run for each;
- denoised: the clean one behind the joint run's denoiser.

`attack` is a check that the certificates hold: projected gradient descent on the smoothed posterior inside
the certified radius, for the joint run. A missing run is trained into RUNS by the preset.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from benchmarks.studies.rows import add_row, has_row, read_rows, trained
from cdm_fast import load
from cdm_fast.config import RunConfig, preset
from cdm_fast.config.choices import Architecture
from cdm_fast.data import ImageData
from cdm_fast.data.draws import choose
from cdm_fast.evaluation.attack_methods import PGD_LENGTH
from cdm_fast.evaluation.attacks import ClassLogLikelihoods
from cdm_fast.evaluation.certification import (
    ABSTAIN,
    DenoisedPixelClassifier,
    NoisyPixelClassifier,
    certify,
)
from cdm_fast.evaluation.certification_report import evaluate_certificates
from cdm_fast.evaluation.norms import per_image, steepest
from cdm_fast.host.progress import to_stderr
from cdm_fast.runs.checkpoint import read_config
from cdm_fast.runs.data import run_data

RESULTS = Path(__file__).parents[1] / "results" / "certificates.jsonl"
KINDS = ("joint", "clean", "noised", "denoised", "embedding")
CLASSIFIES = {"denoised": "clean", "attack": "joint"}  # whose run classifies, for kinds without their own
SIGMAS = (0.25, 0.5, 1.0)
ATTACKED, ATTACK_STEPS, ATTACK_DRAWS, ATTACK_FAILURE = 200, 20, 32, 1e-5


def configured(options: argparse.Namespace, kind: str, sigma: float = 0.0) -> RunConfig:
    """The preset with what the kind and the options change."""
    base = preset(options.data)
    discriminative = kind in ("clean", "noised")
    network = replace(base.network, conditioning="none" if discriminative else kind)
    if discriminative and options.trunk:
        network = replace(network, architecture=options.trunk)
    train = replace(
        base.train,
        objective="classifier" if discriminative else "cdm",
        classifier_noise=sigma,
        steps=options.steps or base.train.steps,
    )
    data = replace(base.data, source=options.source or base.data.source)
    return replace(base, data=data, network=network, train=train)


def run_of(options: argparse.Namespace, kind: str, sigma: float = 0.0) -> Path:
    config = configured(options, kind, sigma)
    name = f"{options.data}-{kind}-{config.network.architecture}" + (f"-{sigma:g}" if sigma else "")
    return trained(config, options.runs / name)


def classifying_run(options: argparse.Namespace, kind: str, sigma: float) -> Path:
    """The run that a kind classifies with."""
    return run_of(options, CLASSIFIES.get(kind, kind), sigma if kind == "noised" else 0.0)


def base_classifier(options: argparse.Namespace, kind: str, sigma: float, data: ImageData) -> nn.Module:
    """The classifier under noise of a kind, trained if need be."""
    model = load(classifying_run(options, kind, sigma))
    if kind == "denoised":
        clean = ClassLogLikelihoods(model, data.num_grey_levels, data.pixels)
        denoiser = load(run_of(options, "joint"))
        return DenoisedPixelClassifier(denoiser, clean, sigma, data.num_grey_levels, data.pixels)
    return NoisyPixelClassifier(model, sigma, data.num_grey_levels, data.pixels)


def attack_inside(
    classifier: nn.Module,
    pixels: Tensor,  # (n, C, H, W)
    predicted: Tensor,  # (n,)
    radius: Tensor,  # (n,)
    sigma: float,
    seed: int = 0,
) -> Tensor:
    """Perturbed pixels, of L2 distance just below the radius, that lower the smoothed posterior of the class.

    Normalised gradient ascent on the mean cross-entropy over fresh noise draws (arXiv 1906.04584, SmoothAdv).
    """
    generator = torch.Generator().manual_seed(seed)
    limit = per_image((0.999 * radius).to(pixels.dtype), pixels)
    delta = torch.zeros_like(pixels)
    for _ in range(ATTACK_STEPS):
        delta.requires_grad_(True)
        noise = torch.randn((ATTACK_DRAWS, *pixels.shape), generator=generator)
        outputs = classifier((pixels + delta + sigma * noise).flatten(0, 1)).unflatten(0, (ATTACK_DRAWS, -1))
        mean = outputs.softmax(2).mean(0).gather(1, predicted[:, None])
        (gradient,) = torch.autograd.grad(-mean.clamp(min=1e-12).log().sum(), delta)
        delta = delta.detach() + PGD_LENGTH / ATTACK_STEPS * limit * steepest(gradient, "l2")
        length = per_image(delta.flatten(1).norm(dim=1).clamp(min=1e-30), delta)
        delta = delta * (limit / length).clamp(max=1)
    return pixels + delta


def attacked(options: argparse.Namespace, sigma: float, data: ImageData) -> dict[str, Any]:
    """How many of the certified images the attack changes inside their radius; 0 is right."""
    classifier = base_classifier(options, "joint", sigma, data).eval().requires_grad_(False)
    index = choose(len(data), None, torch.Generator().manual_seed(0))
    pixels = data.images[index].float() / (data.num_grey_levels - 1)
    before, _ = certify(
        classifier, pixels[: 2 * ATTACKED], sigma, failure_probability=ATTACK_FAILURE, progress=to_stderr
    )
    chosen = (before.predicted != ABSTAIN).nonzero()[:ATTACKED, 0]
    predicted, radius = before.predicted[chosen], before.radius[chosen]
    moved = attack_inside(classifier, pixels[chosen], predicted, radius, sigma)
    after, _ = certify(classifier, moved, sigma, failure_probability=0.01, seed=1, progress=to_stderr)
    lengths = (moved - pixels[chosen]).flatten(1).norm(dim=1).double()
    assert bool((lengths < radius).all())
    changed = (after.predicted != predicted) & (after.predicted != ABSTAIN)
    return {
        "num_images": len(chosen),
        "changed": int(changed.sum()),
        "abstained": int((after.predicted == ABSTAIN).sum()),
        "mean_lower_bound_before": float(before.lower_bound[chosen].mean()),
        "mean_lower_bound_after": float(after.lower_bound.mean()),
        "failure_probability": ATTACK_FAILURE,
    }


def measurements(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each kind and sigma that the file does not hold yet."""
    for kind in options.kinds:
        for sigma in options.sigmas:
            config = configured(options, CLASSIFIES.get(kind, kind))
            key = {
                "data": options.data,
                "kind": kind,
                "trunk": config.network.architecture,
                "sigma": sigma,
                "steps": config.train.steps,
            }
            if has_row(RESULTS, key):
                continue
            data = run_data(read_config(classifying_run(options, kind, sigma)), "test")
            if kind == "attack":
                values = attacked(options, sigma, data)
            else:
                classifier = base_classifier(options, kind, sigma, data)
                num_classes = data.num_classes
                assert num_classes is not None
                values = evaluate_certificates(
                    classifier, data, num_classes, sigma, num_images=options.images, progress=to_stderr
                ).to_json()
            yield {**key, "figures": values}


def show() -> None:
    """The rows as tables in Markdown."""
    for row in read_rows(RESULTS):
        values = row["figures"]
        if row["kind"] == "attack":
            told = f"{values['changed']} of {values['num_images']} changed inside the radius"
        else:
            at = dict(zip(values["radii"], values["certified_accuracy"], strict=True))
            cells = (f"{100 * at[radius]:.1f}" for radius in (0.0, 0.25, 0.5, 1.0))
            error = 100 * math.sqrt(0.25 / values["num_images"])
            told = f"{' | '.join(cells)} | +- {error:.1f} at most | {values['images_per_second']:.3g}"
        print(
            f"| {row['data']} | {row['steps']} | {row['kind']}, {row['trunk']} | {row['sigma']:g} | {told} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", help="digits, fashion-mnist-encoder (a preset), or show")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--source", help="data source in place of the preset's")
    parser.add_argument("--steps", type=int, help="training steps in place of the preset's")
    parser.add_argument("--trunk", choices=get_args(Architecture), help="of the ordinary classifiers")
    parser.add_argument("--kinds", nargs="+", choices=(*KINDS, "attack"), default=[*KINDS[:4], "attack"])
    parser.add_argument("--sigmas", nargs="+", type=float, choices=SIGMAS, default=SIGMAS)
    parser.add_argument("--images", type=int, help="test images to certify; by default all")
    options = parser.parse_args()
    if options.data == "show":
        show()
        return
    for row in measurements(options):
        add_row(RESULTS, row)
        print(row["kind"], row["sigma"], row["figures"])


if __name__ == "__main__":
    main()
