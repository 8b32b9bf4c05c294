"""The report page: what it shows, what it names as missing, and how a browser draws it."""

import json
import math
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from cdm_fast import load
from cdm_fast.cli import nll, report
from cdm_fast.cli.arguments import Nll
from cdm_fast.data import load_data
from cdm_fast.errors import UserError
from cdm_fast.interop import Inspection
from cdm_fast.report import gather as gathered
from cdm_fast.report import playground as module
from cdm_fast.report.blocks import Picture, RunPage
from cdm_fast.report.gather import SECTIONS, Source
from cdm_fast.report.page import FILES, _rows, render
from cdm_fast.runs.checkpoint import read_config
from cdm_fast.runs.reports import figure_text, read_report
from cdm_fast.training.log import read_log
from cdm_fast.training.train import train
from tests.test_cli import call, call_json
from tests.tiny_run import CLASSES, tiny_config, write_images

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


# Single parts of the page


@pytest.fixture
def source(run, tmp_path):
    """A copy of the run with its test images."""
    again = shutil.copytree(run, tmp_path / "it's")
    data = load_data(str(run.parent / "images.npz"))
    return Source(again, read_config(again), load(again), data, data, "", lambda _: [])


def bars(blocks):
    """The names of the classes in their bars."""
    return [name for name, _, _ in blocks[1].rows]


def test_kept_classes_take_the_names_of_their_own_data_only(source):
    numbers = [f"class {c}" for c in range(CLASSES)]
    named = replace(source, data=replace(source.data, class_names=("a", "b", "c")))
    assert bars(gathered._classes(named)) == ["a", "b", "c"]
    assert bars(gathered._classes(replace(named, given=True))) == numbers
    other = replace(named, data=replace(source.data, class_names=("a", "b")))
    assert bars(gathered._classes(other)) == numbers


def test_images_without_labels_are_told(source):
    (source.run / "classes.json").unlink()
    (block,) = gathered._classes(replace(source, data=replace(source.data, labels=None)))
    assert block.reason == "the images have no labels"
    assert shlex.split(block.command) == ["cdm-fast", "report", str(source.run), "--data", "DATA"]


@pytest.mark.parametrize(("shape", "known"), [((1, 1, 8), 4), ((2, 5, 3), 12), ((1, 4, 4), 8)], ids=str)
def test_half_of_an_image_is_known_and_the_whole_width_of_a_signal_is_not(shape, known):
    found = gathered._known_half(torch.zeros(shape))
    assert found.sum() == known and found.flatten()[0] and not found.flatten()[-1]


def test_a_restoration_that_fails_leaves_the_others(source, monkeypatch):
    def fail(*_):
        raise UserError("no")

    monkeypatch.setattr(gathered, "_filled_in", fail)
    blocks = gathered._restoration(source)
    assert [block.kind for block in blocks] == ["tiles", "missing"] and blocks[1].reason == "no"


def test_no_command_is_named_that_cannot_help(source):
    (block,) = gathered._likelihood(replace(source, model=torch.nn.Linear(1, 1)))
    assert block.kind == "missing" and block.command == ""
    assert gathered._audit(source)[0].command
    assert gathered._audit(replace(source, data=None, why="gone"))[0].command == ""


def test_only_the_audit_of_clean_test_images_is_kept():
    command = Nll(run="run", method="audit")
    assert nll._describes_run(command)
    for change in ({"level": 3}, {"split": "train"}, {"data": "x.npz"}, {"pixels": "points"}):
        assert not nll._describes_run(replace(command, **change))


@pytest.mark.parametrize(("level", "split"), [(3, "test"), (0, "train")])
def test_the_head_shows_no_audit_of_another_level_or_split(tmp_path, level, split):
    figures = {"audited_bits_per_dim": 1.0, "level": 0, "split": "test"}
    (tmp_path / "audit.json").write_text(json.dumps(figures))
    assert gathered._figures(tmp_path, {}) == {"bits/dim, audited": "1.0000"}
    (tmp_path / "audit.json").write_text(json.dumps({**figures, "level": level, "split": split}))
    assert gathered._figures(tmp_path, {}) == {}


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"confusion": null}',
        '{"confusion": [[1, 2]]}',
        '{"confusion": [["a"]]}',
        '{"confusion": [[null]]}',
    ],
)
@pytest.mark.parametrize("name", ["audit", "classes"])
def test_a_kept_file_that_does_not_fit_is_told(source, name, text):
    (source.run / f"{name}.json").write_text(text)
    with pytest.raises(UserError, match=rf"{name}\.json: the kept file does not fit"):
        gathered._MAKERS[name](source)


def test_null_is_nan_where_a_number_is_expected():
    found = gathered._with_nan({"elbo": None, "ece": None, "log_z": {"log_z": [1.0, None]}})
    assert found["elbo"] is None and math.isnan(found["ece"]) and math.isnan(found["log_z"]["log_z"][1])
    assert figure_text({"x": math.nan}, "x") == ""


def test_a_damaged_score_is_shown_as_missing(tmp_path):
    (tmp_path / "nll.json").write_text("{")
    sections = {"likelihood": []}
    assert gathered._figures(tmp_path, sections) == {}
    assert "cannot be read" in sections["likelihood"][0].reason


def test_a_number_beyond_the_range_of_floats_is_none(tmp_path):
    (tmp_path / "nll.json").write_text('{"a": 1e999, "b": -1e999, "c": %s, "d": 2, "e": 0.5}' % ("1" * 400))
    assert read_report(tmp_path, "nll.json") == {"a": None, "b": None, "c": None, "d": 2, "e": 0.5}


