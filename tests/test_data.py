"""Data sources, splits, batches and pixels: exact round trips, and reproducible randomness."""

import gzip
import hashlib
import io
import struct
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image

from cdm_fast.data import batch_indices, dequantize, load_data, quantize, read_image, write_grid, write_image
from cdm_fast.data.order import split_indices

SPLITS = ("train", "validation", "test")
QUICK = settings(max_examples=25, deadline=None)


def image_stacks(max_count=5, max_side=6, max_value=255):
    """Arrays (N,H,W) of uint8."""
    shape = st.tuples(st.integers(1, max_count), st.integers(1, max_side), st.integers(1, max_side))
    return shape.flatmap(lambda s: npst.arrays(np.uint8, s, elements=st.integers(0, max_value)))


def idx_bytes(array):
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_idx_folder(folder, train, test, mark="-", packed=False):
    """train and test are (images, labels)."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem, (images, labels) in (("train", train), ("t10k", test)):
        for kind, array in (("images", images), ("labels", labels)):
            name = f"{stem}-{kind}{mark}idx{array.ndim}-ubyte"
            content = idx_bytes(array)
            (folder / (name + ".gz" if packed else name)).write_bytes(
                gzip.compress(content) if packed else content
            )
    return folder


def png_bytes(array, **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", **options)
    return buffer.getvalue()


def everything(source, **options):
    """The three splits of a source by name."""
    return {split: load_data(source, split, **options) for split in SPLITS}


# ---------------------------------------------------------------- digits and the pinned splits


def test_digits_have_the_pinned_splits():
    splits = everything("digits")
    assert [len(splits[s]) for s in SPLITS] == [1259, 179, 359]
    for data in splits.values():
        assert data.images.dtype == torch.uint8 and data.images.shape[1:] == (1, 8, 8)
        assert data.labels.dtype == torch.int64 and data.labels.shape == (len(data),)
        assert (data.num_grey_levels, data.num_classes, data.name) == (17, 10, "digits")
        assert int(data.images.min()) == 0 and int(data.images.max()) == 16


# A digest that changes means that every published figure on digits was taken on other test images: a new
# release of scikit-learn or numpy altered the data or the order. Do not update it without saying so.
DIGITS_DIGESTS = {
    0: "4ef5defb3e20c175",
    1: "64251ce8a497f8cf",
}


@pytest.mark.parametrize("seed", DIGITS_DIGESTS)
def test_digits_test_split_is_the_one_written_down(seed):
    test = load_data("digits", "test", split_seed=seed)
    content = test.images.numpy().tobytes() + test.labels.numpy().astype("<i8").tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == DIGITS_DIGESTS[seed]


def test_digits_test_indices_are_the_ones_written_down():
    from sklearn.datasets import load_digits

    indices = split_indices(1797, load_digits().target.astype(np.int64), frozenset({"train"}), 0)["test"]
    assert indices[:8].tolist() == [2, 4, 22, 28, 36, 40, 41, 43]
    assert hashlib.sha256(indices.astype("<i8").tobytes()).hexdigest()[:16] == "f670a9975e869b93"


@QUICK
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=200),
    st.integers(0, 2**64 - 1),
    st.sampled_from([frozenset({"train"}), frozenset({"train", "test"}), frozenset({"train", "validation"})]),
)
def test_splits_are_disjoint_complete_stratified_and_repeatable(labels, seed, shipped):
    labels = np.array(labels)
    splits = split_indices(len(labels), labels, shipped, seed)
    assert set(splits) == {"train", *SPLITS} - (shipped - {"train"})
    assert sorted(np.concatenate(list(splits.values())).tolist()) == list(range(len(labels)))
    shares = {"test": 0.2, "validation": 0.1}
    for split in splits.keys() - {"train"}:
        assert len(splits[split]) == pytest.approx(shares[split] * len(labels), abs=1.2)
        for label in range(5):
            expected = shares[split] * np.sum(labels == label)
            assert np.sum(labels[splits[split]] == label) == pytest.approx(expected, abs=1.2)
    again = split_indices(len(labels), labels, shipped, seed)
    assert all(np.array_equal(splits[key], again[key]) for key in splits)


def test_split_seeds_differ_and_unlabelled_data_split_too():
    first, second = (split_indices(100, None, frozenset({"train"}), seed)["test"] for seed in (0, 1))
    assert len(first) == len(second) == 20
    assert not np.array_equal(first, second)


# ---------------------------------------------------------------- batches


@QUICK
@given(st.integers(1, 40), st.integers(1, 60), st.integers(0, 2**64 - 1), st.integers(1, 5))
def test_every_epoch_is_a_permutation(count, batch_size, seed, epochs):
    steps = -(-epochs * count // batch_size)
    order = torch.cat([batch_indices(count, batch_size, seed, step) for step in range(steps)])
    for epoch in order[: epochs * count].split(count):
        assert sorted(epoch.tolist()) == list(range(count))


def test_batches_depend_on_seed_and_step_alone():
    forward = [batch_indices(100, 7, 3, step) for step in range(40)]
    torch.manual_seed(1)
    np.random.seed(1)  # the global generators must not matter
    before = torch.get_rng_state()
    backward = [batch_indices(100, 7, 3, step) for step in reversed(range(40))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(forward[0], batch_indices(100, 7, 4, 0))
    epochs = torch.cat([batch_indices(100, 100, 3, step) for step in range(2)]).view(2, 100)
    assert not torch.equal(epochs[0], epochs[1])


def test_batch_order_is_the_one_written_down():
    assert batch_indices(10, 12, 0, 0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7, 5, 3]
    assert batch_indices(10**6, 4, 7, 123_456_789).tolist() == [758796, 600722, 412796, 190923]


@pytest.mark.filterwarnings("error")
def test_the_largest_seeds_are_told_apart():
    assert not torch.equal(batch_indices(50, 50, 2**64 - 1, 0), batch_indices(50, 50, 2**64 - 2, 0))


def test_batches_are_mutable_copies():
    batch_indices(10, 4, 0, 0).zero_()
    assert sorted(batch_indices(10, 10, 0, 0).tolist()) == list(range(10))


# ---------------------------------------------------------------- pixels


@pytest.mark.parametrize("num_grey_levels", [2, 17, 256])
def test_dequantize_fills_each_interval_and_quantize_inverts_it(num_grey_levels):
    levels = torch.arange(num_grey_levels, dtype=torch.uint8)
    images = levels.repeat(64, 1).view(64, 1, 1, num_grey_levels)
    x = dequantize(images, num_grey_levels, torch.Generator().manual_seed(0))
    assert x.dtype == torch.float32 and x.shape == images.shape
    assert float(x.min()) >= -1 and float(x.max()) <= 1
    assert torch.equal(quantize(x, num_grey_levels), images)
    lower = dequantize(images, num_grey_levels, torch.zeros(images.shape))
    assert lower[0].flatten().tolist() == pytest.approx(
        [2 * u / num_grey_levels - 1 for u in range(num_grey_levels)]
    )
    width = 2 / num_grey_levels
    assert float((x - lower).mean()) == pytest.approx(width / 2, rel=0.1)


def test_quantize_clamps_what_a_sampler_overshoots():
    assert quantize(torch.tensor([-3.0, -1.0, 1.0, 3.0]), 17).tolist() == [0, 0, 16, 16]


# ---------------------------------------------------------------- readers: what is written is read back


@pytest.mark.parametrize("mark", ["-", "."])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_idx_round_trip(tmp_path, mark, packed):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (50, 5, 4)), np.arange(50) % 5
    folder = write_idx_folder(tmp_path / "idx", (images, labels), (images[:7], labels[:7]), mark, packed)
    splits = everything(folder)
    assert [len(splits[s]) for s in SPLITS] == [45, 5, 7]
    assert torch.equal(splits["test"].images, torch.from_numpy(images[:7, None].astype(np.uint8)))
    assert splits["test"].labels.tolist() == labels[:7].tolist()
    assert splits["validation"].labels.tolist().count(3) == 1
    assert (splits["train"].num_classes, splits["train"].num_grey_levels) == (5, 256)


@QUICK
@given(image_stacks(), st.booleans())
def test_any_idx_array_is_read_back(tmp_path_factory, images, packed):
    from cdm_fast.data.arrays import read_idx

    path = tmp_path_factory.mktemp("idx") / ("a.gz" if packed else "a")
    path.write_bytes(gzip.compress(idx_bytes(images)) if packed else idx_bytes(images))
    assert np.array_equal(read_idx(path, 3), images)


@QUICK
@given(image_stacks(max_count=8), st.sampled_from(["|u1", "<i8", ">i4", "<f4", "<f8", "<f2"]), st.booleans())
def test_any_npz_is_read_back(tmp_path_factory, images, dtype, packed):
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    labels = np.arange(len(images), dtype=np.uint16)
    stored = (images / 255).astype(dtype) if "f" in dtype else images.astype(dtype)
    save = np.savez_compressed if packed else np.savez
    save(path, x_train=stored, y_train=labels, x_test=stored[::-1], y_test=labels[:, None])
    test = load_data(path, "test")
    assert np.array_equal(test.images[:, 0].numpy(), images[::-1])
    assert test.labels.tolist() == labels.tolist() and test.num_classes == len(images)


@pytest.mark.parametrize(
    "shape, expected",
    [((9, 4, 5), (1, 4, 5)), ((9, 4, 5, 3), (3, 4, 5)), ((9, 3, 4, 5), (3, 4, 5)), ((9, 4, 5, 1), (1, 4, 5))],
    ids=["NHW", "NHWC", "NCHW", "NHW1"],
)
@pytest.mark.parametrize("order", ["C", "F"])
def test_npz_axes(tmp_path, shape, expected, order):
    images = np.arange(np.prod(shape)).reshape(shape).astype(np.uint8)
    np.savez(tmp_path / "a.npz", images=np.asarray(images, order=order))
    read = torch.cat([data.images for data in everything(tmp_path / "a.npz").values()])
    assert tuple(read.shape) == (9, *expected)
    rows = (
        images.reshape(9, *expected)
        if shape[1] == expected[0] or len(shape) == 3
        else images.transpose(0, 3, 1, 2)
    )
    assert sorted(map(bytes, read.numpy())) == sorted(map(bytes, np.ascontiguousarray(rows)))


def test_npz_with_few_grey_levels_and_no_labels(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.tile(np.arange(4, dtype=np.uint8), (10, 4, 1)), num_grey_levels=4)
    data = load_data(tmp_path / "a.npz")
    assert (data.num_grey_levels, data.num_classes, data.labels) == (4, None, None)


@pytest.mark.parametrize("inside", ["", "cifar-10-batches-bin"], ids=["flat", "unpacked"])
def test_cifar10_binary(tmp_path, inside):
    rng = np.random.default_rng(0)
    folder = tmp_path / inside
    folder.mkdir(exist_ok=True)
    records = rng.integers(0, 256, (6, 10, 3073)).astype(np.uint8)
    records[:, :, 0] = np.arange(10)
    for name, content in zip([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"], records, strict=True):
        (folder / f"{name}.bin").write_bytes(content.tobytes())
    splits = everything(tmp_path)
    assert [len(splits[s]) for s in SPLITS] == [45, 5, 10]
    assert np.array_equal(splits["test"].images.numpy(), records[5, :, 1:].reshape(10, 3, 32, 32))
    assert splits["test"].labels.tolist() == list(range(10)) and splits["test"].num_classes == 10


def test_cifar100_binary_takes_the_fine_labels(tmp_path):
    records = np.zeros((100, 3074), np.uint8)
    records[:, 0], records[:, 1] = 7, np.arange(100)
    for name in ("train.bin", "test.bin"):
        (tmp_path / name).write_bytes(records.tobytes())
    test = load_data(tmp_path, "test")
    assert test.labels.tolist() == list(range(100)) and test.num_classes == 100


def picture_files(count=10, classes=("cat", "dog"), colour=True, side=(6, 5)):
    """Relative name -> pixels, in class sub-folders."""
    rng = np.random.default_rng(0)
    shape = (*side, 3) if colour else side
    return {
        f"{name}/{index:02d}.png": rng.integers(0, 256, shape).astype(np.uint8)
        for name in classes
        for index in range(count)
    }


def write_pictures(path, files):
    """As a folder, or as a zip file if the path says so."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, pixels in files.items():
                archive.writestr(name, png_bytes(pixels))
        return path
    for name, pixels in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(png_bytes(pixels))
    return path


