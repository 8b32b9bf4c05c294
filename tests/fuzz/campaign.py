"""Many inputs in worker processes that may crash, hang, or run out of memory."""

import contextlib
import multiprocessing
import os
import random
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.fuzz.readers import READERS
from tests.fuzz.watch import Finding, Watch

HANG_SECONDS = 30  # for one input, after which its process is killed; not counted while both are stopped


@dataclass
class Report:
    """What a campaign found: the first input of each kind of finding, and how many there were of it."""

    inputs: int = 0
    refused: int = 0
    seconds: float = 0.0
    findings: dict[tuple[str, str], tuple[int, str, int]] = field(default_factory=dict)

    def add(self, index: int, finding: Finding) -> bool:
        """Counts a finding; whether it is the first of its kind."""
        key = (finding.kind, finding.place)
        first, detail, count = self.findings.get(key, (index, finding.detail, 0))
        self.findings[key] = (first, detail, count + 1)
        return count == 0


def rng_of(seed: int, index: int) -> random.Random:
    """The random numbers that make input `index` of a seed."""
    return random.Random(f"{seed} {index}")


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder in memory for the inputs of one process, with a file beside it that no reader may open."""
    base = Path("/dev/shm" if Path("/dev/shm").is_dir() else "/tmp") / f"cdm-fuzz-{os.getpid()}"
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir()
    try:
        (base / "outside").write_bytes(b"secret")
        yield base / "case"
    finally:
        shutil.rmtree(base, ignore_errors=True)


def replay(name: str, seed: int, index: int) -> Finding | None:
    """Runs one input of a campaign in this process."""
    with scratch() as root:
        return Watch(READERS[name], root).run(READERS[name].make(rng_of(seed, index)))


def campaign(name: str, count: int, seed: int, seconds: float) -> Report:
    """Runs `count` inputs of a reader, or as many as the seconds allow, and tells findings as they come."""
    report, began = Report(), time.perf_counter()
    index = 0
    while index < count and time.perf_counter() - began < seconds:
        index = _one_worker(name, index, count, seed, began + seconds, report)
    report.seconds = time.perf_counter() - began
    return report


def _one_worker(name: str, start: int, count: int, seed: int, until: float, report: Report) -> int:
    """Runs inputs in a process until it ends or hangs; returns the index to go on from."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    current = context.Value("q", start, lock=False)
    worker = context.Process(target=_work, args=(name, current, count, seed, until, sender))
    worker.start()
    sender.close()
    last, waited, hung = start, 0, False
    while True:
        try:
            if receiver.poll(1.0):
                index, finding = receiver.recv()
                _tell(name, seed, index, finding, report)
                continue
        except EOFError:
            break
        if current.value != last:
            last, waited = current.value, 0
            continue
        waited += 1
        if waited > HANG_SECONDS:
            hung = True
            worker.kill()
            _tell(name, seed, last, Finding("time", "hang", f"no end in {HANG_SECONDS} s"), report)
            break
    worker.join()
    reached = current.value
    if worker.exitcode == 0:
        report.inputs += reached - start
        return reached if time.perf_counter() > until else count
    if not hung:
        ended = f"exit {worker.exitcode}"
        _tell(name, seed, reached, Finding("crash", ended, "the process ended early"), report)
    report.inputs += reached + 1 - start
    return reached + 1


def _work(name, current, count, seed, until, sender) -> None:
    torch.set_num_threads(1)
    reader = READERS[name]
    reader.make(rng_of(seed, 0))  # builds what all inputs share
    with scratch() as root:
        watch = Watch(reader, root)
        watch.limit_memory()
        for index in range(current.value, count):
            current.value = index
            if time.perf_counter() > until:
                break
            finding = watch.run(reader.make(rng_of(seed, index)))
            if finding is not None:
                sender.send((index, finding))
        else:
            current.value = count


def _tell(name: str, seed: int, index: int, finding: Finding, report: Report) -> None:
    if report.add(index, finding):
        print(
            f"{name} seed {seed} input {index}: {finding.kind} at {finding.place}: {finding.detail}",
            file=sys.stderr,
            flush=True,
        )
