"""Images of any height and width: sizes as they are written, readers, corruptions, and whole runs.

The adjoints of networks on such images are in `test_adjoint.py`.
"""

import json
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from PIL import Image

from cdm_fast import Encoder, Transformer, UNet, UserError, load, sample
from cdm_fast.config import DataConfig, ImageShape, RunConfig, check, preset
from cdm_fast.config.json import differences, from_json, to_json
from cdm_fast.config.size import attended, halved, nearest_divisible, parse_image_size, resolutions
from cdm_fast.data import load_data, read_image, write_grid, write_image
from cdm_fast.data.corruptions import KINDS, corrupt
from cdm_fast.data.order import split_indices
from cdm_fast.data.pictures import Fit, decode
from cdm_fast.interop.export import Likelihood, export, export_onnx
from cdm_fast.nn.resample import Downsample, Upsample
from cdm_fast.runs.build import build_model
from cdm_fast.runs.checkpoint import load_checkpoint, read_config
from cdm_fast.training import finish
from cdm_fast.training.train import resume, train
from tests.test_cli import call, call_json
from tests.test_data_bad_input import refused, save_png
from tests.test_data_of_a_run import png
from tests.test_train import stop_after
from tests.tiny_run import CLASSES, FLAGS, GREY_LEVELS, tiny_config

# Sizes.


@pytest.mark.parametrize(
    ("text", "size"), [("64", 64), ("48x64", (48, 64)), ("1X64", (1, 64)), ("64x64", 64), (" 8x9 ", (8, 9))]
)
def test_size_as_it_is_written(text, size):
    assert parse_image_size(text) == size


@pytest.mark.parametrize("text", ["", "48x", "x48", "48x64x3", "-3", "4.5", "48 64", "48*64", "1" * 99])
def test_size_that_is_none(text):
    with pytest.raises(UserError, match="give one side, such as 64, or HEIGHTxWIDTH"):
        parse_image_size(text)


def test_a_side_of_one_is_never_halved():
    assert halved((6, 8)) == (3, 4)
    assert halved((1, 8)) == (1, 4) and halved((8, 1)) == (4, 1)
    assert halved((3, 8)) is None and halved((1, 1)) is None
    assert resolutions((2, 8), 3) == [(2, 8), (1, 4), (1, 2), (1, 1)]
    assert resolutions((2, 8), 4) is None and resolutions((8, 12), 3) is None


@pytest.mark.parametrize("sides", [(50, 70), (3, 5), (1, 7), (9, 1), (1, 1), (1000, 1)])
@pytest.mark.parametrize("halvings", range(4))
def test_the_size_that_is_proposed_can_be_halved(sides, halvings):
    assert resolutions(nearest_divisible(sides, halvings), halvings) is not None


def test_attention_by_height_by_width_and_by_share():
    oblong, signal = [(12, 16), (6, 8), (3, 4)], [(1, 64), (1, 32), (1, 16)]
    assert attended(oblong, (6,)) == [False, True, False]
    assert attended(oblong, (1.0, 0.25)) == [True, False, True]
    assert attended(signal, (16, 0.5)) == [False, True, True]
    assert attended(signal, (1,)) == [False, False, False]  # the share of the full size is 1.0


@pytest.mark.parametrize(
    ("sides", "network", "told"),
    [
        ((12, 18), {"multipliers": (1, 2, 2)}, "12x18 cannot be halved 2 times.*--image-size 12x16"),
        ((1, 18), {"multipliers": (1, 2, 2)}, "1x18 cannot be halved.*--image-size 1x16"),
        ((1, 1), {"multipliers": (1, 2)}, "1x1 cannot be halved 1 times.*--image-size 2$"),
        ((12, 16), {"attention_resolutions": (16,)}, "16: .*works at 12, 6, or .* 1.0, 0.5"),
        ((12, 16), {"attention_resolutions": (0.3,)}, "0.3: .*works at 12, 6, or .* 1.0, 0.5"),
        ((1, 16), {"attention_resolutions": (1,)}, "1: .*works at 16, 8, or .* 1.0, 0.5"),
        ((0, 8), {}, "--image-size is 0"),
        ((8, 2000), {}, "--image-size is 2000"),
    ],
)
def test_settings_that_do_not_fit_the_shape(sides, network, told):
    config = RunConfig()
    image = replace(config.image, height=sides[0], width=sides[1])
    network = replace(config.network, **{"attention_resolutions": (), **network})
    with pytest.raises(UserError, match=told):
        check(replace(config, image=image, network=network))


