"""The library imports with torch, numpy and safetensors alone; features name the package that they need."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cdm_fast.host.optional import need

ROOT = Path(__file__).parents[1]
OPTIONAL = ("tyro", "rich", "PIL", "matplotlib", "sklearn", "scipy")
COMMAND_LINE = ("cdm_fast.cli.entry", "cdm_fast.cli.help")
# The estimators derive from scikit-learn's classes; samples are judged by its forest.
STUDIES = (
    "density_tables",
    "held_out_density",
    "information_tasks",
    "outlier_tables",
    "sample_quality",
    "table_sets",
    "two_sample_tests",
)
USE_TABLES = {f"benchmarks.studies.{name}" for name in STUDIES}
TABLE_NAMES = ["CDMDensity", "DensityRatio", "MutualInformation", "log_density_ratio"]

# feature -> (code that uses it, package that it names)
FEATURES = {
    "CDMDensity": ("cdm_fast.CDMDensity", "scikit-learn"),
    "MutualInformation": ("cdm_fast.MutualInformation", "scikit-learn"),
    "log_density_ratio": ("cdm_fast.log_density_ratio", "scikit-learn"),
    "digits": ("cdm_fast.data.load_data('digits', 'train')", "scikit-learn"),
    "auroc": ("cdm_fast.statistics.auroc(torch.ones(2), torch.ones(2))", "scikit-learn"),
    "decode": ("cdm_fast.data.pictures.decode(b'', 'x')", "pillow"),
    "write_grid": ("cdm_fast.data.pictures.write_grid(torch.zeros(1, 1, 2, 2), 'unwritten.png')", "pillow"),
    "jpeg": (
        "cdm_fast.data.corruptions.corrupt(torch.zeros(1, 1, 8, 8).byte(), 'jpeg_compression', 1)",
        "pillow",
    ),
    "plots": (
        "cdm_fast.plots.training.write_losses([{'step': 1, 'loss': 1.0}], 'unwritten.png')",
        "matplotlib",
    ),
}

# Refuses the optional packages as if they were not installed, and tells what then works and what does not.
SCRIPT = """
import contextlib, importlib, io, json, sys

optional, modules, features = json.loads(sys.argv[1])

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in optional:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
failures, messages, lines = {}, {}, io.StringIO()
for name in modules:
    try:
        importlib.import_module(name)
    except (ImportError, ValueError) as error:
        failures[name] = str(error)

import cdm_fast, torch
from cdm_fast.training.display import Display
for name, code in features.items():
    try:
        eval(code)
    except cdm_fast.UserError as error:
        messages[name] = str(error)
with contextlib.redirect_stderr(lines), Display(0, 10) as display:
    display.advance(1)
    assert not display.due()
    display.line(1, {"loss": 0.5})
absent = []
for name in cdm_fast.__all__:
    with contextlib.suppress(cdm_fast.UserError):
        if getattr(cdm_fast, name, None) is not None:
            continue
    absent.append(name)
print(json.dumps([failures, messages, lines.getvalue(), absent]))
"""


def module_names(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.fixture(scope="module")
def without_them():
    """(modules that do not import, messages of features, progress lines, public names that are missing)."""
    modules = [*module_names("cdm_fast"), *module_names("benchmarks")]
    wanted = json.dumps([OPTIONAL, modules, {name: code for name, (code, _) in FEATURES.items()}])
    command = [sys.executable, "-c", SCRIPT, wanted]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_every_module_imports_but_the_command_line_and_tables(without_them):
    failures = without_them[0]
    assert all("tyro" in failures.pop(name) for name in COMMAND_LINE)
    for name, message in failures.items():
        assert "needs scikit-learn" in message or name in USE_TABLES, name
    assert all(name.startswith("cdm_fast.tables") or name in USE_TABLES for name in failures)


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_names_the_package_that_it_needs(without_them, feature):
    package = FEATURES[feature][1]
    message = without_them[1][feature]
    assert message.endswith(f"needs {package}: pip install {package}")
    assert "\n" not in message


def test_training_shows_plain_lines_without_rich(without_them):
    assert without_them[2] == "step 1/10  loss 0.5000\n"


def test_every_public_name_but_the_estimators_is_there(without_them):
    assert without_them[3] == TABLE_NAMES


def test_need_returns_the_module_or_names_the_package():
    assert need("json", "reading").loads("1") == 1
    with pytest.raises(ValueError, match="^reading needs no_such_package: pip install no_such_package$"):
        need("no_such_package.part", "reading")
