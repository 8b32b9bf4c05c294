"""What a training step moves and computes, op by op, against a GPU's floors. Nothing is timed.

    python -m benchmarks.step_costs [--preset cifar10] [--batch-size 128] [--bandwidth 4.3] [--flops 790]

The step runs on tensors with shapes but no data, in the place of a GPU's, and by the Triton kernels. Each op
counts the bytes that it reads and writes, and the FLOPs of its products; a fused op also counts what its
kernels read a second time. An op's floor is the larger of bytes over bandwidth (TB/s) and FLOPs over rate
(TFLOP/s): a lower bound, as if no data stayed in a cache from one op to the next and no time passed between
them.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from cdm_fast.config import preset
from cdm_fast.model.losses import Noised
from cdm_fast.ops import backend
from cdm_fast.runs.build import build_model
from cdm_fast.training.ema import Ema
from cdm_fast.training.step import make_loss, make_optimizer, training_step

Call = tuple[tuple[Any, ...], Any]  # arguments, result


@dataclass
class Cost:
    """Of all calls of one op."""

    calls: int = 0
    bytes: float = 0
    flops: float = 0
    seconds: float = 0


@dataclass
class Costs(TorchDispatchMode):
    """Adds up what is dispatched while it is active."""

    bandwidth: float  # bytes/s
    rate: float  # FLOP/s
    of_op: dict[str, Cost] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __hash__(self) -> int:
        return id(self)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        if outputs and not _is_view(func, inputs, outputs) and not name.startswith(("empty", "new_empty")):
            self._add(name, func, args, kwargs or {}, inputs, outputs, result)
        return result

    def _add(
        self,
        name: str,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        inputs: list[Tensor],
        outputs: list[Tensor],
        result: Any,
    ) -> None:
        moved = sum(map(_bytes, inputs)) + sum(map(_bytes, outputs))
        flops = 0.0
        if name in OWN:
            moved, flops = OWN[name](inputs, outputs)
        elif func.overloadpacket in flop_registry:
            flops = flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
        cost = self.of_op.setdefault(name.removesuffix("_triton"), Cost())
        cost.calls += 1
        cost.bytes += moved
        cost.flops += flops
        cost.seconds += max(moved / self.bandwidth, flops / self.rate)


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def _bytes(x: Tensor) -> int:
    """Of what is read: an expanded axis is read once."""
    return x.element_size() * _product(
        size for size, stride in zip(x.shape, x.stride(), strict=True) if stride
    )


def _product(sizes: Iterator[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def _is_view(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    if func._schema.is_mutable:
        return False
    storages = {x.untyped_storage()._cdata for x in inputs}
    return all(x.untyped_storage()._cdata in storages for x in outputs)


def _norm(inputs: list[Tensor], outputs: list[Tensor]) -> tuple[float, float]:
    """GroupNorm reads the images twice: for the sums and for the result."""
    images = sum(_bytes(x) for x in inputs if x.dim() == 4)
    return 2 * images + sum(map(_bytes, outputs)), 0.0


def _attention(products: int, passes: int) -> Callable[..., tuple[float, float]]:
    """A composed attention: its products, and how often a score matrix is read or written."""

    def cost(inputs: list[Tensor], outputs: list[Tensor]) -> tuple[float, float]:
        batch, tokens, channels = inputs[0].shape
        scores = batch * tokens * tokens
        ends = sum(map(_bytes, inputs)) + sum(map(_bytes, outputs))
        return ends + passes * scores * inputs[0].element_size(), 2.0 * products * scores * channels

    return cost


# Ops of several kernels. Scores written by a product, changed in place by a pass, read by a product count 4.
OWN: dict[str, Callable[..., tuple[float, float]]] = {
    "group_norm_silu": _norm,
    "group_norm_silu_vjp": _norm,
    "group_norm_silu_backward": _norm,
    "group_norm_silu_vjp_backward": _norm,
    "attention": _attention(2, 4),
    "attention_vjp": _attention(5, 9),
    "attention_vjp_backward": _attention(12, 22),
}
OWN |= {f"{name}_triton": cost for name, cost in OWN.items()}


def _never(value: Tensor) -> bool:
    return False


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Tensors of the CPU take the ops that a GPU's would, and no check reads a value."""

    def resolve(op: str, *_: Any) -> str:
        return "triton" if "triton" in backend._coverage[op] else "reference"

    with (
        FakeTensorMode(),
        mock.patch.object(backend, "_resolve", resolve),
        mock.patch("cdm_fast.ops.checks.may_read", _never),
        mock.patch("cdm_fast.nn.embedding.may_read", _never),
        mock.patch("cdm_fast.model.denoiser.may_read", _never),
        mock.patch("cdm_fast.ops.linear._ONEDNN_LINEAR", None),
    ):
        yield


def _without_data(model: nn.Module) -> nn.Module:
    """The model with fake tensors of its shapes and strides; under a FakeTensorMode."""

    def fake(x: Tensor) -> Tensor:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(fake(parameter))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)
    return model


def step_costs(name: str, batch_size: int, bandwidth: float, rate: float) -> dict[str, Cost]:
    """The cost of each op in one training step of a preset in bf16, without its data."""
    config = preset(name)
    config = replace(config, train=replace(config.train, precision="bf16", batch_size=batch_size))
    real = build_model(config).train()
    if config.train.channels_last:
        real = real.to(memory_format=torch.channels_last)
    shape = (batch_size, *config.image.sides, config.image.channels)
    costs = Costs(1e12 * bandwidth, 1e12 * rate)
    with as_on_a_gpu():
        model = _without_data(real)
        ema = Ema.__new__(Ema)  # its own copy would be real
        ema.decay, ema.start = config.train.ema_decay, None
        ema._weights = [x.detach() for x in model.parameters()]
        ema._averages = [torch.empty_like(x) for x in ema._weights]
        images = torch.empty(shape).permute(0, 3, 1, 2)
        level = torch.empty(batch_size, dtype=torch.int64)
        label = level if config.network.conditioning != "none" else None
        batch = Noised(images, torch.empty_like(images), level, label)
        optimizer = make_optimizer(config.train, model)
        with costs:
            training_step(
                model, optimizer, ema, batch, make_loss(config.train), clip_norm=1.0, precision="bf16"
            )
    return costs.of_op


def table(of_op: dict[str, Cost], rows: int = 20) -> str:
    """Markdown: the costliest ops, what is left, and the total."""
    ordered = sorted(of_op.items(), key=lambda item: -item[1].seconds)
    lines = ["| op | calls | GB | TFLOP | floor, ms |", "|---|---|---|---|---|"]
    for name, cost in [*ordered[:rows], ("other", _sum(ordered[rows:])), ("all", _sum(ordered))]:
        numbers = f"{cost.bytes / 1e9:.2f} | {cost.flops / 1e12:.2f} | {1e3 * cost.seconds:.2f}"
        lines.append(f"| {name} | {cost.calls} | {numbers} |")
    return "\n".join(lines)


def _sum(costs: list[tuple[str, Cost]]) -> Cost:
    total = Cost()
    for _, cost in costs:
        total.calls += cost.calls
        total.bytes += cost.bytes
        total.flops += cost.flops
        total.seconds += cost.seconds
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="cifar10")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--bandwidth", type=float, default=4.3, help="TB/s of a copy (default: an H200's)")
    parser.add_argument("--flops", type=float, default=790, help="TFLOP/s of bf16 products (an H200's)")
    options = parser.parse_args()
    print(table(step_costs(options.preset, options.batch_size, options.bandwidth, options.flops)))


if __name__ == "__main__":
    main()