THREE_RESOLUTIONS = {"base_channels": 8, "multipliers": (1, 2, 2), "attention_resolutions": ()}


@pytest.mark.parametrize(
    "build",
    [
        partial(UNet, **THREE_RESOLUTIONS),
        partial(Encoder, **THREE_RESOLUTIONS),
        partial(Transformer, width=64),
    ],
    ids=["unet", "encoder", "transformer"],
)
@pytest.mark.parametrize("size", [(12, 18), (0, 8), (8, -4), (8,), (8, 8, 3), "8x8", (8.0, 8)])
def test_networks_refuse_a_size(build, size):
    with pytest.raises(UserError, match="image size"):
        build(size, 1, 22, num_groups=4)


@pytest.mark.parametrize(
    ("size", "told"),
    [
        ("48x", "'48x'"),
        ("0x8", "0x8 is out of range"),
        ("48x64x3", "'48x64x3'"),
        ("8x2000", "8x2000 is out of range"),
        ("10x8", "10x8 cannot be halved 2 times"),
    ],
)
def test_flag_that_is_wrong_in_one_line(tmp_path, size, told):
    flags = [*FLAGS, "--image-size", size, "--multipliers", "1", "2", "4", "--out", tmp_path / "run"]
    status, out, err = call("train", *flags)
    assert (status, out) == (2, "")
    assert told in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


# Settings, as JSON of today and of runs from when images were square.


def test_settings_survive_json():
    config = replace(
        RunConfig(),
        data=DataConfig(image_size=(48, 64)),
        image=ImageShape(48, 64, 3, 256, None),
        network=replace(RunConfig().network, attention_resolutions=(12, 0.5, 1.0)),
    )
    again = from_json(RunConfig, json.loads(json.dumps(to_json(config))))
    assert again == config
    assert [type(each) for each in again.network.attention_resolutions] == [int, float, float]


def test_settings_of_an_older_run_mean_the_same():
    config = preset("celeba64")
    old = to_json(config)
    for name in ("height", "width"):
        del old["image"][name]
    old["image"]["size"] = 64
    assert old["data"]["image_size"] == 64
    assert from_json(RunConfig, old) == config


def test_older_settings_that_are_damaged_are_refused():
    for image in ({"size": 8, "height": 8}, {"size": "8"}, {"size": None}, {"size": [8, 8]}, {"side": 8}):
        with pytest.raises(UserError, match="restore the file"):
            from_json(RunConfig, {**to_json(RunConfig()), "image": image})
    for size in ([8], [8, 8, 8], ["8", 8], {}, 1.5, True):
        with pytest.raises(UserError, match="image_size"):
            from_json(RunConfig, {**to_json(RunConfig()), "data": {"image_size": size}})


def test_one_size_has_one_spelling():
    square, pair = (replace(RunConfig(), data=DataConfig(image_size=size)) for size in (64, (64, 64)))
    assert square == pair and not differences(square, pair)
    assert Fit((64, 64)) == Fit(64) and Fit((48, 64)) != Fit((64, 48))


# Readers.


def test_the_central_box_has_the_proportions_of_the_size():
    """Of 10 x 20 pixels, 4x12 wants 6.7 rows of all columns, and 8x4 all rows of 5 columns."""
    row, column = np.meshgrid(np.arange(10), np.arange(20), indexing="ij")
    for size, rows, columns in (((4, 12), (1.67, 8.33), (0, 20)), ((8, 4), (0, 10), (7.5, 12.5))):
        for values, (low, high) in ((row, rows), (column, columns)):
            got = decode(png((10 * values).astype(np.uint8)), "x", Fit(size, resample="box"))
            assert got.shape == (1, *size)
            line = (got[0] if values is row else got[0].T)[:, 0] / 10
            step = (high - low) / len(line)
            assert abs(line[0] - (low + step / 2 - 0.5)) < 0.5
            assert abs(line[-1] - (high - step / 2 - 0.5)) < 0.5


