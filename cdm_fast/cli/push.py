"""`cdm-fast push`: uploads a run with its card to the Hugging Face hub."""

import tempfile
from pathlib import Path
from typing import Any

from cdm_fast.cli import arguments
from cdm_fast.cli.outcome import Outcome
from cdm_fast.errors import UserError
from cdm_fast.host import hub
from cdm_fast.host.files import atomic_directory, saving, write_atomically
from cdm_fast.host.optional import need
from cdm_fast.runs.card import is_edited, write_card
from cdm_fast.runs.checkpoint import read_config
from cdm_fast.runs.hub import REPLACED, require_repository, stage_run

CARD = "README.md"


def push_command(command: arguments.Push) -> Outcome:
    """`cdm-fast push`."""
    name = require_repository(command.repo)
    read_config(command.run)  # refused before anything is written
    need("huggingface_hub", "push")
    if command.dry_run is not None:
        _require_empty(command.dry_run)
        with saving(command.dry_run):
            command.dry_run.parent.mkdir(parents=True, exist_ok=True)
            with atomic_directory(command.dry_run) as unfinished:
                return _prepared(command, name, unfinished)
    with tempfile.TemporaryDirectory() as folder:
        outcome = _prepared(command, name, Path(folder))
        title = f"{command.run.resolve().name}, by cdm-fast push"
        address = hub.upload(Path(folder), name, private=command.private, message=title, replaced=REPLACED)
    result = {**outcome.result, "commit": address}
    return Outcome(result, [*outcome.lines[:-1], address, f'load it by cdm_fast.load("{name}")'])


def _prepared(command: arguments.Push, name: hub.HubName, folder: Path) -> Outcome:
    """What is published, in `folder`, and its description."""
    config = stage_run(command.run, folder, optimizer=command.optimizer)
    before = hub.read_text(name, CARD) if command.dry_run is None else None
    if not _keeps(command, name, before):
        card = write_card(folder, config, name.repo, name.repo.partition("/")[2], before)
        write_atomically(folder / CARD, card.encode())
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    result: dict[str, Any] = {
        "run": str(command.run),
        "repo": name.repo,
        "files": files,
        "bytes": sum(files.values()),
        "folder": command.dry_run and str(command.dry_run),
    }
    summary = f"{command.run}: {len(files)} files, {sum(files.values()) / 1e6:.1f} MB for {name.repo}"
    return Outcome(result, [summary, f"nothing was uploaded; see {command.dry_run}/{CARD}"])


def _keeps(command: arguments.Push, name: hub.HubName, card: str | None) -> bool:
    """Whether the card on the hub stays as it is; UserError if it was edited and the user has not chosen."""
    if card is None or not is_edited(card):
        return False
    if command.edited_card == "refuse":
        raise UserError(
            f"{name}: {CARD} was edited since cdm-fast push wrote it, or something else wrote it; give"
            " --edited-card keep or --edited-card replace"
        )
    return command.edited_card == "keep"


def _require_empty(folder: Path) -> None:
    if folder.is_file() or folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"--dry-run {folder} exists already; give a new folder")
