"""Sphinx configuration: `make docs` builds the site from this folder into build/docs.

Two groups of pages are written at build time into `_generated/`: the tutorials, from the scripts in
`tutorials/`, and the options of each command, from its own `--help`.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import jupytext
from sphinx.application import Sphinx

from cdm_fast.cli.arguments import Command

DOCS = Path(__file__).parent
COMMANDS = [command.__name__.lower() for command in get_args(Command)]

project = "cdm_fast"
author = "the cdm_fast authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "cdm_fast"
exclude_patterns = ["tutorials"]
myst_heading_anchors = 3
default_role = "code"  # docstrings put single backticks around code
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False


def write_tutorials(folder: Path) -> None:
    """A Markdown page of each tutorial script."""
    for script in sorted((DOCS / "tutorials").glob("*.py")):
        text = jupytext.writes(jupytext.read(script, fmt="py:percent"), fmt="md")
        text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)  # jupytext's metadata
        (folder / f"{script.stem}.md").write_text(text.lstrip())


def write_commands(page: Path) -> None:
    """One page with the options of every command, as `--help` prints them."""
    text = [
        "# Command line",
        "",
        "With `--json`, standard output is exactly one JSON object.",
        "`~` at the beginning of a path is the home folder.",
        "",
        "Exit status: 0; 2 for an error that the user can correct, with one line on standard error;",
        "130 after Ctrl-C (`train` and `sample` save what they have, and exit with 0);",
        "141 if the reader of standard output has gone.",
        "",
    ]
    for command in COMMANDS:
        printed = subprocess.run(
            [sys.executable, "-m", "cdm_fast.cli", command, "--help"],
            capture_output=True,
            text=True,
            check=True,
            env={"COLUMNS": "110", "NO_COLOR": "1", "PATH": "", "PYTHONIOENCODING": "utf-8"},
        ).stdout
        text += [f"## cdm-fast {command}", "", "```text", printed.strip(), "```", ""]
    page.write_text("\n".join(text))


def skip_metadata_requests(
    app: Sphinx, what: str, name: str, member: object, skip: bool, options: object
) -> bool | None:
    """Leaves out scikit-learn's generated `set_fit_request` and the like, which link into its own site."""
    return True if re.fullmatch(r"set_\w+_request", name) else None


def setup(app: Sphinx) -> None:
    """Writes the generated pages before Sphinx looks for sources."""
    app.connect("autodoc-skip-member", skip_metadata_requests)
    folder = DOCS / "_generated"
    folder.mkdir(exist_ok=True)
    write_tutorials(folder)
    write_commands(folder / "command_line.md")
