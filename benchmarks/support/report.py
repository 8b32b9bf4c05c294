"""The one table of benchmarks/README.md, made from benchmarks/results/{cpu,gpu}-*.jsonl.

    python -m benchmarks.support.report           # writes the table
    python -m benchmarks.support.report --check   # fails if it is not what the results give
    python -m benchmarks.support.report --keep OUT/results.json gpu-h200    # run_gpu.sh's, as a result file

`benchmarks.support.results` describes a result file. Profiles, trainings and failures of a GPU run are told
in lines below the table.
"""

import argparse
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.support.results import BadResult, Run, keep, read

FOLDER = Path(__file__).parents[1]
FILES = "[cg]pu-*.jsonl"  # the studies' result files lie beside them
IN_A_PICTURE = ("scaling",)  # benchmarks whose figures are drawn instead: one row each would hide the others
BEGIN, END = "<!-- table: python -m benchmarks.support.report -->", "<!-- end of table -->"
COLUMNS = ("benchmark", "case", "shape", "ms", "baseline ms", "ratio", "of limit", "peak MiB", "run")
NOTHING = "—"


def figures(run: Run) -> list[dict[str, Any]]:
    """The rows that hold times or memory of a candidate: rows of the table."""
    measured = [row for row in run.rows if "candidate_ms" in row or "candidate_peak_mib" in row]
    return [row for row in measured if row.get("benchmark") not in (None, "training")]


def remarks(run: Run) -> list[str]:
    """In words, what is no row of the table."""
    told = []
    for row in run.rows:
        if "status" in row:
            why = f" ({row['reason']})" if "reason" in row else ""
            told.append(f"stage {row['name']}: {row['status']}{why}")
        elif "error" in row:
            told.append(f"{row['benchmark']}, {row['case']}: no figure, {row['error']}")
        elif "bits_per_dim" in row:
            told.append(_training(row))
    return told + _profile([row for row in run.rows if "profile" in row])


def _training(record: dict[str, Any]) -> str:
    accuracy = record.get("accuracy")
    classes = "" if accuracy is None else f", accuracy {accuracy:.1%}"
    return (
        f"{record['case']}, {record['step']} steps in {record['seconds']:.0f} s: "
        f"{record['bits_per_dim']:.3f} bits/dim (single pass, unaudited){classes}"
    )


def _profile(rows: list[dict[str, Any]], most: int = 8) -> list[str]:
    """The profile of a step, in a line: its launches and gaps, and the kernels that take most of it."""
    if not rows:
        return []
    whole, *kernels = rows
    longest = "; ".join(
        f"`{row['name'][:60]}` {row['launches']:.0f}x {row['ms']:.2f}" for row in kernels[:most]
    )
    return [
        f"{whole['of']}: {whole['launches']:.0f} launches, {whole['busy_ms']:.1f} ms busy of"
        f" {whole['span_ms']:.1f}, {whole['gap_share']:.0%} gaps; most ms a step: {longest}"
    ]


def table(runs: list[Run]) -> str:
    """The table, with a row for each benchmark that no GPU has run yet; then a line per run."""
    rows = [
        _row(figure, number)
        for number, run in enumerate(runs, 1)
        for figure in figures(run)
        if figure["benchmark"] not in IN_A_PICTURE
    ]
    measured = {(run.environment["device"], figure["benchmark"]) for run in runs for figure in figures(run)}
    missing = sorted({name for _, name in measured if ("cuda", name) not in measured})
    if not measured:
        missing = ["all"]
    blank = [""] * (len(COLUMNS) - 3)
    rows += [_line([name, "on a GPU", "not measured yet", *blank]) for name in missing]
    notes = [line for number, run in enumerate(runs, 1) for line in _notes(number, run)]
    return "\n".join([_line(COLUMNS), "|---" * len(COLUMNS) + "|", *rows, *(["", *notes] if notes else [])])


