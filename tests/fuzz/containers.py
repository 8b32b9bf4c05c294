"""Zip files written field by field, so that any of them can lie."""

import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache
from random import Random

from tests.fuzz.mutate import chance, damage, number, pick


@dataclass
class Entry:
    """One member: its name, its content, and whether it is deflated."""

    name: bytes
    content: bytes
    deflated: bool = False
    mode: int = 0o100644


def zip_file(rng: Random, entries: list[Entry], lies: float) -> bytes:
    """A zip file of the entries; in `lies` of the draws a header field of an entry is a lie."""
    out, directory = bytearray(), bytearray()
    for entry in entries:
        packed = _deflate(entry.content) if entry.deflated else entry.content
        fields = {
            "flags": 0,
            "method": 8 if entry.deflated else 0,
            "crc": zlib.crc32(entry.content),
            "packed": len(packed),
            "size": len(entry.content),
            "offset": len(out),
            "mode": entry.mode << 16,
            "extra": b"",
        }
        local, central = dict(fields), dict(fields)
        if chance(rng, lies):
            for side in rng.choice(((local,), (central,), (local, central))):
                _lie(rng, side)
        out += _local(local, entry.name) + packed
        directory += _central(central, entry.name)
    count = number(rng, len(entries), lies / 4) % 2**16
    start, size = (number(rng, usual, lies / 4) % 2**32 for usual in (len(out), len(directory)))
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, size, start, 0)
    content = bytes(out + directory + end)
    return damage(rng, content) if chance(rng, lies) else content


@lru_cache(100)
def _deflate(content: bytes) -> bytes:
    packer = zlib.compressobj(6, zlib.DEFLATED, -15)
    return packer.compress(content) + packer.flush()


def _lie(rng: Random, fields: dict) -> None:
    name = rng.choice(sorted(fields))
    if name == "extra":
        sizes = struct.pack("<QQQ", *(number(rng, 0, 0.8) % 2**64 for _ in range(3)))
        fields["extra"] = struct.pack("<HH", 1, pick(rng, 24, (8, 0, 16, 65535))) + sizes
        fields.update({key: 0xFFFFFFFF for key in rng.sample(("packed", "size", "offset"), 2)})
    elif name in ("flags", "method"):
        fields[name] = rng.choice((0, 1, 8, 9, 12, 14, 93, 99, 1 << 3, 1 << 5, 1 << 6, 1 << 11, 0xFFFF))
    else:
        fields[name] = number(rng, fields[name], 0.9) % 2**32


def _local(f: dict, name: bytes) -> bytes:
    head = struct.pack(
        "<4s5H3I2H",
        b"PK\3\4",
        20,
        f["flags"],
        f["method"],
        0,
        33,
        f["crc"],
        f["packed"],
        f["size"],
        len(name),
        len(f["extra"]),
    )
    return head + name + f["extra"]


def _central(f: dict, name: bytes) -> bytes:
    head = struct.pack(
        "<4s6H3I",
        b"PK\1\2",
        20 + (3 << 8),
        20,
        f["flags"],
        f["method"],
        0,
        33,
        f["crc"],
        f["packed"],
        f["size"],
    )
    tail = struct.pack("<5H2I", len(name), len(f["extra"]), 0, 0, 0, f["mode"], f["offset"])
    return head + tail + name + f["extra"]
