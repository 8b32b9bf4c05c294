"""The ops before and after the network's adjoint: the head's cotangent, and eps_hat with its squared error.

B batch, L = T+2 noise levels, K classes, D features of the head. CDM Thm 3.1: with F(x, t) = f[T+1] - f[t],
E[eps | x_t = x] = s_t (grad_x F + x), and x_0 = (x - s_t eps) / a_t.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cdm_fast.ops import backend as _backend
from cdm_fast.ops import checks
from cdm_fast.ops.backend import Coverage
from cdm_fast.ops.precision import compute_dtype
from cdm_fast.ops.registry import define, overload

_backend.declare(
    "denoise",
    cpp=Coverage("cpu", (torch.float32, torch.bfloat16, torch.float64)),
    cuda=Coverage("cuda", (torch.float32, torch.bfloat16, torch.float16)),
    triton=Coverage("cuda", checks.FLOATING),
)


def head_cotangent_reference(
    weight_c: Tensor,  # (N, D)
    level: Tensor,  # (B,) int64
    class_weight: Tensor | None = None,  # (B, K)
) -> Tensor:  # (B, D)
    """The specification of `head_cotangent` in plain PyTorch; see there."""
    noise = weight_c.index_select(0, weight_c.new_full((1,), weight_c.shape[0] - 1, dtype=torch.int64))
    if class_weight is None:
        return noise - weight_c.index_select(0, level)
    num_classes = class_weight.shape[1]
    row = level[:, None] * num_classes + torch.arange(num_classes, device=level.device)
    is_noise = row[:, 0] == weight_c.shape[0] - 1
    rows = weight_c.index_select(0, row.clamp(max=weight_c.shape[0] - 1).flatten())
    mixed = torch.einsum("bk,bkd->bd", class_weight.to(weight_c.dtype), rows.unflatten(0, row.shape))
    return torch.where(is_noise[:, None], torch.zeros_like(mixed), noise - mixed)


def denoise_epilogue_reference(grad_x: Tensor, x: Tensor, s_t: Tensor) -> Tensor:
    """The specification of `denoise_epilogue` in plain PyTorch; see there."""
    g, x_wide, s_wide = _widen(grad_x, x, s_t)
    return (s_wide * (g + x_wide)).to(_output_dtype(grad_x, x))


def denoise_x0_reference(grad_x: Tensor, x: Tensor, a_t: Tensor, s_t: Tensor) -> Tensor:
    """The specification of `denoise_x0` in plain PyTorch; see there."""
    g, x_wide, s_wide, a_wide = _widen(grad_x, x, s_t, a_t)
    return ((x_wide - s_wide * (s_wide * (g + x_wide))) / a_wide).to(_output_dtype(grad_x, x))


def denoise_loss_reference(grad_x: Tensor, x: Tensor, s_t: Tensor, eps: Tensor) -> Tensor:
    """The specification of `denoise_loss` in plain PyTorch; see there."""
    g, x_wide, s_wide = _widen(grad_x, x, s_t)
    return (s_wide * (g + x_wide) - eps.to(g.dtype)).square().flatten(1).sum(1)


def _widen(grad_x: Tensor, x: Tensor, *per_image: Tensor) -> tuple[Tensor, ...]:
    """The arguments in the dtype of the computation, the (B,) ones shaped to broadcast over an image."""
    compute = compute_dtype(_output_dtype(grad_x, x))
    shape = (-1,) + (1,) * (x.dim() - 1)
    return grad_x.to(compute), x.to(compute), *(value.to(compute).reshape(shape) for value in per_image)


def _output_dtype(grad_x: Tensor, x: Tensor) -> torch.dtype:
    return torch.promote_types(grad_x.dtype, x.dtype)


def head_cotangent(
    weight_c: Tensor,  # (N, D)
    level: Tensor,  # (B,) int64
    class_weight: Tensor | None = None,  # (B, K)
) -> Tensor:  # (B, D)
    """Gradient of f[T+1] - f[level] with respect to the head's features: a gather, no product over levels.

    out[b] = weight_c[N-1] - sum_c class_weight[b, c] weight_c[level[b] K + c], and 0 at level T+1.

    weight_c: the head's cumulated weight; N = L rows, or the (L-1) K + 1 rows of a joint head.
    level: 0..L-1.
    class_weight: for a joint head, the weight of z[level, c] in f: one-hot for class c, softmax_c z[level]
        for the marginal, (1 + w) one-hot - w softmax for guidance w. None means K = 1 with weight 1.

    Returns weight_c's dtype. Differentiable once with respect to weight_c and class_weight,
    deterministically. Raises TypeError or ValueError, naming the argument, for arguments that do not match
    the above. Source: CDM Thm 3.1.
    """
    _check_cotangent(weight_c, level, class_weight)
    num_classes = 1 if class_weight is None else class_weight.shape[1]
    checks.check_index_range("level", level, 0, (weight_c.shape[0] - 1) // num_classes + 1)
    backend = _backend.resolve("denoise", weight_c)
    if backend == "reference":
        return head_cotangent_reference(weight_c, level, class_weight)
    if class_weight is not None:
        class_weight = class_weight.to(compute_dtype(weight_c.dtype)).contiguous()
    return overload("head_cotangent", backend)(weight_c.contiguous(), level.contiguous(), class_weight)


def denoise_epilogue(
    grad_x: Tensor,  # (B, ...)
    x: Tensor,  # (B, ...)
    s_t: Tensor,  # (B,)
) -> Tensor:  # (B, ...)
    """eps_hat = s_t (grad_x + x), in one pass.

    grad_x: the gradient of F; x: the noisy image x_t; s_t: the schedule's s at each image's level, a
    constant. Floating dtypes may differ; computed in fp32 (fp64 if one is fp64), returned in the wider of the
    two dtypes. Differentiable once with respect to grad_x and x (the reference: to any order). Raises
    TypeError or ValueError, naming the argument, for another shape, dtype or device. Source: CDM Thm 3.1.
    """
    _check_images(grad_x, x, s_t=s_t)
    backend = _backend.resolve("denoise", _widest(grad_x, x))
    if backend == "reference":
        return denoise_epilogue_reference(grad_x, x, s_t)
    return overload("denoise_epilogue", backend)(*_ready(grad_x, x, s_t)).to(_output_dtype(grad_x, x))


def denoise_x0(
    grad_x: Tensor,  # (B, ...)
    x: Tensor,  # (B, ...)
    a_t: Tensor,  # (B,)
    s_t: Tensor,  # (B,)
) -> Tensor:  # (B, ...)
    """x0_hat = (x - s_t eps_hat) / a_t with eps_hat = s_t (grad_x + x), in one pass.

    Arguments, dtypes, derivatives and errors as in `denoise_epilogue`; a_t is the schedule's a at the image's
    level. Infinite or NaN where a_t = 0: pure noise has no x_0. Source: CDM Thm 3.1.
    """
    _check_images(grad_x, x, a_t=a_t, s_t=s_t)
    backend = _backend.resolve("denoise", _widest(grad_x, x))
    if backend == "reference":
        return denoise_x0_reference(grad_x, x, a_t, s_t)
    return overload("denoise_x0", backend)(*_ready(grad_x, x, a_t, s_t)).to(_output_dtype(grad_x, x))


def denoise_loss(
    grad_x: Tensor,  # (B, ...)
    x: Tensor,  # (B, ...)
    s_t: Tensor,  # (B,)
    eps: Tensor,  # (B, ...)
) -> Tensor:  # (B,)
    """sum over an image of (eps_hat - eps)^2 with eps_hat = s_t (grad_x + x), in one pass.

    Returns fp32 (fp64 if grad_x or x is). eps: the true noise. Differentiable once with respect to grad_x, x
    and eps (the reference: to any order); otherwise as `denoise_epilogue`. Source: CDM Alg. 1.
    """
    _check_images(grad_x, x, s_t=s_t, eps=eps)
    backend = _backend.resolve("denoise", _widest(grad_x, x))
    if backend == "reference":
        return denoise_loss_reference(grad_x, x, s_t, eps)
    return overload("denoise_loss", backend)(*_ready(grad_x, x, s_t, eps))


def _widest(grad_x: Tensor, x: Tensor) -> Tensor:
    """The tensor whose dtype determines the dtype of grad_x in the kernels, see `_ready`."""
    return x if x.dtype == torch.float64 else grad_x


def _ready(grad_x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """The arguments for the kernels: contiguous, all except grad_x in the dtype of computation."""
    compute = compute_dtype(_output_dtype(grad_x, others[0]))
    if compute == torch.float64:
        grad_x = grad_x.to(compute)
    return grad_x.contiguous(), *(other.to(compute).contiguous() for other in others)


def _launch(name: str, *arguments: Any) -> Any:
    from cdm_fast.kernels import denoise as kernels

    return getattr(kernels, name)(*arguments)


def _triton_epilogue(grad_x: Tensor, x: Tensor, s_t: Tensor) -> Tensor:
    out = torch.empty_like(x)
    _launch("epilogue", grad_x, x, s_t, out)
    return out


def _triton_x0(grad_x: Tensor, x: Tensor, a_t: Tensor, s_t: Tensor) -> Tensor:
    out = torch.empty_like(x)
    _launch("clean_image", grad_x, x, a_t, s_t, out)
    return out


def _triton_loss(grad_x: Tensor, x: Tensor, s_t: Tensor, eps: Tensor) -> Tensor:
    out = torch.empty_like(s_t)
    _launch("loss", grad_x, x, s_t, eps, out)
    return out


def _triton_loss_backward(grad_x: Tensor, x: Tensor, s_t: Tensor, eps: Tensor, grad_sum: Tensor) -> Tensor:
    out = torch.empty_like(grad_x)
    _launch("loss_backward", grad_x, x, s_t, eps, grad_sum, out)
    return out


def _fake_cotangent(weight_c: Tensor, level: Tensor, class_weight: Tensor | None) -> Tensor:
    return weight_c.new_empty((level.shape[0], weight_c.shape[1]))


def _triton_cotangent(weight_c: Tensor, level: Tensor, class_weight: Tensor | None) -> Tensor:
    out = _fake_cotangent(weight_c, level, class_weight)
    _launch("cotangent", weight_c, level, class_weight, out)
    return out


def _fake_cotangent_backward(
    weight_c: Tensor, level: Tensor, class_weight: Tensor | None, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of weight_c and class_weight (empty without it), in the dtype of the arithmetic."""
    compute = compute_dtype(weight_c.dtype)
    num_classes = 0 if class_weight is None else class_weight.shape[1]
    grad_class_weight = weight_c.new_empty((level.shape[0], num_classes), dtype=compute)
    return weight_c.new_empty(weight_c.shape, dtype=compute), grad_class_weight


