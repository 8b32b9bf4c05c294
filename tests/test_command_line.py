"""The command line in pipes, other locales and odd situations."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from cdm_fast.cli import arguments, main
from cdm_fast.cli.entry import parse
from cdm_fast.data import load_data
from cdm_fast.data.pictures import encode_png
from cdm_fast.errors import UserError
from cdm_fast.host.device import pick_device
from cdm_fast.host.progress import ProgressBar
from cdm_fast.runs.load import load
from cdm_fast.sampling import sample
from tests.test_bad_input import refused
from tests.test_cli import COMMANDS, call_json
from tests.tiny_run import FLAGS, write_images

PROGRAM = [sys.executable, "-m", "cdm_fast"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory of a run that has taken its 6 steps."""
    folder = tmp_path_factory.mktemp("command_line")
    data = write_images(folder / "images.npz")
    call_json("train", "--data", data, "--out", folder / "run", *FLAGS, "--device", "cpu")
    return folder / "run"


# Resuming with fewer steps


@pytest.mark.parametrize("steps", ["1", "5"])
def test_a_run_does_not_resume_with_fewer_steps_than_it_has_taken(trained, steps):
    refused(
        trained, ["train", "--resume", trained, "--steps", steps], f"--steps is {steps}", "taken 6", "give 6"
    )


def test_a_finished_run_resumes_with_its_own_number_of_steps(trained):
    assert call_json("train", "--resume", trained, "--steps", "6")["stopped"] == "finished"


# Output that goes away


