"""Fuzzes a reader: python -m tests.fuzz READER [--count N] [--seed S] [--seconds T]."""

import argparse
import json
import math
import sys

from tests.fuzz.campaign import campaign, replay
from tests.fuzz.readers import READERS


def main() -> int:
    """Returns 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("reader", choices=[*READERS, "all"])
    parser.add_argument("--count", type=int, default=100_000, help="inputs for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop a reader after so long")
    parser.add_argument("--only", type=int, help="run one input again, in this process, and show it")
    asked = parser.parse_args()
    if asked.only is not None:
        print(replay(asked.reader, asked.seed, asked.only))
        return 0
    bad = False
    for name in READERS if asked.reader == "all" else [asked.reader]:
        report = campaign(name, asked.count, asked.seed, asked.seconds)
        bad |= bool(report.findings)
        facts = {"reader": name, "inputs": report.inputs, "seconds": round(report.seconds, 1)}
        facts["inputs_per_second"] = round(report.inputs / max(report.seconds, 1e-9), 1)
        facts["findings"] = [[*key, *value] for key, value in report.findings.items()]
        print(json.dumps(facts), flush=True)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
