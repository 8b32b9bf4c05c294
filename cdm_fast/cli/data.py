"""`cdm-fast data`: the content of a source, its prepared copy, and a sheet of examples."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cdm_fast.cli import arguments
from cdm_fast.cli.outcome import Outcome
from cdm_fast.data import write_grid
from cdm_fast.data.copies import VARIABLE, Copy, cache_folder, cached_in, clear
from cdm_fast.data.load import Request, make_copy, ready_copy, split_counts, tell_unread
from cdm_fast.data.names import SPLITS
from cdm_fast.data.pictures import Fit, parse_crop
from cdm_fast.data.pixels import levels_to_display
from cdm_fast.data.source import Source
from cdm_fast.errors import UserError

EXAMPLES = 64  # images of a sheet
_CLASSES_SHOWN = 20


def data_command(command: arguments.Data) -> Outcome:
    """`cdm-fast data`."""
    with cached_in(command.cache):
        if command.clear and not command.source:
            return _clear(None)
        fit = Fit(command.image_size, command.channels, parse_crop(command.crop), command.resample)
        request = Request(command.source, fit, command.split_seed, command.hf_column, command.hf_split)
        if command.clear:
            if command.prepare or command.sheet is not None:
                raise UserError("--clear goes with neither --prepare nor --sheet; leave one out")
            return _clear(request)
        return _describe(command, request)


def _clear(request: Request | None) -> Outcome:
    cache = _need_cache()
    key = None
    if request is not None:
        mark = request.mark() or request.open().mark
        key = request.key(mark or "")
    removed, freed = clear(cache, key)
    told = f"{cache}: {removed} prepared cop{'y' if removed == 1 else 'ies'} removed, {_size(freed)}"
    return Outcome({"cache": str(cache), "removed": removed, "bytes": freed}, [told])


def _need_cache() -> Path:
    cache = cache_folder()
    if cache is None:
        raise UserError(f"prepared copies are off; name a folder by --cache or {VARIABLE}")
    return cache


def _describe(command: arguments.Data, request: Request) -> Outcome:
    mark, copy = ready_copy(request)
    verified = None
    if copy is not None and command.prepare:
        verified = copy.verify()
        if not verified:
            clear(_need_cache(), copy.folder.name)
            copy = None
    found = None
    if copy is None:
        found = request.open()
        if command.prepare:
            copy = make_copy(request, found, mark, _need_cache())
            if copy is None:
                raise UserError(f"{command.source} cannot be identified by its content; leave --prepare out")
    else:
        tell_unread(command.source, copy.about.unread)
    result = _of_copy(copy) if copy is not None else _of_source(found, request)
    result = {"source": command.source, **result, "verified": verified}
    lines = _lines(result)
    if command.sheet is not None:
        images = _examples(copy, found, request)
        write_grid(levels_to_display(images, result["num_grey_levels"]), command.sheet)
        result["sheet"] = str(command.sheet)
        lines.append(str(command.sheet))
    return Outcome(result, lines)


def _of_copy(copy: Copy) -> dict[str, Any]:
    about = copy.about
    return {
        "kind": about.kind,
        "splits": {split: getattr(about, split) for split in SPLITS},
        "shape": list(about.shape),
        "num_grey_levels": about.num_grey_levels,
        "num_classes": about.num_classes,
        "class_names": None if about.class_names is None else list(about.class_names),
        "not_read": list(about.unread),
        "bytes": about.num_bytes,
        "copy": str(copy.folder),
        "digest": about.digest,
    }


def _of_source(found: Source | None, request: Request) -> dict[str, Any]:
    assert found is not None
    counts = split_counts(found, request.split_seed)
    with found.parts["train"].open(request.fit) as rows:
        shape = rows.shape
    return {
        "kind": found.kind,
        "splits": counts,
        "shape": list(shape),
        "num_grey_levels": found.num_grey_levels,
        "num_classes": found.num_classes,
        "class_names": None if found.class_names is None else list(found.class_names),
        "not_read": list(found.unread),
        "bytes": sum(counts.values()) * math.prod(shape),
        "copy": None,
        "digest": None,
    }


def _lines(result: dict[str, Any]) -> list[str]:
    channels, height, width = result["shape"]
    splits = ", ".join(f"{count:,} {split}" for split, count in result["splits"].items())
    lines = [
        f"{result['source']}: {result['kind']}",
        f"images: {splits}; {height}x{width}, {'colour' if channels == 3 else 'grey'},"
        f" {result['num_grey_levels']} grey levels, {_size(result['bytes'])}",
    ]
    names = result["class_names"]
    if result["num_classes"] is None:
        lines.append("classes: none")
    elif names is None:
        lines.append(f"classes: {result['num_classes']}")
    else:
        shown = ", ".join(f"{number} {name}" for number, name in enumerate(names[:_CLASSES_SHOWN]))
        more = ", ..." if len(names) > _CLASSES_SHOWN else ""
        lines.append(f"classes: {result['num_classes']} ({shown}{more})")
    made = {None: "", True: ", verified", False: ", made anew: the old one was damaged"}
    lines.append(
        "prepared copy: " + (f"{result['copy']}{made[result['verified']]}" if result["copy"] else "none")
    )
    return lines


def _examples(copy: Copy | None, found: Source | None, request: Request) -> Tensor:
    """Evenly spaced training images, (n,C,H,W) uint8."""
    if copy is not None:
        images, _ = copy.split("train")
        return images[_spread(len(images))]
    assert found is not None
    part = found.parts["train"]
    with part.open(request.fit) as rows:
        return torch.from_numpy(rows.read(_spread(part.count).numpy()))


def _spread(count: int) -> Tensor:
    return torch.linspace(0, count - 1, min(count, EXAMPLES)).long()


def _size(num_bytes: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes} bytes"
