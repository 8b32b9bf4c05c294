"""Picture files: bounded decoding, resizing, sample sheets."""

# B images, C channels (1 grey, 3 colour), H W pixels

import io
import math
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cdm_fast.config.choices import Resample
from cdm_fast.config.size import ImageSize, plain_size, sides_of, size_text
from cdm_fast.data.pixels import quantize
from cdm_fast.errors import UserError
from cdm_fast.host.files import write_atomically
from cdm_fast.host.optional import need
from cdm_fast.host.reading import MAX_PICTURE_BYTES, bad, error_text, read_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = frozenset(".png .jpg .jpeg .jpe .jfif .bmp .dib .webp .pgm .ppm .pnm .pbm .gif .tif .tiff".split())
# Formats of pictures that are not read.
UNREAD_SUFFIXES = frozenset(
    ".avif .heic .heif .hif .jp2 .j2k .jxl .svg .psd .eps .exr .hdr .dds .ico .tga .pcx .raw .dng .cr2 .nef"
    " .arw .dcm .nii .xcf".split()
)
MAX_PIXELS = 2**25  # of one picture before resizing; 4 bytes per pixel in every copy while decoding
MAX_SIDE = 1024  # of a model's images
_THINNEST = 8  # pixels of an image on a sheet, so that signals are visible

# Pillow's plug-ins for other formats are not tried: fewer parsers mean fewer vulnerabilities.
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "PPM", "GIF", "TIFF")
_KNOWN = "PNG, JPEG, BMP, WebP, PNM, GIF or TIFF"
_MAY_BE_ANIMATED = ("PNG", "WEBP", "GIF", "TIFF")
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
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Fit:
    """How pictures are cropped, resampled and converted for a model; by default they are unchanged.

    Fields:
        image_size: side of the square, or (height, width), to which they are resampled; None keeps the size.
        channels: 1 or 3 converts them to grey or colour; None keeps their channels.
        crop: "centre", the largest central box with the proportions of `image_size`; "none", the whole
            picture, whose proportions may change; or (left, top, width, height) in pixels, applied before the
            filter.
        resample: the filter, antialiased.
    """

    image_size: ImageSize | None = None
    channels: int | None = None
    crop: str | Box = "centre"
    resample: Resample = "bicubic"

    def __post_init__(self) -> None:
        if self.image_size is not None:
            if not all(1 <= side <= MAX_SIDE for side in sides_of(self.image_size)):
                told = size_text(self.image_size)
                raise UserError(f"image size {told} is out of range; give sides of 1 to {MAX_SIDE} pixels")
            object.__setattr__(self, "image_size", plain_size(self.image_size))
        if self.channels not in (None, 1, 3):
            raise UserError(f"{self.channels} channels; give 1 (grey) or 3 (colour)")


_CROP = re.compile(r"(\d{1,5}),(\d{1,5}),(\d{1,5}),(\d{1,5})")


def parse_crop(text: str) -> str | Box:
    """`centre`, `none`, or LEFT,TOP,WIDTH,HEIGHT as four numbers; UserError for anything else."""
    if text in ("centre", "center", "none"):
        return "centre" if text == "center" else text
    found = _CROP.fullmatch(text.replace(" ", ""))
    if found is None or int(found[3]) == 0 or int(found[4]) == 0:
        raise UserError(f"--crop {text!r}; give centre, none, or LEFT,TOP,WIDTH,HEIGHT in pixels")
    left, top, width, height = (int(number) for number in found.groups())
    return left, top, width, height


def pillow_version() -> str:
    """The version of Pillow, on which decoded pixels may depend; "" without it."""
    try:
        return str(import_module("PIL").__version__)
    except ImportError:
        return ""


def _pillow() -> Any:
    """The module PIL.Image, which also converts arrays to pictures; UserError without pillow."""
    return need("PIL.Image", "reading and writing pictures")


