"""Small programs with a known effect on a GPU, run under `FakeCuda`; prints what it saw, as JSON.

python -m tests.fake_cuda_faults CACHE json
"""

import json
import sys
from pathlib import Path
from typing import Any

from tests import fake_cuda


def main(cache: str, *_: str) -> None:
    fake_cuda.stand_in(Path(cache))
    import torch

    device = fake_cuda.fake_cuda_class()()
    with device:
        x = torch.empty(4, 8, device="cuda")
        small = [torch.empty(5, device="cuda") for _ in range(130)]
        large = [torch.empty(330 * 65536, device="cuda")]
        image, kernel = torch.empty(2, 4, 6, 6, device="cuda"), torch.empty(5, 4, 3, 3, device="cuda")
        kernel_last = kernel.to(memory_format=torch.channels_last)
    host = torch.arange(4)
    programs = {
        "item": lambda: float(x[0, 0]),
        "pageable copy": lambda: host.to("cuda", non_blocking=True),
        "number made on the device": lambda: torch.tensor([1, 2], device="cuda"),
        "copy to the host": lambda: x.cpu(),
        "index on the host": lambda: x[host],
        "nonzero": lambda: x.nonzero(),
        "mixed devices": lambda: x + torch.ones(8),
        "pinned copy": lambda: host.pin_memory().to("cuda", non_blocking=True),
        "views": lambda: x.t()[1:].unflatten(1, (2, 2)).unsqueeze(0),
        "host": lambda: float(host.sum()),
        "plain op": lambda: 2 * x + 1,
        "cast": lambda: x.bfloat16(),
        "many small tensors": lambda: torch._foreach_add_(small, small),
        "convolution": lambda: _layout(torch.conv2d(image, kernel)),
        "convolution by a channels-last kernel": lambda: _layout(torch.conv2d(image, kernel_last)),
        "one large tensor": lambda: torch._foreach_add_(large, large),
    }
    seen: dict[str, dict[str, Any]] = {}
    for name, program in programs.items():
        device.record.clear()
        error, value = "", None
        try:
            with device:
                value = program()
        except Exception as raised:
            error = type(raised).__name__
        kept = value if isinstance(value, float) else None
        seen[name] = {**device.record.to_json(), "error": error, "value": kept}
    print(json.dumps(seen))


def _layout(x: Any) -> float:
    """1 for a channels-last tensor, else 0."""
    import torch

    return float(x.is_contiguous(memory_format=torch.channels_last))


if __name__ == "__main__":
    main(*sys.argv[1:])
