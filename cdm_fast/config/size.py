"""Sizes of images: how they are written, and which ones a network can halve. Nothing here imports torch.

# H W pixels
"""

import re
from collections.abc import Sequence

from cdm_fast.errors import UserError

ImageSize = int | tuple[int, int]  # the side of a square, or (height, width)
Sides = tuple[int, int]  # (height, width)

_SIZE = re.compile(r"(\d{1,9})(?:[xX](\d{1,9}))?")


def parse_image_size(text: str) -> ImageSize:
    """Parses `64` (a square) or `48x64` (height by width); UserError for anything else.

    >>> parse_image_size("64"), parse_image_size("48x64")
    (64, (48, 64))
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise UserError(
            f"image size {text[:40]!r}; give one side, such as 64, or HEIGHTxWIDTH, such as 48x64"
        )
    height, width = int(found[1]), int(found[2] or found[1])
    return plain_size((height, width))


def sides_of(size: ImageSize) -> Sides:
    """(height, width) of a size; UserError for anything but a whole number or two."""
    sides = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, tuple | list) else ()
    if len(sides) != 2 or not all(isinstance(side, int) for side in sides):
        raise UserError(f"image size {str(size)[:40]!r}; give one side, such as 64, or two, such as (48, 64)")
    return sides[0], sides[1]


def plain_size(size: ImageSize) -> ImageSize:
    """The same size, with one number for a square: settings that mean the same are then equal."""
    height, width = sides_of(size)
    return height if height == width else (height, width)


def size_text(size: ImageSize) -> str:
    """A size as `parse_image_size` reads it: `64` or `48x64`."""
    return str(size) if isinstance(size, int) else "{}x{}".format(*size)


def halved(sides: Sides) -> Sides | None:
    """Both sides halved, except a side of 1; None if a side above 1 is odd, or both sides are 1 already."""
    if sides == (1, 1) or any(side > 1 and side % 2 for side in sides):
        return None
    return max(sides[0] // 2, 1), max(sides[1] // 2, 1)


def resolutions(sides: Sides, halvings: int) -> list[Sides] | None:
    """(height, width) at every resolution, from full resolution down; None where a halving is not exact."""
    found = [sides]
    for _ in range(halvings):
        smaller = halved(found[-1])
        if smaller is None:
            return None
        found.append(smaller)
    return found


def nearest_divisible(sides: Sides, halvings: int) -> Sides:
    """A size near this one that can be halved exactly: the largest below it, else the smallest possible.

    >>> nearest_divisible((50, 70), 3), nearest_divisible((1, 70), 3)
    ((48, 64), (1, 64))
    """
    unit = 2**halvings
    height, width = (side if side == 1 else max(side // unit, 1) * unit for side in sides)
    return (unit, unit) if (height, width) == (1, 1) else (height, width)


def patch_sides(sides: Sides, patch_size: int) -> Sides:
    """Height and width of a square patch; along a side of 1 it is 1, so signals have patches too."""
    height, width = (1 if side == 1 else patch_size for side in sides)
    return height, width


def patch_grid(sides: Sides, patch_size: int) -> Sides:
    """Rows and columns of the patches of an image; UserError for a size that they do not fill.

    >>> patch_grid((28, 32), 4), patch_grid((1, 64), 4)
    ((7, 8), (1, 16))
    """
    if patch_size < 1:
        raise UserError(f"patch size {patch_size}: it must be at least 1")
    (height, width), (of_height, of_width) = sides, patch_sides(sides, patch_size)
    rows, columns = height // of_height, width // of_width
    if min(sides) < 1 or (rows * of_height, columns * of_width) != sides:
        fits = plain_size((max(rows, 1) * of_height, max(columns, 1) * of_width))
        raise UserError(
            f"image size {size_text(plain_size(sides))} does not consist of whole patches of side"
            f" {patch_size}; use a size such as {size_text(fits)}, or another patch size"
        )
    return rows, columns


def check_stem(patch_size: int, channels: int, num_resolutions: int) -> None:
    """UserError for a transformer's stem without channels or whole patches at its last resolution."""
    factor = 2 ** max(num_resolutions - 1, 0)
    if num_resolutions < 1 or patch_size % factor:
        raise UserError(
            f"patch size {patch_size} with {num_resolutions} resolutions of the stem: give 1 resolution or"
            f" more, and a patch size that is a multiple of {factor}"
        )
    if num_resolutions > 1 and not channels:
        raise UserError(f"a stem of {num_resolutions} resolutions needs channels; give stem channels, or 1")


def attended(sizes: Sequence[Sides], wanted: Sequence[int | float]) -> list[bool]:
    """Whether each resolution is one of those that `wanted` names: see `NetworkConfig.attention_resolutions`.

    sizes: of all resolutions, from full resolution down. An int names a height, or a width where images are
    one pixel high; a float names a share of the full size.

    >>> attended([(12, 16), (6, 8), (3, 4)], [6, 0.25]), attended([(1, 64), (1, 32)], [32])
    ([False, True, True], [False, True])
    """
    heights = {each for each in wanted if not isinstance(each, float)}
    shares = {each for each in wanted if isinstance(each, float)}
    return [length in heights or 2.0**-i in shares for i, length in enumerate(attention_lengths(sizes))]


def attention_lengths(sizes: Sequence[Sides]) -> list[int]:
    """The number that names each resolution for attention: its height, or its width for images of one row."""
    flat = sizes[0][0] == 1
    return [width if flat else height for height, width in sizes]
