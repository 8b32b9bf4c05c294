"""Packages that single features need. The library imports with torch, numpy and safetensors alone."""

from importlib import import_module
from types import ModuleType
from typing import Any, NoReturn

from cdm_fast.errors import UserError

# Packages that are not called as the module they bring.
_PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn"}


def need(module: str, purpose: str) -> ModuleType:
    """A module such as "PIL.Image"; UserError, which names the package, if that is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(_message(module, purpose)) from error


def _message(module: str, purpose: str) -> str:
    name = module.split(".")[0]
    package = _PACKAGES.get(name, name)
    return f"{purpose} needs {package}: pip install {package}"


class WithoutSklearn:
    """Base of the estimators where scikit-learn is missing: the classes exist, making one says what to do."""

    def __new__(cls, *arguments: Any, **parameters: Any) -> NoReturn:
        raise UserError(_message("sklearn", cls.__name__))


def without_sklearn(*arguments: Any, **options: Any) -> NoReturn:
    """Stands for scikit-learn's functions where it is missing."""
    raise UserError(_message("sklearn", "an estimator"))