def decode(content: bytes, name: object, fit: Fit = Fit()) -> Pixels:  # noqa: B008  (frozen)
    """Decode one 8-bit picture, rotate it by its EXIF tag, then apply `fit`.

    Returns (C,H,W) uint8. Raises UserError, naming `name`, for anything but a whole PNG, JPEG, BMP, WebP,
    PNM, GIF or TIFF picture of at most 2**25 pixels with 8 bits a channel, one frame, and no transparency.
    """
    with quiet():
        return decode_quietly(content, name, fit)


@contextmanager
def quiet() -> Iterator[None]:
    """Silences Pillow's warnings of damaged EXIF tags and large sizes (checked here) in all threads."""
    with warnings.catch_warnings(action="ignore"):
        yield


def decode_quietly(content: bytes, name: object, fit: Fit) -> Pixels:
    """`decode` for threads, which must not change warning filters: call it within `quiet`."""
    pillow = _pillow()
    try:
        with pillow.open(io.BytesIO(content), formats=_FORMATS) as image:
            if math.prod(image.size) > MAX_PIXELS:
                raise bad(name, f"has {image.height}x{image.width} pixels, over {MAX_PIXELS}; scale it down")
            _refuse_loss(image, name)
            import_module("PIL.ImageOps").exif_transpose(image, in_place=True)
            plain = _grey_or_colour(image, name)
    except UserError:
        raise
    except pillow.UnidentifiedImageError:
        raise bad(name, f"is not a {_KNOWN} picture; convert it to PNG") from None
    except (*_DECODE_ERRORS, pillow.DecompressionBombError) as error:
        raise bad(name, f"is damaged or truncated ({error_text(error)}); replace or remove it") from None
    return _to_array(_fit(plain, fit, name))


def _refuse_loss(image: "Image", name: object) -> None:
    """UserError if Pillow would silently reduce samples of more than 8 bits, or drop frames."""
    bits = _bit_depth(image)
    if bits > 8:
        raise bad(
            name,
            f"has {bits} bits a channel (Pillow's {image.mode}), not 8 bits a channel; convert it to 8-bit"
            " grey or RGB",
        )
    if image.format in _MAY_BE_ANIMATED and getattr(image, "is_animated", False):
        raise bad(name, "holds several frames or pages; save each as a picture of its own")


def _bit_depth(image: "Image") -> int:
    """Bits per channel in the file, whatever Pillow's mode is; 8 if unknown."""
    if image.format == "TIFF":
        bits = image.tag_v2.get(258, (1,))  # type: ignore[attr-defined]  # BitsPerSample
        return max(int(number) for number in (bits if isinstance(bits, tuple) else (bits,)))
    if image.format == "PNG":
        return 16 if ";16" in str(image.tile) else 8  # type: ignore[attr-defined]
    if image.format == "PPM":
        tiles = image.tile  # type: ignore[attr-defined]
        arguments = tiles[0].args if tiles else ""
        highest = arguments[1] if isinstance(arguments, tuple) and len(arguments) == 2 else 255
        return 16 if ";16" in str(arguments) else max(8, int(highest).bit_length())
    return 8


def _grey_or_colour(image: "Image", name: object) -> "Image":
    """The picture in mode L or RGB; UserError if that would lose depth or transparency."""
    image.load()  # the pixels remain after its file is closed
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image
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


def _fit(image: "Image", fit: Fit, name: object) -> "Image":
    if fit.channels is not None:
        image = image.convert("L" if fit.channels == 1 else "RGB")
    size = None if fit.image_size is None else sides_of(fit.image_size)[::-1]  # width first, as Pillow has it
    if isinstance(fit.crop, tuple):
        image = _cut(image, fit.crop, size, name)
    if size is None or image.size == size:
        return image
    kind = getattr(_pillow().Resampling, fit.resample.upper())
    if fit.crop == "centre":
        # Only the central box is computed, but the filter uses the pixels beside it, as in a full resize.
        width, height = _largest_like(size, image.size)
        left, top = (image.width - width) / 2, (image.height - height) / 2
        return image.resize(size, kind, box=(left, top, left + width, top + height))
    return image.resize(size, kind)


def _largest_like(size: tuple[int, int], outer: tuple[int, int]) -> tuple[float, float]:
    """(width, height) of the largest box of the proportions of `size` that fits into `outer`."""
    if outer[0] * size[1] >= outer[1] * size[0]:
        return outer[1] * size[0] / size[1], outer[1]
    return outer[0], outer[0] * size[1] / size[0]


