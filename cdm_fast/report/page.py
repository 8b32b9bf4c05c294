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

    playground: the result of `playground.content`; None for a page without the network.
    Raises UserError without jinja2.
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
    """Rows of (run, block) of a section. With several runs a row holds their blocks of one title, or None."""
    if len(pages) == 1:
        return [[(pages[0].name, block) for block in pages[0].sections[key]]]
    titles = dict.fromkeys(block.title for page in pages for block in page.sections[key])
    by_title = [(page.name, {block.title: block for block in page.sections[key]}) for page in pages]
    return [[(name, blocks.get(title)) for name, blocks in by_title] for title in titles]
