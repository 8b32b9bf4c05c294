"""Training from a prepared copy: images per second by image size, cold and warm, and under a limit of memory.

    python -m benchmarks.studies.feeding sizes   # 8x8 to 64x64, against the same images in memory
    python -m benchmarks.studies.feeding limited # a file three times as large as the memory of the process
    python -m benchmarks.studies.feeding readahead # a batch of such a file, with and without readahead
    python -m benchmarks.studies.feeding show    # results/feeding.jsonl as tables

The network is the preset `fashion-mnist-encoder`'s at every size, with three channels from 32x32 on. Images
are random, as their values do not matter here. *Cold*: the kernel's cache of the file is dropped before each
round. `limited` and `readahead` need root: they make a memory cgroup whose limit, page cache included, is a
third of a file.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.studies.rows import add_row, read_rows
from benchmarks.support.memory import anonymous_mib
from benchmarks.support.train_steps import WholeStep
from cdm_fast.config import PRESETS, RunConfig
from cdm_fast.data.copies import expect_random_reads, map_file
from cdm_fast.training.feed import on_device

RESULTS = Path(__file__).parents[1] / "results" / "feeding.jsonl"
SIDES = (8, 16, 28, 32, 64)
SMALL_MIB = 64
GATHERED, BATCHES = 64, 200  # rows of a batch, and batches, of `readahead`
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


def limited_output(part: str, limit: int, folder: Path, options: argparse.Namespace) -> str:
    """What a part of this program prints in a memory cgroup (version 1 or 2) with this limit in bytes."""
    second = (CGROUPS / "cgroup.controllers").exists()
    group = (CGROUPS if second else CGROUPS / "memory") / f"cdm-fast-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.max" if second else "memory.limit_in_bytes")).write_text(str(limit))
        command = [sys.executable, "-m", "benchmarks.studies.feeding", part, "--folder", str(folder)]
        command += ["--side", str(options.side), "--threads", str(options.threads)]
        enter = partial((group / "cgroup.procs").write_text, "0")
        return subprocess.run(command, preexec_fn=enter, stdout=subprocess.PIPE, text=True, check=True).stdout
    finally:
        group.rmdir()


def measure_readahead(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Milliseconds to gather random rows of a file, in a cgroup with a third of its size as the limit."""
    shape = configured(options.side).image.shape
    path = folder / "large"
    write_rows(path, shape, options.gib * 2**10)
    limit = path.stat().st_size // 3
    default, training = map(float, limited_output("gathers", limit, folder, options).split())
    return {
        "shape": list(shape),
        "file_gib": options.gib,
        "limit_mib": limit // 2**20,
        "rows": GATHERED,
        "milliseconds": {"default": default, "training": training},
    }


def gathers(options: argparse.Namespace) -> None:
    """Gathers rows of the large file as mapped by default, and as training maps it; prints both medians."""
    path = options.folder / "large"
    for expect in (False, True):
        forget(path)
        rows = map_file(path)
        size = prod(configured(options.side).image.shape)
        rows = rows[: len(rows) // size * size].view(-1, size)
        if expect:
            expect_random_reads(rows)
        generator, seconds = torch.Generator().manual_seed(0), []
        for _ in range(BATCHES):
            index = torch.randint(len(rows), (GATHERED,), generator=generator)
            time.sleep(0.05)  # a step, during which the kernel may read ahead or reclaim memory
            began = time.perf_counter()
            rows[index]
            seconds.append(time.perf_counter() - began)
        print(1e3 * statistics.median(seconds))
        del rows


def measure_limited(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The figures of `steps`, which runs in a cgroup with a third of the large file's size as its limit."""
    shape = configured(options.side).image.shape
    small, large = folder / "small", folder / "large"
    write_rows(small, shape, SMALL_MIB)
    write_rows(large, shape, options.gib * 2**10)
    forget(large)
    limit = large.stat().st_size // 3
    found = limited_output("steps", limit, folder, options)
    small_rate, large_rate, ratio, lower, upper, anonymous = map(float, found.split())
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


def steps(options: argparse.Namespace) -> None:
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
    middle = [statistics.median(each) for each in (*rates, ratios)]
    print(*middle, *statistics.quantiles(ratios, n=4)[::2], anonymous_mib())


def spread(ratio: float, quartiles: list[float]) -> str:
    return f"{ratio:.2f} ({quartiles[0]:.2f}-{quartiles[1]:.2f})"


def show() -> None:
    """The rows as tables in Markdown."""
    for row in read_rows(RESULTS):
        values = row["figures"]
        size = "x".join(map(str, values["shape"]))
        if row["kind"] == "readahead":
            print(
                f"| {size} |", *(f"{values['milliseconds'][kind]:.1f} |" for kind in ("default", "training"))
            )
            continue
        rates = values["images_per_second"]
        if row["kind"] == "sizes":
            told = (
                spread(values["ratio"][kind], values["ratio_quartiles"][kind]) for kind in ("warm", "cold")
            )
            print(f"| {size} | {rates['memory']:.0f} | {' | '.join(told)} |")
        else:
            ratio = spread(values["ratio"], values["ratio_quartiles"])
            cells = (size, values["file_gib"], values["limit_mib"], f"{rates['small']:.0f}", ratio)
            print("|", *(f"{cell} |" for cell in cells), f"{values['anonymous_mib']:.0f} |")


def measurements(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The rows that a command measures."""
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        if options.what == "sizes":
            for side in options.sides:
                yield {"kind": "sizes", "figures": measure_side(side, folder)}
            return
        measure = measure_limited if options.what == "limited" else measure_readahead
        yield {"kind": options.what, "figures": measure(options, folder)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("sizes", "limited", "readahead", "steps", "gathers", "show"))
    parser.add_argument(
        "--folder", type=Path, help="where files are written; by default the temporary folder"
    )
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES, help="of the images of `sizes`")
    parser.add_argument("--side", type=int, default=28, help="of the images of `limited` and `readahead`")
    parser.add_argument("--gib", type=int, default=6, help="size of the large file")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    parts = {"steps": steps, "gathers": gathers}  # of `limited` and `readahead`
    if options.what in parts:
        parts[options.what](options)
    elif options.what == "show":
        show()
    else:
        for row in measurements(options):
            print(add_row(RESULTS, row)["figures"])


if __name__ == "__main__":
    main()
