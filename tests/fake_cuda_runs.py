"""Steps, samplers and likelihoods on fake CUDA tensors; prints what each did, as JSON or as a table.

    TRITON_INTERPRET=1 python -m tests.fake_cuda_runs CACHE [json] [NAME ...]

CACHE is a folder for the compiled stand-in, NAME one of `RUNS`.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tests import fake_cuda

STEPS = 4  # of a sampler
IMAGES = 16  # drawn by a sampler, scored by a likelihood


class Scene:
    """A CIFAR-10 preset's model, optimizer and training images, all fake, in bf16.

    small: with a network of fewer blocks. conditioning: of a model of ten classes.
    """

    def __init__(
        self,
        device: Any,
        batch_size: int,
        small: bool = False,
        conditioning: str = "none",
        preset: str = "cifar10",
    ) -> None:
        import torch

        from cdm_fast.config import PRESETS
        from cdm_fast.data import ImageData
        from cdm_fast.training.ema import Ema
        from cdm_fast.training.state import new_state
        from cdm_fast.training.step import make_optimizer

        config = PRESETS[preset]
        network = replace(config.network, conditioning=conditioning)
        if small:
            network = replace(network, base_channels=32, multipliers=(1, 2), blocks_per_level=1)
        image = replace(config.image, num_classes=None if conditioning == "none" else 10)
        train = replace(config.train, precision="bf16", batch_size=batch_size, seed=0)
        self.config = config = replace(config, train=train, network=network, image=image)
        state = new_state(config, torch.device("cpu"))
        shape = (50_000, *config.image.shape)
        with device:
            device.moved(state.model)
            device.moved(state.ema.model)
            state.optimizer = make_optimizer(config.train, state.model)
            model = state.ema.model
            state.ema = Ema.__new__(Ema)
            state.ema.decay, state.ema.start, state.ema._model = config.train.ema_decay, None, model
            state.ema._averages = [parameter.detach() for parameter in model.parameters()]
            state.ema._weights = [parameter.detach() for parameter in state.model.parameters()]
            for name in ("sums", "bad", "recent", "spikes"):
                setattr(state, name, device._like(getattr(state, name)))
            images = torch.empty(shape, dtype=torch.uint8, device="cuda")
            labels = torch.empty(50_000, dtype=torch.int64, device="cuda")
        self.state = state
        self.data = ImageData(images, labels, 256, 10, "nothing", "train")

    def step(self) -> None:
        from cdm_fast.training.loop import take_step
        from cdm_fast.training.step import make_loss

        self.state.model.train()
        take_step(self.state, self.data, self.config, make_loss(self.config.train))


def main(cache: str, *names: str) -> None:
    fake_cuda.stand_in(Path(cache))
    device = fake_cuda.fake_cuda_class()()
    results = {}
    for name in names[names[:1] == ("json",) :] or RUNS:
        results[name] = RUNS[name](device)
    print(
        _table(results) if sys.stdout.isatty() or "TABLE" in __import__("os").environ else json.dumps(results)
    )


def _recorded(device: Any, run: Callable[[], Any]) -> dict[str, dict[str, int]]:
    device.record.clear()
    with device:
        run()
    return device.record.to_json()


def _step(device: Any, **options: Any) -> dict[str, dict[str, int]]:
    """The second step: the first one makes the optimizer's moments."""
    scene = Scene(device, **options)
    with device:
        scene.step()
    return _recorded(device, scene.step)


def _evaluation(act: Callable[[Any, Any], Any], device: Any, **options: Any) -> dict[str, dict[str, int]]:
    """`act(scene, images (16, C, H, W))` on the averaged model of a fresh run."""
    import torch

    scene = Scene(device, IMAGES, **options)
    with device:
        x = torch.empty((IMAGES, *scene.state.model.input_shape), device="cuda")
    return _recorded(device, lambda: act(scene, x))


def _sample(sampler: str, scene: Scene, x: Any, **options: Any) -> None:
    from cdm_fast import sample

    precision = "fp32" if sampler in ("mala", "smc") else "bf16"
    sample(scene.state.ema.model, IMAGES, sampler, STEPS, precision=precision, **options)


def _guided(scene: Scene, x: Any) -> None:
    _sample("ddim", scene, x, label=1, guidance=1.5)


def _log_prob(scene: Scene, x: Any) -> None:
    import torch

    with torch.no_grad():
        scene.state.ema.model.log_prob(x)


def _record(scene: Scene, x: Any) -> None:
    import torch

    from cdm_fast.training.step import StepResult

    scene.state.record(StepResult(*(torch.zeros((), device="cuda") for _ in range(5))))


def _nll(scene: Scene, x: Any) -> None:
    import torch

    from cdm_fast.data import ImageData
    from cdm_fast.likelihood import evaluate

    images = torch.zeros((2 * IMAGES, *scene.state.model.input_shape), dtype=torch.uint8)
    data = ImageData(images, None, 256, None, "zeros", "test")
    evaluate(scene.state.ema.model, data, draws=2, batch_size=IMAGES, check_levels=0, precision="bf16")


SMALL = ("ddpm", "dpm_solver_pp_2m", "heun", "mala", "smc")
RUNS: dict[str, Callable[[Any], dict[str, dict[str, int]]]] = {
    "step": partial(_step, batch_size=128),
    "step of a joint head": partial(_step, batch_size=8, small=True, conditioning="joint"),
    "step of a transformer": partial(_step, batch_size=128, preset="cifar10-transformer"),
    "record": partial(_evaluation, _record, small=True),
    "ddim": partial(_evaluation, partial(_sample, "ddim")),
    **{sampler: partial(_evaluation, partial(_sample, sampler), small=True) for sampler in SMALL},
    "guided": partial(_evaluation, _guided, small=True, conditioning="embedding"),
    "guided joint": partial(_evaluation, _guided, small=True, conditioning="joint"),
    "log_prob": partial(_evaluation, _log_prob),
    "nll": partial(_evaluation, _nll),
}


def _table(results: dict[str, dict[str, dict[str, int]]]) -> str:
    lines = []
    for name, record in results.items():
        lines.append(
            f"{name}: {sum(record['launches'].values())} launches, {sum(record['syncs'].values())} waits"
        )
        for kind in ("syncs", "launches", "copies", "sites"):
            lines += [f"    {kind:10} {count:5} {what}" for what, count in list(record[kind].items())[:40]]
    return "\n".join(lines)


if __name__ == "__main__":
    main(*sys.argv[1:])
