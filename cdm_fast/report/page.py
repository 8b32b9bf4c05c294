"""The page itself: a template, a style sheet and the blocks of the runs, as one HTML file."""

from collections.abc import Sequence
from importlib.resources import files
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
    template = environment.from_string((FILES / "page.html").read_text(encoding="utf-8"))
    names = list(dict.fromkeys(name for page in pages for name in page.figures))
    return template.render(
        pages=pages,
        names=names,
        sections=[(key, title, _rows(pages, key)) for key, title in SECTIONS.items()],
        style=(FILES / "page.css").read_text(encoding="utf-8"),
        playground=playground,
        script=(FILES / "playground.js").read_text(encoding="utf-8"),
    )


def _rows(pages: Sequence[RunPage], key: str) -> list[list[tuple[str, Block | None]]]:
    """The blocks of a section, each with its run: those of one title in a row, None where a run has none."""
    if len(pages) == 1:
        return [[(page.name, block) for block in page.sections[key]] for page in pages]
    columns = [_by_title(page.sections[key]) for page in pages]
    titles = dict.fromkeys(title for column in columns for title in column)
    return [
        [(page.name, column.get(title)) for page, column in zip(pages, columns, strict=True)]
        for title in titles
    ]


def _by_title(blocks: Sequence[Block]) -> dict[tuple[str, int], Block]:
    """Blocks by title, and by number among those of the same title."""
    found: dict[tuple[str, int], Block] = {}
    for block in blocks:
        number = sum(title == block.title for title, _ in found)
        found[block.title, number] = block
    return found
