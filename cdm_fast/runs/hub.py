"""Runs on the Hugging Face hub: a repository holds a run directory, with a card beside it.

What is pushed is the newest intact checkpoint with its averaged weights, the config, the calibration, the
log, and the pictures and scores that the run keeps. What is fetched becomes a run directory again.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from cdm_fast.config import RunConfig
from cdm_fast.config.json import parse_json
from cdm_fast.errors import UserError
from cdm_fast.host import hub
from cdm_fast.host.files import saving, write_atomically
from cdm_fast.host.reading import bad, read_bytes
from cdm_fast.runs.checkpoint import (
    LEFT_OUT,
    PARTS,
    checkpoint_folders,
    load_checkpoint,
    read_config,
    write_config,
    write_json,
)
from cdm_fast.runs.reports import read_report

KEPT = ("*.json", "*.png", "log.jsonl")  # of the top folder of a run, what is pushed beside the checkpoint
FILE_LIMIT = 2**26  # bytes of a picture or log that a run keeps
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def fetch_run(run: str | Path, parts: Sequence[str] = ("ema",), folder: Path | None = None) -> Path | None:
    """The run that `hf:OWNER/NAME[@REVISION]` names, as a run directory on this machine.

    Args:
        parts: of `checkpoint.PARTS`, those to fetch.
        folder: where the run directory goes, with the commit in its name; by default beside the cache of
            `huggingface_hub`. What is in it already stays.

    Returns None where the repository holds something else, such as a model of diffusers. Raises UserError
    where it cannot be had.
    """
    name = hub.parse_hub_name(run)
    found = hub.fetch(name, ["*.json"])
    if not checkpoint_folders(found) or not (found / "config.json").is_file():
        return None
    commit = found.name
    pinned = hub.HubName(name.repo, commit)
    weights = [f"checkpoints/*/{part}.safetensors" for part in parts]
    snapshot = hub.fetch(pinned, [*KEPT, "checkpoints/*.json", *weights])
    target = (
        hub.assets_folder(name, commit) if folder is None else folder.with_name(f"{folder.name}-{commit[:8]}")
    )
    with saving(target):
        _copy_into(snapshot, target)
    return target


def require_run(run: str | Path, parts: Sequence[str] = ("ema",), folder: Path | None = None) -> Path:
    """As `fetch_run`; UserError where the repository holds no run."""
    found = fetch_run(run, parts, folder)
    if found is None:
        raise bad(run, "holds no run of cdm_fast; give a repository that cdm-fast push wrote")
    return found


def _copy_into(snapshot: Path, target: Path) -> None:
    """Copies the files of a snapshot that are not there yet; weights are hard links where possible."""
    for path in sorted(snapshot.rglob("*")):
        copy = target / path.relative_to(snapshot)
        if path.is_dir() or copy.exists():
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            _link(path.resolve(), copy)
        else:
            write_atomically(copy, path.read_bytes())


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        unfinished = target.with_name(f".{target.name}.unfinished-{os.getpid()}")
        shutil.copyfile(source, unfinished)
        os.replace(unfinished, target)


def require_repository(name: str) -> hub.HubName:
    """`OWNER/NAME`, with or without `hf:`, as a repository; UserError for anything else."""
    repo = name.removeprefix(hub.PREFIX)
    if not _NAME.fullmatch(repo):
        raise UserError(
            f"{name!r} names no repository; give OWNER/NAME, of letters, digits, '-', '_' and '.'"
        )
    return hub.HubName(repo)


def stage_run(run: Path, folder: Path, *, optimizer: bool = False) -> RunConfig:
    """Copies into `folder` what of a run is published; returns the published config.

    The newest intact checkpoint is verified first. Paths of this machine are cut to their last part.

    optimizer: also the raw weights and the optimizer state, with which training can be continued.
    Raises UserError for a folder that is no run, or holds no intact checkpoint.
    """
    config = published_config(read_config(run))
    parts = PARTS if optimizer else ("ema",)
    checkpoint = load_checkpoint(run, parts=parts)
    with saving(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_config(folder, config)
        for pattern in KEPT:
            for path in sorted(run.glob(pattern)):
                if path.name != "config.json":
                    _publish(path, folder / path.name, run)
        place = Path("checkpoints") / f"step-{checkpoint.step:08d}"
        _stage_checkpoint(run / place, folder / place, parts, dict(checkpoint.state))
    return config


def published_config(config: RunConfig) -> RunConfig:
    """The config without paths of this machine: the data by the name that was given, or a last part."""
    source = config.data.given or config.data.source
    data = replace(config.data, source=_last_part(source), given=None)
    finetune = config.train.finetune
    train = replace(config.train, finetune=finetune and PurePath(finetune).name)
    return replace(config, data=data, train=train)


def _last_part(source: str) -> str:
    return PurePath(source).name if source.startswith(("/", "~", "hf:/", "hf:~")) else source


def _publish(path: Path, target: Path, run: Path) -> None:
    """Copies a picture, log or report of a run; a report without paths of this machine."""
    if path.suffix == ".json":
        write_json(target, _without_paths(read_report(run, path.name), str(run)))
    else:
        write_atomically(target, read_bytes(path, FILE_LIMIT, run))


def _without_paths(value: Any, run: str) -> Any:
    """JSON values with paths that are absolute, or lead into the run, cut to their last part."""
    if isinstance(value, dict):
        return {key: _without_paths(each, run) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_paths(each, run) for each in value]
    if isinstance(value, str) and (value == run or value.startswith(("/", "~", f"{run}/"))):
        return PurePath(value).name
    return value


def _stage_checkpoint(source: Path, target: Path, parts: Sequence[str], state: dict[str, Any]) -> None:
    """One checkpoint with the named parts; its manifest tells which are left out."""
    target.mkdir(parents=True, exist_ok=True)
    manifest = parse_json((source / "manifest.json").read_bytes())
    kept = {f"{part}.safetensors": manifest[f"{part}.safetensors"] for part in parts}
    for name in kept:
        _link(source / name, target / name)
    if "config" in state:
        state["config"] = _state_config(state["config"])
    text = json.dumps(state, indent=2).encode()
    write_atomically(target / "state.json", text)
    facts = {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    left_out = [part for part in PARTS if part not in parts]
    write_json(target / "manifest.json", {**kept, "state.json": facts, LEFT_OUT: left_out})


def _state_config(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings in state.json, with the source run's path cut as `published_config` does."""
    train = dict(settings.get("train", {}))
    if train.get("finetune"):
        train["finetune"] = PurePath(train["finetune"]).name
    return {**settings, "train": train} if train else settings