def _cut(image: "Image", box: Box, size: tuple[int, int] | None, name: object) -> "Image":
    """The crop box of a picture; a picture of the final size that does not contain the box is unchanged."""
    left, top, width, height = box
    if left + width > image.width or top + height > image.height:
        if image.size == size:
            return image
        cut = f"{left},{top},{width},{height}"
        raise bad(
            name,
            f"is {image.height} pixels high and {image.width} wide, and --crop {cut} goes beyond; give"
            " another",
        )
    if size is not None and width * size[1] != height * size[0]:
        raise bad(
            name,
            f"--crop cuts out a box {width} wide and {height} high, and --image-size is {size[0]} wide and"
            f" {size[1]} high; give the crop those proportions",
        )
    return image.crop((left, top, left + width, top + height))


def _to_array(image: "Image") -> Pixels:
    shape = (image.height, image.width, 3) if image.mode == "RGB" else (image.height, image.width)
    pixels = np.frombuffer(image.tobytes(), np.uint8).reshape(shape)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def reshape(images: Pixels, num_grey_levels: int, fit: Fit, name: object = "images") -> Pixels:
    """Apply `fit` to images in memory, (B,C,H,W) uint8, as to picture files; clips at the highest grey level.

    Grey is repeated over channels, colour is converted to luma (ITU-R 601). Returns (B,C',H',W') uint8 in
    0..num_grey_levels-1.
    """
    _, own_channels, height, width = images.shape
    size, channels = fit.image_size, fit.channels
    keeps_size = (size is None or sides_of(size) == (height, width)) and not isinstance(fit.crop, tuple)
    if keeps_size and channels in (None, own_channels):
        return images
    if keeps_size and channels == 3:
        return np.repeat(images, 3, axis=1)
    fitted = [
        _to_array(
            _fit(
                _pillow().fromarray(
                    pixels[0] if own_channels == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0))
                ),
                fit,
                name,
            )
        )
        for pixels in images
    ]
    return np.minimum(np.stack(fitted), num_grey_levels - 1)


def read_image(path: str | Path, image_size: ImageSize | None = None, channels: int | None = None) -> Tensor:
    """Read one picture file; (C,H,W) uint8.

    By default it keeps its size and channels; otherwise it is cropped and resampled to `image_size`, the side
    of a square or (height, width) (which averages noise away, so do not resize a picture that you want to
    denoise), and converted to grey (1) or colour (3).
    Raises UserError for a missing, damaged, transparent, 16-bit or oversized picture.
    """
    fit = Fit(image_size, channels)
    content = read_bytes(Path(path), MAX_PICTURE_BYTES)
    return torch.from_numpy(decode(content, path, fit).copy())


def write_grid(images: Tensor, path: str | Path, columns: int | None = None) -> None:
    """Write a sheet of images as PNG, row by row, atomically. Small images are enlarged by an integer factor.

    Args:
        images: (B,C,H,W), C 1 or 3; uint8, or float in [-1, 1] (clamped).
        path: a name that ends in .png; the folder is created if needed.
        columns: images per row; by default the sheet is square.

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
    """(B,C,H,W) uint8 -> (C,H',W') uint8, white lines of 2 pixels between the enlarged images.

    A side of fewer than `_THINNEST` pixels, such as a signal's of 1, is enlarged more than the other.
    """
    count, channels, height, width = images.shape
    scale, line = max(1, 64 // max(height, width)), 2
    down, across = (max(scale, -(-_THINNEST // side)) for side in (height, width))
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    rows = math.ceil(count / columns)
    big = images.repeat_interleave(down, 2).repeat_interleave(across, 3)
    height, width = height * down + line, width * across + line
    sheet = torch.full((channels, rows * height + line, columns * width + line), 255, dtype=torch.uint8)
    for index, image in enumerate(big):
        top, left = line + index // columns * height, line + index % columns * width
        sheet[:, top : top + height - line, left : left + width - line] = image
    return sheet