@pytest.mark.parametrize("kind", ["folder", "pictures.zip"])
@pytest.mark.parametrize("colour", [False, True], ids=["grey", "colour"])
def test_pictures_round_trip(tmp_path, kind, colour):
    files = picture_files(colour=colour)
    source = write_pictures(tmp_path / kind, {f"top/{name}": pixels for name, pixels in files.items()})
    splits = everything(source)
    assert [len(splits[s]) for s in SPLITS] == [14, 2, 4]
    expected = {pixels.reshape(6, 5, -1).transpose(2, 0, 1).tobytes(): name for name, pixels in files.items()}
    for data in splits.values():
        for image, label in zip(data.images.numpy(), data.labels.tolist(), strict=True):
            assert expected.pop(image.tobytes()).startswith(("cat", "dog")[label])
    assert not expected


def test_folder_and_zip_of_it_are_the_same_data(tmp_path):
    files = picture_files()
    folder, archive = write_pictures(tmp_path / "a", files), write_pictures(tmp_path / "a.zip", files)
    for one, other in zip(everything(folder).values(), everything(archive).values(), strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


def test_folder_with_its_own_splits_numbered_classes_and_clutter(tmp_path):
    names = [
        f"{split}/{label}/{i}.png"
        for split in ("train", "val", "test")
        for label in (2, 10)
        for i in range(3)
    ]
    files = {name: np.full((4, 4), index, np.uint8) for index, name in enumerate(names)}
    write_pictures(tmp_path, files)
    for clutter in (".DS_Store", "notes.txt", "train/.hidden.png", "train/2/._0.png"):
        (tmp_path / clutter).write_bytes(b"not a picture")
    splits = everything(tmp_path)
    assert {split: data.images[:, 0, 0, 0].tolist() for split, data in splits.items()} == {
        "train": [3, 4, 5, 0, 1, 2],
        "validation": [9, 10, 11, 6, 7, 8],
        "test": [15, 16, 17, 12, 13, 14],
    }
    assert splits["train"].labels.tolist() == [1, 1, 1, 0, 0, 0]  # 10 comes after 2


def test_flat_folder_has_no_labels_and_links_inside_it_work(tmp_path):
    write_pictures(tmp_path, {f"{i}.png": np.full((4, 4), i, np.uint8) for i in range(9)})
    (tmp_path / "link.png").symlink_to(tmp_path / "0.png")
    splits = everything(tmp_path)
    assert sum(len(data) for data in splits.values()) == 10
    assert all(data.labels is None and data.num_classes is None for data in splits.values())


def test_hugging_face_data(monkeypatch):
    """Through a stand-in for the optional package with the parts that the reader uses."""
    fake = types.ModuleType("datasets")

    class Image_:
        def __init__(self, decode=True):
            self.decode = decode

    class ClassLabel:
        num_classes, names = 3, ["a", "b", "c"]

    class Table(list):
        features = {"img": Image_(), "label": ClassLabel(), "id": None}

        def cast_column(self, column, kind):
            assert column == "img" and kind.decode is False
            return self

        def __getitem__(self, key):
            return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)

    def rows(count):
        pixels = [np.full((4, 4), index, np.uint8) for index in range(count)]
        return Table(
            {"img": {"bytes": png_bytes(p), "path": None}, "label": i % 3} for i, p in enumerate(pixels)
        )

    fake.Image, fake.ClassLabel = Image_, ClassLabel
    fake.load_dataset = {"me/small": {"train": rows(30), "test": rows(6)}}.__getitem__
    monkeypatch.setitem(sys.modules, "datasets", fake)
    splits = everything("hf:me/small")
    assert [len(splits[s]) for s in SPLITS] == [27, 3, 6]
    assert splits["test"].images[:, 0, 0, 0].tolist() == list(range(6))
    assert splits["test"].labels.tolist() == [0, 1, 2, 0, 1, 2] and splits["test"].num_classes == 3


