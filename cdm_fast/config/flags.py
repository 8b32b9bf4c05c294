"""tyro's markers for the dataclasses from which the command line is built.

Without tyro there is no command line, and the same names leave the annotations unchanged.
"""

from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from cdm_fast.config.size import ImageSize, parse_image_size, size_text

__all__ = ["FlagCreatePairsOff", "ImageSizeFlag", "Positional", "Suppress", "arg"]


def _parse_image_size(words: list[str]) -> ImageSize | None:
    return None if words == ["None"] else parse_image_size(words[0])


def _is_image_size(value: Any) -> bool:
    pair = isinstance(value, tuple) and len(value) == 2 and all(isinstance(side, int) for side in value)
    return value is None or isinstance(value, int) or pair


if TYPE_CHECKING:
    from tyro.conf import FlagCreatePairsOff, Positional, Suppress, arg

    ImageSizeFlag = ImageSize | None
else:
    try:
        from tyro.conf import FlagCreatePairsOff, Positional, Suppress, arg
        from tyro.constructors import PrimitiveConstructorSpec

        ImageSizeFlag = Annotated[  # written as `48x64`, which tyro has no rule for
            ImageSize | None,
            PrimitiveConstructorSpec(
                nargs=1,
                metavar="SIZE",
                instance_from_str=_parse_image_size,
                is_instance=_is_image_size,
                str_from_instance=lambda size: ["None" if size is None else size_text(size)],
            ),
        ]
    except ImportError:
        _T = TypeVar("_T")
        FlagCreatePairsOff = Positional = Suppress = Annotated[_T, "for tyro"]
        ImageSizeFlag = ImageSize | None

        def arg(**_: Any) -> None:
            """No marker."""
