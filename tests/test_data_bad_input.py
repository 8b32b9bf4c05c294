"""Broken and hostile data: each kind gives one clear line that names the file and a remedy."""

import gzip
import os
import pickle
import struct
import sys
import types
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cdm_fast.data import batch_indices, dequantize, load_data, quantize, read_image, write_grid, write_image
from cdm_fast.errors import UserError
from cdm_fast.host.reading import MAX_DATA_BYTES

IMAGES = np.arange(6 * 5 * 4, dtype=np.uint8).reshape(6, 5, 4)
LABELS = np.arange(6, dtype=np.uint8) % 3


def refused(call, *words, name=""):
    """Asserts that `call()` raises a UserError of one line with a remedy, the name and the words."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert message.isprintable() and "; " in message
    for word in (name, *words):
        assert word in message
    return message


def idx_bytes(array, kind=8):
    return struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def idx_folder(tmp_path):
    for stem in ("train", "t10k"):
        (tmp_path / f"{stem}-images-idx3-ubyte").write_bytes(idx_bytes(IMAGES))
        (tmp_path / f"{stem}-labels-idx1-ubyte").write_bytes(idx_bytes(LABELS))
    return tmp_path


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_header(width, height):
    """A PNG whose header promises width x height RGB pixels and which holds none."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + png_chunk(b"IDAT", zlib.compress(b"\0" * 10))
        + png_chunk(b"IEND", b"")
    )


