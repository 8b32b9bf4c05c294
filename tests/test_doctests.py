"""Doctests: pytest collects them from the whole package, whichever optional packages are missing."""

import doctest
import os
import subprocess
import sys
from importlib import import_module
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


# What people call first: each has an example that runs.
FIRST_CALLED = """
    cdm_fast.CDM cdm_fast.DDM cdm_fast.NoiseSchedule
    cdm_fast.UNet cdm_fast.Encoder cdm_fast.Transformer cdm_fast.MLP
    cdm_fast.cdm_loss cdm_fast.ddm_loss cdm_fast.sample cdm_fast.load cdm_fast.use_backend
    cdm_fast.CDMDensity cdm_fast.DensityRatio cdm_fast.MutualInformation cdm_fast.log_density_ratio
    cdm_fast.config.preset cdm_fast.data.load_data cdm_fast.likelihood.evaluate cdm_fast.likelihood.audit
    cdm_fast.likelihood.flow_log_prob
""".split()


@pytest.mark.parametrize("name", FIRST_CALLED)
def test_what_people_call_first_has_an_example(name):
    module, _, attribute = name.rpartition(".")
    documented = getattr(import_module(module), attribute)
    found = doctest.DocTestFinder(recurse=False).find(documented, name, module=False)
    assert any(test.examples for test in found), f"the docstring of {name} has no >>> example"
