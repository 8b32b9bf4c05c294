"""The weights of a model as one training step reads them: cast together, with a gradient for each use.

Autocast casts weights one by one, and an explicit adjoint reads most of them twice, so that their two
gradients are added and cast one by one too: some 600 small kernels a step of the CIFAR-10 network. Here lists
do all of it, in some 20. The numbers are the same up to the order in which gradients are added.

Triton sums the gradients of a norm's parameters over pixels; those of all norms are summed over images here,
at once, where each op would launch a kernel for it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cdm_fast.nn.layers import FOR_IMAGES, GroupNorm, for_adjoint_name

Slot = tuple[nn.Module, str]


@contextmanager
def working_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Lends the model its weights for a loss and its backward pass, both inside the block.

    Weights of convolutions and of embeddings' products are cast to `dtype`, that of autocast there, unless
    they are exact; those of norms keep their own. Gradients arrive where they always do, once.
    """
    cast, kept = _slots(model)
    slots = [*cast, *kept]
    weights = [_weight(slot) for slot in slots]
    of_images: dict[Slot, list[Tensor]] = {slot: [] for slot in slots}
    lent = _Lend.apply(dtype, len(cast), list(of_images.values()), *weights)
    try:
        for (module, name), first, second in zip(slots, lent[: len(slots)], lent[len(slots) :], strict=True):
            module._parameters[name] = first
            module.__dict__[for_adjoint_name(name)] = second
            if isinstance(module, GroupNorm) and torch.is_grad_enabled():
                module.__dict__[FOR_IMAGES] = partial(_for_images, of_images, module)
        yield
    finally:
        for (module, name), weight in zip(slots, weights, strict=True):
            module._parameters[name] = weight
            module.__dict__.pop(for_adjoint_name(name), None)
            module.__dict__.pop(FOR_IMAGES, None)


@contextmanager
def cast_weights(
    model: nn.Module, device: torch.device, precision: Literal["fp32", "bf16"]
) -> Iterator[None]:
    """Autocast to bf16, if that is the precision, for evaluations of a model whose weights stay as they are.

    Autocast remembers the casts of whole trainable weights alone: averaged ones and parts of weights are cast
    anew at every use. Here all are cast once, unless a compiled network does it. The numbers are the same.
    """
    if precision != "bf16":
        yield
        return
    lends = not any(is_compiled(module.__dict__.get("forward")) for module in model.modules())
    with (
        torch.autocast(device.type, torch.bfloat16),
        torch.no_grad(),
        working_weights(model, torch.bfloat16) if lends else nullcontext(),
    ):
        yield


def is_compiled(function: Callable[..., Any] | None) -> bool:
    """Whether torch.compile has made it."""
    return hasattr(function, "_torchdynamo_orig_callable")


def _weight(slot: Slot) -> nn.Parameter:
    module, name = slot
    weight = module._parameters[name]
    assert weight is not None
    return weight


def _slots(model: nn.Module) -> tuple[list[Slot], list[Slot]]:
    """Weights that are cast, and those that are only read twice."""
    cast: list[Slot] = []
    kept: list[Slot] = []
    for module in model.modules():
        casts = getattr(module, "casts", isinstance(module, nn.Conv2d))
        if not (casts or isinstance(module, nn.Conv2d | GroupNorm)):
            continue
        slots = cast if casts else kept
        slots += [
            (module, name)
            for name, weight in module._parameters.items()
            if weight is not None and weight.dtype == torch.float32
            if weight.requires_grad or not torch.is_grad_enabled()
        ]
    return cast, kept


def _for_images(
    of_images: dict[Slot, list[Tensor]], module: nn.Module, name: str, weight: Tensor, num_images: int
) -> Tensor:
    """The weight (C,) as (B, C), whose gradient is kept in `of_images` for `_Lend` to sum."""
    expanded: Tensor = _ForImages.apply(of_images[module, name], weight, num_images)
    return expanded


class _ForImages(torch.autograd.Function):
    """(kept, weight (C,), B) -> the same (B, C); its gradient is appended to `kept` and goes no further.

    Autograd computes the gradient of `_Lend` after those of all that was lent, and so of all that is kept.
    """

    @staticmethod
    def forward(ctx: Any, kept: list[Tensor], weight: Tensor, num_images: int) -> Tensor:
        ctx.kept = kept
        return weight.expand(num_images, -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ctx.kept.append(grad)
        return None, None, None


class _Lend(torch.autograd.Function):
    """(dtype, n, kept, weights) -> the weights, of which the first n are cast, and the same once more.

    kept: of each weight, gradients per image, to be added to its own.
    """

    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, num_cast: int, of_images: list[list[Tensor]], *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.of_images = of_images
        ctx.num_cast = num_cast
        ctx.like = [torch.empty_like(weight, device="meta") for weight in weights[:num_cast]]
        cast = [torch.empty_like(weight, dtype=dtype) for weight in weights[:num_cast]]
        if cast:
            torch._foreach_copy_(cast, list(weights[:num_cast]))
        lent = [*cast, *(weight.detach() for weight in weights[num_cast:])]
        return *lent, *(weight.detach() for weight in lent)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        num = len(grads) // 2
        total = _added(list(grads[:num]), list(grads[num:]))
        places = [i for i in range(ctx.num_cast) if total[i] is not None]
        wide = [torch.empty_like(ctx.like[i], device=total[i].device) for i in places]  # type: ignore[union-attr]
        if places:
            torch._foreach_copy_(wide, [total[i] for i in places])  # type: ignore[misc]
        for i, grad in zip(places, wide, strict=True):
            total[i] = grad
        for use in _sums_over_images(ctx.of_images):
            total = _added(total, use)
        return None, None, None, *total


def _sums_over_images(of_images: list[list[Tensor]]) -> Iterator[list[Tensor | None]]:
    """Of each weight the sums (C,) of its first gradient (B, C), then of its second, ...; None past the last.

    All are put side by side and summed at once. Takes the gradients out.
    """
    places = [(use, i) for i, kept in enumerate(of_images) for use in range(len(kept))]
    grads = [of_images[i][use] for use, i in places]
    uses: list[list[Tensor | None]] = [
        [None] * len(of_images) for _ in range(max(map(len, of_images), default=0))
    ]
    for batch in {len(grad) for grad in grads}:
        which = [n for n, grad in enumerate(grads) if len(grad) == batch]
        sums = torch.cat([grads[n] for n in which], 1).sum(0).split([grads[n].shape[1] for n in which])
        for n, part in zip(which, sums, strict=True):
            use, i = places[n]
            uses[use][i] = part
    for kept in of_images:
        kept.clear()
    yield from uses


def _added(first: list[Tensor | None], second: list[Tensor | None]) -> list[Tensor | None]:
    """The sums of two lists, in which None is nothing."""
    total = [one if other is None else other for one, other in zip(first, second, strict=True)]
    both = [i for i in range(len(total)) if first[i] is not None and second[i] is not None]
    by_dtype: dict[torch.dtype, list[int]] = {}
    for i in both:
        by_dtype.setdefault(first[i].dtype, []).append(i)  # type: ignore[union-attr]
    for places in by_dtype.values():
        sums = torch._foreach_add([first[i] for i in places], [second[i] for i in places])  # type: ignore[misc]
        for i, value in zip(places, sums, strict=True):
            total[i] = value
    return total