def save_png(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def write_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


# ---------------------------------------------------------------- the source itself


@pytest.mark.parametrize(
    "source", ["nowhere", "nowhere.npz", "nowhere.zip", "/nowhere/at/all", "\0", "digit"]
)
def test_missing_source(source):
    refused(lambda: load_data(source), "digits, hf:OWNER/NAME", name=source.strip("\0"))


def test_file_of_no_known_kind(tmp_path):
    (tmp_path / "a.txt").write_text("1,2,3")
    refused(lambda: load_data(tmp_path / "a.txt"), "no known kind", name="a.txt")


@pytest.mark.parametrize(
    "options, word",
    [
        ({"split": "dev"}, "dev"),
        ({"image_size": 0}, "image size 0"),
        ({"image_size": 10**6}, "1000000"),
        ({"channels": 2}, "2 channels"),
        ({"split_seed": -1}, "-1"),
        ({"split_seed": 2**64}, str(2**64)),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_impossible_option(options, word):
    refused(lambda: load_data("digits", **options), word)


def test_too_few_images_to_split(tmp_path):
    np.savez(tmp_path / "a.npz", images=IMAGES[:3])
    refused(lambda: load_data(tmp_path / "a.npz", "test"), "too few", name="a.npz")


@pytest.mark.parametrize("arguments", [(0, 4, 0, 0), (4, 0, 0, 0), (4, 4, 0, -1), (4, 4, -1, 0)])
def test_impossible_batch(arguments):
    refused(lambda: batch_indices(*arguments))


# ---------------------------------------------------------------- IDX


def test_idx_file_is_missing(idx_folder):
    (idx_folder / "t10k-labels-idx1-ubyte").unlink()
    refused(lambda: load_data(idx_folder), "t10k-labels-idx1-ubyte", "all four")


@pytest.mark.parametrize("keep", [0, 3, 10, 16, 40, -1])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_idx_file_is_truncated(idx_folder, keep, packed):
    path = idx_folder / "train-images-idx3-ubyte"
    content = path.read_bytes()
    if packed:
        path.unlink()
        path, content = idx_folder / f"{path.name}.gz", gzip.compress(content)
    path.write_bytes(content[:keep])
    refused(lambda: load_data(idx_folder), "fetch it again", name=path.name)


def test_idx_file_is_too_long(idx_folder):
    path = idx_folder / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes() + b"\0")
    refused(lambda: load_data(idx_folder, "train"), "too long", name=path.name)


@pytest.mark.parametrize("kind", [0x09, 0x0B, 0x0C, 0x0D, 0x0E])
def test_idx_file_of_another_type(idx_folder, kind):
    (idx_folder / "train-images-idx3-ubyte").write_bytes(idx_bytes(IMAGES, kind))
    refused(lambda: load_data(idx_folder), f"{kind:#04x}", name="train-images-idx3-ubyte")


def test_idx_labels_in_place_of_images(idx_folder):
    (idx_folder / "train-images-idx3-ubyte").write_bytes(idx_bytes(LABELS) + bytes(100))
    refused(lambda: load_data(idx_folder), "1 axes", name="train-images-idx3-ubyte")


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("shape", [(2**32 - 1,) * 3, (60_000, 2**10, 2**10), (2**20, 28, 28)], ids=str)
def test_idx_header_promises_too_much(idx_folder, packed, shape):
    content = struct.pack(">HBB3I", 0, 8, 3, *shape) + bytes(1000)
    (idx_folder / "train-images-idx3-ubyte").unlink()
    path = idx_folder / ("train-images-idx3-ubyte.gz" if packed else "train-images-idx3-ubyte")
    path.write_bytes(gzip.compress(content) if packed else content)
    refused(lambda: load_data(idx_folder), name=path.name)


def test_gzip_bomb(idx_folder):
    (idx_folder / "train-images-idx3-ubyte").unlink()
    path = idx_folder / "train-images-idx3-ubyte.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(struct.pack(">HBB3I", 0, 8, 3, 80, 1000, 1000))
        for _ in range(80):
            stream.write(bytes(10**6))
    refused(lambda: load_data(idx_folder), "decompression bomb", name=path.name)


def test_gzip_checksum_is_wrong(idx_folder):
    (idx_folder / "train-images-idx3-ubyte").unlink()
    content = bytearray(gzip.compress(idx_bytes(IMAGES)))
    content[-6] ^= 1
    (idx_folder / "train-images-idx3-ubyte.gz").write_bytes(content)
    refused(lambda: load_data(idx_folder), "damaged", name="train-images-idx3-ubyte.gz")


def test_idx_counts_differ(idx_folder):
    (idx_folder / "train-labels-idx1-ubyte").write_bytes(idx_bytes(LABELS[:5]))
    refused(lambda: load_data(idx_folder), "(5,)", "6 images", name="train-labels-idx1-ubyte")


def test_idx_test_label_is_no_training_class(idx_folder):
    (idx_folder / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(LABELS + np.uint8(7)))
    refused(lambda: load_data(idx_folder), "label 9", "0 to 2", name=str(idx_folder))


def test_idx_shapes_differ(idx_folder):
    (idx_folder / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(IMAGES.reshape(6, 4, 5)))
    refused(lambda: load_data(idx_folder), "(1, 4, 5)", "(1, 5, 4)")


def test_idx_without_images(idx_folder):
    (idx_folder / "train-images-idx3-ubyte").write_bytes(idx_bytes(IMAGES[:0]))
    (idx_folder / "train-labels-idx1-ubyte").write_bytes(idx_bytes(LABELS[:0]))
    refused(lambda: load_data(idx_folder), "no images", name="train-images-idx3-ubyte")


# ---------------------------------------------------------------- CIFAR


@pytest.fixture
def cifar_folder(tmp_path):
    records = np.zeros((4, 3073), np.uint8)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (tmp_path / f"{name}.bin").write_bytes(records.tobytes())
    return tmp_path


def test_cifar_file_is_truncated(cifar_folder):
    path = cifar_folder / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-1])
    refused(lambda: load_data(cifar_folder), "truncated", name=path.name)


def test_cifar_file_is_missing(cifar_folder):
    (cifar_folder / "test_batch.bin").unlink()
    refused(lambda: load_data(cifar_folder), "no such file", name="test_batch.bin")


def test_cifar_label_is_out_of_range(cifar_folder):
    path = cifar_folder / "data_batch_5.bin"
    path.write_bytes(b"\x0a" + path.read_bytes()[1:])
    refused(lambda: load_data(cifar_folder), "label 10", "0 to 9", name=path.name)


def test_pickled_cifar_that_is_damaged_or_wants_to_run_code(tmp_path):
    (tmp_path / "data_batch_1").write_bytes(b"\x80\x04.")
    refused(lambda: load_data(tmp_path), "damaged", name="data_batch_1")
    for protocol in range(6):
        content = pickle.dumps({"data": Exploit(tmp_path / "executed"), "labels": [0]}, protocol)
        (tmp_path / "data_batch_1").write_bytes(content)
        refused(lambda: load_data(tmp_path), "execute code", name="data_batch_1")
    assert not (tmp_path / "executed").exists()


