"""Picture files: bounded decoding, resizing, sample sheets."""

# B images, C channels (1 grey, 3 colour), H W pixels, S side after resizing

import io
import math
import struct
import warnings
import zlib
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdm_fast.data.pixels import quantize
from cdm_fast.errors import UserError
from cdm_fast.host.files import write_atomically
from cdm_fast.host.optional import need
from cdm_fast.host.reading import MAX_PICTURE_BYTES, bad, error_text, read_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".pgm", ".ppm", ".pnm"})
MAX_PIXELS = 2**25  # of one picture before resizing; 4 bytes each in every copy while it is decoded
MAX_SIDE = 1024  # of the images a model sees

# Pillow's plug-ins for other formats are not even tried: fewer parsers, fewer holes.
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "PPM")
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    OverflowError,
    ZeroDivisionError,
    struct.error,
    zlib.error,
)

Pixels = NDArray[np.uint8]


def _pillow() -> Any:
    """The module PIL.Image, which also turns arrays into pictures; UserError without pillow."""
    return need("PIL.Image", "reading and writing pictures")


def check_shape(image_size: int | None, channels: int | None) -> None:
    """Raise UserError unless image_size is None or 1..1024, and channels None, 1 or 3."""
    if image_size is not None and not 1 <= image_size <= MAX_SIDE:
        raise UserError(f"image size {image_size} is out of range; give 1 to {MAX_SIDE}")
    if channels not in (None, 1, 3):
        raise UserError(f"{channels} channels; give 1 (grey) or 3 (colour)")


def decode(content: bytes, name: object, image_size: int | None, channels: int | None) -> Pixels:
    """Decode one 8-bit picture, upright by its EXIF tag, then `reshape` it.

    Returns (C,H,W) uint8. Raises UserError, naming `name`, for anything but a whole PNG, JPEG, BMP, WebP or
    PNM picture of at most 2**25 pixels with 8 bits a channel and no transparency.
    """
    pillow = _pillow()
    try:
        # The warnings that are silenced are of damaged EXIF tags and of sizes that we judge ourselves.
        with (
            warnings.catch_warnings(action="ignore"),
            pillow.open(io.BytesIO(content), formats=_FORMATS) as image,
        ):
            if math.prod(image.size) > MAX_PIXELS:
                raise bad(name, f"has {image.width}x{image.height} pixels, over {MAX_PIXELS}; scale it down")
            import_module("PIL.ImageOps").exif_transpose(image, in_place=True)
            plain = _grey_or_colour(image, name)
    except UserError:
        raise
    except pillow.UnidentifiedImageError:
        raise bad(name, "is not a PNG, JPEG, BMP, WebP or PNM picture; convert it to PNG") from None
    except (*_DECODE_ERRORS, pillow.DecompressionBombError) as error:
        raise bad(name, f"is damaged or truncated ({error_text(error)}); replace or remove it") from None
    return _to_array(_fit(plain, image_size, channels))


def _grey_or_colour(image: "Image", name: object) -> "Image":
    """The picture in mode L or RGB; UserError if that would lose depth or transparency."""
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image.copy()
    if image.mode in ("1", "CMYK", "YCbCr") and "transparency" not in image.info:
        return image.convert("L" if image.mode == "1" else "RGB")
    if image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA"):
        raise bad(
            name, f"has pixels of type {image.mode}, not 8 bits a channel; convert it to 8-bit grey or RGB"
        )
    alpha_mode = "LA" if image.mode in ("1", "L", "LA") else "RGBA"
    with_alpha = image if image.mode == alpha_mode else image.convert(alpha_mode)
    lowest = with_alpha.getextrema()[-1][0]  # type: ignore[index]  # one (min, max) per band
    if lowest < 255:
        raise bad(name, "has transparent pixels; flatten it onto a background first")
    return with_alpha.convert(with_alpha.mode[:-1])


def _fit(image: "Image", image_size: int | None, channels: int | None) -> "Image":
    if channels is not None:
        image = image.convert("L" if channels == 1 else "RGB")
    if image_size is None or image.size == (image_size, image_size):
        return image
    # Only the central square is computed, but the filter sees the pixels beside it, as if all were.
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((image_size, image_size), _pillow().Resampling.BICUBIC, box=box)


