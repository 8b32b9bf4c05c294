"""Documents: tutorials run, Python blocks run, command lines parse, and links lead somewhere."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from markdown_it import MarkdownIt
from markdown_it.token import Token

import cdm_fast
from cdm_fast import load
from cdm_fast.cli import entry
from cdm_fast.cli.arguments import Command
from cdm_fast.config import RunConfig, preset
from cdm_fast.training.train import train

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*/*.md"), ROOT / "benchmarks/README.md"])
PAGES = [page for page in PAGES if page.parent.name != "_generated"]
HAS_ONNX = importlib.util.find_spec("onnxscript") is not None
SCRIPTS = sorted([*ROOT.glob("docs/tutorials/*.py"), *ROOT.glob("docs/examples/*.py")])
# The page of a command that has none of its own name.
PAGE_OF = {"push": "share"}
# What stands for a value in a command line of the documents, and a value of its type.
PLACEHOLDERS = {"N": "3", "S": "3", "T": "3"}


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path) -> list[Token]:
    """Code blocks of a page, fenced or indented."""
    tokens = MarkdownIt().enable("table").parse(page.read_text())
    return [token for token in tokens if token.type in ("fence", "code_block")]


def command_lines(page: Path) -> list[str]:
    """The lines of the page's code blocks that call cdm-fast, without comments and what stands before it."""
    found = []
    for token in blocks(page):
        for line in token.content.replace("\\\n", " ").splitlines():
            call = re.match(r"\s*(?:\$ )?(?:\S*/)?cdm-fast ([a-z].*)", line)
            if call and "..." not in line and "|" not in line:
                found.append(call.group(1).split(" #")[0].split(";")[0].strip())
    return found


COMMANDS = [(page, line) for page in PAGES for line in command_lines(page)]
WITH_PYTHON = [page for page in PAGES if any(token.info == "python" for token in blocks(page))]


@pytest.mark.parametrize("script", SCRIPTS, ids=name)
def test_script_runs(script, tmp_path):
    environment = {**os.environ, "STEPS": "3", "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a run of two steps where `cdm-fast train` would put it."""
    folder = tmp_path_factory.mktemp("workplace")
    config = preset("digits-encoder")
    output = replace(config.output, evaluate_every=0, num_samples=10, sampling_steps=2)
    config = replace(config, train=replace(config.train, steps=2), output=output)
    train(config, folder / "runs/digits-encoder")
    return folder


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_python_blocks_run(page, workplace, monkeypatch):
    """The blocks of one page run in order, share their names, and find what a reader brings."""
    monkeypatch.chdir(workplace)
    model = load("runs/digits-encoder")
    image = torch.rand(1, 8, 8) * 2 - 1
    names: dict[str, object] = {
        "__name__": "__main__",
        "torch": torch,
        "model": model,
        "network": lambda y, sigma: y / (1 + sigma.view(-1, 1, 1, 1) ** 2),  # of N(0, I) data
        "x": torch.stack([image, -image]),
        "image": image,
        "known": image > 0,
    }
    for token in blocks(page):
        if token.info == "python" and (HAS_ONNX or "onnx" not in token.content):
            exec(compile(token.content, name(page), "exec"), names)


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=lambda value: str(value)[-60:])
def test_command_line_parses(page, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("cdm_fast.runs.checkpoint.read_config", lambda run: RunConfig())
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(line.replace("[", "").replace("]", ""))]
    entry.parse(words)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_relative_links_lead_to_files(page):
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{name(page)} links to {target}"


def test_the_reference_has_every_public_name():
    text = (ROOT / "docs/reference/api.md").read_text()
    listed = set(re.findall(r"^\.\. auto(?:class|function):: (\w+)$", text, flags=re.MULTILINE))
    assert listed == set(cdm_fast.__all__)


@pytest.mark.parametrize("command", [command.__name__.lower() for command in get_args(Command)])
def test_every_command_has_a_page(command):
    page = ROOT / f"docs/how-to/{PAGE_OF.get(command, command)}.md"
    assert any(line.split()[0] == command for line in command_lines(page)), (
        f"{name(page)} shows no cdm-fast {command}"
    )


def test_measurements_tell_device_and_versions():
    for page in ROOT.glob("docs/measurements/*.md"):
        text = page.read_text()
        assert any(device in text for device in ("AMD EPYC", "Intel Xeon", "CPU")), (
            f"{name(page)} names no device"
        )
        assert re.search(r"torch 2\.\d+", text), f"{name(page)} names no version"
