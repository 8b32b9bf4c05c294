"""Configs and reports as JSON, and the part of a config that a resumed run must keep."""

import dataclasses
import json
import math
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from cdm_fast.config.settings import ImageShape, RunConfig
from cdm_fast.errors import UserError

Config = TypeVar("Config")

# What may change when a run is resumed: its length and its output. Everything else affects the numbers.
# The path of the data may change, since their content is compared.
_FREE_ON_RESUME = {"output": None, "train": {"steps"}, "data": {"source", "given"}}


def fixed_part(config: RunConfig) -> dict[str, Any]:
    """The part of the config that a resumed run must share with its beginning, as nested JSON values."""
    tree = to_json(config)
    for section, names in _FREE_ON_RESUME.items():
        if names is None:
            del tree[section]
        else:
            tree[section] = {k: v for k, v in tree[section].items() if k not in names}
    return tree


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


def fields_without(report: Any, *names: str) -> dict[str, Any]:
    """The fields of a report without those named, such as values of single images; dataclasses as dicts."""
    return {name: value for name, value in dataclasses.asdict(report).items() if name not in names}


def from_json(kind: type[Config], value: Any, where: str = "config") -> Config:
    """The dataclass `kind` from nested JSON values: fields, each with its own type, and nothing else.

    A missing field gets its default, if it has one, because the file may be older than the field.
    Raises UserError that names `where` and the field, because the file may come from anywhere.
    """
    hints = get_type_hints(kind)
    if kind is ImageShape:
        value = _with_both_sides(value)
    if isinstance(value, dict):
        odd = sorted(value.keys() - hints.keys() | _without_default(kind) - value.keys())
    else:
        odd = [_shown(value)]
    if odd:
        named = ", ".join(name[:40] if name.isprintable() else ascii(name)[:40] for name in odd[:8])
        raise UserError(f"{where}: unexpected or missing {named}; restore the file")
    return kind(**{name: _decode(hints[name], value[name], f"{where}: {name}") for name in value})


def _with_both_sides(image: Any) -> Any:
    """An image's JSON with height and width, of a run from when all images were square and had one size."""
    if not isinstance(image, dict) or "size" not in image or not image.keys().isdisjoint(("height", "width")):
        return image
    rest = {name: value for name, value in image.items() if name != "size"}
    return {"height": image["size"], "width": image["size"], **rest}


def _without_default(kind: Any) -> set[str]:
    """The fields of a dataclass that have no default."""
    missing = dataclasses.MISSING
    return {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is missing}


def finite(value: Any) -> Any:
    """A JSON value in which NaN and infinity, which JSON lacks, are null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse_json(text: bytes) -> Any:
    """The JSON value in `text`; ValueError for anything that JSON parsers treat differently.

    Besides invalid JSON it refuses duplicate keys, NaN and infinities, and nesting beyond the interpreter's
    stack.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands in it twice")
    return found


def _refuse(word: str) -> Any:
    raise ValueError(f"it holds {word}")


def _finite(digits: str) -> float:
    number = float(digits)
    return number if math.isfinite(number) else _refuse(f"a number beyond floating point ({digits[:20]})")


def _decode(hint: Any, value: Any, where: str) -> Any:
    """One JSON value as the annotated type `hint`."""
    if dataclasses.is_dataclass(hint):
        return from_json(hint, value, where)  # type: ignore[arg-type]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _decode_union(arguments, value, where)
    if origin is tuple and isinstance(value, list) and arguments[-1] is not Ellipsis:
        if len(value) == len(arguments):
            return tuple(_decode(*each, where) for each in zip(arguments, value, strict=True))
    elif origin is tuple and isinstance(value, list):
        return tuple(_decode(arguments[0], item, where) for item in value)
    if origin is Literal and value in arguments:
        return value
    if type(value) is int and abs(value) < 2**63 and hint in (int, float):
        return hint(value)
    if isinstance(hint, type) and type(value) is hint and hint is not int:
        return value
    raise UserError(f"{where} is {_shown(value)}, which this version does not understand; restore the file")


def _decode_union(hints: tuple[Any, ...], value: Any, where: str) -> Any:
    """One JSON value as the first of several types that takes it as it is written."""
    if value is None and NoneType in hints:
        return None
    hints = tuple(hint for hint in hints if hint is not NoneType)
    written = [hint for hint in hints if type(value) is {tuple: list}.get(get_origin(hint), hint)]
    return _decode((written or hints)[0], value, where)


def _shown(value: Any) -> str:
    """The beginning of a value that may be long, deep or unprintable."""
    if isinstance(value, dict | list) and value:
        return f"a {type(value).__name__} of {len(value)}"
    return ascii(value)[:40] if not isinstance(value, int) or abs(value) < 10**40 else "a huge number"
