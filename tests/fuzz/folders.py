"""Hostile inputs of the picture readers: image folders and zip files of them."""

import json
from random import Random

from tests.fuzz.arrays import options
from tests.fuzz.case import Case, unusual_files
from tests.fuzz.containers import Entry, zip_file
from tests.fuzz.mutate import chance, damage, number, pick
from tests.fuzz.pictures import SUFFIXES, hostile, samples

_PARTS = (
    "a",
    "b",
    "train",
    "test",
    "val",
    "validation",
    "0",
    "1",
    "10",
    ".hidden",
    "__MACOSX",
    "ü",
    "\n",
    "Testing",
    "x" * 200,
)
_BAD_NAMES = (
    *("../a.png", "/etc/a.png", "a/../../b.png", "..\\a.png", "C:/a.png", "a//b.png", "./a.png", "a/./b.png"),
    *(
        "\0.png",
        ".png",
        "a.png/",
        "a/.png",
        "\x1b[31m.png",
        "a\r\n.png",
        "\u202e.png",
        "a/" * 300 + "a.png",
        "/",
    ),
)


def _names(rng: Random) -> list[str]:
    """Names of 2 to 12 pictures: without classes, in class folders, or in split folders with or without."""
    count = rng.randrange(2, 13)
    layouts = (
        ("",),
        ("a/", "b/"),
        ("train/a/", "train/b/", "test/a/", "test/b/"),
        ("train/", "test/"),
        ("0/", "10/", "9/"),
        ("Training/a/", "Training/b/", "dev/a/"),
        ("00000/", "00001/"),
    )
    places = rng.choice(layouts)
    names = [f"{places[i % len(places)]}{i}.{pick(rng, 'png', SUFFIXES, 0.2)}" for i in range(count)]
    if chance(rng, 0.2):
        names.append(f"{'/'.join(rng.choices(_PARTS, k=rng.randrange(4)))}/stray.png".lstrip("/"))
    return names


def _table(rng: Random, names: list[str]) -> tuple[str, bytes]:
    """A table of labels by file, which may be wrong in any way."""
    kind = rng.choice(("dataset.json", "metadata.jsonl", "metadata.csv", "labels.csv"))
    numbers = chance(rng, 0.7)
    labels = [number(rng, i % 3, 0.05) if numbers else f"c{i % 3}" for i in range(len(names))]
    if chance(rng, 0.1):
        labels[0] = rng.choice((None, True, 0.5, [1], {}, "x" * 999, 10**400 % 10**30, "\n"))
    pairs = list(zip(names, labels, strict=True))
    if chance(rng, 0.2):
        pairs = rng.choice((pairs[1:], pairs * 2, pairs + [("../a.png", 0)], pairs + [(3, 0)], []))
    if kind == "dataset.json":
        held = pick(rng, pairs, (None, 3, "x", dict(pairs), [1], [[1]]), 0.2)
        text = json.dumps(pick(rng, {"labels": held}, ({}, [], {"other": 1}), 0.1))
    elif kind == "metadata.jsonl":
        keys = pick(
            rng, ("file_name", "label"), (("file_name", "text"), ("f", "label"), ("file_name",) * 2), 0.2
        )
        text = "\n".join(json.dumps(dict(zip(keys, pair, strict=True))) for pair in pairs)
    else:
        rows = [("file_name", "label"), *pairs] if chance(rng, 0.8) else pairs
        text = "\n".join(rng.choice(",,,,;").join(map(str, row)) for row in rows)
    content = text.encode("utf8", "replace")
    return kind, damage(rng, content) if chance(rng, 0.15) else content


def _content(rng: Random, kind: str) -> bytes:
    return hostile(rng) if chance(rng, 0.15) else samples()[kind]


def _kind(rng: Random) -> str:
    return rng.choice(
        (
            "PNG L",
            "PNG RGB",
            "PNG P",
            "JPEG RGB",
            "PNG RGB",
            "WEBP RGB",
            "BMP L",
            "PPM RGB",
            "GIF P",
            "TIFF RGB",
        )
    )


def image_folder(rng: Random) -> Case:
    """A folder of pictures, some of them hostile, with links, pipes and odd names."""
    kind, names = _kind(rng), _names(rng)
    case = Case({name: _content(rng, kind) for name in names}, options=options(rng))
    if chance(rng, 0.3):
        case.files |= {name: content for name, content in [_table(rng, names)]}
    if chance(rng, 0.3):
        unusual_files(rng, case)
    return case


def image_zip(rng: Random) -> Case:
    """A zip file of pictures, some of them hostile, whose names, modes and container may lie."""
    kind = _kind(rng)
    entries = [
        Entry(
            name.encode(),
            _content(rng, kind),
            chance(rng, 0.5),
            pick(rng, 0o100644, (0o120777, 0o40755, 0), 0.02),
        )
        for name in _names(rng)
    ]
    if chance(rng, 0.1):
        name = rng.choice(_BAD_NAMES).encode("utf8", "surrogateescape")
        entries.append(Entry(pick(rng, name, (b"\xff\xfe.png", b"")), samples()[kind]))
    if chance(rng, 0.3):
        name, content = _table(rng, [entry.name.decode("utf8", "replace") for entry in entries])
        entries.append(Entry(name.encode(), content, chance(rng, 0.5)))
    if chance(rng, 0.05):
        entries.append(rng.choice(entries))
    if chance(rng, 0.02):
        entries.append(Entry(entries[0].name, bytes(rng.choice((2**20, 2**26 + 2**20))), True))
    case = Case({"data.zip": zip_file(rng, entries, 0.06)}, options=options(rng))
    if chance(rng, 0.02):
        unusual_files(rng, case, named=True)
    return case
