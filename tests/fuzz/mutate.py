"""Damage that every format shares: hostile numbers, and edits of bytes.

Each function draws from an object with the interface of `random.Random`, so that a seed, hypothesis, or the
bytes of a coverage-guided fuzzer can decide what happens.
"""

import struct
from collections.abc import Sequence
from random import Random
from typing import Any

NUMBERS = (
    *(0, 1, 2, 3, 4, 8, 9, 10, 17, 28, 255, 256, 257, 1024, 1025),
    *(2**15 - 1, 2**15, 2**16 - 1, 2**16, 2**24, 2**25, 2**31 - 1, 2**31, 2**32 - 1, 2**32),
    *(2**34, 2**40, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, -1, -2, -(2**31), -(2**63)),
)
_FIELDS = ("B", "<H", ">H", "<I", ">I", "<Q", ">Q")


def chance(rng: Random, share: float) -> bool:
    """True in `share` of the draws."""
    return rng.randrange(1000) < 1000 * share


def number(rng: Random, usual: int, share: float = 0.3) -> int:
    """Mostly `usual`; in `share` of the draws something that no reader expects."""
    if not chance(rng, share):
        return usual
    return rng.choice((usual - 1, usual + 1, usual * 2, rng.choice(NUMBERS)))


def pick(rng: Random, usual: Any, others: Sequence[Any], share: float = 0.2) -> Any:
    """Mostly `usual`, in `share` of the draws one of the others."""
    return rng.choice(others) if chance(rng, share) else usual


def damage(rng: Random, content: bytes, other: bytes = b"", edits: int = 4) -> bytes:
    """`content` with up to `edits` bytes, fields or ranges changed, repeated, spliced or cut."""
    damaged = bytearray(content)
    for _ in range(rng.randrange(1, edits + 1)):
        _edit(rng, damaged, other)
    return bytes(damaged)


def _edit(rng: Random, content: bytearray, other: bytes) -> None:
    place = rng.randrange(len(content) + 1)
    end = min(len(content), place + rng.choice((1, 2, 4, 8, 16, 64, 1024)))
    kind = rng.randrange(8)
    if kind == 0 and place < len(content):
        content[place] ^= 1 << rng.randrange(8)
    elif kind == 1 and place < len(content):
        content[place] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    elif kind == 2:
        field = rng.choice(_FIELDS)
        size = struct.calcsize(field)
        value = number(rng, rng.choice((0, len(content))), 0.7) % 256**size
        content[place : place + size] = struct.pack(field, value)
    elif kind == 3:
        del content[place:end]
    elif kind == 4:
        content[place:place] = rng.randbytes(rng.randrange(1, 9))
    elif kind == 5:
        content[place:place] = content[place:end] * rng.choice((1, 2, 100))
    elif kind == 6 and other:
        start = rng.randrange(len(other))
        content[place:end] = other[start : start + rng.choice((4, 16, 64, len(other)))]
    else:
        del content[place:]
