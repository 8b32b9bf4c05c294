"""Whole training steps with their data: batches drawn, dequantised, flipped and noised, optimizer, average.

The baseline is the same step with its optimizer and average on one prepared batch, so the ratio is the share
of the time that data does not take. Fashion-MNIST's shape (28x28, grey) with the preset's network, and
CIFAR-10's on a GPU; the images are random, as their values do not matter here.
"""

from dataclasses import replace

from benchmarks.support.cases import both_finite
from benchmarks.support.train_steps import WholeStep
from cdm_fast.data.copies import map_file


def test_images_per_second(benchmark, compare, small, device):
    whole = WholeStep(small, device)
    ready = whole.draw()
    compare(benchmark, whole.step, lambda: whole.step_on(ready), both_finite, rounds=9)
    info = benchmark.extra_info
    info["shape"] = list(whole.shape)
    if "candidate_ms" in info:
        info["images_per_second"] = 1e3 * whole.shape[0] / info["candidate_ms"]


def test_images_per_second_from_a_prepared_copy(benchmark, compare, small, device, tmp_path):
    """The same step on images mapped from a file; the baseline has them in memory. On a CPU."""
    memory, mapped = WholeStep(small, device), WholeStep(small, device)
    (tmp_path / "rows").write_bytes(memory.data.images.cpu().numpy().tobytes())
    rows = map_file(tmp_path / "rows").view(memory.data.images.shape)
    mapped.data = replace(mapped.data, images=rows)
    compare(benchmark, mapped.step, memory.step, both_finite, rounds=9)
    benchmark.extra_info["shape"] = list(memory.shape)
