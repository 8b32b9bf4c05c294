"""Packages that single features need. The library imports with torch, numpy and safetensors alone."""

from importlib import import_module
from types import ModuleType

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
