"""Leaves out of the collection of doctests what needs a package that is not installed."""

from importlib.util import find_spec

NEEDS = {
    "cdm_fast/cli/entry.py": "tyro",
    "cdm_fast/cli/help.py": "tyro",
    "cdm_fast/tables": "sklearn",
    "benchmarks/studies/density_tables.py": "sklearn",
    "benchmarks/studies/information_tasks.py": "sklearn",
}

collect_ignore = [path for path, package in NEEDS.items() if find_spec(package) is None]
