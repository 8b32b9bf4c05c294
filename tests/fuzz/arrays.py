"""Hostile inputs of the readers whose data are arrays: IDX, CIFAR binaries, npz."""

import gzip
import pickle
import struct
from functools import cache
from random import Random
from typing import Any

import numpy as np

from tests.fuzz.case import Case, unusual_files
from tests.fuzz.containers import Entry, zip_file
from tests.fuzz.mutate import chance, damage, number, pick

_DTYPES = "|b1 <i2 >u2 <i8 <u8 <f2 <f4 >f8 <f16 <c8 |O |S3 <U2 <M8[s] |V4 |u0 <u1 <f3 |u99 <i1".split()


class Payload:
    """Unpickling this would print; a reader that does is seen by the watch."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("executed",)


def options(rng: Random) -> dict[str, Any]:
    """What `load_data` is asked for besides the source."""
    return {
        "split": rng.choice(("train", "validation", "test")),
        "image_size": pick(rng, None, (1, 4, 8, 64), 0.3),
        "channels": pick(rng, None, (1, 3), 0.3),
    }


def idx(rng: Random, packed: bool) -> Case:
    """An IDX folder, of which one file is hostile."""
    files = {}
    for stem, count in (("train", 6), ("t10k", 3)):
        files[f"{stem}-images-idx3-ubyte"] = _idx(rng, (count, 5, 4), 0.0)
        files[f"{stem}-labels-idx1-ubyte"] = _idx(rng, (count,), 0.0)
    victim = rng.choice(sorted(files))
    shape = (6, 5, 4) if "images" in victim else (6,)
    content = _idx(rng, shape, 0.15)
    files[victim] = damage(rng, content, files["train-images-idx3-ubyte"]) if chance(rng, 0.3) else content
    if packed:
        files = {f"{name}.gz": _gzip(rng, content, name == victim) for name, content in files.items()}
    case = Case(dict(files), options=options(rng))
    if chance(rng, 0.05):
        unusual_files(rng, case)
    return case


def _idx(rng: Random, shape: tuple[int, ...], lies: float) -> bytes:
    axes = [number(rng, axis, lies) % 2**32 for axis in shape]
    if chance(rng, lies):
        axes = axes[: rng.randrange(len(axes) + 1)] + [number(rng, 1, 0.5) % 2**32] * rng.randrange(3)
    rank, kind = number(rng, len(shape), lies) % 256, pick(rng, 8, (0, 9, 11, 12, 13, 14), lies)
    held = 1
    for axis in shape:
        held *= axis
    body = rng.randbytes(held) if len(shape) == 3 else bytes(i % 3 for i in range(held))
    return struct.pack(f">HBB{len(axes)}I", 0, kind, rank, *axes) + body


def _gzip(rng: Random, content: bytes, hostile: bool) -> bytes:
    packed = gzip.compress(content, 1)
    if not hostile or chance(rng, 0.4):
        return packed
    kind = rng.randrange(5)
    if kind == 0:
        return packed + rng.choice((packed, b"\0" * 20, b"x", packed[:9]))  # several members, or rubbish
    if kind == 1:  # the optional fields of the header
        flags = rng.randrange(256)
        return packed[:3] + bytes([flags]) + packed[4:10] + rng.randbytes(rng.randrange(20)) + packed[10:]
    if kind == 2 and chance(rng, 0.05):
        side = rng.choice((1000, 2**15, 2**16))
        return _gzip_bomb(side)
    if kind == 3:
        return gzip.compress(content + bytes(rng.choice((1, 2**20))), 1)
    return damage(rng, packed)


@cache
def _gzip_bomb(side: int) -> bytes:
    return gzip.compress(struct.pack(">HBB3I", 0, 8, 3, 80, side, side) + bytes(2**26 + 2**20), 1)


def cifar(rng: Random) -> Case:
    """A CIFAR folder, of which one file is hostile."""
    fine = chance(rng, 0.3)
    names = ["train", "test"] if fine else [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    length = 3072 + 1 + fine
    place = pick(rng, "", ("cifar-10-batches-bin/", "cifar-100-binary/", "other/"))
    files = {f"{place}{name}.bin": bytes(length * (2 if "data" in name else 3)) for name in names}
    victim = rng.choice(sorted(files))
    content = bytearray(files[victim])
    for record in range(0, len(content), length):
        content[record : record + 2] = bytes(number(rng, 3, 0.1) % 256 for _ in range(2))
    files[victim] = damage(rng, bytes(content)) if chance(rng, 0.3) else bytes(content)
    if chance(rng, 0.1):
        files[f"{place}{rng.choice(('data_batch_1', 'train.bin', 'data_batch_1.bin'))}"] = pickle.dumps(
            Payload()
        )
    case = Case(dict(files), options=options(rng))
    if chance(rng, 0.1):
        unusual_files(rng, case)
    return case


def pickled_cifar(rng: Random) -> Case:
    """CIFAR-10's Python version, of which one file is hostile."""
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    place = pick(rng, "", ("cifar-10-batches-py/", "data/cifar-10-batches-py/"))
    files = {f"{place}{name}": _pickled(rng, 0.0) for name in names}
    files[rng.choice(sorted(files))] = _pickled(rng, 0.3)
    case = Case(dict(files), options=options(rng))
    if chance(rng, 0.05):
        unusual_files(rng, case)
    return case