def _row(figure: dict[str, Any], run: int) -> str:
    cells = [
        figure["benchmark"],
        figure["case"],
        "x".join(map(str, figure.get("shape", []))) or NOTHING,
        _number(figure, "candidate_ms"),
        _number(figure, "baseline_ms"),
        _ratio(figure),
        _share(figure),
        _peaks(figure),
        f"[{run}]",
    ]
    return _line(cells)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(figure: dict[str, Any], key: str) -> str:
    """Three significant digits, without an exponent."""
    value = figure.get(key)
    if value is None:
        return NOTHING
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def _ratio(figure: dict[str, Any]) -> str:
    if "ratio" not in figure:
        return NOTHING
    ratio = f"{figure['ratio']:.2f}"
    if "ratio_lower_quartile" not in figure:
        return ratio
    return f"{ratio} ({figure['ratio_lower_quartile']:.2f}-{figure['ratio_upper_quartile']:.2f})"


def _share(figure: dict[str, Any]) -> str:
    """Of what bounds the candidate: the memory's copy rate, or the convolution rate."""
    share = figure.get("share_of_copy", figure.get("share_of_convolution"))
    return NOTHING if share is None else f"{share:.0%}"


def _peaks(figure: dict[str, Any]) -> str:
    if "candidate_peak_mib" not in figure:
        return NOTHING
    return f"{figure['candidate_peak_mib']:.0f} : {figure['baseline_peak_mib']:.0f}"


def _notes(number: int, run: Run) -> list[str]:
    """Device, versions, commit and command of a run; then its remarks."""
    facts = run.environment
    if facts["device"] == "cuda":
        device = f"{facts['gpu']}, driver {facts.get('driver', 'unknown')}"
    else:
        device = f"{facts['cpu']} ({facts['cpu_capability']}), {facts['threads']} threads"
    keys = ("python", "torch", "triton", "cuda")
    versions = ", ".join(f"{key} {facts[key]}" for key in keys if facts.get(key))
    origin = (
        f"- [{number}] `{run.name}.jsonl`: {device}; {versions}; "
        f"commit {facts.get('commit', 'unknown')}; `{facts.get('command', 'unknown')}`"
    )
    return [origin, *(f"  - {remark}" for remark in remarks(run))]


def with_table(page: str, content: str) -> str:
    """`page` with what stands between its two markers replaced.

    Raises:
        BadResult: a marker is missing.
    """
    pattern = re.compile(f"{re.escape(BEGIN)}\n.*?{re.escape(END)}", re.DOTALL)
    if not pattern.search(page):
        raise BadResult(f"README.md: the markers {BEGIN!r} and {END!r} are not there; put them back")
    return pattern.sub(lambda _: f"{BEGIN}\n\n{content}\n\n{END}", page)


def _keep(document: Path, name: str, folder: Path) -> None:
    """Raises BadResult for a name that the table would not find, and for a document that gives no results."""
    path = folder / f"{name}.jsonl"
    if not path.match(FILES):
        raise BadResult(f"--keep {name}: a name begins with cpu- or gpu-")
    keep(document, path)


def main(arguments: list[str] | None = None, folder: Path = FOLDER) -> int:
    """Writes or checks the table in `folder`. Exit status: 0, 1 for a stale table, 2 for bad results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.support.report", description="README's table")
    parser.add_argument("--check", action="store_true", help="write nothing, fail if the table is stale")
    parser.add_argument(
        "--keep",
        nargs=2,
        metavar=("FILE", "NAME"),
        help="keep a results.json of run_gpu.sh under a name, first",
    )
    options = parser.parse_args(arguments)
    readme = folder / "README.md"
    page = readme.read_text()
    try:
        if options.keep:
            _keep(Path(options.keep[0]), options.keep[1], folder / "results")
        runs = [read(path) for path in sorted((folder / "results").glob(FILES))]
        new = with_table(page, table(runs))
    except BadResult as error:
        print(f"benchmarks.support.report: error: {error}", file=sys.stderr)
        return 2
    if options.check:
        if new != page:
            print("benchmarks/README.md is stale: run `python -m benchmarks.support.report`", file=sys.stderr)
        return int(new != page)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
