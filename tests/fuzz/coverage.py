"""Inputs guided by coverage: libFuzzer, by way of atheris, keeps and mutates what reaches new lines.

Its bytes decide what the generators of inputs draw; every other time they are the reader's file itself. What
is to be watched must not have been imported before, so nothing of the project is imported up here.
"""

import atexit
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.fuzz.campaign import Report

_INSTRUMENTED = (
    *(
        "cdm_fast.data",
        "cdm_fast.checkpoint",
        "cdm_fast.config",
        "cdm_fast.config_json",
        "cdm_fast.interop.convert",
    ),
    *("cdm_fast.plain_pickle", "cdm_fast.state", "zipfile", "gzip", "PIL", "torch._weights_only_unpickler"),
)
# The file whose bytes the fuzzer writes itself.
_RAW = {
    "idx": "train-images-idx3-ubyte",
    "idx.gz": "train-images-idx3-ubyte.gz",
    "cifar": "data_batch_1.bin",
    "npz": "data.npz",
    "zip": "data.zip",
    "folder": "0.png",
    "run": "run/config.json",
    "convert": "cdm.pt",
}


class Decisions(random.Random):
    """Random numbers that are the bytes of a string, and go on from a fixed seed when it ends."""

    def __init__(self, decisions: bytes) -> None:
        super().__init__(0)
        self._decisions = memoryview(decisions)

    def getrandbits(self, k: int) -> int:
        count = (k + 7) // 8
        if len(self._decisions) < count:
            return super().getrandbits(k)
        taken, self._decisions = self._decisions[:count], self._decisions[count:]
        return int.from_bytes(taken) & ((1 << k) - 1)


def guided_campaign(name: str, count: int, seed: int, seconds: float) -> "Report":
    """Fuzzes a reader in a process of its own, which libFuzzer ends by leaving it."""
    from tests.fuzz.campaign import Report
    from tests.fuzz.watch import Finding

    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "findings"
        began = time.perf_counter()
        limit = int(min(seconds, 10**6))
        command = [
            sys.executable,
            "-m",
            "tests.fuzz.coverage",
            name,
            str(count),
            str(seed),
            str(limit),
            str(told),
        ]
        status = subprocess.run(command, stderr=sys.stderr, stdout=subprocess.DEVNULL).returncode
        report = Report(seconds=time.perf_counter() - began)
        for line in told.read_text().splitlines() if told.exists() else []:
            index, *finding = json.loads(line)
            report.inputs = max(report.inputs, index)
            if finding and report.add(index, Finding(*finding)):
                print(f"{name} guided seed {seed} input {index}: {finding}", file=sys.stderr, flush=True)
        if status not in (0, 77):
            report.add(report.inputs, Finding("crash", f"exit {status}", "the fuzzer's process ended early"))
        return report


def _fuzz(name: str, count: int, seed: int, seconds: int, told: Path) -> None:
    """Never returns. A finding is a line [input, kind, place, detail] of `told`; other lines are [inputs]."""
    import atheris

    with atheris.instrument_imports(include=list(_INSTRUMENTED)):
        from tests.fuzz.campaign import scratch
        from tests.fuzz.readers import READERS
        from tests.fuzz.watch import Watch

    import torch

    torch.set_num_threads(1)
    reader, inputs = READERS[name], 0
    folder = scratch()
    watch = Watch(reader, folder.__enter__())
    reader.make(random.Random(seed))
    lines = open(told, "w", buffering=1)
    atexit.register(lambda: folder.__exit__(None, None, None))

    def one_input(content: bytes) -> None:
        nonlocal inputs
        inputs += 1
        case = reader.make(Decisions(content[1:]))
        if content[:1] and content[0] % 2:
            case.files[_RAW[name]] = content[1:]
        finding = watch.run(case)
        if finding is not None:
            print(json.dumps([inputs, finding.kind, finding.place, finding.detail]), file=lines)
        if inputs % 100 == 0:
            print(json.dumps([inputs]), file=lines)

    corpus = told.parent / "corpus"
    corpus.mkdir()
    draws = random.Random(seed)
    for index in range(64):
        first = bytes([2 * draws.randrange(128)])
        (corpus / f"decisions-{index}").write_bytes(first + draws.randbytes(draws.choice((50, 400, 2000))))
        raw = reader.make(random.Random(f"{seed} {index}")).files.get(_RAW[name])
        if raw:
            (corpus / f"file-{index}").write_bytes(b"\1" + raw[:100_000])
    limits = [f"-runs={count}", f"-max_total_time={seconds}", f"-seed={seed + 1}", "-max_len=200000"]
    os.chdir(told.parent)
    atheris.Setup([name, *limits, "-timeout=30", "-rss_limit_mb=2000", str(corpus)], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    reader_name, *numbers, findings = sys.argv[1:]
    _fuzz(reader_name, *map(int, numbers), Path(findings))