# ---------------------------------------------------------------- size and channels


def test_resizing_keeps_grey_levels_and_flat_areas():
    data = load_data("digits", "validation", image_size=16)
    assert data.images.shape[1:] == (1, 16, 16)
    assert int(data.images.max()) <= 16
    plain = load_data("digits", "validation")
    assert torch.allclose(data.images.float().mean((1, 2, 3)), plain.images.float().mean((1, 2, 3)), atol=0.5)
    same = load_data("digits", "validation", image_size=8)
    assert torch.equal(same.images, plain.images)


def test_resizing_takes_the_central_square(tmp_path):
    wide = np.zeros((4, 20), np.uint8)
    wide[:, 4:16] = 200  # the square is columns 8..11; the filter reaches 4 further
    (tmp_path / "a.png").write_bytes(png_bytes(wide))
    for side in (2, 3, 7):
        assert read_image(tmp_path / "a.png", image_size=side).tolist() == [[[200] * side] * side]
    assert read_image(tmp_path / "a.png").shape == (1, 4, 20)


def test_grey_becomes_colour_and_colour_grey(tmp_path):
    grey = load_data("digits", "test")
    colour = load_data("digits", "test", channels=3)
    assert torch.equal(colour.images, grey.images.expand(-1, 3, -1, -1)) and colour.num_grey_levels == 17
    np.savez(tmp_path / "a.npz", images=np.full((10, 4, 4, 3), [255, 0, 0], np.uint8))
    assert load_data(tmp_path / "a.npz", channels=1).images.unique().tolist() == [76]  # 0.299 * 255


