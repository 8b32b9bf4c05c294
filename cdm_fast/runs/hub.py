"""Runs on the Hugging Face hub: a repository holds a run directory and a model card.

A push uploads the averaged weights of the newest intact checkpoint, the config, the calibration, the log,
and the pictures and scores of the run. A fetch makes a run directory of them again.
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
from cdm_fast.host.files import replacing, saving, write_atomically
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
from cdm_fast.runs.reports import KEPT_LIMIT, read_kept_json

KEPT = ("*.json", "*.png", "log.jsonl")  # of the top folder of a run, what is pushed beside the checkpoint
REPLACED = (  # by the next push: what would not fit other weights
    "checkpoints/*",
    *(f"{name}.json" for name in ("calibration", "constants", "nll", "classes", "audit")),
)
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def fetch_run(run: str | Path, parts: Sequence[str] = ("ema",), folder: Path | None = None) -> Path | None:
    """The run that `hf:OWNER/NAME[@REVISION]` names, as a run directory on this machine.

    Args:
        parts: the parts of the checkpoint to fetch, from `checkpoint.PARTS`.
        folder: the run directory to create; the commit is appended to its name. By default a folder beside
            the cache of `huggingface_hub`. Existing files are kept.

    Returns None if the repository holds something else, such as a model of diffusers. Raises UserError if it
    cannot be fetched.
    """
    name = hub.parse_hub_name(run)
    found = hub.fetch(name, ["*.json"])
    if not checkpoint_folders(found) or not (found / "config.json").is_file():
        return None
    commit = found.name
    pinned = hub.HubName(name.repo, commit)
    files = [*KEPT, "checkpoints/*/*.json", *(f"checkpoints/*/{part}.safetensors" for part in parts)]
    snapshot = hub.fetch(pinned, files)
    target = (
        hub.assets_folder(name, commit) if folder is None else folder.with_name(f"{folder.name}-{commit[:8]}")
    )
    with saving(target):
        _copy_into(snapshot, target, files)
    return target


def require_run(run: str | Path, parts: Sequence[str] = ("ema",), folder: Path | None = None) -> Path:
    """The same as `fetch_run`, but raises UserError if the repository holds no run."""
    found = fetch_run(run, parts, folder)
    if found is None:
        raise bad(run, "holds no run of cdm_fast; give a repository that cdm-fast push wrote")
    return found


def _copy_into(snapshot: Path, target: Path, patterns: Sequence[str]) -> None:
    """Copies the files of a run that are not there yet; weights are hard links where possible.

    A snapshot is shared with other programs, which may have fetched more. Every process may do this at once.
    """
    for path in (path for pattern in patterns for path in sorted(snapshot.glob(pattern))):
        copy = target / path.relative_to(snapshot)
        if path.suffix != ".safetensors" and path.stat().st_size > KEPT_LIMIT:
            raise bad(path, f"has {path.stat().st_size} bytes, above the limit of {KEPT_LIMIT}")
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            _link(path.resolve(), copy) if path.suffix == ".safetensors" else _copy(path, copy)
    for path in snapshot.glob("checkpoints/*/manifest.json"):
        _name_absent_parts(path, target / path.relative_to(snapshot))


def _name_absent_parts(source: Path, target: Path) -> None:
    """Writes a manifest with the parts that were not fetched among those left out."""
    manifest = parse_json(read_bytes(source.resolve(), KEPT_LIMIT))
    if isinstance(manifest, dict):
        absent = [part for part in PARTS if not (target.parent / f"{part}.safetensors").exists()]
        manifest = {**manifest, LEFT_OUT: absent}
    with replacing(target) as unfinished:
        unfinished.write_text(json.dumps(manifest, indent=2))


def _link(source: Path, target: Path) -> None:
    """A hard link; a copy on another file system."""
    try:
        os.link(source, target)
    except OSError:
        if not target.exists():  # else another process was faster
            _copy(source, target)


def _copy(source: Path, target: Path) -> None:
    with replacing(target) as unfinished:
        shutil.copyfile(source, unfinished)


def require_repository(name: str) -> hub.HubName:
    """`OWNER/NAME`, with or without `hf:`, as a repository; UserError for anything else."""
    repo = name.removeprefix(hub.PREFIX)
    if not _NAME.fullmatch(repo):
        raise UserError(
            f"{name!r} names no repository; give OWNER/NAME, of letters, digits, '-', '_' and '.'"
        )
    return hub.HubName(repo)


def stage_run(run: Path, folder: Path, *, optimizer: bool = False) -> RunConfig:
    """Copies the files of a run that are to be published into `folder`; returns the published config.

    The newest intact checkpoint is verified first. Paths of this machine are cut to their last part.

    optimizer: also copy the raw weights and the optimizer state, which are needed to continue training.
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
    """The config with paths cut to their last part; the data have the name that was given."""
    source = config.data.given or config.data.source
    data = replace(config.data, source=_last_part(source), given=None)
    finetune = config.train.finetune
    train = replace(config.train, finetune=finetune and PurePath(finetune).name)
    return replace(config, data=data, train=train)


def _last_part(source: str) -> str:
    """The last component of a path; the name of a data set on the hub as it is."""
    name = source.removeprefix(hub.PREFIX)
    is_path = name.startswith(("/", "~", ".")) or Path(name).exists()
    return source if hub.on_hub(source) and not is_path else PurePath(name).name


def _publish(path: Path, target: Path, run: Path) -> None:
    """Copies a picture, log or report of a run; a report without paths of this machine."""
    if path.suffix == ".json":
        write_json(target, _without_paths(read_kept_json(path, run), str(run)))
    else:
        write_atomically(target, read_bytes(path, KEPT_LIMIT, run))


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
