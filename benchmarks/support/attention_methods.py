"""Times both methods of Triton's attention, and writes the table by which one of them is chosen.

    python -m benchmarks.support.attention_methods [--out FILE] [--seconds 0.2] [--small]

For every size of the table: forward, VJP and the derivative of the VJP, by "fused", by "composed" and by
plain PyTorch with autograd through autograd. FILE is the table of the installed package unless --out says
otherwise. --small takes few, small sizes and one round, for a machine without a GPU (TRITON_INTERPRET=1).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.bench_attention import baseline, candidate, check, inputs
from cdm_fast.ops import backend, use_attention_method, use_backend

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
TOKENS, WIDTHS = (64, 256, 1024, 4096), (64, 128, 256)
ELEMENTS = 1 << 23  # of q: batch 128 at 256 tokens of 256 channels


def time_ms(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Median time of a call, over rounds that last about `seconds` together."""

    def once() -> float:
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - begin)

    once()  # compiles
    first = once()
    return statistics.median([first, *(once() for _ in range(int(1e3 * seconds / first)))])


def measure(
    tokens: int, width: int, dtype: str, device: torch.device, elements: int, seconds: float
) -> dict[str, object]:
    """An entry of the table: times in ms, and the method that won."""
    batch = max(1, elements // (tokens * width))
    tensors = inputs((batch, tokens, width), DTYPES[dtype], device)
    expected, times = baseline(*tensors), {}
    for method in backend.ATTENTION_METHODS[1:]:
        with use_backend("triton"), use_attention_method(method):
            check(candidate(*tensors), expected)
            times[method] = time_ms(lambda: candidate(*tensors), device, seconds)
    plain = time_ms(lambda: baseline(*tensors), device, seconds)
    entry = {"dtype": dtype, "tokens": tokens, "width": width, "method": min(times, key=lambda x: times[x])}
    milliseconds = {name: round(value, 4) for name, value in {**times, "plain": plain}.items()}
    return {**entry, "batch": batch, "ms": milliseconds}


def write(path: Path, entries: list[dict[str, object]], device: torch.device) -> None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    head = {
        "device": name,
        "source": f"python -m benchmarks.support.attention_methods, torch {torch.__version__}",
    }
    lines = ",\n    ".join(json.dumps(entry) for entry in entries)
    text = json.dumps(head, indent=2)[:-2] + f',\n  "methods": [\n    {lines}\n  ]\n}}\n'
    path.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=backend.ATTENTION_TABLE)
    parser.add_argument("--seconds", type=float, default=0.2, help="time for each method at each size")
    parser.add_argument("--small", action="store_true", help="a smoke run, no figures")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.small:
        sizes, elements, options.seconds = [(16, 16)], 256, 0.0
    else:
        sizes, elements = [(tokens, width) for tokens in TOKENS for width in WIDTHS], ELEMENTS
    entries = []
    for dtype in DTYPES:
        for tokens, width in sizes:
            entries.append(measure(tokens, width, dtype, device, elements, options.seconds))
            print(json.dumps(entries[-1]), flush=True)
            write(options.out, entries, device)


if __name__ == "__main__":
    main()