def test_a_square_is_cut_as_ever():
    pixels = np.random.default_rng(0).integers(0, 256, (21, 34, 3), dtype=np.uint8)
    want = Image.fromarray(pixels).resize((8, 8), Image.Resampling.BICUBIC, box=(6.5, 0, 27.5, 21))
    got = decode(png(pixels), "x", Fit(8))
    assert np.array_equal(got.transpose(1, 2, 0), np.asarray(want))


def test_whole_pictures_keep_their_shape(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 6, 10), dtype=np.uint8)
    for index, each in enumerate(pixels):
        save_png(tmp_path / f"pics/{index:02}.png", each)
    assert load_data(tmp_path / "pics").images.shape[1:] == (1, 6, 10)
    assert load_data(tmp_path / "pics", crop="none").images.shape[1:] == (1, 6, 10)
    whole = load_data(tmp_path / "pics", image_size=(12, 20), crop="none", resample="box").images
    every = load_data(tmp_path / "pics").images
    assert torch.equal(whole, every.repeat_interleave(2, 2).repeat_interleave(2, 3))
    assert load_data(tmp_path / "pics", crop="2,1,5,4").images.shape[1:] == (1, 4, 5)
    refused(lambda: load_data(tmp_path / "pics", crop="0,0,10,7"), "6 pixels high and 10 wide", "0,0,10,7")


def test_arrays_that_are_not_square(tmp_path):
    grey = np.arange(20 * 6 * 10, dtype=np.uint8).reshape(20, 6, 10)
    np.savez(tmp_path / "a.npz", images=grey)
    kept = split_indices(20, None, frozenset({"train"}), 0)["train"]
    assert np.array_equal(load_data(tmp_path / "a.npz").images[:, 0].numpy(), grey[kept])
    np.savez(tmp_path / "signals.npz", images=grey.reshape(20, 1, 60))
    assert load_data(tmp_path / "signals.npz").images.shape[1:] == (1, 1, 60)
    assert load_data(tmp_path / "signals.npz", image_size=(1, 30), crop="none").images.shape[1:] == (1, 1, 30)


def test_idx_files_that_are_not_square(tmp_path):
    images = np.arange(20 * 6 * 10, dtype=np.uint8).reshape(20, 6, 10)
    for stem, count in (("train", 20), ("t10k", 5)):
        for kind, array in (("images-idx3", images[:count]), ("labels-idx1", np.zeros(count, np.uint8))):
            header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
            (tmp_path / f"{stem}-{kind}-ubyte").write_bytes(header + array.tobytes())
    assert torch.equal(load_data(tmp_path, "test").images[:, 0], torch.from_numpy(images[:5]))


def test_prepared_copies_are_told_apart_by_both_sides(tmp_path, monkeypatch):
    monkeypatch.setenv("CDM_FAST_CACHE", str(tmp_path / "cache"))
    for index in range(10):
        save_png(tmp_path / f"pics/{index}.png", np.full((8, 8), 20 * index, np.uint8))
    for size in ("4x6", "6x4", "4", "4x4"):
        status, out, err = call("data", tmp_path / "pics", "--image-size", size, "--prepare")
        assert status == 0, err
        want = parse_image_size(size)
        found = load_data(tmp_path / "pics", image_size=want).images
        assert found.shape[2:] == (want if isinstance(want, tuple) else (want, want))
    assert len(list((tmp_path / "cache").glob("*/rows"))) == 3


# Layers, corruptions, pictures.


def test_a_row_is_resampled_by_convolutions_in_one_dimension():
    """Along a side of 1 the kernel's middle row is the whole kernel."""
    down, up = Downsample(4, (False, True)).double(), Upsample(4, (False, True)).double()
    x = torch.randn(2, 4, 1, 12, dtype=torch.float64)
    with torch.no_grad():
        want = nnf.conv1d(nnf.pad(x[:, :, 0], (0, 1)), down.conv.weight[:, :, 1], down.conv.bias, stride=2)
        torch.testing.assert_close(down(x)[0][:, :, 0], want)
        wide = x[:, :, 0].repeat_interleave(2, 2)
        want = nnf.conv1d(wide, up.conv.weight[:, :, 1], up.conv.bias, padding=1)
        torch.testing.assert_close(up(x)[0][:, :, 0], want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(3, 24, 40), (1, 40, 6), (1, 1, 64)], ids=str)