def _triton_cotangent_backward(
    weight_c: Tensor, level: Tensor, class_weight: Tensor | None, grad: Tensor
) -> tuple[Tensor, Tensor]:
    results = _fake_cotangent_backward(weight_c, level, class_weight, grad)
    _launch("cotangent_backward", weight_c, level, class_weight, grad, *results)
    return results


def _save_per_image(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    grad_x, *_ = inputs
    ctx.save_for_backward(*inputs[2:])
    ctx.dtype = grad_x.dtype


def _epilogue_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Plain PyTorch is enough: the op is linear, and training differentiates `denoise_loss` instead."""
    s = _per_image(ctx.saved_tensors[0], grad)
    return (s * grad).to(ctx.dtype), s * grad, None


def _x0_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The op is linear in grad_x and x, as `denoise_epilogue` is."""
    a, s = (_per_image(value, grad) for value in ctx.saved_tensors)
    return (-s * s / a * grad).to(ctx.dtype), (1 - s * s) / a * grad, None, None


def _save_loss(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _loss_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, x, s_t, eps = ctx.saved_tensors
    of_grad_x = of_x = of_eps = None
    if ctx.needs_input_grad[0]:
        op = overload("denoise_loss_backward", ctx.backend)
        of_grad_x = op(grad_x, x, s_t, eps, grad.contiguous())
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:  # not in training: x and eps are data
        s = _per_image(s_t, x)
        twice_error = 2 * _per_image(grad, x) * (s * (grad_x.to(x.dtype) + x) - eps)
        of_x, of_eps = s * twice_error, -twice_error
    return of_grad_x, of_x, None, of_eps


def _save_cotangent(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _cotangent_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight_c, level, class_weight = ctx.saved_tensors
    op = overload("head_cotangent_backward", ctx.backend)
    of_weight, of_class_weight = op(weight_c, level, class_weight, grad.contiguous())
    return of_weight.to(weight_c.dtype), None, None if class_weight is None else of_class_weight


def _per_image(value: Tensor, like: Tensor) -> Tensor:
    return value.reshape((-1,) + (1,) * (like.dim() - 1))


define(
    "head_cotangent",
    "(Tensor weight_c, Tensor level, Tensor? class_weight) -> Tensor",
    fake=_fake_cotangent,
    triton=_triton_cotangent,
    save=_save_cotangent,
    backward=_cotangent_backward,
)
define(
    "head_cotangent_backward",
    "(Tensor weight_c, Tensor level, Tensor? class_weight, Tensor grad) -> (Tensor, Tensor)",
    fake=_fake_cotangent_backward,
    triton=_triton_cotangent_backward,
)
define(
    "denoise_epilogue",
    "(Tensor grad_x, Tensor x, Tensor s_t) -> Tensor",
    fake=lambda grad_x, x, s_t: torch.empty_like(x),
    triton=_triton_epilogue,
    save=_save_per_image,
    backward=_epilogue_backward,
)
define(
    "denoise_x0",
    "(Tensor grad_x, Tensor x, Tensor a_t, Tensor s_t) -> Tensor",
    fake=lambda grad_x, x, a_t, s_t: torch.empty_like(x),
    triton=_triton_x0,
    save=_save_per_image,
    backward=_x0_backward,
)
define(
    "denoise_loss",
    "(Tensor grad_x, Tensor x, Tensor s_t, Tensor eps) -> Tensor",
    fake=lambda grad_x, x, s_t, eps: torch.empty_like(s_t),
    triton=_triton_loss,
    save=_save_loss,
    backward=_loss_backward,
)
define(
    "denoise_loss_backward",
    "(Tensor grad_x, Tensor x, Tensor s_t, Tensor eps, Tensor grad_sum) -> Tensor",
    fake=lambda grad_x, *_: torch.empty_like(grad_x),
    triton=_triton_loss_backward,
)


def _check_cotangent(weight_c: Tensor, level: Tensor, class_weight: Tensor | None) -> None:
    checks.check_tensor("weight_c", weight_c, dtypes=checks.FLOATING, shape=(None, None))
    checks.check_batch("weight_c", weight_c)
    device = weight_c.device
    checks.check_tensor("level", level, dtypes=(torch.int64,), shape=(None,), device=device)
    checks.check_batch("level", level)
    if class_weight is None:
        return
    shape = (level.shape[0], None)
    checks.check_tensor("class_weight", class_weight, dtypes=checks.FLOATING, shape=shape, device=device)
    checks.check_batch("class_weight", class_weight)
    if (weight_c.shape[0] - 1) % class_weight.shape[1] != 0:
        raise ValueError(
            f"class_weight: expected K that divides the {weight_c.shape[0] - 1} rows of weight_c other than "
            f"noise's, got K = {class_weight.shape[1]}"
        )


def _check_images(grad_x: Tensor, x: Tensor, **others: Tensor) -> None:
    """others: eps like x, everything else (B,)."""
    checks.check_tensor("grad_x", grad_x, dtypes=checks.FLOATING)
    checks.check_batch("grad_x", grad_x)
    shape, device = tuple(grad_x.shape), grad_x.device
    checks.check_tensor("x", x, dtypes=checks.FLOATING, shape=shape, device=device)
    for name, value in others.items():
        expected = shape if name == "eps" else shape[:1]
        checks.check_tensor(name, value, dtypes=checks.FLOATING, shape=expected, device=device)
        if name != "eps" and value.requires_grad:
            raise ValueError(f"{name}: expected no gradient; it is a constant of the schedule")