@contextlib.contextmanager
def closed_pipe():
    """A stream into a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        yield stream


@contextlib.contextmanager
def full_disk():
    with open("/dev/full", "w") as stream:
        yield stream


COMMAND_LINES = {
    "help": ["--help"],
    "long help": ["train", "--help"],
    "result": ["doctor"],
    "json": ["doctor", "--json"],
    "error as json": ["nll", "nowhere", "--json"],
}


@pytest.mark.parametrize("arguments", COMMAND_LINES.values(), ids=COMMAND_LINES)
def test_a_closed_pipe_ends_quietly(arguments):
    errors = io.StringIO()
    with closed_pipe() as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        status = main(arguments)
    if "nowhere" in arguments:
        assert status == 2 and errors.getvalue().count("\n") == 1
    else:
        assert status == 141 and errors.getvalue() == ""


@pytest.mark.parametrize("arguments", COMMAND_LINES.values(), ids=COMMAND_LINES)
def test_a_full_disk_is_one_line(arguments):
    errors = io.StringIO()
    with full_disk() as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        status = main(arguments)
    assert status == 2 and errors.getvalue().count("\n") == 1
    assert ("no run directory" if "nowhere" in arguments else "No space left") in errors.getvalue()


@pytest.mark.parametrize("stream", [closed_pipe, full_disk])
def test_progress_that_nobody_reads_does_not_stop_a_command(trained, tmp_path, stream):
    out = io.StringIO()
    with stream() as errors, contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        status = main(["nll", str(trained), "--method", "elbo", "--elbo-images", "2", "--json"])
        assert main(["nll", str(tmp_path / "nowhere")]) == 2
    assert status == 0 and np.isfinite(json.loads(out.getvalue())["elbo_bits_per_dim"])


@pytest.mark.parametrize(
    ("redirection", "status"),
    [("| true", 141), ("> /dev/full", 2), (">&-", 0), ("2>&- | true", 141), ("2> /dev/full >&2", 2)],
)
def test_a_process_ends_without_a_traceback(redirection, status):
    line = f'"{sys.executable}" -m cdm_fast train --help {redirection}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
    assert done.returncode == status
    assert done.stderr.count("\n") == (redirection == "> /dev/full") and "Traceback" not in done.stderr


# Paths


@pytest.mark.parametrize(
    "line",
    [
        "sample ~/run --out ~/a.png",
        "nll ~/run --out ~/a.csv",
        "calibrate ~/run",
        "classify ~/run --attack-from ~/b --out ~/a.csv",
        "score ~/run --out ~/a.csv",
        "denoise ~/run ~/a.png ~/b.png --out ~/c",
        "restore ~/run ~/a.png --task inpaint --mask ~/m.png --out=~/b.png",
        "plot ~/run",
        "replay ~/run --step 1 --out ~/a.npz",
        "convert ~/a.pt --out ~/run",
        "train --out ~/run",
        "train --out=~/run",
    ],
)
def test_a_tilde_is_the_home_in_every_path(line, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert "~" not in repr(parse(line.split())) and "/home/someone/" in repr(parse(line.split()))


def test_a_tilde_is_the_home_in_what_is_resumed_finetuned_and_loaded(trained, monkeypatch):
    monkeypatch.setenv("HOME", str(trained.parent))
    assert parse(["train", "--resume", "~/run"]).resume == trained
    assert parse(["train", "--resume=~/run"]).config.train.steps == 6
    assert parse(["train", "--finetune", "~/run"]).config.train.finetune == str(trained)
    assert load("~/run").input_shape == (1, 8, 8)


def test_the_home_of_nobody_is_refused(tmp_path):
    refused(tmp_path, ["sample", "~nobody-of-this-name/run"], "~nobody-of-this-name")
    refused(tmp_path, ["train", "--data", "~nobody-of-this-name/x"], "~nobody-of-this-name")


# Names that name nothing


@pytest.mark.parametrize("source", ["", "hf:"], ids=["empty", "hub"])
@pytest.mark.parametrize("command", ["train", "nll", "calibrate", "classify", "score", "against"])
def test_data_without_a_name_are_refused(trained, tmp_path, source, command):
    lines = {
        "train": ["train", "--out", tmp_path / "new", "--data", source],
        "against": ["score", trained, "--against", source],
    }
    refused(
        tmp_path,
        lines.get(command, [command, trained, "--data", source]),
        "give digits, a path or hf:OWNER/NAME",
    )


@pytest.mark.parametrize("run", ["hf:", "diffusers:"])
def test_a_model_without_a_name_is_refused(tmp_path, run):
    refused(tmp_path, ["sample", run], run, "names no model")


# The run's own data


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """A folder of pictures, a run trained on it, and other pictures under the same relative name."""
    for folder, seed in (("pics", 0), ("other/pics", 1)):
        generator = np.random.default_rng(seed)
        (tmp_path / folder).mkdir(parents=True)
        for i in range(40):
            pixels = generator.integers(0, 256, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{i:02d}.png")
    monkeypatch.chdir(tmp_path)
    call_json("train", "--data", "pics", "--out", "run", *FLAGS, "--device", "cpu")
    return tmp_path


OWN_DATA = [["nll"], ["calibrate"], ["score"], ["plot"]]


@pytest.mark.parametrize("command", OWN_DATA, ids=" ".join)
def test_a_run_is_not_scored_on_other_pictures_under_the_name_of_its_own(pictures, command):
    (pictures / "pics").rename(pictures / "gone")
    (pictures / "other" / "pics").rename(pictures / "pics")
    refused(pictures, [*command, "run"], "pics has changed since run was trained")


def test_a_run_finds_its_own_pictures_from_another_folder(pictures, monkeypatch):
    here = call_json("nll", "run", "--draws", "1")
    monkeypatch.chdir(pictures / "other")  # where another folder has the name that was given in training
    there = call_json("nll", "../run", "--draws", "1")
    assert there["bits_per_dim"] == here["bits_per_dim"]


def test_a_run_is_not_scored_on_data_that_grew(pictures):
    Image.new("L", (8, 8)).save(pictures / "pics" / "more.png")
    refused(pictures, ["nll", "run"], "pics has changed")
    assert call_json("nll", "run", "--data", "pics", "--draws", "1")["num_images"] > 0


# Locales and devices


@pytest.mark.parametrize(
    "command", [["nll"], ["nll", "run", "--bogus"], ["sample", "run", "--num", "x"], ["x"]]
)
def test_an_error_is_one_clean_line_in_an_ascii_locale(command):
    ascii_ = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [*PROGRAM, *command], capture_output=True, text=True, timeout=60, env={**os.environ, **ascii_}
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("cdm-fast: error: ") and "--- " not in done.stderr


def test_a_result_that_ascii_lacks_is_escaped(monkeypatch):
    buffer = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(buffer, encoding="ascii"))
    monkeypatch.setattr("cdm_fast.cli.tools.doctor.render", lambda found: "Modell für Bilder")
    assert main(["doctor"]) == 0
    assert buffer.getvalue() == b"Modell f\\xfcr Bilder\n"


@pytest.mark.parametrize("name", ["mps", "vulkan", "hpu", "meta", "no-such-device", ""])
def test_a_device_that_is_not_there_is_a_short_line(name):
    with pytest.raises(UserError) as refusal:
        pick_device(name)
    assert "--device" in str(refusal.value) and "give cpu" in str(refusal.value)
    assert len(str(refusal.value)) < 250 and "\n" not in str(refusal.value)


# Ctrl-C


@pytest.mark.parametrize("seconds", [0.1, 0.3, 1.0])
def test_ctrl_c_during_the_imports_shows_no_traceback(trained, seconds):
    """From the moment on at which the program has taken over."""
    script = "import sys, cdm_fast.cli.interrupt; print(flush=True); from cdm_fast.cli import main; main()"
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # shells ignore it
    command = [sys.executable, "-c", listen + script, "nll", trained, "--method", "audit"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.read(1)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 130) and "Traceback" not in errors


# Many samples


@pytest.fixture
def flat(tmp_path, trained):
    """Flags that draw 10 images in batches of 4."""
    return ["sample", trained, "--num", "10", "--batch-size", "4", "--steps", "2", "--seed", "3"]


def test_batches_and_outputs_hold_the_same_images(flat, tmp_path):
    call_json(*flat, "--out", tmp_path / "batches.npz")
    call_json(*flat, "--batch-size", "100", "--out", tmp_path / "one.npz")
    found = call_json(*flat, "--out", tmp_path / "folder")
    assert (found["num_images"], found["stopped"]) == (10, "finished")
    with np.load(tmp_path / "batches.npz") as batches, np.load(tmp_path / "one.npz") as one:
        assert set(batches) == set(one) == {"images", "num_grey_levels"}
        np.testing.assert_array_equal(batches["images"], one["images"])
        images, grey = batches["images"], int(batches["num_grey_levels"])
    names = sorted((tmp_path / "folder").iterdir())
    assert [path.name for path in names] == [f"{i:06d}.png" for i in range(10)]
    pictures = np.stack([np.asarray(Image.open(path)) for path in names])
    np.testing.assert_allclose(pictures / 255 * (grey - 1), images[..., 0], atol=0.51)
    assert len(load_data(str(tmp_path / "batches.npz"), "train").images) == 7
    assert not [path for path in tmp_path.rglob("*") if "unfinished" in path.name]


def test_moves_of_several_batches_are_those_of_one(flat, tmp_path):
    flags = ["--sampler", "mala", "--moves", "1"]
    several = call_json(*flat, *flags, "--out", tmp_path / "several.npz")
    one = call_json(*flat, *flags, "--batch-size", "100", "--out", tmp_path / "one.npz")
    assert several["step_size"] == one["step_size"]
    np.testing.assert_allclose(several["acceptance"], one["acceptance"], rtol=1e-5)
    with np.load(tmp_path / "several.npz") as a, np.load(tmp_path / "one.npz") as b:
        np.testing.assert_array_equal(a["images"], b["images"])


def test_ctrl_c_keeps_what_was_drawn(flat, tmp_path, monkeypatch):
    for out in ("a.npz", "folder", "sheet.png"):
        calls = []

        def draw(*arguments, calls=calls, **options):
            calls.append(options)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return sample(*arguments, **options)

        monkeypatch.setattr("cdm_fast.cli.sample.sample", draw)
        found = call_json(*flat, "--out", tmp_path / out)
        assert (found["num_images"], found["stopped"]) == (8, "signal")
    with np.load(tmp_path / "a.npz") as arrays:
        assert len(arrays["images"]) == 8
    assert len(list((tmp_path / "folder").iterdir())) == 8 and (tmp_path / "sheet.png").exists()


def test_ctrl_c_while_a_batch_is_written_waits_for_its_end(flat, tmp_path, monkeypatch):
    def encode(image):
        os.kill(os.getpid(), signal.SIGINT)
        return encode_png(image)

    monkeypatch.setattr("cdm_fast.cli.sample_files.encode_png", encode)
    found = call_json(*flat, "--out", tmp_path / "folder")
    names = sorted(path.name for path in (tmp_path / "folder").iterdir())
    assert found["num_images"] == 4 and names == [f"{i:06d}.png" for i in range(4)]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--num", str(10**9)], "more than a sheet holds"),
        (["--num", str(10**15), "--out", "big.npz"], "bytes in"),
        (["--num", str(10**15), "--out", "big"], "files in"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--out", "picture.gif"], ".png or .npz, or that of a folder"),
        (["--out", "taken"], "taken exists already"),
    ],
)
def test_samples_that_cannot_be_written_are_refused_first(trained, tmp_path, monkeypatch, flags, told):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    monkeypatch.chdir(tmp_path)
    refused(tmp_path, ["sample", trained, *flags], told)


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(capsys, monkeypatch):
    monkeypatch.setattr(ProgressBar, "_SECONDS_BETWEEN_LINES", 0.0)
    with ProgressBar("drawing images", 3) as bar:
        for _ in range(3):
            bar.advance(1)
    lines = capsys.readouterr().err
    assert lines == "drawing images: 1 of 3, 0 s left\ndrawing images: 2 of 3, 0 s left\n"
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes this for a terminal
    with ProgressBar("drawing images", 3) as bar:
        bar.advance(3)
    assert "drawing images" in (drawn := capsys.readouterr().err) and "3/3" in drawn and "ETA" in drawn
    with ProgressBar("reading digits", 3, delay=60.0) as bar:
        bar.advance(3)
    assert capsys.readouterr().err == ""


def test_only_rank_0_reports_progress_unless_every_process_may_do_the_work(capsys, monkeypatch):
    monkeypatch.setattr(ProgressBar, "_SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr("cdm_fast.host.progress.is_main", lambda: False)
    for every_process, lines in ((False, 0), (True, 1)):
        with ProgressBar("reading digits", 2, every_process=every_process) as bar:
            bar.advance(1)
        assert capsys.readouterr().err.count("reading digits: 1 of 2") == lines


def test_memory_does_not_grow_with_the_number_of_samples(trained, tmp_path):
    """400,000 images of 64 bytes would show as 25 MB; the network is replaced, for it takes minutes."""
    script = (
        "import resource, sys, torch\n"
        "import cdm_fast.cli.sample as command\n"
        "from cdm_fast.cli import main\n"
        "command.sample = lambda model, num, *_, **__: torch.zeros(num, 1, 8, 8)\n"
        "def peak(num, out):\n"
        "    assert main(['sample', sys.argv[1], '--num', num, '--batch-size', '2000', '--out', out]) == 0\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak('8000', 'few.npz')\n"
        "grown = peak('400000', 'many.npz') - before\n"
        "assert grown < 8000, f'{grown} KiB'\n"
    )
    command = [sys.executable, "-c", script, str(trained.resolve())]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "many.npz") as arrays:
        assert arrays["images"].shape == (400_000, 8, 8, 1)


# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_whole_sentences_without_defaults_that_are_none(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert "(default: None)" not in text
    if command != "train":  # whose settings can be taken back to None
        assert "{None}" not in text


def test_options_that_commands_share_are_written_once():
    """`--json` and `--device` each stand in one class."""
    classes = [value for value in vars(arguments).values() if isinstance(value, type)]
    for name in ("json", "device", "compile", "tolerance", "probes", "particles", "runs", "rungs"):
        owners = [each for each in classes if name in vars(each).get("__annotations__", {})]
        owners = [each for each in owners if (name, each) != ("runs", arguments.Report)]  # no option there
        assert len(owners) == 1, name


def test_the_module_is_the_program():
    done = subprocess.run([*PROGRAM, "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "cdm-fast" in done.stdout
