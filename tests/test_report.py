"""The report page: what it shows, what it names as missing, and how a browser draws it."""

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from cdm_fast import load
from cdm_fast.interop import Inspection
from cdm_fast.report import playground as module
from cdm_fast.report.blocks import Missing, RunPage
from cdm_fast.report.gather import SECTIONS
from cdm_fast.report.page import _rows
from cdm_fast.training.train import train
from tests.test_cli import call, call_json
from tests.tiny_run import CLASSES, FLAGS, GREY_LEVELS, tiny_config, write_images

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (390, 1440)


class Page(HTMLParser):
    """The pictures, links and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.sources, self.targets, self.ids, self.words = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.sources += [found["src"]] if "src" in found else []
        self.targets += [found["href"]] if "href" in found else []
        self.ids += [found["id"]] if "id" in found else []

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished class-conditional run."""
    folder = tmp_path_factory.mktemp("report")
    config = tiny_config(write_images(folder / "images.npz"))
    network = replace(config.network, conditioning="joint")
    train(replace(config, network=network), folder / "run", device="cpu")
    return folder / "run"


@pytest.fixture(scope="module")
def written(run, tmp_path_factory):
    """(the page of the run, what the command says)."""
    out = tmp_path_factory.mktemp("page") / "report.html"
    told = call_json("report", run, "--out", out, "--device", "cpu")
    return out, told


def test_every_section_is_there_and_nothing_outside_of_the_file_is_named(run, written):
    out, told = written
    page = Page(out.read_text())
    assert set(SECTIONS) <= set(page.ids) and told["out"] == str(out)
    assert len(page.ids) == len(set(page.ids))
    assert page.sources and all(source.startswith("data:") for source in page.sources)
    assert all(target.startswith(("#", "data:")) for target in page.targets)
    assert {target[1:] for target in page.targets if target.startswith("#")} <= set(page.ids)
    text = " ".join(page.words)
    nll = json.loads((run / "nll.json").read_text())
    assert f"{nll['bits_per_dim']:.4f} ± {nll['bits_per_dim_stderr']:.4f}" in text
    assert not re.findall(r"https?://(?!www\.w3\.org)", out.read_text())


def test_what_is_missing_is_named_with_its_command(run, written):
    out, told = written
    assert told["missing"] == 1 and f"cdm-fast nll {run} --method audit" in out.read_text()


def test_an_audit_that_the_run_keeps_is_shown_with_its_words(run, tmp_path):
    again = shutil.copytree(run, tmp_path / "again")
    few = [
        "--ode-images",
        "2",
        "--elbo-images",
        "4",
        "--particles",
        "8",
        "--runs",
        "2",
        "--tolerance",
        "0.01",
    ]
    found = call_json("nll", again, "--method", "audit", *few, "--device", "cpu")
    told = call_json("report", again, "--device", "cpu")
    text = (again / "report.html").read_text()
    assert told["missing"] == 0 and told["out"] == str(again / "report.html")
    assert f"{found['audited_bits_per_dim']:.4f} ±" in text and "probability-flow ODE" in text
    assert "log Z of the single-pass density" in text


def test_runs_stand_side_by_side(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    call_json("report", run, other, "--out", tmp_path / "two.html", "--device", "cpu")
    text = (tmp_path / "two.html").read_text()
    assert 'class="several"' in text
    page = Page(text)
    assert len(page.sources) % 2 == 0 and "other" in page.words and "run" in page.words


def test_without_its_images_the_page_says_so(run, tmp_path):
    moved = shutil.copytree(run, tmp_path / "moved")
    config = json.loads((moved / "config.json").read_text())
    config["data"]["source"] = str(tmp_path / "gone.npz")
    (moved / "config.json").write_text(json.dumps(config))
    told = call_json("report", moved, "--device", "cpu")
    text = (moved / "report.html").read_text()
    assert told["missing"] > 2 and "cannot be read" in text and "--data DATA" in text
    given = ["--data", run.parent / "images.npz"]
    assert call_json("report", moved, *given, "--device", "cpu")["missing"] == 1


@pytest.mark.parametrize("changes", [{"objective": "ddm"}, {"objective": "classifier"}], ids=str)
def test_other_kinds_of_models_have_a_page(tmp_path, changes):
    config = tiny_config(write_images(tmp_path / "images.npz"), **changes)
    train(config, tmp_path / "run", device="cpu")
    told = call_json("report", tmp_path / "run", "--device", "cpu")
    assert told["missing"] > 0 and (tmp_path / "run/report.html").is_file()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("nll.json", "{"),
        ("classes.json", '{"accuracy": 0.5}'),
        ("classes.json", '{"accuracy": 1e999, "confusion": null}'),
        ("audit.json", '{"audited_bits_per_dim": null}'),
        ("log.jsonl", '{"step": 1, "ce": 1.0}\n{"ce": 2.0}\n'),
    ],
)
def test_a_kept_file_that_does_not_fit_is_named_and_the_page_is_written(run, tmp_path, name, content):
    odd = shutil.copytree(run, tmp_path / "odd")
    (odd / name).write_text(content)
    call_json("report", odd, "--device", "cpu")
    text = (odd / "report.html").read_text()
    assert name == "nll.json" or f"{name} does not fit" in text


