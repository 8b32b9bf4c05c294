"""Optional packages. The library itself imports only torch, numpy and safetensors."""

from importlib import import_module
from types import ModuleType

from cdm_fast.errors import UserError

# Packages whose name differs from their module's name.
_PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn"}


def need(module: str, purpose: str) -> ModuleType:
    """The imported module, such as "PIL.Image"; UserError that names the package if it is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(_message(module, purpose)) from error


def _message(module: str, purpose: str) -> str:
    name = module.split(".")[0]
    package = _PACKAGES.get(name, name)
    return f"{purpose} needs {package}: pip install {package}"
