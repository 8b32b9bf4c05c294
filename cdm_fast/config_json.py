"""Configs as JSON, and what of a config a resumed run must keep."""

import dataclasses
import hashlib
import json
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from cdm_fast.config import RunConfig
from cdm_fast.errors import UserError

Config = TypeVar("Config")

# What may change when a run is resumed: its length and what it writes. Everything else decides the numbers.
_FREE_ON_RESUME = {"output": None, "train": {"steps"}}


def fixed_part(config: RunConfig) -> dict[str, Any]:
    """The part of the config that a resumed run must share with its beginning, as nested JSON values."""
    tree = to_json(config)
    for section, names in _FREE_ON_RESUME.items():
        if names is None:
            del tree[section]
        else:
            tree[section] = {k: v for k, v in tree[section].items() if k not in names}
    return tree


def digest(config: RunConfig) -> str:
    """SHA-256 (hex) of `fixed_part`: two configs with one digest can continue each other's checkpoints."""
    return hashlib.sha256(json.dumps(fixed_part(config), sort_keys=True).encode()).hexdigest()


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """The settings of `fixed_part` that differ, each as `name: old -> new`."""
    before, after = fixed_part(old), fixed_part(new)
    return [
        f"{name}: {before[section][name]} -> {after[section][name]}"
        for section in before
        for name in before[section]
        if before[section][name] != after[section][name]
    ]


def to_json(config: Any) -> dict[str, Any]:
    """A config (or any part of one) as nested dicts of JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(kind: type[Config], value: Any, where: str = "config") -> Config:
    """The dataclass `kind` from nested JSON values: every field, each with its own type, and nothing else.

    Raises UserError that names `where` and the field: the file may come from anywhere.
    """
    hints = get_type_hints(kind)
    if not isinstance(value, dict) or value.keys() != hints.keys():
        odd = sorted(set(value) ^ set(hints)) if isinstance(value, dict) else [repr(value)[:40]]
        raise UserError(f"{where}: unexpected or missing {', '.join(map(str, odd))}; restore the file")
    return kind(**{name: _decode(hint, value[name], f"{where}: {name}") for name, hint in hints.items()})


def _decode(hint: Any, value: Any, where: str) -> Any:
    """One JSON value as the annotated type `hint`."""
    if dataclasses.is_dataclass(hint):
        return from_json(hint, value, where)  # type: ignore[arg-type]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType) and NoneType in arguments:
        return None if value is None else _decode(arguments[0], value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_decode(arguments[0], item, where) for item in value)
    if origin is Literal and value in arguments:
        return value
    if hint is float and type(value) is int:
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise UserError(f"{where} is {value!r:.40}, which this version does not understand; restore the file")
