"""kill -9 at random moments of a training, its saves included: the run always loads and ends as if untouched.

    python -m tests.kill_training [--kills 200] [--seed 0]     # a few minutes; prints one JSON object

A small run (dropout, classes, two parts a batch) is trained by child processes of one that has everything
imported, each killed at a random moment: 1 of 8 while it starts, half of the others while a checkpoint is
being written, the rest anywhere. After each kill the run directory must load, without any complaint, at the
newest checkpoint whose writing had ended or at the one that was being written, at most `--save-every` steps
before the last one taken, and the next child resumes it.
What a run ends with, weights, average, optimizer state and log, must be bitwise what an uninterrupted one
ends with; then another run begins.
"""

import argparse
import json
import mmap
import os
import random
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch._dynamo  # which every optimizer imports, for a second; children find it imported

from cdm_fast.config import RunConfig
from cdm_fast.runs.checkpoint import load_checkpoint
from cdm_fast.training import finish, loop, report, saver, train
from tests.tiny_run import tiny_config, write_images

STEPS = 40
SAVE_EVERY = (1, 8)  # drawn for each run
TIMINGS = ("seconds", "images_per_second")
NONE = -1


class Progress:
    """Numbers that a child writes and that outlive it."""

    NAMES = ("step", "being_saved", "saved")

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8 * len(self.NAMES))
        self.reset()

    def reset(self) -> None:
        for name in self.NAMES:
            self[name] = NONE

    def __getitem__(self, name: str) -> int:
        return struct.unpack_from("q", self._memory, 8 * self.NAMES.index(name))[0]

    def __setitem__(self, name: str, value: int) -> None:
        struct.pack_into("q", self._memory, 8 * self.NAMES.index(name), value)


def watch(progress: Progress) -> None:
    """Makes the training of this process report; its final pictures, which change nothing, are left out."""
    take_step, save = loop.take_step, saver.save_checkpoint

    def step(state, *rest):
        take_step(state, *rest)
        progress["step"] = state.step

    def save_checkpoint(run, checkpoint, *rest):
        progress["being_saved"] = checkpoint.step
        save(run, checkpoint, *rest)
        progress["saved"] = checkpoint.step
        progress["being_saved"] = NONE

    loop.take_step, saver.save_checkpoint = step, save_checkpoint
    report.write_loss_curves, finish.write_final = lambda *_: [], lambda *_: {}


def child(config: RunConfig, run: Path) -> int:
    """Starts a process that begins or continues the run; returns its id."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        sys.stderr = open(run.with_suffix(".stderr"), "a")  # noqa: SIM115  (the process ends with it)
        if run.exists():
            train.resume(run, device="cpu")
        else:
            train.train(config, run, device="cpu")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def kill_at_random(
    run: Path, process: int, progress: Progress, chance: random.Random, before: int
) -> str | None:
    """Kills the process at a random moment; tells what it was doing, or None when it had ended by itself.

    before: step of the checkpoint that it begins from.
    """
    ended = False

    def wait(seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        nonlocal ended
        limit = time.monotonic() + seconds
        while not (ended or until() or time.monotonic() > limit):
            pid, status = os.waitpid(process, os.WNOHANG)
            ended = pid != 0
            assert not ended or status == 0, (run.with_suffix(".stderr")).read_text()
            time.sleep(0.0005)

    if chance.random() < 1 / 8:
        wait(chance.uniform(0, 0.2))
    else:
        target = before + chance.randint(1, 12)
        wait(60, until=lambda: progress["step"] >= target)
        if chance.random() < 1 / 2:
            wait(60, until=lambda: progress["being_saved"] != NONE)
        wait(chance.uniform(0, 0.02))
    if ended:
        return None
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    if not os.WIFSIGNALED(status):
        return None
    if progress["being_saved"] != NONE:
        return "saving"
    return "starting" if progress["step"] == NONE else "training"


def check_after_kill(run: Path, progress: Progress, save_every: int, before: int) -> int:
    """Asserts that the run loads, at the step it must; returns how many steps are lost.

    before: step of the newest checkpoint when the killed process began.
    """
    newest = load_checkpoint(run).step  # a warning would be an error
    written = max(before, progress["saved"])
    assert newest in (written, progress["being_saved"]), (newest, written, progress["being_saved"])
    reached = max(progress["step"], before)
    assert reached - newest <= save_every, (reached, newest, save_every)
    return reached - newest


def what_is_left(run: Path) -> dict[str, object]:
    """The state and the log that a finished run leaves."""
    checkpoint = load_checkpoint(run)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    for line in lines:
        for name in TIMINGS:
            line.pop(name, None)
    return {"tensors": checkpoint.tensors, "log": lines, "step": checkpoint.step}


def check_same(run: Path, expected: dict[str, object]) -> None:
    """Asserts that a finished run is bitwise the expected one, and that nothing half-written is left."""
    found = what_is_left(run)
    assert found["step"] == expected["step"] == STEPS
    assert found["log"] == expected["log"]
    for part, tensors in expected["tensors"].items():
        assert tensors.keys() == found["tensors"][part].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, found["tensors"][part][name]), (run, part, name)
    assert not list(run.rglob(".*"))


def kill_training(kills: int, seed: int, folder: Path) -> dict[str, object]:
    """Kills so often, checks after each, and returns what happened."""
    chance, progress = random.Random(seed), Progress()
    watch(progress)
    config = tiny_config(write_images(folder / "images.npz"), steps=STEPS, accumulate=2)
    config = replace(config, network=replace(config.network, conditioning="embedding"))
    config = replace(config, output=replace(config.output, log_every=3))
    process = child(config, folder / "whole")
    assert os.waitpid(process, 0)[1] == 0, (folder / "whole.stderr").read_text()
    expected = what_is_left(folder / "whole")
    moments: Counter[str] = Counter()
    lost: list[tuple[int, int]] = []  # steps, of how many that may be lost
    runs = 0
    while sum(moments.values()) < kills:
        runs += 1
        run, save_every = folder / f"run-{runs}", chance.randint(*SAVE_EVERY)
        settings = replace(config, output=replace(config.output, save_every=save_every))
        moment: str | None = ""
        while moment is not None:
            before = load_checkpoint(run).step if run.exists() else 0
            progress.reset()
            process = child(settings, run)
            if sum(moments.values()) == kills:
                assert os.waitpid(process, 0)[1] == 0, run.with_suffix(".stderr").read_text()
                break
            moment = kill_at_random(run, process, progress, chance, before)
            if moment is not None:
                moments[moment] += 1
                if run.exists():  # else it was killed before there was a run: nothing to lose
                    lost.append((check_after_kill(run, progress, save_every, before), save_every))
        check_same(run, expected)
    return {
        "kills": sum(moments.values()),
        "while": dict(moments),
        "runs": runs,
        "ended_bitwise_equal": runs,
        "most_steps_lost": max(steps for steps, _ in lost),
        "most_intervals_lost": max(steps / interval for steps, interval in lost),
        "threads": torch.get_num_threads(),
        "seed": seed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "training has waited")  # on a busy machine it may
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(kill_training(arguments.kills, arguments.seed, Path(folder))))


if __name__ == "__main__":
    main()