def test_corruptions_of_any_shape(kind, shape):
    images = torch.randint(0, 256, (4, *shape), dtype=torch.uint8)
    got = corrupt(images, kind, 3, seed=3)
    assert got.shape == images.shape and got.dtype == torch.uint8
    assert not torch.equal(got, images)


@pytest.mark.parametrize("kind", ["fog", "frost", "snow", "elastic_transform"])
def test_a_wide_picture_sees_the_middle_of_the_weather(kind):
    """Lengths follow the longer side, so nothing is stretched."""
    side, height = 40, 20
    square = (torch.arange(side) * 6).to(torch.uint8).expand(3, 1, side, side).contiguous()
    top = (side - height) // 2
    wide = corrupt(square[:, :, top : top + height].contiguous(), kind, 3)
    assert torch.equal(wide, corrupt(square, kind, 3)[:, :, top : top + height])


def test_sheet_of_signals_can_be_seen(tmp_path):
    images = torch.randint(0, 256, (6, 1, 1, 64), dtype=torch.uint8)
    write_grid(images, tmp_path / "sheet.png", columns=1)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (2 + 6 * 10, 68)  # each row 8 pixels high, lines of 2
    assert np.array_equal(sheet[2:10, 2:66], np.repeat(images[0, 0].numpy(), 8, 0))


# Whole runs: pictures of 12x16, signals of 1x16.


def oblong_source(folder):
    """Pictures of 26x34 pixels in a folder for each class."""
    rng = np.random.default_rng(0)
    for index in range(48):
        pixels = rng.integers(0, 60, (26, 34), dtype=np.uint8)
        label = index % CLASSES
        pixels[:, 10 * label : 10 * label + 8] = 240
        save_png(folder / f"pictures/class-{label}/{index:02}.png", pixels)
    return folder / "pictures", ["--crop", "none", "--image-size", "12x16"]


def signal_source(folder):
    """Rows of 16 values, a bump whose place tells the class."""
    rng = np.random.default_rng(0)
    labels = np.arange(48) % CLASSES
    images = rng.integers(0, 4, (48, 1, 16))
    for image, label in zip(images, labels, strict=True):
        image[0, 5 * label : 5 * label + 4] = GREY_LEVELS - 1
    path = folder / "signals.npz"
    np.savez(path, images=images.astype(np.uint8), labels=labels, num_grey_levels=np.array(GREY_LEVELS))
    return path, []


SHAPES = {
    "oblong": (oblong_source, (1, 12, 16), "encoder"),
    "signal": (signal_source, (1, 1, 16), "unet"),
    "patches": (oblong_source, (1, 12, 16), "transformer"),
}


@pytest.fixture(scope="module", params=SHAPES)
def trained(request, tmp_path_factory):
    """(run directory, shape of its images)."""
    build, shape, architecture = SHAPES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    source, flags = build(folder)
    attention = ["--attention-resolutions", "0.5"]
    network = [
        "--architecture",
        architecture,
        "--conditioning",
        "joint",
        "--multipliers",
        "1",
        "2",
        *attention,
    ]
    settings = [*FLAGS, *network, *flags, "--device", "cpu"]
    call_json("train", "--data", source, "--out", folder / "run", *settings)
    return folder / "run", shape


def test_run_records_its_shape(trained):
    run, shape = trained
    config = read_config(run)
    assert config.image.shape == shape
    assert config.network.attention_resolutions == (0.5,)
    assert config.data.image_size == ((12, 16) if shape[1] > 1 else None)
    assert load(run).network.input_shape == shape