def test_a_log_that_is_no_text_or_too_large_is_told(tmp_path, monkeypatch):
    log = tmp_path / "log.jsonl"
    log.write_bytes(b"\xff\xfe\n")
    with pytest.raises(UserError, match="is no text"):
        read_log(log)
    log.write_text("[" * 100_000 + "\n{}\n")
    with pytest.raises(UserError, match="line 1: not JSON"):
        read_log(log)
    monkeypatch.setattr("cdm_fast.training.log._LIMIT", 10)
    with pytest.raises(UserError, match="above the limit"):
        read_log(log)


def test_a_record_without_a_step_is_left_out(source):
    log = source.run / "log.jsonl"
    log.write_text('{"loss": 1.0}\n' + log.read_text())
    assert all(block.kind == "picture" for block in gathered._training(source))
    log.write_text('{"step": "x", "loss": 1.0}\n')
    with pytest.raises(UserError, match="does not fit"):
        gathered._training(source)


def page_of(name, *titles, kind=""):
    """A page whose training section holds pictures of these titles."""
    sections = {key: [] for key in SECTIONS}
    return RunPage(name, [], {}, {**sections, "training": [Picture(each, "data:,") for each in titles]}, kind)


def test_blocks_of_a_title_stand_side_by_side():
    rows = _rows([page_of("a", "Confusion", "Error", "Error"), page_of("b", "Error")], "training")
    titles = [[block and block.title for _, block in row] for row in rows]
    assert titles == [["Confusion", None], ["Error", "Error"], ["Error", None]]


def test_the_page_names_the_kinds_of_its_models():
    text = render([page_of("a", "Error", kind="Classifier of images"), page_of("b", kind="Other")])
    assert "Classifier of images, Other" in text and "<div></div>" in text
    assert "Classification Diffusion Model" not in text


def test_the_parts_of_the_page_are_read_as_utf8(monkeypatch):
    read = type(FILES).read_text
    found = []
    monkeypatch.setattr(
        type(FILES), "read_text", lambda path, encoding=None: found.append(encoding) or read(path, encoding)
    )
    render([page_of("a")])
    assert found == ["utf-8"] * 3


@pytest.mark.parametrize(("height", "width", "cell"), [(8, 8, 32), (28, 28, 18), (256, 256, 2), (1, 4096, 1)])
def test_the_drawing_has_a_bounded_size(height, width, cell):
    assert module._cell(height, width) == cell
    assert "cell = data.cell" in (FILES / "playground.js").read_text(encoding="utf-8")


FAILING_NETWORK = """
const context = new Proxy({}, { get: (_, name) => name === "getImageData"
  ? () => ({ data: new Uint8ClampedArray(4) }) : () => {}, set: () => true });
const elements = {};
const made = () => ({ width: 1, height: 1, value: "0", getContext: () => context, addEventListener() {},
  insertRow: made, insertCell: made, append() {}, textContent: "" });
globalThis.document = { getElementById: (id) => (elements[id] ??= made()), createElement: made };
globalThis.window = globalThis;
const run = async () => { throw new Error("out of memory"); };
const create = async () => ({ run });
globalThis.ort = { env: { wasm: {} }, InferenceSession: { create }, Tensor: class {} };
const data = { cell: 1, width: 1, height: 1, channels: 1, names: ["all"], a: [1], s: [0], scale: 2,
  shift: -1, examples: [] };
document.getElementById("playground-data").textContent = JSON.stringify(data);
for (const id of ["ort-glue", "ort-wasm", "network"])
  document.getElementById(id).textContent = require("zlib").gzipSync("").toString("base64");
console.error = () => {};
eval(require("fs").readFileSync(process.argv[1], "utf-8"));
setTimeout(async () => {
  const first = elements.status.textContent;
  elements.status.textContent = "";
  await globalThis.playground.update();
  console.log(first + "|" + elements.status.textContent);
}, 300);
"""


def test_a_network_that_fails_in_the_page_is_told_each_time():
    if shutil.which("node") is None:
        pytest.skip("there is no node")
    command = ["node", "-e", FAILING_NETWORK, str(FILES / "playground.js")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    told = "the network failed: Error: out of memory"
    assert found.stdout.strip() == f"{told}|{told}", found.stderr


def test_the_examples_of_sorted_data_are_of_every_class(source):
    order = source.data.labels.argsort(stable=True)
    data = source.data.take(order)
    found = torch.tensor(module._examples(data, data.num_grey_levels)).reshape(-1, 8, 8)
    brightest = found[:, :, 2:6].float().mean(2)
    assert len({int(each[:7].unfold(0, 3, 2).mean(1).argmax()) for each in brightest}) == CLASSES


def test_a_missing_jinja2_is_told_before_anything_is_computed(run, monkeypatch):
    def absent(name, purpose):
        raise UserError(f"{purpose} needs {name}")

    monkeypatch.setattr(report, "need", absent)
    monkeypatch.setattr(report, "_open", lambda *_: pytest.fail("a run was opened"))
    status, _, error = call("report", run)
    assert status == 2 and "the report page needs jinja2" in error


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
    """The page of the run with its playground; `written` has the restored images, which take long."""
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    if shutil.which("npm") is None:
        pytest.skip("there is no npm, from which onnxruntime-web comes")
    try:
        module.runtime_files()
    except module.UserError as error:
        pytest.skip(str(error))
    out = tmp_path_factory.mktemp("playground") / "report.html"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gathered._MAKERS, "restoration", lambda source: [])
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
