"""What a joint head of 1,000 classes and 1,002 levels adds to the memory of training, by its low rank.

Three whole steps (loss, gradients, clipping, fused Adam, moving average) of batch 128 in fp32, with the head
and with one of levels alone, whose memory is negligible; each in a separate process. The images are small,
which makes no difference to the head; its 256 features are those of the paper's CIFAR-10 network.

    python -m benchmarks.bench_joint_head CLASSES [--small]  # peak MiB of one process; 0: levels alone
"""

import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.support.memory import peak_resident_mib
from cdm_fast.config import ImageShape, NetworkConfig, RunConfig, ScheduleConfig, TrainConfig
from cdm_fast.model.losses import Noised
from cdm_fast.runs.build import build_model
from cdm_fast.training.ema import Ema
from cdm_fast.training.step import make_loss, make_optimizer, training_step

CLASSES, LEVELS, BATCH = 1000, 1002, 128


def run_config(num_classes: int, small: bool) -> RunConfig:
    """A run of so many classes by a joint head of the rank that it has by itself, or of none for 0."""
    return RunConfig(
        image=ImageShape(8, 8, 3, 256, num_classes or None),
        schedule=ScheduleConfig(T=(52 if small else LEVELS) - 2),
        network=NetworkConfig(
            base_channels=32 if small else 128,
            multipliers=(1,),
            blocks_per_level=1,
            attention_resolutions=(),
            conditioning="joint" if num_classes else "none",
        ),
        train=TrainConfig(batch_size=16 if small else BATCH),
    )


def peak_mib(num_classes: int, small: bool) -> float:
    """Peak resident memory of this process after three training steps, in MiB."""
    torch.manual_seed(0)
    config = run_config(num_classes, small)
    model = build_model(config).train()
    optimizer, ema = make_optimizer(config.train, model), Ema(model, 0.999)
    batch = config.train.batch_size
    x_t, eps = torch.randn(2, batch, 3, 8, 8).unbind()
    level = torch.arange(batch) * 7 % (config.schedule.T + 2)
    label = torch.arange(batch) % (num_classes + 1) - 1 if num_classes else None
    for step in range(3):
        result = training_step(
            model, optimizer, ema, Noised(x_t, eps, level, label), make_loss(config.train), step=step
        )
        assert bool(torch.isfinite(result.loss)) and not bool(result.bad)
    return peak_resident_mib()


def test_peak_memory(benchmark, small, device):
    """MiB that the head adds to the peak; the time shown means nothing. On the CPU."""

    def measure(num_classes: int) -> float:
        command = [sys.executable, "-m", "benchmarks.bench_joint_head", str(num_classes)]
        command += ["--small"] if small else []
        root = Path(__file__).parent.parent
        return float(subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout)

    with_head = benchmark.pedantic(lambda: measure(CLASSES))
    trunk = measure(0)
    benchmark.extra_info.update(candidate_peak_mib=with_head, baseline_peak_mib=trunk)
    benchmark.extra_info["shape"] = [BATCH, LEVELS, CLASSES]


if __name__ == "__main__":
    print(peak_mib(int(sys.argv[1]), "--small" in sys.argv[2:]))