def _to_array(image: "Image") -> Pixels:
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def reshape(images: Pixels, num_grey_levels: int, image_size: int | None, channels: int | None) -> Pixels:
    """Give images another size and number of channels; None keeps the one they have.

    Size: the shorter side is resampled to S (bicubic, antialiased), the centre cropped to S x S, and
    overshoot cut off at the highest grey level. Channels: grey is repeated, colour becomes its luma (ITU-R
    601).

    Args: images: (B,C,H,W) uint8. Returns (B,C',S,S) uint8 in 0..num_grey_levels-1.
    """
    _, own_channels, height, width = images.shape
    if channels == 3 and own_channels == 1 and image_size is None:
        return np.repeat(images, 3, axis=1)
    if channels in (None, own_channels) and (image_size is None or height == width == image_size):
        return images
    side = (height, width) if image_size is None else (image_size, image_size)
    out = np.empty((len(images), channels or own_channels, *side), np.uint8)
    for target, pixels in zip(out, images, strict=True):
        picture = _pillow().fromarray(
            pixels[0] if own_channels == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0))
        )
        target[:] = _to_array(_fit(picture, image_size, channels))
    return np.minimum(out, num_grey_levels - 1, out=out)


def read_image(path: str | Path, image_size: int | None = None, channels: int | None = None) -> Tensor:
    """Read one picture file; (C,H,W) uint8.

    By default it keeps its size and channels; otherwise it is resampled and cropped to `image_size` (which
    averages noise away: do not resize what is to be denoised) and made grey (1) or colour (3).
    Raises UserError for a missing, damaged, transparent, 16-bit or oversized picture.
    """
    check_shape(image_size, channels)
    content = read_bytes(Path(path), MAX_PICTURE_BYTES)
    return torch.from_numpy(decode(content, path, image_size, channels).copy())


def write_grid(images: Tensor, path: str | Path, columns: int | None = None) -> None:
    """Write a sheet of images as PNG, row by row, atomically. Small images are enlarged by a whole factor.

    Args:
        images: (B,C,H,W), C 1 or 3; uint8, or float in [-1, 1] (clamped).
        path: its name should end in .png; the folder is made if needed.
        columns: images in a row; default: a square sheet.

    Raises UserError for another shape, NaN, or a file that cannot be written.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise UserError(f"no sheet of images of shape {tuple(images.shape)}; give (B,C,H,W) with C = 1 or 3")
    if columns is not None and columns < 1:
        raise UserError(f"a sheet of {columns} columns; give 1 or more")
    pixels = images.detach().cpu()
    _write_png(_sheet(pixels if pixels.dtype == torch.uint8 else quantize(pixels, 256), columns), path)


def write_image(image: Tensor, path: str | Path) -> None:
    """Write one image (C,H,W) uint8, C 1 or 3, as a PNG of its own size, atomically.

    Raises UserError for another shape or dtype, and for a file that cannot be written.
    """
    if image.ndim != 3 or image.shape[0] not in (1, 3) or 0 in image.shape or image.dtype != torch.uint8:
        raise UserError(
            f"no picture of {image.dtype} of shape {tuple(image.shape)}; give uint8 (C,H,W) with C = 1 or 3"
        )
    _write_png(image.cpu(), path)


def encode_png(pixels: Tensor) -> bytes:
    """The PNG file of one image (C,H,W) uint8 on the CPU, C 1 or 3; UserError without pillow."""
    picture = _pillow().fromarray(
        pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).contiguous().numpy()
    )
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _write_png(pixels: Tensor, path: str | Path) -> None:
    """(C,H,W) uint8 on the CPU as a PNG file."""
    write_atomically(Path(path), encode_png(pixels))


def _sheet(images: Tensor, columns: int | None) -> Tensor:
    """(B,C,H,W) uint8 -> (C,H',W') uint8, white lines of 2 pixels between the enlarged images."""
    count, channels, height, width = images.shape
    scale, line = max(1, 64 // max(height, width)), 2
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    rows = math.ceil(count / columns)
    big = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    height, width = height * scale + line, width * scale + line
    sheet = torch.full((channels, rows * height + line, columns * width + line), 255, dtype=torch.uint8)
    for index, image in enumerate(big):
        top, left = line + index // columns * height, line + index % columns * width
        sheet[:, top : top + height - line, left : left + width - line] = image
    return sheet
