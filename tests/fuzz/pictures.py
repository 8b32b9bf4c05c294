"""Picture files: small valid ones of every format, and hostile ones built chunk by chunk."""

import io
import struct
import zlib
from functools import cache
from random import Random

import numpy as np
from PIL import Image

from tests.fuzz.mutate import chance, damage, number, pick

SUFFIXES = ("png", "jpg", "jpeg", "bmp", "webp", "ppm", "pgm", "pnm", "gif", "tif", "tiff", "jfif")
_CHUNKS = (b"PLTE", b"tRNS", b"gAMA", b"iCCP", b"zTXt", b"iTXt", b"eXIf", b"acTL", b"fcTL", b"fdAT", b"IDAT")


@cache
def samples() -> dict[str, bytes]:
    """A valid 4x5 picture by `format mode`."""
    values = np.random.default_rng(0).integers(0, 256, (5, 4, 3), np.uint8)
    colour = Image.fromarray(values)
    found = {}
    for mode in ("L", "RGB", "P", "1", "LA", "RGBA", "CMYK", "I;16"):
        picture = colour.convert("L").convert(mode) if mode == "I;16" else colour.convert(mode)
        for kind in ("PNG", "JPEG", "BMP", "WEBP", "PPM", "GIF", "TIFF"):
            buffer = io.BytesIO()
            try:
                picture.save(buffer, kind)
            except (OSError, ValueError):
                continue
            found[f"{kind} {mode}"] = buffer.getvalue()
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation
    for kind in ("PNG", "JPEG", "WEBP"):
        buffer = io.BytesIO()
        colour.save(buffer, kind, exif=exif)
        found[f"{kind} exif"] = buffer.getvalue()
    buffer = io.BytesIO()
    colour.save(buffer, "JPEG", progressive=True)
    found["JPEG progressive"] = buffer.getvalue()
    return found


def hostile(rng: Random) -> bytes:
    """A picture file that may be wrong in any way."""
    kind = rng.randrange(6)
    if kind == 0:
        return _png(rng)
    if kind == 1:
        return _pnm(rng)
    if kind == 2:
        return _bmp(rng)
    known = sorted(samples())
    content = samples()[rng.choice(known)]
    if kind == 3:
        return _jpeg(rng)
    return damage(rng, content, samples()[rng.choice(known)]) if kind == 4 else content


def png_chunk(kind: bytes, content: bytes, checksum: int | None = None) -> bytes:
    """Length, kind, content and (right or given) checksum."""
    checksum = zlib.crc32(kind + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def _png(rng: Random) -> bytes:
    side = [number(rng, usual, 0.15) % 2**32 for usual in (4, 5)]
    depth = pick(rng, 8, (1, 2, 4, 16, 0, 3, 255))
    colour = pick(rng, rng.choice((0, 2)), (3, 4, 6, 1, 5, 255))
    fields = (*side, depth, colour, pick(rng, 0, (1,), 0.02), pick(rng, 0, (1,), 0.02), pick(rng, 0, (1, 2)))
    rows = pick(rng, bytes(80), (b"", rng.randbytes(80), b"\5" * 80, bytes(2**20)))
    chunks = [png_chunk(b"IHDR", struct.pack(">IIBBBBB", *fields))]
    for _ in range(rng.randrange(4) if chance(rng, 0.5) else 0):
        content = rng.choice((rng.randbytes(rng.randrange(20)), _text(rng), struct.pack(">II", 2**31, 7)))
        chunks.append(png_chunk(rng.choice(_CHUNKS), content))
    packed = zlib.compress(rows)
    packed = damage(rng, packed) if chance(rng, 0.1) else packed
    cut = rng.randrange(len(packed) + 1)
    chunks += [png_chunk(b"IDAT", part) for part in (packed[:cut], packed[cut:])]
    if chance(rng, 0.1):
        rng.shuffle(chunks)
    content = b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + png_chunk(b"IEND", b"")
    return damage(rng, content, edits=1) if chance(rng, 0.1) else content


@cache
def _packed_zeros(count: int) -> bytes:
    return zlib.compress(bytes(count))


def _text(rng: Random) -> bytes:
    """What stands in zTXt and iCCP: a name, a method, and something compressed, perhaps a bomb."""
    return b"name\0\0" + _packed_zeros(rng.choice((10, 2**16, 2**22)))


def _pnm(rng: Random) -> bytes:
    magic = pick(
        rng,
        rng.choice((b"P5", b"P6")),
        (b"P1", b"P2", b"P3", b"P4", b"P7", b"Pf", b"PF", b"PyRGBA", b"P0"),
        0.4,
    )
    words = [str(number(rng, usual, 0.15)).encode() for usual in (4, 5, 255)]
    if chance(rng, 0.1):
        words[rng.randrange(3)] = rng.choice(
            (b"", b"#" + b"x" * 99, b"1e9", b"nan", b"9" * 5000, b"-0.0", b"\xff")
        )
    body = rng.choice((bytes(60), rng.randbytes(60), b"1 2 3 " * 20, b"9999999999 " * 20, b""))
    return magic + rng.choice((b"\n", b" ", b"\n# note\n")) + b" ".join(words) + b"\n" + body


def _bmp(rng: Random) -> bytes:
    content = bytearray(samples()[rng.choice(("BMP L", "BMP RGB", "BMP 1", "BMP RGBA"))])
    for offset, form in rng.sample(
        [
            (10, "<I"),
            (14, "<I"),
            (18, "<i"),
            (22, "<i"),
            (26, "<H"),
            (28, "<H"),
            (30, "<I"),
            (34, "<I"),
            (46, "<I"),
        ],
        2,
    ):
        size = struct.calcsize(form)
        value = number(rng, rng.choice((0, 1, 2, 4, 8, 40)), 0.5) % 256**size
        content[offset : offset + size] = value.to_bytes(size, "little")
    return bytes(content)


def _jpeg(rng: Random) -> bytes:
    content = samples()[rng.choice(("JPEG L", "JPEG RGB", "JPEG CMYK", "JPEG exif", "JPEG progressive"))]
    segments, rest = [], content[2:]
    while rest[:1] == b"\xff" and rest[1:2] != b"\xda":
        length = 2 + int.from_bytes(rest[2:4], "big")
        segments.append(rest[:length])
        rest = rest[length:]
    for _ in range(rng.randrange(1, 3)):
        index = rng.randrange(len(segments))
        head, body = segments[index][:2], damage(rng, segments[index][4:], edits=2)[:60_000]
        if chance(rng, 0.2):
            head = b"\xff" + bytes(
                [rng.choice((0xE0, 0xE1, 0xE2, 0xED, 0xC0, 0xC1, 0xC2, 0xC3, 0xC9, 0xDB, 0xDD))]
            )
        if chance(rng, 0.1):
            body = rng.choice((b"Exif\0\0", b"MPF\0", b"ICC_PROFILE\0", b"Photoshop 3.0\0")) + body
        segments[index] = head + struct.pack(">H", len(body) + 2) + body
    if chance(rng, 0.2):
        segments.append(rng.choice(segments))
    return b"\xff\xd8" + b"".join(segments) + rest
