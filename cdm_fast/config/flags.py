"""tyro's markers for the dataclasses from which the command line is built.

Without tyro there is no command line, and the same names leave the annotations unchanged.
"""

from typing import TYPE_CHECKING, Annotated, Any, TypeVar

__all__ = ["FlagCreatePairsOff", "Positional", "Suppress", "arg"]

if TYPE_CHECKING:
    from tyro.conf import FlagCreatePairsOff, Positional, Suppress, arg
else:
    try:
        from tyro.conf import FlagCreatePairsOff, Positional, Suppress, arg
    except ImportError:
        _T = TypeVar("_T")
        FlagCreatePairsOff = Positional = Suppress = Annotated[_T, "for tyro"]

        def arg(**_: Any) -> None:
            """No marker."""