def test_grey_pictures_join_a_colour_folder(tmp_path):
    files = picture_files(classes=("a",)) | {"a/99.png": np.full((6, 5), 9, np.uint8)}
    write_pictures(tmp_path, files)
    assert all(data.images.shape[1] == 3 for data in everything(tmp_path).values())


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_opaque_pictures_of_every_8_bit_kind_are_read(tmp_path, mode):
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[:2] = 255
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.fromarray(pixels).convert(mode).save(path)
    image = read_image(path, channels=1)
    assert image.shape == (1, 4, 4) and image[0, 0, 0] > 250 and image[0, 3, 0] < 5
    assert read_image(path).shape[0] == (1 if mode in ("1", "L", "LA") else 3)


def test_pictures_are_turned_upright(tmp_path):
    pixels = np.zeros((2, 6), np.uint8)
    pixels[:, :3] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    (tmp_path / "a.png").write_bytes(png_bytes(pixels, exif=exif))
    image = read_image(tmp_path / "a.png")
    assert image.shape == (1, 6, 2) and image[0, 0].tolist() == [255, 255] and image[0, 5].tolist() == [0, 0]


# ---------------------------------------------------------------- sheets


@pytest.mark.parametrize("channels", [1, 3])
def test_sheet_shows_every_image_in_its_place(tmp_path, channels):
    images = torch.linspace(-1, 1, 6).view(6, 1, 1, 1).expand(6, channels, 32, 32)
    write_grid(images, tmp_path / "deep" / "sheet.png", columns=3)
    sheet = read_image(tmp_path / "deep" / "sheet.png")
    assert sheet.shape == (channels, 2 * 66 + 2, 3 * 66 + 2)
    centres = sheet[:, 34::66, 34::66]
    assert centres[0].flatten().tolist() == quantize(torch.linspace(-1, 1, 6), 256).tolist()
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["sheet.png"]


def test_sheet_of_bytes_keeps_their_values(tmp_path):
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 1, 64, 64) * 50
    write_grid(images, tmp_path / "sheet.png")
    assert read_image(tmp_path / "sheet.png")[0, 34::66, 34::66].tolist() == [[0, 50, 100], [150, 200, 255]]


@pytest.mark.parametrize("channels", [1, 3])
def test_one_picture_comes_back_pixel_for_pixel(tmp_path, channels):
    image = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
    write_image(image, tmp_path / "deep" / "picture.png")
    assert torch.equal(read_image(tmp_path / "deep" / "picture.png"), image)


FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="needs the package dataset-fashion-mnist")
def test_real_fashion_mnist():
    splits = everything(FASHION_MNIST)
    assert [tuple(splits[s].images.shape) for s in SPLITS] == [
        (54000, 1, 28, 28),
        (6000, 1, 28, 28),
        (10000, 1, 28, 28),
    ]
    assert [splits[s].labels.bincount().tolist() for s in SPLITS] == [[5400] * 10, [600] * 10, [1000] * 10]
    assert float(splits["train"].images.float().mean()) / 255 == pytest.approx(0.2860, abs=1e-3)
