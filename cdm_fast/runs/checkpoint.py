"""Run directories: config and checkpoints, written atomically and verified when read.

    RUN/config.json                            the resolved RunConfig
    RUN/checkpoints/step-00001000/
        model.safetensors  ema.safetensors     weights, raw and averaged
        optimizer.safetensors                  one tensor per parameter and moment
        state.json                             step, counters, the settings trained with
        manifest.json                          size and SHA-256 of each file above

Nothing is pickled. A checkpoint is written to a temporary directory, flushed to the disk and renamed, so a
directory under its final name is complete; removal renames the directory first, too. Reading uses the newest
checkpoint whose checksums match.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from cdm_fast.config import RunConfig, check
from cdm_fast.config.json import from_json, parse_json, to_json
from cdm_fast.errors import UserError
from cdm_fast.host.files import atomic_directory, remove, remove_unfinished, saving, write_atomically
from cdm_fast.host.reading import read_bytes, shown
from cdm_fast.runs.tensor_file import HashedFile, write_tensors

PARTS = ("model", "ema", "optimizer")
LEFT_OUT = "left_out"  # key of a manifest: the parts that a published checkpoint does not hold
_MAX_JSON_BYTES = 1 << 20  # config, state and manifest have a few kilobytes; a larger file is not ours
_FOLDER = re.compile(r"step-(\d{8,15})")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in host memory.

    tensors: tensors by name, for each part ("model", "ema", "optimizer"); state: JSON values, including
    `step`.
    """

    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps taken."""
        return int(self.state["step"])


def read_config(run: str | Path) -> RunConfig:
    """The config of a run directory; UserError if there is none, or it is invalid."""
    run = Path(run)
    if not run.is_dir():
        raise UserError(f"no run directory {run}; give the --out of a training run")
    if not (run / "config.json").is_file():
        raise UserError(
            f"{run} is not a run directory (it has no config.json); give the --out of a training run"
        )
    config = from_json(RunConfig, _read_json(run / "config.json"), str(run / "config.json"))
    try:
        check(config)
    except UserError as error:
        raise UserError(f"{run / 'config.json'}: {error}") from None
    return config


def write_config(run: Path, config: RunConfig) -> None:
    """Replaces RUN/config.json atomically."""
    write_json(run / "config.json", to_json(config))


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically; DiskError if the disk refuses."""
    write_atomically(path, json.dumps(value, indent=2).encode())


def require_new(run: str | Path) -> None:
    """Raises UserError unless `run` can become a run directory: it must not exist, or be empty."""
    run = Path(run)
    for parent in run.absolute().parents:
        if parent.is_file():
            raise UserError(f"cannot write to {run}: {parent} is a file; give another --out")
    if run.is_file() or (run.is_dir() and any(run.iterdir())):
        raise UserError(f"{run} exists already; continue it with --resume {run}, or give another --out")


def create_run(run: str | Path, config: RunConfig, checkpoint: Checkpoint) -> None:
    """Creates a run directory with its config and first checkpoint, atomically.

    Raises UserError when `run` is a file or a directory that is not empty, or weights are not finite;
    DiskError when the disk refuses.
    """
    run = Path(run)
    require_new(run)
    with saving(run):
        run.parent.mkdir(parents=True, exist_ok=True)
        remove_unfinished(run.parent, run.name)
        with atomic_directory(run) as unfinished:
            write_config(unfinished, config)
            save_checkpoint(unfinished, checkpoint, keep=1)


def save_checkpoint(
    run: Path, checkpoint: Checkpoint, keep: int, proceed: Callable[[], None] = lambda: None
) -> Path:
    """Writes RUN/checkpoints/step-N and removes all but the newest `keep`; returns its path.

    proceed: called every few megabytes; may raise to abandon the save.
    Raises UserError, with everything saved earlier intact, when a value is not finite; DiskError when the
    disk refuses.
    """
    folder = run / "checkpoints"
    target = folder / f"step-{checkpoint.step:08d}"
    with saving(run):
        folder.mkdir(exist_ok=True)
        remove_unfinished(folder)
        with atomic_directory(target) as unfinished:
            _write_parts(unfinished, checkpoint, run, proceed)
    for old in checkpoint_folders(run)[keep:]:
        if old != target:
            remove(old)
    return target


