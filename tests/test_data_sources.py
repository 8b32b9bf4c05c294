"""Sources as users have them: their content is read, refused, or named as not read, and never misread."""

import io
import json
import pickle
import warnings
import zipfile

import numpy as np
import pytest
from PIL import Image

from cdm_fast.data import load_data, read_image
from cdm_fast.data.names import split_of
from tests.test_data import SPLITS, everything, png_bytes, write_idx_folder
from tests.test_data_bad_input import refused


def picture(value=0, suffix="png", colour=False):
    """The content of a 4x4 picture file of one grey level."""
    buffer = io.BytesIO()
    shape = (4, 4, 3) if colour else (4, 4)
    formats = {"png": "PNG", "tif": "TIFF", "gif": "GIF", "jfif": "JPEG"}
    Image.fromarray(np.full(shape, value, np.uint8)).save(buffer, formats[suffix])
    return buffer.getvalue()


def lay_out(root, names, content=None):
    """Files of pictures, each of its own grey level, in a folder, or in a zip if the root's name says so."""
    contents = {
        name: picture(i, name.rpartition(".")[2]) if content is None else content
        for i, name in enumerate(names)
    }
    return put(root, contents)


def put(root, contents):
    if root.suffix == ".zip":
        with zipfile.ZipFile(root, "w") as archive:
            for name, content in contents.items():
                archive.writestr(name, content)
        return root
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def read(source, **options):
    """All splits, and what was told as not read."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        splits = everything(source, **options)
    return splits, {str(warning.message).partition(": not read: ")[2] for warning in caught}


def labels_by_level(splits):
    """Label of each picture by the grey level that it has everywhere."""
    return {
        int(image[0, 0, 0]): int(label)
        for data in splits.values()
        for image, label in zip(data.images, data.labels, strict=True)
    }


# ---------------------------------------------------------------- dataset.json of StyleGAN and EDM


NAMES = [f"0000{i // 10}/img{i:08}.png" for i in range(20)]


@pytest.mark.parametrize("kind", ["folder", "a.zip"])
@pytest.mark.parametrize("pairs", [list, dict])
def test_labels_of_dataset_json(tmp_path, kind, pairs):
    root = lay_out(tmp_path / kind, NAMES)
    labels = pairs([name, i % 3] for i, name in enumerate(NAMES))
    table = json.dumps({"labels": list(map(list, labels)) if pairs is list else labels}).encode()
    if kind == "a.zip":
        with zipfile.ZipFile(root, "a") as archive:
            archive.writestr("dataset.json", table)
    else:
        (root / "dataset.json").write_bytes(table)
    splits, unread = read(root)
    assert labels_by_level(splits) == {i: i % 3 for i in range(20)} and not unread
    assert splits["train"].num_classes == 3
    noun = "zip" if kind == "a.zip" else "folder"
    assert splits["train"].kind == f"an EDM {noun} with labels of dataset.json"


def test_dataset_json_without_labels_makes_no_classes_of_archive_folders(tmp_path):
    contents = {name: picture(i) for i, name in enumerate(NAMES)}
    source = put(tmp_path / "a.zip", contents | {"dataset.json": b'{"labels": null}'})
    splits, _ = read(source)
    assert all(data.labels is None for data in splits.values())


@pytest.mark.parametrize(
    "name", ["{thousand:05}/img{i:08}.png", "{thousand}000/{i:05}.png"], ids=["stylegan", "ffhq"]
)
def test_numbered_archive_folders_are_no_classes_without_dataset_json_either(tmp_path, name):
    names = [
        name.format(thousand=f"0{i // 1000}" if "000/" in name else i // 1000, i=i)
        for i in (*range(9), *range(1000, 1009))
    ]
    splits, _ = read(lay_out(tmp_path, names))
    assert splits["train"].labels is None and "numbered folders" in splits["train"].kind


def test_numbered_class_folders_stay_classes(tmp_path):
    splits, _ = read(lay_out(tmp_path, [f"{i % 2:05}/{i:05}.png" for i in range(20)]))
    assert splits["train"].num_classes == 2


@pytest.mark.parametrize(
    "labels, word",
    [
        ([[NAMES[0], 0]], "has no label"),
        ([[name, 0] for name in [*NAMES, "x.png"]], "1 files that are not there"),
        ([[name, 0.5] for name in NAMES], "a float"),
        ([[name, [0, 1]] for name in NAMES], "a list"),
        ([[name, None] for name in NAMES], "nothing"),
        ([[name, True] for name in NAMES], "a bool"),
        ([[name, i if i else "a"] for i, name in enumerate(NAMES)], "by numbers and others by names"),
        ([[NAMES[0], 0], [NAMES[0], 1]], "twice"),
        ([1, 2], "another form"),
        ([[name, -1] for name in NAMES], "label -1"),
        ([[name, 10**30] for name in NAMES], "64 bits"),
    ],
    ids=str.split("missing gone float list null bool mixed twice form negative huge"),
)
def test_dataset_json_that_does_not_fit(tmp_path, labels, word):
    source = lay_out(tmp_path, NAMES)
    (source / "dataset.json").write_text(json.dumps({"labels": labels}))
    refused(lambda: load_data(source), word, name=str(tmp_path))


# ---------------------------------------------------------------- tables of names and labels


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "labels.csv"])
def test_tables_beside_pictures(tmp_path, name):
    files = [f"{i}.png" for i in range(20)]
    source = lay_out(tmp_path, files)
    rows = [
        {"file_name": file, "label": "dog" if i % 2 else "cat", "text": "x"} for i, file in enumerate(files)
    ]
    if name.endswith("jsonl"):
        text = "\n".join(map(json.dumps, rows))
    else:
        text = "file_name,label,text\n" + "\n".join(",".join(row.values()) for row in rows)
    (source / name).write_text(text)
    splits, unread = read(source)
    assert labels_by_level(splits) == {i: i % 2 for i in range(20)}
    assert splits["train"].class_names == ("cat", "dog")
    assert unread == {f"columns text of {name}"}


def test_a_table_in_each_split_folder(tmp_path):
    files = [f"{split}/{i}.png" for split in ("train", "test") for i in range(10)]
    source = lay_out(tmp_path, files)
    for split in ("train", "test"):
        rows = [json.dumps({"file_name": f"{i}.png", "label": i % 2}) for i in range(10)]
        (source / split / "metadata.jsonl").write_text("\n".join(rows))
    splits, _ = read(source)
    assert [len(splits[split]) for split in SPLITS] == [9, 1, 10]
    assert splits["test"].labels.tolist() == [0, 1] * 5


def test_a_table_without_labels_leaves_class_folders_and_is_named(tmp_path):
    files = [f"{'ab'[i % 2]}/{i}.png" for i in range(20)]
    source = lay_out(tmp_path, files)
    (source / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": f, "text": "t"}) for f in files)
    )
    splits, unread = read(source)
    assert splits["train"].class_names == ("a", "b") and unread == {"columns text of metadata.jsonl"}


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_csv_as_the_source(tmp_path, header, separator):
    files = [f"deep/{i}.png" for i in range(20)]
    lay_out(tmp_path, [*files, "deep/not_named.png"])
    rows = ([("filename", "class")] if header else []) + [(file, str(i % 3)) for i, file in enumerate(files)]
    (tmp_path / "mine.csv").write_text("\n".join(separator.join(row) for row in rows))
    splits, _ = read(tmp_path / "mine.csv")
    assert labels_by_level(splits) == {i: i % 3 for i in range(20)}
    assert splits["train"].kind == "a table of 20 pictures with labels of mine.csv"


def test_a_jsonl_with_splits(tmp_path):
    files = [f"{i}.png" for i in range(20)]
    lay_out(tmp_path, files)
    rows = [{"path": f, "split": "Training" if i < 15 else "eval", "y": i % 5} for i, f in enumerate(files)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    splits, _ = read(tmp_path / "a.jsonl")
    assert len(splits["test"]) == 5 and splits["test"].labels.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    "text, word",
    [
        ("file_name,label\n../out.png,0", "outside of its folder"),
        ("file_name,label\n/etc/passwd,0", "outside of its folder"),
        ("file_name,label\ngone.png,0", "not there (gone.png)"),
        ("file_name,label\n0.png,0\n0.png,1", "twice"),
        ("file_name\n0.png\n0.png", "twice"),
        ("file_name,label\n0.png", "1 cells"),
        ("file_name,class,target\n0.png,1,2", "2 columns of labels"),
        ("colour,label\nred,0", "no column of file names"),
        ("file_name,split\n0.png,holdout", "split holdout"),
        ("file_name,split\n0.png,test", "no file into the split train"),
        ("", "empty"),
    ],
)
def test_tables_that_do_not_fit(tmp_path, text, word):
    lay_out(tmp_path, [f"{i}.png" for i in range(9)])
    (tmp_path / "a.csv").write_text(text)
    refused(lambda: load_data(tmp_path / "a.csv", "test"), word, name="a.csv")


# ---------------------------------------------------------------- arrays by their names


@pytest.mark.parametrize("label", ["label", "labels", "targets", "target", "y", "Y", "class"])
@pytest.mark.parametrize("image", ["images", "X", "imgs", "image"])
def test_npz_labels_by_their_usual_names(tmp_path, image, label):
    images = np.zeros((20, 4, 4), np.uint8)
    np.savez(tmp_path / "a.npz", **{image: images, label: np.arange(20) % 4})
    splits, unread = read(tmp_path / "a.npz")
    assert splits["train"].num_classes == 4 and not unread


@pytest.mark.parametrize(
    "form", ["x_{}|y_{}", "{}_images|{}_labels", "{}_x|{}_y", "images_{}|labels_{}", "X_{}|targets_{}"]
)
@pytest.mark.parametrize("names", [("train", "val", "test"), ("Train", "dev", "eval")], ids=str)
def test_npz_splits_by_their_usual_names(tmp_path, form, names):
    image, label = form.split("|")
    arrays = {}
    for count, name in zip((5, 3, 4), names, strict=True):
        arrays |= {
            image.format(name): np.full((count, 4, 4), count, np.uint8),
            label.format(name): np.arange(count) % 2,
        }
    np.savez(tmp_path / "a.npz", **arrays)
    splits, unread = read(tmp_path / "a.npz")
    assert [len(splits[split]) for split in SPLITS] == [5, 3, 4] and not unread
    assert splits["test"].labels.tolist() == [0, 1, 0, 1]


def test_npz_arrays_that_are_not_read_are_named_and_two_of_a_kind_refused(tmp_path):
    images = np.zeros((20, 4, 4), np.uint8)
    np.savez(tmp_path / "a.npz", images=images, masks=images, age=np.arange(20))
    _, unread = read(tmp_path / "a.npz")
    assert unread == {"arrays age, masks"}
    np.savez(tmp_path / "b.npz", images=images, x_train=images, x_test=images)
    refused(lambda: load_data(tmp_path / "b.npz"), "both are the train images", name="b.npz")
    np.savez(tmp_path / "c.npz", images=images, test_labels=np.arange(20))
    refused(lambda: load_data(tmp_path / "c.npz"), "no images of its split", name="c.npz:test_labels")


@pytest.mark.parametrize(
    "low, high, words", [(0, 1, "x * 255"), (-1, 1, "(x + 1) * 127.5"), (0, 200, "x.round()")]
)
def test_floats_are_refused_with_the_line_that_converts_them(tmp_path, low, high, words):
    x = np.random.default_rng(0).uniform(low, high, (9, 4, 4)).astype(np.float32)
    x.flat[:2] = low, high
    np.savez(tmp_path / "a.npz", images=x)
    message = refused(lambda: load_data(tmp_path / "a.npz"), words, name="a.npz:images")
    converted = eval(message.partition("such as ")[2], {"x": x})
    np.savez(tmp_path / "a.npz", images=converted)
    assert len(load_data(tmp_path / "a.npz")) == 7


# ---------------------------------------------------------------- split folders


@pytest.mark.parametrize(
    "names",
    [
        ("Training", "Testing"),
        ("TRAIN", "Test"),
        ("training_set", "test_set"),
        ("train", "eval"),
        ("trainset", "testset"),
        ("train-images", "test-images"),
    ],
    ids=str,
)
def test_split_folders_by_their_usual_names(tmp_path, names):
    files = [f"{split}/{'ab'[i % 2]}/{i}.png" for split in names for i in range(10)]
    splits, _ = read(lay_out(tmp_path, files))
    assert splits["train"].class_names == ("a", "b")
    assert sorted(splits["test"].images[:, 0, 0, 0].tolist()) == list(range(10, 20))


def test_dev_is_for_validation_and_class_names_below_a_split_are_free(tmp_path):
    files = [
        f"{split}/{'test train'.split()[i % 2]}/{i}.png" for split in ("train", "dev") for i in range(10)
    ]
    splits, _ = read(lay_out(tmp_path, files))
    assert splits["train"].class_names == ("test", "train")
    assert sorted(splits["validation"].images[:, 0, 0, 0].tolist()) == list(range(10, 20))


@pytest.mark.parametrize(
    "tops, word",
    [
        (("train", "test", "extra"), "beside extra/"),
        (("train", "bus"), "beside bus/"),
        (("test", "control"), "beside control/"),
        (("test", "val"), "no folder train"),
        (("train", "Training"), "both of which mean train"),
        (("train", "test", "eval"), "both of which mean test"),
        (("bottle/train", "bottle/test", "cable/train", "cable/test"), "within another"),
        (("a", "b/test"), "within another"),
    ],
    ids=str,
)
def test_mixtures_of_splits_and_others_are_refused(tmp_path, tops, word):
    refused(lambda: load_data(lay_out(tmp_path, [f"{top}/{i}.png" for top in tops for i in range(5)])), word)


def test_split_names():
    assert [
        split_of(name) for name in ("Validation", "dev", " VAL ", "training set", "x", "", "set", "images")
    ] == [
        *["validation"] * 3,
        "train",
        *[None] * 4,
    ]


def test_one_class_in_training_and_several_in_test_are_refused(tmp_path):
    files = [f"train/a/{i}.png" for i in range(5)] + [f"test/{'ab'[i % 2]}/{i}.png" for i in range(4)]
    refused(lambda: load_data(lay_out(tmp_path / "two", files)), "no training pictures", name="test/b/1.png")
    files = [f"train/a/{i}.png" for i in range(5)] + [f"test/b/{i}.png" for i in range(4)]
    refused(lambda: load_data(lay_out(tmp_path / "other", files)), "no training pictures")
    files = [f"train/{i}.png" for i in range(5)] + [f"test/{'ab'[i % 2]}/{i}.png" for i in range(4)]
    refused(lambda: load_data(lay_out(tmp_path / "flat", files)), "no training pictures")


# ---------------------------------------------------------------- pictures of every kind


def test_tiff_gif_and_jfif_are_read(tmp_path):
    names = [
        f"{place}/{i}.{suffix}"
        for place, suffix in zip("wxyz", ("png", "tif", "gif", "jfif"), strict=True)
        for i in range(5)
    ]
    splits, unread = read(lay_out(tmp_path, names), channels=1)  # a GIF has a palette of colours
    assert splits["train"].num_classes == 4 and not unread
    assert labels_by_level(splits) == {i: i // 5 for i in range(20)}


def test_pictures_that_are_not_read_are_counted_and_no_class_is_lost(tmp_path):
    names = [f"{place}/{i}.png" for place in "ab" for i in range(10)]
    source = lay_out(tmp_path, names)
    put(
        source, {"a/x.avif": b"?", "b/x.heic": b"?", "b/y.heic": b"?", "b/notes.txt": b"?", "README.md": b"?"}
    )
    _, unread = read(source)
    assert unread == {
        "1 .avif and 2 .heic pictures (a/x.avif, b/x.heic, b/y.heic), which convert to PNG;"
        " 1 other file (b/notes.txt)"
    }
    put(source, {"c/0.heic": b"?"})
    refused(lambda: load_data(source), "as are all of c", name="c/0.heic")


@pytest.mark.parametrize("lost", ["test", "test/a"])
def test_a_split_of_pictures_that_are_not_read_is_refused(tmp_path, lost):
    names = [f"{split}/{place}/{i}.png" for split in ("train", "test") for place in "ab" for i in range(5)]
    names = [name.replace(".png", ".heic") if name.startswith(f"{lost}/") else name for name in names]
    source = put(tmp_path, {n: b"?" if n.endswith("heic") else picture(i) for i, n in enumerate(names)})
    refused(lambda: load_data(source), "convert them to PNG", name="test")


def sixteen_bits(colours, kind):
    """A picture file of 16 bits a channel whose levels are those of a 12-bit camera."""
    levels = np.full((4, 5, colours), 3000, ">u2")
    if kind == "png":
        import struct
        import zlib

        def chunk(name, content):
            return (
                struct.pack(">I", len(content))
                + name
                + content
                + struct.pack(">I", zlib.crc32(name + content))
            )

        colour = {1: 0, 2: 4, 3: 2, 4: 6}[colours]
        rows = b"".join(b"\0" + row.tobytes() for row in levels)
        head = struct.pack(">IIBBBBB", 5, 4, 16, colour, 0, 0, 0)
        return (
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", head)
            + chunk(b"IDAT", zlib.compress(rows))
            + chunk(b"IEND", b"")
        )
    if kind.startswith("pnm"):
        magic = b"P6" if colours == 3 else b"P5"
        return magic + b"\n# from a camera\n5 4\n" + kind[3:].encode() + b"\n" + levels.tobytes()
    text = b"P3" if colours == 3 else b"P2"
    return text + b"\n5 4\n4095\n" + b" ".join(b"3000" for _ in range(levels.size))


@pytest.mark.parametrize(
    "colours, kind",
    [
        (1, "png"),
        (2, "png"),
        (3, "png"),
        (4, "png"),
        (1, "pnm4095"),
        (3, "pnm4095"),
        (3, "pnm65535"),
        (1, "pnm65535"),
        (3, "text"),
        (1, "text"),
    ],
)
def test_more_than_8_bits_are_never_cut_to_8(tmp_path, colours, kind):
    (tmp_path / "a.png").write_bytes(sixteen_bits(colours, kind))
    refused(lambda: read_image(tmp_path / "a.png"), "bits a channel", name="a.png")


def test_a_tiff_of_16_bits_in_colour_is_refused(tmp_path):
    # Pillow writes none; a header and one strip, little endian, three samples of 16 bits.
    import struct

    tags = [
        (256, 3, 1, 5),
        (257, 3, 1, 4),
        (258, 3, 3, 200),
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (273, 4, 1, 210),
    ]
    tags += [(277, 3, 1, 3), (278, 3, 1, 4), (279, 4, 1, 120)]
    content = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
    content += b"".join(struct.pack("<HHII", *tag) for tag in tags) + struct.pack("<I", 0)
    content = content.ljust(200, b"\0") + struct.pack("<3H", 16, 16, 16)
    (tmp_path / "a.tif").write_bytes(content.ljust(210, b"\0") + bytes(120))
    refused(lambda: read_image(tmp_path / "a.tif"), "16 bits a channel", name="a.tif")


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "WEBP"])
def test_pictures_of_several_frames_are_refused(tmp_path, kind):
    frames = [Image.fromarray(np.full((4, 4), value, np.uint8)) for value in (0, 100, 200)]
    frames[0].save(tmp_path / "a.png", kind, save_all=True, append_images=frames[1:])
    refused(lambda: read_image(tmp_path / "a.png"), "several frames", name="a.png")


# ---------------------------------------------------------------- where tools leave data sets


@pytest.mark.parametrize("place", ["", "raw", "MNIST/raw", "data/MNIST/raw"])
def test_idx_files_further_in(tmp_path, place):
    images, labels = np.zeros((20, 4, 4)), np.arange(20) % 2
    write_idx_folder(tmp_path / place, (images, labels), (images[:5], labels[:5]))
    assert len(load_data(tmp_path, "test")) == 5


def test_two_data_sets_in_a_folder_are_refused(tmp_path):
    images, labels = np.zeros((20, 4, 4)), np.arange(20) % 2
    for name in ("MNIST", "FashionMNIST"):
        write_idx_folder(tmp_path / name / "raw", (images, labels), (images, labels))
    refused(lambda: load_data(tmp_path), "FashionMNIST/raw, MNIST/raw", name=str(tmp_path))


def write_pickled_cifar(folder, fine=False, protocol=2):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = ["train", "test", "meta"] if fine else [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    contents = {}
    for name in names:
        data = rng.integers(0, 256, (100 if fine else 10, 3072)).astype(np.uint8)
        labels = list(range(len(data)))
        found = {"data": data, "fine_labels" if fine else "labels": labels, "coarse_labels": [0] * len(data)}
        (folder / name).write_bytes(pickle.dumps(found, protocol))
        contents[name] = data
    return contents


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("inside", ["", "cifar-10-batches-py", "data/cifar-10-batches-py"])
def test_pickled_cifar10_is_read_without_unpickling(tmp_path, monkeypatch, inside, protocol):
    contents = write_pickled_cifar(tmp_path / "set" / inside, protocol=protocol)
    monkeypatch.setattr(pickle, "load", None)
    monkeypatch.setattr(pickle, "loads", None)
    splits, _ = read(tmp_path / "set")
    assert [len(splits[split]) for split in SPLITS] == [45, 5, 10]
    assert np.array_equal(splits["test"].images.numpy(), contents["test_batch"].reshape(10, 3, 32, 32))
    assert splits["test"].labels.tolist() == list(range(10)) and splits["train"].num_classes == 10


def test_cifar_as_python_2_pickled_it(tmp_path):
    """Texts of Python 2 are bytes to Python 3; the published files are of that kind."""
    contents = write_pickled_cifar(tmp_path / "set")
    for name, data in contents.items():
        raw = data.tobytes()
        shape = b"(" + b"".join(b"M" + n.to_bytes(2, "little") for n in data.shape) + b"t"
        state = (
            b"(K\x01"
            + shape
            + b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNN"
            + b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        )
        array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR" + state
        array += b"T" + len(raw).to_bytes(4, "little") + raw + b"tb"
        labels = b"]" + b"".join(b"K" + bytes([i]) + b"a" for i in range(10))
        (tmp_path / "set" / name).write_bytes(
            b"\x80\x02}(U\x04data" + array + b"U\x06labels" + labels + b"u."
        )
    splits, _ = read(tmp_path / "set")
    assert np.array_equal(splits["test"].images.numpy(), contents["test_batch"].reshape(10, 3, 32, 32))


def test_pickled_cifar100_takes_the_fine_labels(tmp_path):
    write_pickled_cifar(tmp_path / "cifar-100-python", fine=True)
    splits, unread = read(tmp_path)
    assert splits["test"].labels.tolist() == list(range(100)) and not unread


def test_files_beside_those_of_a_known_set_are_named(tmp_path):
    images, labels = np.zeros((20, 4, 4)), np.arange(20) % 2
    write_idx_folder(tmp_path, (images, labels), (images, labels))
    (tmp_path / "extra-images-idx3-ubyte").write_bytes(b"")
    _, unread = read(tmp_path)
    assert unread == {f"extra-images-idx3-ubyte in {tmp_path}"}


@pytest.mark.parametrize("source", ["", " ", "hf:", "hf: "])
def test_an_empty_source_is_refused(source):
    refused(lambda: load_data(source))


# ---------------------------------------------------------------- parquet and arrow files


def write_parquet(path, labels, label="label", names=None, extra=False, column="image"):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"bytes": picture(i), "path": None} for i in range(len(labels))]
    features = {column: {"_type": "Image"}, label: {"dtype": "int64", "_type": "Value"}}
    if names:
        features[label] = {"names": names, "_type": "ClassLabel"}
    table = pa.table({column: rows, label: labels, **({"id": labels} if extra else {})})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        pq.write_table(table, path)


@pytest.mark.parametrize(
    "form", ["data/{}-00000-of-00001.parquet", "{}/data-00000-of-00001.arrow", "{}.parquet"]
)
def test_parquet_and_arrow_folders(tmp_path, form):
    for split, count in (("train", 20), ("validation", 5), ("test", 6)):
        write_parquet(tmp_path / form.format(split), [i % 4 for i in range(count)], extra=True)
    splits, unread = read(tmp_path)
    assert [len(splits[split]) for split in SPLITS] == [20, 5, 6]
    assert splits["test"].images[:, 0, 0, 0].tolist() == list(range(6))
    assert splits["test"].labels.tolist() == [0, 1, 2, 3, 0, 1] and splits["test"].num_classes == 4
    assert unread == {"columns id"} and "labels of column label" in splits["train"].kind


def test_parquet_labels_with_names_and_as_text(tmp_path):
    write_parquet(tmp_path / "named/train.parquet", [0, 1] * 10, names=["cat", "dog", "owl"])
    data = load_data(tmp_path / "named")
    assert data.class_names == ("cat", "dog", "owl") and data.num_classes == 3
    write_parquet(tmp_path / "text/train.parquet", ["dog", "cat"] * 10, label="class")
    assert load_data(tmp_path / "text").class_names == ("cat", "dog")
    assert load_data(f"hf:{tmp_path / 'text'}").class_names == ("cat", "dog")


def test_parquet_that_does_not_fit(tmp_path):
    write_parquet(tmp_path / "a/train.parquet", [0.5] * 20)
    data, unread = read(tmp_path / "a")
    assert data["train"].labels is None and unread == {"columns label"}
    write_parquet(tmp_path / "b/test.parquet", [0] * 20)
    refused(lambda: load_data(tmp_path / "b"), "none of them for training")
    write_parquet(tmp_path / "c/train.parquet", [0, 1] * 10)
    (tmp_path / "c/train.parquet").write_bytes((tmp_path / "c/train.parquet").read_bytes()[:100])
    refused(lambda: load_data(tmp_path / "c"), "damaged", name="train.parquet")
    write_parquet(tmp_path / "d/train.parquet", [0, -1] * 10)
    refused(lambda: load_data(tmp_path / "d"), "label -1")
    write_parquet(tmp_path / "e/train.parquet", [0, 1] * 10, label="y")
    write_parquet(tmp_path / "e/test.parquet", [0, 1] * 10, label="z")
    refused(lambda: load_data(tmp_path / "e", "test"), "no column y")


def test_a_cell_of_png_bytes_is_a_picture(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [png_bytes(np.full((4, 4), i, np.uint8)) for i in range(20)]
    pq.write_table(pa.table({"img": rows}), tmp_path / "train.parquet")
    assert load_data(tmp_path, "train").images.shape == (14, 1, 4, 4)
