"""Draws what `bench_scaling.py` measured: images per second, and the share of the convolution rate.

python -m benchmarks.support.plot_scaling RESULT.jsonl PICTURE.png
"""

import sys
from pathlib import Path

from benchmarks.support.report import figures
from benchmarks.support.results import BadResult, read
from cdm_fast.host.optional import need


def draw(result: Path, picture: Path) -> None:
    """Two panels over the batch size, a line per resolution.

    Raises:
        BadResult: the file holds no figures of bench_scaling.py.
    """
    run = read(result)
    measured = [figure for figure in figures(run) if figure["benchmark"] == "scaling" and "shape" in figure]
    if not measured:
        raise BadResult(f"{result}: no figures of bench_scaling.py; take them with its command")
    need("matplotlib", "drawing").use("Agg")
    plt = need("matplotlib.pyplot", "drawing")
    fig, (speed, share) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for size in sorted({figure["shape"][-1] for figure in measured}):
        rows = sorted((f for f in measured if f["shape"][-1] == size), key=lambda f: f["shape"][0])
        batch = [row["shape"][0] for row in rows]
        speed.plot(
            batch, [1e3 * row["shape"][0] / row["candidate_ms"] for row in rows], "o-", label=f"{size}x{size}"
        )
        share.plot(batch, [row["share_of_convolution"] for row in rows], "o-", label=f"{size}x{size}")
    speed.set(yscale="log", ylabel="training step: images/s")
    share.set(ylim=(0, None), ylabel="share of the convolution rate")
    for axis in (speed, share):
        axis.set(xscale="log", xlabel="batch size")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    speed.legend(title="resolution")
    facts = run.environment
    name = facts["gpu"] if facts["device"] == "cuda" else f"{facts['cpu']}, {facts['threads']} threads"
    fig.suptitle(f"{name}; torch {facts['torch']}; commit {facts['commit']}", fontsize=9)
    fig.savefig(picture, dpi=120)
    plt.close(fig)


if __name__ == "__main__":
    try:
        draw(Path(sys.argv[1]), Path(sys.argv[2]))
    except (BadResult, IndexError) as error:
        sys.exit(f"benchmarks.support.plot_scaling: error: {error}; usage: RESULT.jsonl PICTURE.png")
