"""Training from a prepared copy: images per second by image size, cold and warm, and under a limit of memory.

    python -m benchmarks.studies.feeding sizes   # 8x8 to 64x64, against the same images in memory
    python -m benchmarks.studies.feeding limited # a file three times as large as the memory of the process
    python -m benchmarks.studies.feeding show    # results/feeding.jsonl as tables

The network is the preset `fashion-mnist-encoder`'s at every size, with three channels from 32x32 on. Images
are random, as their values do not matter here. *Cold*: the kernel's cache of the file is dropped before each
round. `limited` needs root: it makes a memory cgroup whose limit, page cache included, is a third of a file.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.studies.rows import add_row, read_rows
from benchmarks.support.train_steps import WholeStep
from cdm_fast.config import PRESETS, RunConfig
from cdm_fast.data.copies import map_file
from cdm_fast.training.feed import on_device

RESULTS = Path(__file__).parents[1] / "results" / "feeding.jsonl"
SIDES = (8, 16, 28, 32, 64)
SMALL_MIB = 64
ROUNDS, ROUND_SECONDS = 5, 4.0
CGROUPS = Path("/sys/fs/cgroup")


def configured(side: int) -> RunConfig:
    """The preset `fashion-mnist-encoder` at another image size."""
    base = PRESETS["fashion-mnist-encoder"]
    channels = 1 if side < 32 else 3
    image = replace(base.image, height=side, width=side, channels=channels)
    sizes: dict[str, Any] = {"attention_resolutions": (side // 4,)}
    if side == 8:
        sizes = {"multipliers": (1, 2), "attention_resolutions": (4,)}
    network = replace(base.network, **sizes)
    return replace(base, image=image, network=network)


def write_rows(path: Path, shape: tuple[int, ...], mebibytes: int) -> None:
    """Random uint8 rows of a shape, about this many MiB, flushed to the disk."""
    count = mebibytes * 2**20 // prod(shape)
    chunk = max(1, 2**26 // prod(shape))
    generator = torch.Generator().manual_seed(0)
    with path.open("wb") as file:
        for start in range(0, count, chunk):
            rows = torch.randint(
                256, (min(chunk, count - start), *shape), dtype=torch.uint8, generator=generator
            )
            file.write(rows.numpy().data)
        file.flush()
        os.fsync(file.fileno())


def forget(path: Path) -> None:
    """Drops the file from the kernel's cache; nothing may have it mapped."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def feed(whole: WholeStep, images: Tensor) -> None:
    """Lets the steps of `whole` draw from these images, (N, C, H, W)."""
    labels = torch.arange(len(images)) % 10
    whole.data = on_device(replace(whole.data, images=images, labels=labels), torch.device("cpu"))


def images_per_second(whole: WholeStep, seconds: float = ROUND_SECONDS) -> float:
    """Of whole steps, data included, for about so many seconds."""
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        float(whole.step())
        steps += 1
    return steps * whole.shape[0] / (time.perf_counter() - began)


def measure_side(side: int, folder: Path) -> dict[str, Any]:
    """Images per second from memory, from a warm map and from a cold one, in turns."""
    config = configured(side)
    whole = WholeStep(False, torch.device("cpu"), config=config)
    path = folder / "rows"
    write_rows(path, config.image.shape, SMALL_MIB)
    in_memory = map_file(path).clone().view(-1, *config.image.shape)
    rates: dict[str, list[float]] = {"memory": [], "warm": [], "cold": []}
    for _ in range(ROUNDS):
        feed(whole, in_memory)
        rates["memory"].append(images_per_second(whole))
        forget(path)
        feed(whole, map_file(path).view(in_memory.shape))
        rates["cold"].append(images_per_second(whole))
        whole.data.images.sum()  # touches every page
        rates["warm"].append(images_per_second(whole))
    path.unlink()
    ratios = {
        kind: [a / b for a, b in zip(rates[kind], rates["memory"], strict=True)] for kind in ("warm", "cold")
    }
    return {
        "shape": list(config.image.shape),
        "images_per_second": {kind: statistics.median(values) for kind, values in rates.items()},
        "ratio": {kind: statistics.median(values) for kind, values in ratios.items()},
        "ratio_quartiles": {kind: statistics.quantiles(values, n=4)[::2] for kind, values in ratios.items()},
        "file_mib": SMALL_MIB,
        "threads": torch.get_num_threads(),
    }