# ---------------------------------------------------------------- npz


class Exploit:
    """What numpy would pickle; unpickling it makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_npz_with_a_pickle_runs_nothing(tmp_path):
    marker = tmp_path / "executed"
    for key in ("images", "labels"):
        arrays = {"images": IMAGES, "labels": LABELS} | {key: np.array([Exploit(marker)] * 6, dtype=object)}
        np.savez(tmp_path / "a.npz", **arrays)
        refused(lambda: load_data(tmp_path / "a.npz"), "pickled objects", name=f"a.npz:{key}")
    assert not marker.exists()


@pytest.mark.parametrize(
    "images, words",
    [
        (np.where(IMAGES == 7, np.nan, IMAGES / 255), ("image 0", "nan")),
        (np.where(IMAGES == 100, np.inf, IMAGES / 255), ("image 5", "inf")),
        (IMAGES.astype(np.float32), ("0 to 119", "k/255")),
        (IMAGES / 255 * 2 - 1, ("-1 to", "k/255")),
        (IMAGES / 16, ("k/255",)),
        (IMAGES * 1e306, ("0 to 1.19e+308", "k/255")),
        (IMAGES * np.longdouble("1e4000"), ("0 to", "k/255")),
        (IMAGES.astype(np.int16) - 1, ("-1 to 118",)),
        (IMAGES.astype(np.uint16) * 100, ("0 to 11900",)),
        (IMAGES > 3, ("bool",)),
        (IMAGES.astype(np.complex64), ("no plain numbers",)),
        (IMAGES.astype("S3"), ("no plain numbers",)),
        (np.zeros(6, [("a", "u1")]), ("no plain numbers",)),
        (IMAGES[0], ("(5, 4)",)),
        (IMAGES[None, None], ("(1, 1, 6, 5, 4)",)),
        (IMAGES[:, :, :, None].repeat(2, 3), ("(6, 5, 4, 2)", "no axis")),
        (np.zeros((6, 3, 4, 3), np.uint8), ("(6, 3, 4, 3)", "first or last")),
        (IMAGES[:0], ("no images",)),
        (np.zeros((1, 1025, 4), np.uint8), ("1024",)),
    ],
    ids=str.split(
        "nan inf whole-floats minus-one-to-one sixteenths huge-floats long-doubles negative too-large bool "
        "complex text structured one-image five-axes two-channels ambiguous empty too-wide"
    ),
)
def test_npz_images_that_are_no_grey_levels(tmp_path, images, words):
    np.savez(tmp_path / "a.npz", images=images)
    refused(lambda: load_data(tmp_path / "a.npz"), *words, name="a.npz:images")


@pytest.mark.parametrize(
    "labels, word",
    [
        (LABELS[:5], "(5,)"),
        (LABELS.astype(float), "float64"),
        (np.eye(6, dtype=np.int64), "(6, 6)"),
        (LABELS.astype(np.int64) - 1, "label -1 of image 0"),
        (LABELS.astype(np.int64) * 10**12, "1000000000000"),
    ],
    ids=["count", "float", "one-hot", "negative", "huge"],
)
def test_npz_labels_that_are_none(tmp_path, labels, word):
    np.savez(tmp_path / "a.npz", images=IMAGES, labels=labels)
    refused(lambda: load_data(tmp_path / "a.npz"), word, name="a.npz:labels")


@pytest.mark.parametrize(
    "arrays, words",
    [
        ({"data": IMAGES}, ("x_train", "data")),
        ({"x_train": IMAGES, "y_train": LABELS}, ("x_test",)),
        ({"x_train": IMAGES, "y_train": LABELS, "x_test": IMAGES}, ("only one of",)),
        ({"images": IMAGES, "num_grey_levels": 17}, ("119", "17 levels")),
        ({"images": IMAGES, "num_grey_levels": 1}, ("2 to 256",)),
        ({"images": IMAGES, "num_grey_levels": 17.0}, ("2 to 256",)),
    ],
    ids=["no-images", "no-test", "half-labelled", "level-too-high", "one-level", "float-levels"],
)
def test_npz_with_the_wrong_keys(tmp_path, arrays, words):
    np.savez(tmp_path / "a.npz", **arrays)
    refused(lambda: load_data(tmp_path / "a.npz"), *words, name="a.npz")


@pytest.mark.parametrize("keep", [0, 1, 100, 200, -1, -30])
def test_npz_is_truncated(tmp_path, keep):
    path = tmp_path / "a.npz"
    np.savez(path, images=IMAGES)
    path.write_bytes(path.read_bytes()[:keep])
    refused(lambda: load_data(path), "create it again", name="a.npz")


def test_npz_is_damaged_inside(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, images=IMAGES)
    content = bytearray(path.read_bytes())
    content[content.index(IMAGES.tobytes()[20:40])] ^= 1
    path.write_bytes(content)
    refused(lambda: load_data(path), "CRC", name="a.npz")


def npy(header, body=b""):
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


HEADER = b"{'descr': '|u1', 'fortran_order': False, 'shape': (%s), }\n"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x93NUMPY\x01",
        b"\x93NUMPY\x07\x00" + bytes(100),
        npy(HEADER % b"6, 5, 4", bytes(119)),
        npy(HEADER % b"4294967295, 4294967295, 4294967295"),
        npy(HEADER % b"0, 99999999999999999999999999999999999999"),
        npy(HEADER % (b"0," * 90)),
        npy(HEADER.replace(b"u1", b"f7") % b"0"),
        npy(b"{'descr': __import__('os').system('true')}"),
        npy(b"(" * 9000),
        npy(b"\xff" * 50),
    ],
    ids=str.split("empty stub version short huge overflow axes type code nested junk"),
)
def test_npy_header_lies(tmp_path, content):
    path = write_zip(tmp_path / "a.npz", [("images.npy", content)])
    refused(lambda: load_data(path), name="a.npz:images")


def test_npz_bomb(tmp_path):
    zeros = npy(HEADER % b"80, 1000, 1000", bytes(80 * 10**6))
    path = write_zip(tmp_path / "a.npz", [("images.npy", zeros)])
    refused(lambda: load_data(path), "decompression bomb", name="images.npy")


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp", "ppm"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.9])
def test_picture_is_truncated(tmp_path, suffix, share):
    path = save_png(
        tmp_path / f"a.{suffix}", np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    )
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    refused(lambda: read_image(path), name=path.name)


@pytest.mark.parametrize(
    "content, word",
    [
        (b"GIF89a" + bytes(50), "not a PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a PNG"),
        (b"<svg/>", "not a PNG"),
        (png_header(5, 5), "damaged"),
        (png_header(0, 5), "not a PNG"),
        (png_header(2**13, 2**13), "8192x8192"),
        (png_header(2**15, 2**15), "damaged"),
        (png_header(2**31 - 1, 2**31 - 1), "damaged"),
    ],
    ids=str.split("gif eps svg no-pixels no-width bomb larger-bomb largest-bomb"),
)
def test_picture_is_no_picture_or_a_bomb(tmp_path, content, word):
    (tmp_path / "a.png").write_bytes(content)
    refused(lambda: read_image(tmp_path / "a.png"), word, name="a.png")


def test_picture_that_would_lose_something(tmp_path):
    deep = save_png(tmp_path / "deep.png", np.full((4, 4), 1000, np.uint16))
    refused(lambda: read_image(deep), "I;16", "8-bit", name="deep.png")
    pixels = np.full((4, 4, 4), 255, np.uint8)
    pixels[0, 0, 3] = 254
    refused(lambda: read_image(save_png(tmp_path / "a.png", pixels)), "transparent", name="a.png")
    keyed = save_png(tmp_path / "keyed.png", np.zeros((4, 4), np.uint8), transparency=0)
    refused(lambda: read_image(keyed), "transparent", name="keyed.png")


def test_picture_path_is_no_file(tmp_path):
    refused(lambda: read_image(tmp_path / "a.png"), "no such file", name="a.png")
    refused(lambda: read_image(tmp_path), "not a regular file", name=str(tmp_path))
    os.mkfifo(tmp_path / "pipe.png")
    refused(lambda: read_image(tmp_path / "pipe.png"), "not a regular file", name="pipe.png")


def test_picture_file_is_too_large(tmp_path):
    with open(tmp_path / "a.png", "wb") as stream:
        stream.truncate(2**27)
    refused(lambda: read_image(tmp_path / "a.png"), "134217728 bytes", name="a.png")


def test_odd_file_names_stay_on_one_line(tmp_path):
    path = tmp_path / "two\nlines\x1b[31m.png"
    path.write_bytes(b"junk")
    refused(lambda: read_image(path), r"two\nlines")


# ---------------------------------------------------------------- folders and zips


@pytest.fixture
def folder(tmp_path):
    for index in range(10):
        save_png(tmp_path / f"pictures/{'ab'[index % 2]}/{index}.png", np.full((4, 4, 3), index, np.uint8))
    return tmp_path / "pictures"


def test_folder_without_pictures(tmp_path):
    refused(lambda: load_data(tmp_path), "no pictures", name=str(tmp_path))
    (tmp_path / "a.txt").write_text("no picture")
    refused(lambda: load_data(tmp_path), "no pictures", name=str(tmp_path))


def test_folder_with_a_broken_picture(folder):
    (folder / "a" / "2.png").write_bytes((folder / "a" / "4.png").read_bytes()[:45])
    broken = [split for split in ("train", "validation", "test") if not loads(folder, split)]
    assert len(broken) == 1
    refused(lambda: load_data(folder, broken[0]), "damaged", name="a/2.png")


def loads(source, split):
    try:
        load_data(source, split)
    except UserError:
        return False
    return True


@pytest.mark.parametrize("target", ["outside.png", "/etc/passwd"])
def test_folder_with_a_link_that_leaves_it(folder, target):
    save_png(folder.parent / "outside.png", np.zeros((4, 4), np.uint8))
    (folder / "a" / "link.png").symlink_to(folder.parent / target)
    refused(lambda: load_data(folder), "link", name="a/link.png")


@pytest.mark.parametrize("target", ["/", "..", "a"])
def test_folder_with_a_link_to_a_folder(folder, target):
    (folder / "loop").symlink_to(folder / target, target_is_directory=True)
    refused(lambda: load_data(folder), "link", name="loop")


def test_folder_with_a_pipe(folder):
    os.mkfifo(folder / "a" / "0.png.png")
    broken = [split for split in ("train", "validation", "test") if not loads(folder, split)]
    refused(lambda: load_data(folder, broken[0]), "not a regular file", name="0.png.png")


def test_folder_with_sizes_that_differ(folder):
    for index in range(10):
        save_png(folder / f"a/{index}x.png", np.zeros((5, 4, 3), np.uint8))
    refused(lambda: load_data(folder), "5x4", "4x4", "image size")
    assert load_data(folder, image_size=4).images.shape[1:] == (3, 4, 4)


def test_folder_with_colour_among_grey(tmp_path):
    for index in range(10):
        save_png(tmp_path / f"{index}.png", np.zeros((4, 4) if index == 0 else (4, 4, 3), np.uint8))
    refused(lambda: load_data(tmp_path), "in colour", "1 or 3 channels")
    assert load_data(tmp_path, channels=1).images.shape[1] == 1


def test_folder_of_pictures_too_large_to_train_on(tmp_path):
    save_png(tmp_path / "a.png", np.zeros((4, 1025), np.uint8))
    refused(lambda: load_data(tmp_path), "4x1025", "image size")


def test_folder_with_a_picture_beside_the_classes(folder):
    save_png(folder / "stray.png", np.zeros((4, 4, 3), np.uint8))
    refused(lambda: load_data(folder), "beside class sub-folders", name="stray.png")


def test_folder_with_a_class_that_only_the_test_split_has(tmp_path):
    for name in ("train/a/0.png", "train/b/0.png", "test/c/0.png"):
        save_png(tmp_path / name, np.zeros((4, 4), np.uint8))
    refused(lambda: load_data(tmp_path), "no training pictures", name="test/c/0.png")


def test_folder_larger_than_memory(folder, monkeypatch):
    monkeypatch.setattr("cdm_fast.host.reading.MAX_DATA_BYTES", 100)
    refused(lambda: load_data(folder), "limit of 100", name="pictures")
    assert MAX_DATA_BYTES > 2**33


@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "a/../../b.png", "..\\a.png", "C:/a.png", "a/.."])
def test_zip_that_leads_out_of_itself(tmp_path, name):
    path = write_zip(tmp_path / "a.zip", [(name, b"x"), ("b.png", b"x")])
    refused(lambda: load_data(path), "leads out", name="a.zip")


def test_zip_with_a_link(tmp_path):
    info = zipfile.ZipInfo("a.png")
    info.external_attr = 0o120777 << 16
    path = write_zip(tmp_path / "a.zip", [(info, "/etc/passwd")])
    refused(lambda: load_data(path), "symbolic link", name="a.zip/a.png")


def test_zip_with_a_password(tmp_path):
    path = write_zip(tmp_path / "a.zip", [("a.png", b"x" * 100)])
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + offset] |= 1
    path.write_bytes(content)
    refused(lambda: load_data(path), "encrypted", name="a.zip/a.png")


def test_zip_packed_with_a_rare_method(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.png", b"x" * 100)
    refused(lambda: load_data(tmp_path / "a.zip"), "deflate", name="a.zip/a.png")


def test_zip_entries_without_a_name_and_of_folders_are_passed_over(tmp_path):
    pictures = [(f"a/{index}.png", SAMPLES["a.png"]) for index in range(10)]
    path = write_zip(tmp_path / "a.zip", [("?nameless", b"x"), ("a/", b""), ("b.png/", b""), *pictures])
    path.write_bytes(path.read_bytes().replace(b"?nameless", b"\0nameless"))  # names end at a zero byte
    assert len(load_data(path)) == 7


def test_zip_bomb(tmp_path):
    path = write_zip(tmp_path / "a.zip", [("a.png", bytes(70 * 10**6))])
    refused(lambda: load_data(path), "decompression bomb", name="a.zip/a.png")


@pytest.mark.parametrize("content", [b"", b"PK", b"no zip file at all", b"PK\x05\x06" + bytes(18)], ids=repr)
def test_zip_that_is_none_or_empty(tmp_path, content):
    (tmp_path / "a.zip").write_bytes(content)
    refused(lambda: load_data(tmp_path / "a.zip"), name="a.zip")


# ---------------------------------------------------------------- the hub


def test_hub_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(lambda: load_data("hf:me/small"), "pip install")


@pytest.mark.parametrize(
    "tables, word",
    [
        (FileNotFoundError("no such data set"), "no such data set"),
        ({"test": None}, "no train split"),
        ({"train": types.SimpleNamespace(features={})}, "0 image columns"),
    ],
    ids=["missing", "no-train", "no-images"],
)
def test_hub_data_that_cannot_be_used(monkeypatch, tables, word):
    def load_dataset(name):
        if isinstance(tables, Exception):
            raise tables
        return tables

    fake = types.ModuleType("datasets")
    fake.load_dataset, fake.Image, fake.ClassLabel = load_dataset, bytes, bytes
    fake.exceptions = types.SimpleNamespace(DatasetsError=RuntimeError)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    refused(lambda: load_data("hf:me/small"), word, name="hf:me/small")


# ---------------------------------------------------------------- pixels and sheets


def test_dequantize_wants_grey_levels():
    noise = torch.zeros(1, 1, 2, 2)
    refused(lambda: dequantize(torch.full((1, 1, 2, 2), 17, dtype=torch.uint8), 17, noise), "grey level 17")
    refused(lambda: dequantize(noise, 17, noise), "torch.float32")
    refused(lambda: dequantize(noise.byte(), 257, noise), "257")
    refused(lambda: dequantize(noise.byte(), 17, noise[0]), "(1, 2, 2)")


def test_nan_is_not_drawn(tmp_path):
    images = torch.zeros(2, 1, 4, 4)
    images[1, 0, 0, 0] = float("nan")
    refused(lambda: quantize(images, 17), "1 of 32")
    refused(lambda: write_grid(images, tmp_path / "a.png"), "NaN")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(4, 4), (1, 2, 4, 4), (0, 1, 4, 4), (1, 1, 0, 4)], ids=str)
def test_sheet_of_no_images(tmp_path, shape):
    refused(lambda: write_grid(torch.zeros(shape), tmp_path / "a.png"), str(shape))


@pytest.mark.parametrize("shape", [(4, 4), (2, 4, 4), (1, 0, 4), (1, 1, 4, 4)], ids=str)
def test_picture_of_no_image(tmp_path, shape):
    refused(lambda: write_image(torch.zeros(shape, dtype=torch.uint8), tmp_path / "a.png"), str(shape))
    refused(lambda: write_image(torch.zeros(1, 4, 4), tmp_path / "a.png"), "torch.float32")


def test_sheet_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    refused(lambda: write_grid(torch.zeros(1, 1, 4, 4), tmp_path / "file" / "a.png"), "a.png")
    refused(lambda: write_grid(torch.zeros(1, 1, 4, 4), tmp_path / "a.png", columns=0), "0 columns")


def test_full_disk_leaves_the_old_sheet(tmp_path, monkeypatch):
    write_grid(torch.zeros(1, 1, 4, 4), tmp_path / "a.png")
    old = (tmp_path / "a.png").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refused(lambda: write_grid(torch.ones(4, 1, 4, 4), tmp_path / "a.png"), "No space left", name="a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"] and (
        tmp_path / "a.png"
    ).read_bytes() == old


# ---------------------------------------------------------------- damage of any kind


def mutations(content):
    """The content with bytes changed, dropped, inserted, or cut off."""
    place, byte = st.integers(0, len(content)), st.binary(max_size=4)
    edit = st.tuples(place, st.integers(0, 4), byte)

    def apply(edits, end):
        damaged = bytearray(content)
        for start, dropped, inserted in edits:
            damaged[start : start + dropped] = inserted
        return bytes(damaged[:end])

    return st.builds(apply, st.lists(edit, min_size=1, max_size=4), st.none() | place)


def _samples():
    """Small valid files by name, as the fuzz test's starting points."""
    import io

    samples = {"train-images-idx3-ubyte": idx_bytes(IMAGES), "data_batch_1.bin": bytes(3073 * 2)}
    samples["train-images-idx3-ubyte.gz"] = gzip.compress(idx_bytes(IMAGES))
    for suffix in ("png", "jpg", "bmp", "webp", "ppm"):
        buffer = io.BytesIO()
        exif = {"exif": Image.Exif()} if suffix in ("png", "jpg", "webp") else {}
        Image.fromarray(IMAGES[0]).convert("RGB").save(
            buffer, "JPEG" if suffix == "jpg" else suffix.upper(), **exif
        )
        samples[f"a.{suffix}"] = buffer.getvalue()
    buffer = io.BytesIO()
    np.savez(buffer, images=IMAGES, labels=LABELS)
    samples["a.npz"] = buffer.getvalue()
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for index in range(10):
            archive.writestr(f"{'ab'[index % 2]}/{index}.png", samples["a.png"])
    samples["a.zip"] = buffer.getvalue()
    return samples


SAMPLES = _samples()


@pytest.mark.parametrize("name", SAMPLES)
def test_damaged_files_are_read_or_refused(tmp_path, name):
    """Whatever bytes a file holds, the outcome is data or a UserError that names it."""
    for stem in ("train", "t10k"):
        if name.startswith("train"):
            (tmp_path / f"{stem}-labels-idx1-ubyte").write_bytes(idx_bytes(LABELS))
            (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(IMAGES))
    if name.endswith(".bin"):
        for other in ("data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
            (tmp_path / f"{other}.bin").write_bytes(bytes(3073))
    path = tmp_path / name
    picture = path.suffix in (".png", ".jpg", ".bmp", ".webp", ".ppm")
    source = path if path.suffix in (".npz", ".zip") else tmp_path

    @settings(max_examples=60, deadline=None)
    @given(mutations(SAMPLES[name]))
    def check(content):
        path.write_bytes(content)
        try:
            pixels = read_image(path) if picture else load_data(source).images
        except UserError as error:
            assert str(tmp_path) in str(error) and str(error).isprintable()
        else:
            assert pixels.dtype == torch.uint8

    check()
