"""Working copies of a model's weights for one training step or evaluation, cast all at once.

Autocast casts weights one by one. An explicit adjoint reads most weights twice, so their two gradients are
added and cast one by one as well: about 600 small kernels per step of the CIFAR-10 network. Operations on
lists of tensors need about 20. The results are the same up to the order in which gradients are summed.

Triton's GroupNorm returns the gradients of its parameters per image. They are summed over images here for all
norms at once, instead of by one kernel per norm.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cdm_fast.nn.layers import FOR_IMAGES, GroupNorm, for_adjoint_name
from cdm_fast.ops.precision import warn_of_emulation

Slot = tuple[nn.Module, str]


@contextmanager
def working_weights(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Replaces the model's weights by working copies, for a loss and its backward pass inside the block.

    The weights of convolutions and embeddings are cast to `dtype`, which must be autocast's, except in exact
    layers; those of norms keep their dtype. Gradients are accumulated in the model's own parameters.
    """
    cast, kept = _slots(model)
    slots = [*cast, *kept]
    weights = [_weight(slot) for slot in slots]
    of_images: dict[Slot, list[Tensor]] = {slot: [] for slot in slots}
    copies = _WorkingCopies.apply(dtype, len(cast), list(of_images.values()), *weights)
    try:
        for (module, name), first, second in zip(
            slots, copies[: len(slots)], copies[len(slots) :], strict=True
        ):
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
    """Autocast to bf16, if `precision` asks for it, for evaluations that do not change the weights.

    Autocast caches only the casts of whole trainable weights; averaged weights and parts of weights are cast
    again at every use. Here all weights are cast once, unless the network is compiled. The results are equal.
    Warns if the hardware has no bf16 instructions.
    """
    if precision != "bf16":
        yield
        return
    warn_of_emulation(device, precision)
    copies = not any(is_compiled(module.__dict__.get("forward")) for module in model.modules())
    with (
        torch.autocast(device.type, torch.bfloat16),
        torch.no_grad(),
        working_weights(model, torch.bfloat16) if copies else nullcontext(),
    ):
        yield


def is_compiled(function: Callable[..., Any] | None) -> bool:
    """Whether torch.compile made this function."""
    return hasattr(function, "_torchdynamo_orig_callable")


def _weight(slot: Slot) -> nn.Parameter:
    module, name = slot
    weight = module._parameters[name]
    assert weight is not None
    return weight


def _slots(model: nn.Module) -> tuple[list[Slot], list[Slot]]:
    """The weights to cast, and the weights that keep their dtype and only get an alias for the adjoint."""
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
    """The weight (C,) expanded to (B, C); its gradients are kept in `of_images`, to be summed."""
    expanded: Tensor = _ForImages.apply(of_images[module, name], weight, num_images)
    return expanded


class _ForImages(torch.autograd.Function):
    """(kept, weight (C,), B) -> weight expanded to (B, C); its gradient is appended to `kept` and stops here.

    Autograd runs the backward pass of `_WorkingCopies` after the backward passes of all uses of the working
    copies, so all gradients have been appended by then.
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


class _WorkingCopies(torch.autograd.Function):
    """(dtype, n, kept, weights) -> the working copies, of which the first n are cast, and an alias of each.

    kept: for each weight, the gradients per image (B, C) to add to its gradient.
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
        copies = [*cast, *(weight.detach() for weight in weights[num_cast:])]
        return *copies, *(copy.detach() for copy in copies)

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
    """For each weight, the sum over images (C,) of its first gradient (B, C), then of its second, and so on.

    None for a weight without further gradients. All gradients are summed at once; the lists are emptied.
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
    """Elementwise sums of two lists; None counts as zero."""
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
