"""The installed files, the content of a wheel, and the cost of the first import."""

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import cdm_fast

ROOT = Path(__file__).parents[1]
SOURCES = ("cdm_fast", "kernels", "csrc", "building", "pyproject.toml", "setup.py", "README.md", "LICENSE")
HEAVY = {"torch", "numpy", "matplotlib", "sklearn", "PIL", "scipy", "safetensors"}


def modules_after(code):
    """Top-level modules that a fresh interpreter holds after running `code`."""
    script = f"{code}\nimport json, sys\nprint()\nprint(json.dumps([m for m in sys.modules if '.' not in m]))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(json.loads(run.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def wheel(request, tmp_path_factory):
    """The wheel given with --wheel, or a pure Python one built from a copy of the sources."""
    given = request.config.getoption("--wheel")
    if given is not None:
        return given.resolve()
    copy, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run(
        [*command, "--wheel-dir", out, copy],
        check=True,
        capture_output=True,
        env={**os.environ, "CDM_FAST_NO_EXT": "1", "CDM_FAST_REQUIRE_EXT": "0"},
    )
    return next(out.iterdir())


def test_the_wheel_holds_every_module_and_nothing_else(wheel):
    """Also catches a package that pyproject.toml forgets to list."""
    expected = {
        f"cdm_fast/{path.relative_to(ROOT / 'cdm_fast')}" for path in (ROOT / "cdm_fast").rglob("*.py")
    }
    expected |= {f"cdm_fast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    expected |= {"cdm_fast/py.typed", "cdm_fast/ops/attention_methods.json"}
    expected |= {f"cdm_fast/report/{name}" for name in ("page.html", "page.css", "playground.js")}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        record = json.loads(archive.read("cdm_fast/_build.json")) if "none-any" not in wheel.name else None
    binaries = {name for name in names if re.fullmatch(r"cdm_fast/_C\.[\w.-]+\.(so|pyd)", name)}
    expected |= {"cdm_fast/_build.json"} if record else set()
    expected |= {"cdm_fast/_build.log"} if record and record["log"] else set()
    assert names - binaries == expected
    assert len(binaries) == (1 if record and record["built"] else 0)


def test_the_wheel_has_licence_entry_point_and_dependencies(wheel):
    with zipfile.ZipFile(wheel) as archive:
        info = f"cdm_fast-{cdm_fast.__version__}.dist-info"
        assert archive.read(f"{info}/licenses/LICENSE").startswith(b"MIT License")
        entry_points = configparser.ConfigParser()
        entry_points.read_string(archive.read(f"{info}/entry_points.txt").decode())
        metadata = archive.read(f"{info}/METADATA").decode()
    assert dict(entry_points["console_scripts"]) == {"cdm-fast": "cdm_fast.cli:main"}
    required = [line for line in metadata.splitlines() if re.match(r"Requires-Dist: torch\b", line)]
    assert required == ["Requires-Dist: torch>=2.10"]
    assert "torchvision" not in metadata


def test_importing_the_package_imports_nothing_heavy():
    assert not modules_after("import cdm_fast") & HEAVY


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]], ids=" ".join)
def test_help_imports_nothing_heavy(arguments):
    code = (
        f"import sys\nsys.argv = {['cdm-fast', *arguments]!r}\n"
        "from cdm_fast.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code"
    )
    assert not modules_after(code) & HEAVY


def test_every_public_name_is_there():
    assert cdm_fast.__all__ == sorted(cdm_fast.__all__)
    for name in cdm_fast.__all__:
        assert getattr(cdm_fast, name) is not None
    assert set(cdm_fast.__all__) <= set(dir(cdm_fast))


def test_the_example_of_the_readme_runs(capsys):
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(compile(example[1], "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() == "torch.Size([16])"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = cdm_fast.nonsense


def test_the_version_is_the_installed_one():
    assert cdm_fast.__version__ == version("cdm_fast")


def test_nothing_imports_torchvision_or_a_top_level_kernels():
    for path in [*(ROOT / "cdm_fast").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        wrong = re.findall(r"^\s*(?:from|import) (?:torchvision|kernels)\b.*", path.read_text(), re.MULTILINE)
        assert not wrong, f"{path}: {wrong}"


def test_only_the_backend_file_asks_for_devices_or_kernels():
    allowed = {ROOT / "cdm_fast" / "ops" / "backend.py"}
    for path in set((ROOT / "cdm_fast").rglob("*.py")) - allowed:
        assert not re.search(r"\.is_cuda\b|\bHAS_[A-Z]+", path.read_text()), (
            f"{path} asks what only backend.py may"
        )