def test_run_draws(trained, tmp_path):
    run, shape = trained
    call_json("sample", run, "--num", 5, "--steps", 3, "--out", tmp_path / "a.npz")
    assert np.load(tmp_path / "a.npz")["images"].shape == (5, *shape[1:], 1)
    call_json("sample", run, "--num", 3, "--steps", 3, "--out", tmp_path / "pngs")
    for path in (tmp_path / "pngs").rglob("*.png"):
        assert read_image(path).shape == shape
    call_json("sample", run, "--num", 4, "--steps", 3, "--sampler", "mala", "--out", tmp_path / "a.png")
    assert sample(load(run), 2, steps=2).shape == (2, *shape)


def test_run_scores_and_audits(trained):
    run, _ = trained
    few = ["--particles", 8, "--runs", 2, "--ode-images", 2, "--probes", 2, "--elbo-images", 4]
    found = call_json("nll", run, "--method", "audit", *few, "--tolerance", 0.01)
    for value in (found["bits_per_dim"], found["ode"]["bits_per_dim"], found["elbo"]["bits_per_dim"]):
        assert np.isfinite(value)
    assert (run / "audit.png").stat().st_size
    call_json("calibrate", run, "--method", "constants", "--rows", 300)
    call_json("calibrate", run, "--method", "constants", "--undo")
    call_json("plot", run)
    assert call_json("replay", run, "--step", 5)["finite"]


def test_run_classifies(trained):
    run, _ = trained
    found = call_json("classify", run, "--draws", 1, "--corruptions", "--selective")
    assert 0 <= found["accuracy"] <= 1
    flags = ["--attack", "square", "--attack-steps", 3, "--attack-images", 4, "--certify"]
    call_json("classify", run, "--draws", 1, *flags, "--certify-images", 2, "--certify-draws", 20)


def test_run_finds_what_is_unusual(trained, tmp_path):
    run, shape = trained
    assert call_json("score", run, "--against", "corrupted")["run"] == str(run)
    other = np.random.default_rng(0).integers(0, 256, (20, 30, 40), dtype=np.uint8)
    np.savez(tmp_path / "other.npz", images=other)
    call_json("score", run, "--against", tmp_path / "other.npz")  # brought to the run's shape
    turned = np.zeros((20, shape[2], shape[1]), np.uint8)
    np.savez(tmp_path / "turned.npz", images=turned, num_grey_levels=np.array(256))
    status, _, err = call("nll", run, "--data", tmp_path / "turned.npz", "--draws", 1)
    if read_config(run).data.image_size is None:
        assert status == 2 and "16x1 images" in err and "1x16 images" in err
    else:
        assert status == 0, err  # brought to the size that the run asks for


