"""Formatting of the command line's dataclasses in `--help`.

tyro's own rule keeps the line breaks of a docstring, lists inherited fields first, and ends the help of every
optional argument in `(default: None)`. The rule here joins the lines, lists inherited fields last, and omits
the default of switches and a default that is None or empty, which the docstring explains.
"""

import ast
import dataclasses
import inspect
from functools import cache
from typing import Annotated, Any, get_type_hints

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec, StructTypeInfo

from cdm_fast.cli.arguments import Switch

registry = ConstructorRegistry()
_without_none: Any = tyro.conf.DisallowNone


@registry.struct_rule
def fields_of_command(info: StructTypeInfo) -> StructConstructorSpec | None:
    """The arguments that a dataclass of this package describes; None for any other type."""
    kind = info.type
    if not (dataclasses.is_dataclass(kind) and kind.__module__.startswith("cdm_fast.")):
        return None
    hints = get_type_hints(kind, include_extras=True)
    own = [f for f in dataclasses.fields(kind) if f.name in vars(kind).get("__annotations__", {})]
    inherited = [f for f in dataclasses.fields(kind) if f not in own]
    fields = []
    for each in own + inherited:
        default = getattr(info.default, each.name) if isinstance(info.default, kind) else _default(each)
        hint: Any = hints[each.name]
        if default is None or default == () or hint == Switch:
            hint = Annotated[hint, tyro.conf.arg(help_behavior_hint="")]
        if each.default is None and not kind.__module__.startswith("cdm_fast.config."):
            hint = _without_none[hint]  # None is what omitting the option means
        fields.append(StructFieldSpec(each.name, hint, default, helptext=_docstring(kind, each.name)))
    return StructConstructorSpec(instantiate=kind, fields=tuple(fields))


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return tyro.MISSING if field.default is dataclasses.MISSING else field.default


def _docstring(kind: type, name: str) -> str | None:
    """The docstring of a field, on one line, from the class that declares it."""
    for base in kind.__mro__:
        if text := _docstrings(base).get(name):
            return " ".join(text.split())
    return None


@cache
def _docstrings(kind: type) -> dict[str, str]:
    """The docstrings of the fields that a class itself declares, by name."""
    if not dataclasses.is_dataclass(kind):
        return {}
    body = ast.parse(inspect.getsource(kind)).body[0].body  # type: ignore[attr-defined]  # of a class
    return {
        field.target.id: text.value.value
        for field, text in zip(body, body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
        if isinstance(text.value.value, str)
    }
