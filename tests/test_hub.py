"""Runs on a hub: pushed to a server on loopback, fetched again, and used wherever a run can stand."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("huggingface_hub", reason="the extra hub is not installed")

from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from cdm_fast import UserError, load, sample
from cdm_fast.config.json import parse_json
from cdm_fast.runs.checkpoint import load_checkpoint, read_config
from cdm_fast.runs.hub import fetch_run, published_config
from cdm_fast.training.train import train
from tests import workers
from tests.hub_server import OTHER, WRITE_TOKEN, serving
from tests.test_cli import call, call_json
from tests.tiny_run import tiny_config, write_images

REPO, RUN = "me/tiny", "hf:me/tiny"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished class-conditional run."""
    folder = tmp_path_factory.mktemp("pushed")
    config = tiny_config(write_images(folder / "images.npz"))
    config = replace(config, network=replace(config.network, conditioning="joint"))
    train(config, folder / "run", device="cpu")
    return folder / "run"


def set_address(monkeypatch, address):
    """What HF_ENDPOINT does before `huggingface_hub` is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A server that `huggingface_hub` takes for the hub, a token, an empty cache, and a folder to work in."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with serving() as server:
        set_address(monkeypatch, server.address)
        for name, value in {
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_ASSETS_CACHE": str(tmp_path / "assets"),
            "HF_TOKEN_PATH": str(tmp_path / "no-token"),
            "HF_HUB_DISABLE_XET": True,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
        disable_progress_bars()
        yield server
        enable_progress_bars()


def held(server, repo=REPO):
    """The files of a repository's newest commit."""
    return server.repositories[repo].files("main")[1]


def drawn(model):
    return sample(model, 3, "ddpm", 4, seed=5, label=torch.tensor([0, 1, 2]))


def test_what_is_loaded_draws_the_same_samples_bitwise(hub, run):
    told = call_json("push", run, REPO)
    assert told["commit"].startswith(hub.address) and told["repo"] == REPO
    ours, theirs = load(run), load(RUN)
    assert torch.equal(drawn(ours), drawn(theirs))
    x = torch.rand(4, 1, 8, 8) * 2 - 1
    assert torch.equal(ours.log_prob_classes(x), theirs.log_prob_classes(x))
    assert os.listdir() == []  # the library leaves nothing in the working folder