def test_run_restores(trained, tmp_path):
    run, shape = trained
    _, height, width = shape
    image = torch.randint(0, 256, shape, dtype=torch.uint8)
    write_image(image, tmp_path / "a.png")
    write_image(image.transpose(1, 2).contiguous(), tmp_path / "turned.png")
    quick = ["--candidates", 2, "--steps", 2, "--moves", 1]
    box = ["--task", "inpaint", "--box", 2, 0, width - 2, height]
    call_json("restore", run, tmp_path / "a.png", *box, *quick, "--out", tmp_path / "b.png")
    mask = torch.zeros(shape, dtype=torch.uint8)
    mask[:, :, : width // 2] = 255
    write_image(mask, tmp_path / "mask.png")
    inpaint = ["--task", "inpaint", "--mask", tmp_path / "mask.png", *quick]
    call_json("restore", run, tmp_path / "a.png", *inpaint, "--out", tmp_path / "c.png")
    call_json("denoise", run, tmp_path / "a.png", "--out", tmp_path / "clean")
    assert read_image(tmp_path / "clean/a.png").shape == shape
    for flags in (["denoise", run, tmp_path / "turned.png"], ["restore", run, tmp_path / "turned.png", *box]):
        status, _, err = call(*flags)
        assert status == 2 and f"{width}x{height} pixels and the run takes {height}x{width}" in err
    outside = ["--task", "inpaint", "--box", 0, 0, height + 1, width + 1]
    status, _, err = call("restore", run, tmp_path / "a.png", *outside)
    assert status == 2 and f"{height} pixels high and {width} wide" in err


def test_run_enlarges_what_its_sides_divide(trained, tmp_path):
    run, (_, height, width) = trained
    write_image(torch.zeros(1, max(height // 2, 1), width // 2, dtype=torch.uint8), tmp_path / "a.png")
    flags = ["restore", run, tmp_path / "a.png", "--task", "super-resolution", "--factor", 2]
    status, _, err = call(*flags, "--candidates", 2, "--steps", 2, "--out", tmp_path / "b.png")
    if height == 1:
        assert status == 2 and "give a divisor of the run's 1x16 pixels" in err
    else:
        assert status == 0, err


def test_run_goes_to_other_programs(trained, tmp_path):
    run, shape = trained
    module, x = Likelihood(load(run)), torch.randn(3, *shape)
    with torch.no_grad():
        want = module(x)
        torch.testing.assert_close(export(module).module()(x), want, rtol=1e-4, atol=1e-4)
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    path = export_onnx(module, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), want, rtol=1e-4, atol=1e-3)


def test_run_is_the_start_of_another(trained, tmp_path):
    run, _ = trained
    data = ["--image-size", "12x16"] if read_config(run).data.image_size else []
    call_json("train", "--finetune", run, "--out", tmp_path / "next", "--steps", 2, *data, "--device", "cpu")
    assert read_config(tmp_path / "next").image == read_config(run).image


@pytest.mark.parametrize("kind", SHAPES)
def test_resumed_run_is_bitwise_the_uninterrupted_one(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(finish, "write_final", lambda *_: {})
    build, shape, architecture = SHAPES[kind]
    source, _ = build(tmp_path)
    config = tiny_config(source, accumulate=2)
    config = replace(
        config,
        data=replace(config.data, flip=True, crop="none", image_size=shape[1:]),
        network=replace(
            config.network, architecture=architecture, conditioning="joint", multipliers=(1, 2), num_groups=8
        ),
    )
    train(config, tmp_path / "whole", device="cpu")
    with monkeypatch.context() as patched:
        stop_after(patched, 3)
        train(config, tmp_path / "parts", device="cpu")
    assert load_checkpoint(tmp_path / "parts").step == 3
    resume(tmp_path / "parts", device="cpu")
    whole, parts = load_checkpoint(tmp_path / "whole"), load_checkpoint(tmp_path / "parts")
    for part, tensors in whole.tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, parts.tensors[part][name]), (part, name)


def test_run_of_square_images_from_before_there_were_two_sides(tmp_path):
    """Its config.json names one `size`; it loads, and goes on."""
    config = replace(tiny_config("digits"), image=ImageShape())
    train(config, tmp_path / "run", device="cpu")
    path = tmp_path / "run/config.json"
    value = json.loads(path.read_text())
    value["image"]["size"] = value["image"].pop("height")
    del value["image"]["width"]
    path.write_text(json.dumps(value))
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    assert load(tmp_path / "run").network.input_shape == (1, 8, 8)
    call_json("train", "--resume", tmp_path / "again", "--steps", 8, "--device", "cpu")
    assert read_config(tmp_path / "again").image.sides == (8, 8)


KINDS_OF_NETWORK = [
    ("cdm", "unet"),
    ("cdm", "encoder"),
    ("cdm", "transformer"),
    ("ddm", "unet"),
    ("classifier", "unet"),
    ("classifier", "encoder"),
    ("classifier", "transformer"),
]


def test_model_of_any_shape_is_built():
    """Every kind of network, conditioning and shape evaluates."""
    for sides in ((6, 8), (8, 6), (1, 8), (8, 1)):
        config = tiny_config("digits")
        image = replace(config.image, height=sides[0], width=sides[1])
        for objective, architecture in KINDS_OF_NETWORK:
            network = replace(config.network, architecture=architecture, multipliers=(1, 2))
            built = replace(
                config, image=image, network=network, train=replace(config.train, objective=objective)
            )
            model = build_model(built)
            x = torch.zeros(2, 1, *sides)
            with torch.no_grad():
                out = model.network(x) if objective == "classifier" else model.denoise(x, 3)
            assert torch.isfinite(out).all()