def test_classes_of_other_data_do_not_name_kept_scores(run, tmp_path):
    images = np.random.default_rng(0).integers(0, GREY_LEVELS, size=(40, 8, 8), dtype=np.uint8)
    np.savez(
        tmp_path / "other.npz", images=images, labels=np.arange(40) % 2, num_grey_levels=np.array(GREY_LEVELS)
    )
    other = shutil.copytree(run, tmp_path / "other")
    call_json("report", other, "--data", tmp_path / "other.npz", "--device", "cpu")
    assert "class 2" in (other / "report.html").read_text()
    (other / "classes.json").unlink()
    np.savez(tmp_path / "bare.npz", images=images, num_grey_levels=np.array(GREY_LEVELS))
    call_json("report", other, "--data", tmp_path / "bare.npz", "--device", "cpu")
    assert "the images have no labels" in (other / "report.html").read_text()


def test_blocks_of_runs_are_paired_by_title():
    first = RunPage("a", [], {}, {key: [Missing("x", ""), Missing("y", "")] for key in SECTIONS})
    second = RunPage("b", [], {}, {key: [Missing("y", ""), Missing("z", "")] for key in SECTIONS})
    rows = [[block and block.title for _, block in row] for row in _rows([first, second], "samples")]
    assert rows == [["x", None], ["y", "y"], [None, "z"]]


def test_a_signal_has_its_right_half_filled_in(tmp_path):
    values = np.random.default_rng(0).integers(0, GREY_LEVELS, size=(60, 1, 8), dtype=np.uint8)
    np.savez(tmp_path / "signals.npz", images=values, num_grey_levels=np.array(GREY_LEVELS))
    words = ["--data", tmp_path / "signals.npz", "--out", tmp_path / "run", *FLAGS, "--device", "cpu"]
    call_json("train", *words, "--conditioning", "none", "--attention-resolutions", "1.0")
    call_json("report", tmp_path / "run", "--device", "cpu")
    assert "Filling in the right half" in (tmp_path / "run/report.html").read_text()


def test_names_of_data_and_runs_are_escaped(run, tmp_path):
    odd = shutil.copytree(run, tmp_path / "<script>alert(1)<&script>")
    call_json("report", odd, "--out", tmp_path / "odd.html", "--device", "cpu")
    text = (tmp_path / "odd.html").read_text()
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["report"], "run"),
        (["report", "nowhere"], "no run directory nowhere"),
        (["report", "RUN", "--out", "page.pdf"], "ends in .html"),
        (["report", "RUN", "--onnxruntime-web", "."], "goes with --playground"),
        (["report", "RUN", "--playground", "--onnxruntime-web", "."], "holds no ort.wasm.min.js"),
        (["report", "RUN", "--data", "nowhere.npz"], "nowhere.npz"),
    ],
    ids=["no run", "no such run", "suffix", "lone folder", "empty folder", "no data"],
)
def test_wrong_input_is_told_in_one_line(run, tmp_path, monkeypatch, words, told):
    if "--playground" in words:
        pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    monkeypatch.chdir(tmp_path)
    status, out, error = call(*(run if word == "RUN" else word for word in words))
    assert status == 2 and out == "" and error.strip().count("\n") == 0
    assert told in error
    assert not list(tmp_path.iterdir())


def fake_npm(folder, body):
    """A program called npm; returns the folder to put on the path."""
    (folder / "bin").mkdir()
    (folder / "bin/npm").write_text(f"#!/bin/sh\n{body}\n")
    (folder / "bin/npm").chmod(0o755)
    return str(folder / "bin")


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (None, "npm, which is not installed"),
        ("echo ENOTFOUND >&2; exit 1", "ENOTFOUND"),
        ("echo other > a.tgz", "not the one that is pinned"),
    ],
    ids=["no npm", "no network", "another file"],
)
def test_where_the_runtime_cannot_be_had(tmp_path, monkeypatch, body, told):
    monkeypatch.setenv("PATH", str(tmp_path) if body is None else fake_npm(tmp_path, body) + ":/bin:/usr/bin")
    with pytest.raises(module.UserError, match=told) as caught:
        module.runtime_files()
    assert "--onnxruntime-web DIR" in str(caught.value) and "\n" not in str(caught.value)


# In a browser