def _pickled(rng: Random, lies: float) -> bytes:
    count = number(rng, 2, lies) % 5
    images = np.zeros(
        (count, pick(rng, 3072, (3071, 0, 1), lies)), pick(rng, "u1", ("i8", "f4", "O", ">i4"), lies)
    )
    images = np.asfortranarray(images) if chance(rng, lies) else images
    labels: Any = [number(rng, 3, lies) for _ in range(count)]
    if chance(rng, lies):
        labels = rng.choice((None, np.zeros(count), ["a"] * count, (1, 2), [True], {}, [[1]]))
    found: Any = {pick(rng, "data", ("x", 3, b"data"), lies): images, "labels": labels}
    if chance(rng, lies / 2):
        found = rng.choice((Payload(), [found], {"data": Payload()}, {(1,) * 9: 1}, 3))
    content = pickle.dumps(found, rng.randrange(2, 6))
    return damage(rng, content, edits=rng.randrange(1, 6)) if chance(rng, lies) else content


def npz(rng: Random) -> Case:
    """An .npz whose members, headers or container may lie."""
    count = rng.choice((2, 6, 20))
    entries = [
        _member(rng, key, shape, bound)
        for key, shape, bound in (
            (
                "images",
                pick(rng, (count, 5, 4), ((count, 5, 4, 3), (count, 1, 5, 4), (count, 3, 4, 3), (count, 4))),
                256,
            ),
            ("labels", (count,), 3),
            ("num_grey_levels", (), 1),
        )
        if chance(rng, 0.9)
    ]
    if chance(rng, 0.3):
        shapes = (("x_train", (6, 4, 4)), ("y_train", (6,)), ("x_test", (3, 4, 4)), ("y_test", (3,)))
        entries = [_member(rng, key, shape, 3) for key, shape in shapes if chance(rng, 0.9)]
    if chance(rng, 0.1):
        entries += rng.choices(entries, k=1) if entries else []
    if chance(rng, 0.02):
        entries.append(Entry(b"images.npy", _npy_bomb(), True))
    if chance(rng, 0.05) and entries:
        rng.choice(entries).name = rng.choice(
            (b"../images.npy", b"/images.npy", b"\xff\xfe.npy", b"images", b"")
        )
    case = Case({"data.npz": zip_file(rng, entries, 0.1)}, options=options(rng))
    if chance(rng, 0.02):
        unusual_files(rng, case, named=True)
    return case


@cache
def _npy_bomb() -> bytes:
    return _npy(Random(0), "|u1", (80, 1000, 1000), bytes(80 * 10**6), 0.0)


def _member(rng: Random, key: str, shape: tuple[int, ...], bound: int) -> Entry:
    dtype = pick(rng, "|u1", _DTYPES, 0.1)
    held = 1
    for axis in shape:
        held *= axis
    try:
        values = np.array([rng.randrange(bound) for _ in range(held)]) if key != "num_grey_levels" else 256
        kind = "<i8" if key[0] in "lyn" else np.dtype(dtype)
        values = np.array(values).astype(kind)
        values = values / 255 if values.dtype.kind == "f" and chance(rng, 0.5) else values
        body = values.tobytes() if values.dtype.kind not in "OMV" else bytes(held * 8)
        dtype = values.dtype.str
    except (TypeError, ValueError):
        body = bytes(held)
    if chance(rng, 0.05):
        body = rng.choice(
            (pickle.dumps(Payload()), b"", body * 2, rng.randbytes(len(body)), b"\xff" * len(body))
        )
    content = _npy(rng, dtype, shape, body, 0.1)
    content = damage(rng, content) if chance(rng, 0.05) else content
    return Entry(f"{key}.npy".encode(), content, chance(rng, 0.5))


def _npy(rng: Random, dtype: str, shape: tuple[int, ...], body: bytes, lies: float) -> bytes:
    axes = [number(rng, axis, lies) for axis in shape]
    header = f"{{'descr': '{dtype}', 'fortran_order': {chance(rng, lies)}, 'shape': {tuple(axes)}, }}"
    if chance(rng, lies / 2):
        header = rng.choice(
            ("(" * 9000, "{}", header.replace("'", '"'), "[" + header, header * 2, header + " " * 2**16, "")
        )
    version = pick(rng, 1, (0, 2, 3, 255), lies)
    length = number(rng, len(header), lies / 2) % (2**16 if version == 1 else 2**32)
    text = header.encode("latin1")
    return (
        b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", length) + text + body
    )
