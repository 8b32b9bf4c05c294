"""The page itself: a template, a style sheet and the blocks of the runs, as one HTML file."""

from collections.abc import Sequence
from importlib.resources import files
from itertools import zip_longest
from typing import Any

from cdm_fast.host.optional import need
from cdm_fast.report.blocks import Block, RunPage
from cdm_fast.report.gather import SECTIONS

FILES = files("cdm_fast.report")


def render(pages: Sequence[RunPage], playground: dict[str, Any] | None = None) -> str:
    """The HTML of the runs side by side.

    playground: of `playground.content`, what the part that runs in the browser needs.
    """
    jinja2 = need("jinja2", "the report page")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((FILES / "page.html").read_text())
    names = list(dict.fromkeys(name for page in pages for name in page.figures))
    return template.render(
        pages=pages,
        names=names,
        sections=[(key, title, _rows(pages, key)) for key, title in SECTIONS.items()],
        style=(FILES / "page.css").read_text(),
        playground=playground,
        script=(FILES / "playground.js").read_text(),
    )


def _rows(pages: Sequence[RunPage], key: str) -> list[list[tuple[str, Block]]]:
    """The blocks of a section, each with its run: those that belong together in a row."""
    columns = [[(page.name, block) for block in page.sections[key]] for page in pages]
    if len(pages) == 1:
        return columns
    return [[pair for pair in row if pair is not None] for row in zip_longest(*columns)]