@pytest.fixture(scope="module")
def browser():
    """Chromium without a window."""
    api = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with api.sync_playwright() as tool:
        opened = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def opened(browser, path, width, dark=False):
    """A page of a file at a width, with what went wrong and what was requested."""
    scheme = "dark" if dark else "light"
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, wrong, requested = context.new_page(), [], []
    page.on("console", lambda line: line.type in ("error", "warning") and wrong.append(line.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda request: requested.append(request.url))
    page.goto(path.as_uri())
    return page, wrong, requested


PICTURES = "images => Promise.all(images.map(each => each.decode().then(() => each.naturalWidth)))"
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
SMALLEST = """Math.min(...[...document.querySelectorAll('body *')].filter(each => each.innerText)
    .map(each => parseFloat(getComputedStyle(each).fontSize)))"""


def overlapping(page):
    """Titles of blocks that reach beyond their section."""
    found = """sections => sections.flatMap(section => {
        const end = section.getBoundingClientRect().bottom + 1;
        return [...section.querySelectorAll('.block')].filter(b => b.getBoundingClientRect().bottom > end)
            .map(b => b.innerText);
    })"""
    return page.eval_on_selector_all("section", found)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_browser_draws_the_page(browser, written, width):
    page, wrong, requested = opened(browser, written[0], width)
    widths = page.eval_on_selector_all("img", PICTURES)
    assert len(widths) > 20 and min(widths) > 0
    assert page.evaluate(OVERFLOW) <= 0 and page.evaluate(SMALLEST) >= 12
    assert wrong == []
    assert [url for url in requested if not url.startswith(("file:", "data:"))] == []
    assert overlapping(page) == []
    shown = page.locator("img.plot").first.bounding_box()
    assert shown["width"] >= 300  # of 4.8 inches: text of 10 points is 9 pixels high or more


def test_dark_mode_is_dark(browser, written):
    page, _, _ = opened(browser, written[0], 390, dark=True)
    colours = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    paper, ink = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
    assert paper < 150 < 500 < ink


@pytest.fixture(scope="module")
def playing(run, tmp_path_factory):
    """The page of the run with its playground."""
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    if shutil.which("npm") is None:
        pytest.skip("there is no npm, from which onnxruntime-web comes")
    try:
        module.runtime_files()
    except module.UserError as error:
        pytest.skip(str(error))
    out = tmp_path_factory.mktemp("playground") / "report.html"
    call_json("report", run, "--playground", "--out", out, "--device", "cpu")
    return out


def ready(page):
    """Waits for the network's first pass."""
    page.locator("#status", has_text="ms a pass").wait_for(timeout=60_000)


RUN_NETWORK = """async x => {
    const found = await window.playground.inspect(Float32Array.from(x));
    return Object.fromEntries(Object.entries(found).map(([name, values]) => [name, [...values].map(Number)]));
}"""


@pytest.mark.parametrize("width", WIDTHS)
def test_the_network_in_the_page_gives_the_numbers_of_pytorch(browser, run, playing, width):
    page, wrong, requested = opened(browser, playing, width)
    ready(page)
    model = load(run)
    for level in (0, 3, 6):
        x = model.schedule.noise(torch.rand(1, 1, 8, 8) * 2 - 1, level)
        found = page.evaluate(RUN_NETWORK, x.flatten().tolist())
        with torch.no_grad():
            expected = dict(zip(Inspection.outputs, Inspection(model)(x), strict=True))
        assert found.keys() == expected.keys() and len(found["log_prob"]) == CLASSES
        for name, values in expected.items():
            assert torch.allclose(torch.tensor(found[name]), values.flatten(), rtol=0, atol=1e-3), name
    ready(page)
    assert page.evaluate(OVERFLOW) <= 0 and wrong == []
    assert [url for url in requested if not url.startswith(("file:", "data:", "blob:"))] == []
    assert overlapping(page) == []


def test_a_drawing_changes_the_bars(browser, playing):
    page, wrong, _ = opened(browser, playing, 1440)
    ready(page)
    page.click("#clear")
    before = page.locator("#class-bars").inner_text()
    box = page.locator("#draw").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 30)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] - 30, steps=5)
    page.mouse.up()
    api = pytest.importorskip("playwright.sync_api")
    api.expect(page.locator("#class-bars")).not_to_have_text(before, use_inner_text=True)
    assert page.locator("#class-bars tr").count() == CLASSES and wrong == []


# The network as a module


def test_what_the_page_is_told_is_what_the_model_tells(run):
    model = load(run)
    x = model.schedule.noise(torch.rand(4, 1, 8, 8) * 2 - 1, 5)
    with torch.no_grad():
        log_prob, log_level, denoised = Inspection(model)(x)
    assert torch.allclose(log_prob, model.log_prob_classes(x))
    level = log_level[:, 1:-1].argmax(1) + 1
    assert torch.allclose(denoised, model.predict_x0(x, level), atol=1e-5)
    assert torch.allclose(log_level.exp().sum(1), torch.ones(4), atol=1e-5)
