"""Doctests: pytest collects them from the whole package, whichever optional packages are missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COLLECT = """
import sys
sys.modules |= dict.fromkeys(sys.argv[1].split(), None)  # they import as if they were not installed
import pytest
sys.exit(pytest.main(["cdm_fast", "--collect-only", "-p", "no:cacheprovider"]))
"""


@pytest.mark.parametrize("missing", ["tyro rich PIL matplotlib sklearn scipy", "triton foolbox torchdiffeq"])
def test_the_package_is_collected_without_optional_packages(missing):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-c", COLLECT, missing], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode == 0, done.stdout
    assert "cdm_fast/model/schedule.py::cdm_fast.model.schedule.NoiseSchedule" in done.stdout