def test_another_process_that_is_told_the_address_alone(hub, run, tmp_path):
    call_json("push", run, REPO)
    environment = {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(tmp_path / "home"),
        "PATH": os.environ["PATH"],
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "CDM_FAST_CACHE": "off",
    }
    words = ["-m", "cdm_fast", "sample", RUN, "--num", "3", "--steps", "4", "--out", "a.npz", "--json"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_images"] == 3 and Path("a.npz").is_file()


def test_no_optimizer_state_unless_asked(hub, run):
    call_json("push", run, REPO)
    assert {Path(name).name for name in held(hub) if name.endswith(".safetensors")} == {"ema.safetensors"}
    with warnings.catch_warnings(), pytest.raises(UserError, match=r"without model\.safetensors"):
        warnings.simplefilter("error")  # nothing is called damaged
        load(RUN, weights="raw")
    call_json("push", run, REPO, "--optimizer")
    names = {Path(name).name for name in held(hub) if name.endswith(".safetensors")}
    assert names == {"ema.safetensors", "model.safetensors", "optimizer.safetensors"}
    state = load(RUN, weights="raw").state_dict()
    assert all(
        torch.equal(value, state[name]) for name, value in load(run, weights="raw").state_dict().items()
    )


def test_parts_that_were_not_fetched_are_not_called_damaged(hub, run):
    call_json("push", run, REPO, "--optimizer")
    call_json("sample", RUN, "--num", "1", "--steps", "4", "--out", "a.npz")  # fetches the averaged weights
    status, _, error = call("push", RUN, "me/again", "--optimizer")
    assert status == 2 and "without model.safetensors" in error and "damaged" not in error


def test_constants_that_were_undone_are_not_left_on_the_hub(hub, run, tmp_path):
    fitted, data = shutil.copytree(run, tmp_path / "fitted"), ["--data", run.parent / "images.npz"]
    call_json("calibrate", fitted, "--method", "constants", "--rows", "400", *data, "--device", "cpu")
    call_json("push", fitted, REPO)
    assert "constants.json" in held(hub)
    call_json("calibrate", fitted, "--method", "constants", "--undo", "--device", "cpu")
    call_json("push", fitted, REPO)
    assert "constants.json" not in held(hub) and "config.json" in held(hub)


def test_scores_without_a_number_are_left_out_of_the_card(run, tmp_path):
    kept = shutil.copytree(run, tmp_path / "kept")
    for name in ("nll.json", "classes.json"):
        (kept / name).write_text('{"bits_per_dim": null, "accuracy": null, "ece": null}')
    (kept / "list.json").write_text("[1, 2]")
    call_json("push", kept, REPO, "--dry-run", tmp_path / "card")
    assert "| bits/dim" not in (tmp_path / "card" / "README.md").read_text()
    assert json.loads((tmp_path / "card" / "list.json").read_text()) == [1, 2]


def test_relative_paths_are_cut_to_their_last_part(run):
    config = read_config(run)
    names = ("../private/x", "x"), ("hf:owner/name", "hf:owner/name"), ("digits", "digits")
    for source, published in names:
        given = replace(config, data=replace(config.data, source=source, given=source))
        assert published_config(given).data.source == published


def test_a_run_that_is_pushed_again_has_one_checkpoint(hub, run, tmp_path):
    old, name = call_json("push", run, REPO), "checkpoints/step-00000006/ema.safetensors"
    assert name in held(hub)
    again = shutil.copytree(run, tmp_path / "longer")
    config = read_config(again)
    call_json("train", "--resume", again, "--steps", config.train.steps + 2, "--device", "cpu")
    call_json("push", again, REPO)
    assert {path for path in held(hub) if path.endswith("ema.safetensors")} == {
        "checkpoints/step-00000008/ema.safetensors"
    }
    commit = old["commit"].rpartition("/")[2]
    assert torch.equal(drawn(load(f"{RUN}@{commit}")), drawn(load(run)))
    assert not torch.equal(drawn(load(RUN)), drawn(load(run)))


def test_the_card_tells_what_the_run_keeps_and_its_links_lead_to_files(hub, run):
    call_json("push", run, REPO)
    text, files = held(hub)["README.md"].decode(), held(hub)
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert {"samples.png", "nll.json", "classes.json", "config.json"} <= set(links)
    assert [link for link in links if link not in files] == []
    card, nll = ModelCard(text), json.loads((run / "nll.json").read_text())
    assert card.data.library_name == "cdm_fast"
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values["bits_per_dim"] == pytest.approx(nll["bits_per_dim"])
    assert f"{nll['bits_per_dim']:.4f} ± {nll['bits_per_dim_stderr']:.4f}" in text and "unaudited" in text
    assert f"{nll['num_images']} test images" in text and f'load("{RUN}")' in text
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names = {}
    exec(code.replace("steps=50", "steps=4"), names)
    assert names["images"].shape == (16, 1, 8, 8) and names["posterior"].shape == (4, 3)


def edit(server, change):
    """Somebody edits the card on the hub."""
    files = dict(held(server))
    files["README.md"] = change(files["README.md"].decode()).encode()
    server.repositories[REPO].commit(files)


def test_a_licence_that_was_added_to_the_card_is_kept(hub, run):
    call_json("push", run, REPO)
    own = held(hub)["README.md"].decode()
    edit(hub, lambda text: text.replace("---\n", "---\nlicense: mit\n", 1).replace("\n", "\r\n"))
    call_json("push", run, REPO)
    card = ModelCard(held(hub)["README.md"].decode())
    assert card.data.license == "mit" and card.content.count("license:") == 1
    assert card.text == ModelCard(own).text
    edit(hub, lambda text: "---\nlicense: mit\n---\n")  # as the hub's page for a new repository writes it
    call_json("push", run, REPO)
    assert ModelCard(held(hub)["README.md"].decode()).data.license == "mit"


def test_an_edited_card_is_neither_lost_nor_left_in_silence(hub, run):
    call_json("push", run, REPO)
    own = held(hub)["README.md"].decode()
    edit(hub, lambda text: text.replace("## Limits", "## Our notes\n\nSeeds matter.\n\n## Limits"))
    before = dict(held(hub))
    refused(["push", run, REPO], "README.md was edited", "--edited-card keep or --edited-card replace")
    assert held(hub) == before
    kept = call_json("push", run, REPO, "--edited-card", "keep")
    assert b"Seeds matter." in held(hub)["README.md"] and "README.md" not in kept["files"]
    call_json("push", run, REPO, "--edited-card", "replace")
    assert held(hub)["README.md"].decode() == own
    edit(hub, lambda text: text.replace("---\n", "---\nlicense: [mit\n", 1))
    refused(["push", run, REPO], "README.md was edited")


def test_nothing_that_is_published_tells_a_path_of_this_machine(hub, run):
    call_json("push", run, REPO)
    told = [name for name, data in held(hub).items() if str(run.parent).encode() in data]
    assert told == []
    assert parse_json(held(hub)["config.json"])["data"]["source"] == "images.npz"


def test_a_run_of_the_hub_stands_for_a_run_on_the_command_line(hub, run):
    call_json("push", run, REPO)
    data = ["--data", run.parent / "images.npz", "--device", "cpu"]
    found = call_json("nll", RUN, *data, "--draws", "2")
    own = call_json("nll", run, *data, "--draws", "2")
    assert found["bits_per_dim"] == own["bits_per_dim"]
    (folder,) = Path("runs").iterdir()
    assert folder.name.startswith("hf-me-tiny-")
    assert call_json("classify", RUN, *data)["accuracy"] == call_json("classify", run, *data)["accuracy"]
    call_json("calibrate", RUN, "--method", "constants", "--rows", "400", *data)
    assert (folder / "constants.json").is_file()
    assert call_json("nll", RUN, *data, "--draws", "2")["bits_per_dim"] != own["bits_per_dim"]  # kept
    tuned = ["train", "--finetune", RUN, "--out", "tuned", "--steps", "1", "--device", "cpu"]
    call_json(*tuned, "--data", run.parent / "images.npz")
    assert read_config("tuned").train.finetune == str(folder)


def test_what_was_fetched_once_serves_without_a_network(hub, run, monkeypatch):
    call_json("push", run, REPO)
    expected = drawn(load(RUN))
    before = len(hub.requests)
    set_address(monkeypatch, "http://127.0.0.1:9")
    assert torch.equal(drawn(load(RUN)), expected) and len(hub.requests) == before


def test_a_run_of_fsdp_is_pushed_and_loaded_by_one_process(hub, run, tmp_path, monkeypatch):
    config = replace(read_config(run), output=replace(read_config(run).output, num_samples=3))
    monkeypatch.setattr("cdm_fast.training.finish.write_final", lambda *_: {})
    workers.start(2, workers.joint_run, tmp_path, config, tmp_path / "sharded", "fsdp", 3)
    call_json("push", tmp_path / "sharded", "me/sharded")
    ours, theirs = load(tmp_path / "sharded"), load("hf:me/sharded")
    assert torch.equal(drawn(ours), drawn(theirs))
    step = load_checkpoint(tmp_path / "sharded", parts=()).step
    assert f"| steps | {step} of 6" in held(hub, "me/sharded")["README.md"].decode()


def test_dry_run_writes_what_would_be_published(hub, run, tmp_path):
    told = call_json("push", run, REPO, "--dry-run", tmp_path / "dry")
    assert hub.requests == [] and told["folder"] == str(tmp_path / "dry")
    files = {
        path.relative_to(tmp_path / "dry").as_posix()
        for path in (tmp_path / "dry").rglob("*")
        if path.is_file()
    }
    assert files == set(told["files"])
    assert torch.equal(drawn(load(tmp_path / "dry")), drawn(load(run)))
    call_json("push", run, REPO)
    assert files == set(held(hub))


def test_private_is_what_the_hub_is_told(hub, run):
    call_json("push", run, REPO, "--private")
    assert hub.repositories[REPO].private


def refused(words, *told):
    """The command fails with one line that holds all of `told`."""
    status, out, error = call(*words)
    assert status == 2 and out == "" and error.strip().count("\n") == 0, error
    for each in told:
        assert each in error


LOADING = {
    "missing": ("hf:me/nothing", "no repository that can be seen"),
    "revision": (f"{RUN}@v9", "has no revision v9"),
    "no name": ("hf:", "names no model"),
    "no revision": (f"{RUN}@", "names no model"),
    "bad name": ("hf:a/b/c", "no name of a repository"),
}


@pytest.mark.parametrize("case", LOADING)
def test_what_cannot_be_fetched_is_told_in_one_line(hub, run, case):
    call_json("push", run, REPO)
    source, told = LOADING[case]
    refused(["sample", source], told)
    with pytest.raises(UserError, match=re.escape(told)) as caught:
        load(source)
    assert "\n" not in str(caught.value)


def test_a_private_run_without_a_token(hub, run, monkeypatch):
    call_json("push", run, REPO, "--private")
    monkeypatch.delenv("HF_TOKEN")
    refused(["sample", RUN], "no repository that can be seen", "HF_TOKEN")


def test_without_a_network(hub, run, monkeypatch):
    set_address(monkeypatch, "http://127.0.0.1:9")
    refused(["sample", RUN], f"{RUN}: cannot be fetched", "check the name and the network")
    refused(["push", run, REPO], f"{RUN}: cannot be pushed to", "check the name and the network")


def test_a_repository_that_holds_no_run(hub):
    from tests.hub_server import Repository

    hub.repositories["me/other"] = Repository()
    hub.repositories["me/other"].commit({"config.json": b'{"model_type": "bert"}', "model.bin": b"pickle"})
    with pytest.raises(UserError, match="holds no run of cdm_fast"):
        load("hf:me/other")
    refused(["restore", "hf:me/other", "a.png", "--task", "denoise"], "holds no run of cdm_fast")
    assert fetch_run("hf:me/other") is None
    assert not [line for line in hub.requests if "model.bin" in line]  # no pickle is even fetched


def test_damaged_weights_are_refused(hub, run):
    call_json("push", run, REPO)
    files = dict(held(hub))
    (name,) = (name for name in files if name.endswith("ema.safetensors"))
    files[name] = files[name][:-1] + bytes([files[name][-1] ^ 1])
    hub.repositories[REPO].commit(files)
    with pytest.warns(UserWarning, match="checksum"), pytest.raises(UserError, match="no intact checkpoint"):
        load(RUN)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["RUN", "tiny"], "names no repository; give OWNER/NAME"),
        (["RUN", "me/ti ny"], "names no repository"),
        (["nowhere", REPO], "no run directory nowhere"),
        (["RUN", REPO, "--dry-run", "RUN"], "exists already"),
        (["RUN", f"{OTHER}/tiny"], "closed to this token"),
    ],
    ids=["no owner", "space", "no run", "dry run into a run", "of others"],
)
def test_what_cannot_be_pushed(hub, run, words, told):
    refused(["push", *(str(run) if word == "RUN" else word for word in words)], told)


def test_pushing_without_a_token(hub, run, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    refused(["push", run, REPO], "needs a token", "HF_TOKEN")


def test_a_run_of_the_hub_is_not_resumed(hub):
    refused(["train", "--resume", RUN], f"--finetune {RUN}")


def test_a_damaged_report_is_named_and_nothing_is_pushed(hub, run, tmp_path):
    damaged = shutil.copytree(run, tmp_path / "damaged")
    (damaged / "nll.json").write_text("{")
    refused(["push", damaged, REPO], "nll.json: cannot be read")
    assert hub.requests == []


def test_the_package_is_named_where_it_is_missing(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(["push", run, REPO], "pip install")
    refused(["sample", RUN], "pip install 'cdm_fast[hub]'")
