"""`cdm-fast report`: runs as one HTML page."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from cdm_fast.cli import arguments
from cdm_fast.cli.describe import describe_audit
from cdm_fast.cli.outcome import Outcome, data_for, load_on
from cdm_fast.config import RunConfig
from cdm_fast.data import ImageData
from cdm_fast.data.draws import choose
from cdm_fast.errors import UserError
from cdm_fast.host.files import write_atomically
from cdm_fast.host.optional import need
from cdm_fast.host.progress import to_stderr
from cdm_fast.model.cdm import require_likelihood
from cdm_fast.report.blocks import RunPage
from cdm_fast.report.gather import MOST_IMAGES, Source, gather
from cdm_fast.report.page import render
from cdm_fast.report.playground import content, runtime_files
from cdm_fast.runs.checkpoint import read_config


def report_command(command: arguments.Report) -> Outcome:
    """`cdm-fast report`."""
    if not command.runs:
        raise UserError("no run to report; name one or more run directories")
    out = command.out or command.runs[0] / "report.html"
    if out.suffix != ".html":
        raise UserError(f"--out {out}: give a name that ends in .html")
    need("jinja2", "the report page")
    configs = [read_config(run) for run in command.runs]  # refused before anything is computed
    sources = [_open(command, run, config) for run, config in zip(command.runs, configs, strict=True)]
    runtime = _runtime(command, sources[0])
    pages = _named([gather(source, to_stderr) for source in sources], command.runs)
    playground = runtime and content(
        require_likelihood(sources[0].model), pages[0].name, configs[0], sources[0].data, runtime
    )
    html = render(pages, playground).encode()
    write_atomically(out, html)
    missing = sum(
        block.kind == "missing" for page in pages for blocks in page.sections.values() for block in blocks
    )
    result = {
        "runs": [str(run) for run in command.runs],
        "out": str(out),
        "bytes": len(html),
        "missing": missing,
    }
    return Outcome(result, [f"{out}: {len(html) / 1e6:.1f} MB, {missing} part{'s' * (missing != 1)} missing"])


def _runtime(command: arguments.Report, first: Source) -> dict[str, bytes] | None:
    """What the playground runs on; UserError before anything is computed, None without `--playground`."""
    if not command.playground:
        if command.onnxruntime_web is not None:
            raise UserError("--onnxruntime-web goes with --playground; give both or leave it out")
        return None
    require_likelihood(first.model)
    need("onnxscript", "--playground")
    return runtime_files(command.onnxruntime_web)


def _open(command: arguments.Report, run: Path, config: RunConfig) -> Source:
    model = load_on(run, command.device)
    why = ""
    images: dict[str, ImageData] = {}
    try:
        for split in ("test", "validation"):
            images[split] = _images(command, run, config, split)
    except UserError as error:
        if command.data is not None:
            raise
        why = f"the images of the run cannot be read: {error}"
    given = command.data is not None
    return Source(
        run, config, model, images.get("test"), images.get("validation"), why, describe_audit, given
    )


def _images(command: arguments.Report, run: Path, config: RunConfig, split: str) -> ImageData:
    """At most `MOST_IMAGES` images of a split."""
    data = data_for(run, config, split, command.data)
    return data.take(choose(len(data), MOST_IMAGES, torch.Generator().manual_seed(0)))


def _named(pages: Sequence[RunPage], runs: Sequence[Path]) -> list[RunPage]:
    """The pages, with whole paths as names where two runs have the same."""
    if len({page.name for page in pages}) == len(pages):
        return list(pages)
    return [replace(page, name=str(run)) for page, run in zip(pages, runs, strict=True)]