def load_checkpoint(run: str | Path, parts: Sequence[str] = PARTS, at_most: int | None = None) -> Checkpoint:
    """The newest intact checkpoint of a run; damaged ones are skipped with a warning.

    Args:
        parts: the parts to read, from `PARTS`.
        at_most: ignore checkpoints of later steps.

    Raises UserError when no intact checkpoint is left.
    """
    tried: set[Path] = set()
    while left := [
        folder
        for folder in checkpoint_folders(Path(run))
        if folder not in tried and (at_most is None or _step_of(folder) <= at_most)
    ]:
        folder = left[0]
        tried.add(folder)
        try:
            return _read_parts(folder, parts)
        except _PartLeftOut as absent:
            raise UserError(str(absent)) from None
        except (OSError, ValueError, SafetensorError) as error:
            if folder.exists():  # otherwise a training in progress has just removed it
                warnings.warn(
                    f"checkpoint {folder} is damaged ({shown(str(error), 300)}); trying the one before",
                    stacklevel=2,
                )
    if at_most is not None:
        raise UserError(
            f"{run} holds no intact checkpoint of step {at_most} or before; give a later step"
            " (--keep sets how many checkpoints a run keeps)"
        )
    what = "no intact checkpoint" if tried else "no checkpoint"
    raise UserError(f"{run} holds {what}; restore its checkpoints folder, or train again into another --out")


def checkpoint_folders(run: Path) -> list[Path]:
    """The complete checkpoint folders of a run, newest first."""
    found = [(_FOLDER.fullmatch(path.name), path) for path in (run / "checkpoints").glob("step-*")]
    steps = {path: int(match[1]) for match, path in found if match}
    return sorted(steps, key=lambda path: steps[path], reverse=True)


def prepare_to_resume(run: Path, step: int) -> None:
    """Cleans up the directory of a run that continues from its checkpoint of `step`.

    Removes the temporary files of killed processes, and renames damaged newer checkpoints to damaged-N, so
    that they are neither taken for the newest nor counted among those to keep. Raises DiskError.
    """
    with saving(run):
        remove_unfinished(run)
        remove_unfinished(run / "checkpoints")
        for folder in checkpoint_folders(run):
            if _step_of(folder) > step:
                aside = folder.with_name(folder.name.replace("step", "damaged"))
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(folder, aside)


def _step_of(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _write_parts(folder: Path, checkpoint: Checkpoint, run: Path, proceed: Callable[[], None]) -> None:
    """The files of one checkpoint, each flushed to the disk, the manifest last."""
    manifest = {}

    def write(name: str, fill: Callable[[HashedFile], None]) -> None:
        with HashedFile(folder / name, proceed) as file:
            fill(file)
        manifest[name] = {"bytes": file.bytes, "sha256": file.sha256}

    for part in PARTS:
        tensors = checkpoint.tensors[part]
        try:
            write(f"{part}.safetensors", partial(write_tensors, tensors=tensors))
        except ValueError as error:
            raise UserError(
                f"{run}: {part}: {error} at step {checkpoint.step}, so nothing was saved;"
                " train into another --out with a lower --lr"
            ) from error
    for name, value in (("state.json", dict(checkpoint.state)), ("manifest.json", manifest)):
        text = json.dumps(value, indent=2).encode()
        write(name, partial(HashedFile.write, data=text))


def _read_parts(folder: Path, parts: Sequence[str]) -> Checkpoint:
    """Reads and verifies the named parts; raises ValueError, OSError or SafetensorError if it cannot."""
    manifest = _read_json(folder / "manifest.json")
    _require_parts(folder, manifest, parts)
    state = parse_json(_read_verified(folder / "state.json", manifest))
    if not isinstance(state, dict) or type(state.get("step")) is not int or not 0 <= state["step"] < 2**53:
        raise ValueError("state.json names no step")
    if state["step"] != _step_of(folder):
        raise ValueError(f"it holds step {state['step']}")
    tensors = {
        part: safetensors.torch.load(_read_verified(folder / f"{part}.safetensors", manifest))
        for part in parts
    }
    return Checkpoint(tensors, state)


def _require_parts(folder: Path, manifest: Any, parts: Sequence[str]) -> None:
    """UserError for a part that was left out when the run was published, which is no damage."""
    left_out = manifest.get(LEFT_OUT) if isinstance(manifest, dict) else None
    missing = [part for part in parts if isinstance(left_out, list) and part in left_out]
    if missing:
        raise _PartLeftOut(
            f"{folder} was published or fetched without {missing[0]}.safetensors, with the averaged weights"
            " alone: load those, begin a new run from them by --finetune, or download all files of a run"
            " that was pushed with --optimizer"
        )


class _PartLeftOut(Exception):
    """What a published checkpoint does not hold was asked for."""


def _read_verified(path: Path, manifest: Any) -> bytes:
    """The bytes of a file; ValueError unless size and checksum match the manifest."""
    entry = manifest.get(path.name) if isinstance(manifest, dict) else None
    if not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys():
        raise ValueError(f"manifest.json does not list {path.name}")
    if path.stat().st_size != entry["bytes"]:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes, not those that manifest.json lists")
    data = read_bytes(path, path.stat().st_size, path.parent)
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise ValueError(f"{path.name} does not match its checksum")
    return data


def _read_json(path: Path) -> Any:
    """The JSON value in a small file; UserError if it is not valid JSON."""
    content = read_bytes(path, _MAX_JSON_BYTES, path.parent)
    try:
        return parse_json(content)
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}); restore it") from None