def _enter(group: Path) -> None:
    (group / "cgroup.procs").write_text("0")


@contextmanager
def memory_limit(limit: int) -> Iterator[Callable[[], None]]:
    """A cgroup (version 1 or 2) with this limit in bytes; yields what puts the calling process into it."""
    second = (CGROUPS / "cgroup.controllers").exists()
    group = (CGROUPS if second else CGROUPS / "memory") / f"cdm-fast-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.max" if second else "memory.limit_in_bytes")).write_text(str(limit))
        yield partial(_enter, group)
    finally:
        group.rmdir()


def measure_limited(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The figures of `child`, which runs in a cgroup with a third of the large file's size as its limit."""
    shape = configured(options.side).image.shape
    small, large = folder / "small", folder / "large"
    write_rows(small, shape, SMALL_MIB)
    write_rows(large, shape, options.gib * 2**10)
    forget(large)
    limit = large.stat().st_size // 3
    with memory_limit(limit) as enter:
        command = [sys.executable, "-m", "benchmarks.studies.feeding", "child"]
        command += ["--side", str(options.side), "--threads", str(options.threads)]
        done = subprocess.run(
            [*command, "--folder", str(folder)],
            preexec_fn=enter,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    small_rate, large_rate, ratio, lower, upper, anonymous = map(float, done.stdout.split())
    return {
        "shape": list(shape),
        "file_gib": options.gib,
        "limit_mib": limit // 2**20,
        "images_per_second": {"small": small_rate, "large": large_rate},
        "ratio": ratio,
        "ratio_quartiles": [lower, upper],
        "anonymous_mib": anonymous,
        "threads": options.threads,
    }


def child(options: argparse.Namespace) -> None:
    """Steps from the small and the large file in turns; prints their rates, ratio and anonymous memory."""
    config = configured(options.side)
    whole = WholeStep(False, torch.device("cpu"), config=config)
    rows = [map_file(options.folder / name).view(-1, *config.image.shape) for name in ("small", "large")]
    feed(whole, rows[1])
    images_per_second(whole, 60.0)  # the cache fills to its limit
    rates: list[list[float]] = [[], []]
    for _ in range(ROUNDS):
        for found, images in zip(rates, rows, strict=True):
            feed(whole, images)
            found.append(images_per_second(whole, 2 * ROUND_SECONDS))
    ratios = [large / small for small, large in zip(*rates, strict=True)]
    anonymous = next(
        int(line.split()[1]) / 2**10
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("RssAnon:")
    )
    middle = [statistics.median(each) for each in (*rates, ratios)]
    print(*middle, *statistics.quantiles(ratios, n=4)[::2], anonymous)


def spread(ratio: float, quartiles: list[float]) -> str:
    return f"{ratio:.2f} ({quartiles[0]:.2f}-{quartiles[1]:.2f})"


def show() -> None:
    """The rows as tables in Markdown."""
    for row in read_rows(RESULTS):
        values = row["figures"]
        size, rates = "x".join(map(str, values["shape"])), values["images_per_second"]
        if row["kind"] == "sizes":
            told = (
                spread(values["ratio"][kind], values["ratio_quartiles"][kind]) for kind in ("warm", "cold")
            )
            print(f"| {size} | {rates['memory']:.0f} | {' | '.join(told)} |")
        else:
            ratio = spread(values["ratio"], values["ratio_quartiles"])
            cells = (size, values["file_gib"], values["limit_mib"], f"{rates['small']:.0f}", ratio)
            print("|", *(f"{cell} |" for cell in cells), f"{values['anonymous_mib']:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("sizes", "limited", "child", "show"))
    parser.add_argument(
        "--folder", type=Path, help="where files are written; by default the temporary folder"
    )
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES)
    parser.add_argument("--side", type=int, default=28, help="of the images of `limited`")
    parser.add_argument("--gib", type=int, default=6, help="size of the large file of `limited`")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.what in ("show", "child"):
        show() if options.what == "show" else child(options)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        if options.what == "limited":
            row = {"kind": "limited", "figures": measure_limited(options, folder)}
            print(add_row(RESULTS, row)["figures"])
            return
        for side in options.sides:
            print(add_row(RESULTS, {"kind": "sizes", "figures": measure_side(side, folder)})["figures"])


if __name__ == "__main__":
    main()
