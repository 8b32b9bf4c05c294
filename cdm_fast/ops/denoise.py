"""The two ends of the way back through the network: the head's cotangent, and eps_hat with its squared error.

B batch, L = T+2 noise levels, K classes, D features of the head. CDM Thm 3.1: with F(x, t) = f[T+1] - f[t],
E[eps | x_t = x] = s_t (grad_x F + x), and x_0 = (x - s_t eps) / a_t.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cdm_fast.ops import _checks


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
    compute = torch.promote_types(_output_dtype(grad_x, x), torch.float32)
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
    class_weight: for a joint head, how much z[level, c] counts in f: one-hot for class c, softmax_c z[level]
        for the marginal, (1 + w) one-hot - w softmax for guidance w. None is K = 1, weight 1.

    Returns weight_c's dtype. Differentiable once with respect to weight_c and class_weight, the same bits
    every time. Raises TypeError or ValueError, naming the argument, for what does not fit the above. Source: CDM Thm 3.1.
    """
    _check_cotangent(weight_c, level, class_weight)
    num_classes = 1 if class_weight is None else class_weight.shape[1]
    _checks.check_index_range("level", level, 0, (weight_c.shape[0] - 1) // num_classes + 1)
    return head_cotangent_reference(weight_c, level, class_weight)


def denoise_epilogue(
    grad_x: Tensor,  # (B, ...)
    x: Tensor,  # (B, ...)
    s_t: Tensor,  # (B,)
) -> Tensor:  # (B, ...)
    """eps_hat = s_t (grad_x + x), in one pass.

    grad_x: the gradient of F; x: the noisy image x_t; s_t: the schedule's s at each image's level: a
    constant.
    Floating dtypes may differ; computed in fp32 (fp64 if one is), returned in the wider of the two dtypes.
    Differentiable once with respect to grad_x and x (the reference: to any order). Raises TypeError or
    ValueError, naming the argument, for another shape, dtype or device. Source: CDM Thm 3.1.
    """
    _check_images(grad_x, x, s_t=s_t)
    return denoise_epilogue_reference(grad_x, x, s_t)


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
    return denoise_x0_reference(grad_x, x, a_t, s_t)


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
    return denoise_loss_reference(grad_x, x, s_t, eps)


def _check_cotangent(weight_c: Tensor, level: Tensor, class_weight: Tensor | None) -> None:
    _checks.check_tensor("weight_c", weight_c, dtypes=_checks.FLOATING, shape=(None, None))
    _checks.check_batch("weight_c", weight_c)
    device = weight_c.device
    _checks.check_tensor("level", level, dtypes=(torch.int64,), shape=(None,), device=device)
    _checks.check_batch("level", level)
    if class_weight is None:
        return
    shape = (level.shape[0], None)
    _checks.check_tensor("class_weight", class_weight, dtypes=_checks.FLOATING, shape=shape, device=device)
    _checks.check_batch("class_weight", class_weight)
    if (weight_c.shape[0] - 1) % class_weight.shape[1] != 0:
        raise ValueError(
            f"class_weight: expected K that divides the {weight_c.shape[0] - 1} rows of weight_c other than "
            f"noise's, got K = {class_weight.shape[1]}"
        )


def _check_images(grad_x: Tensor, x: Tensor, **others: Tensor) -> None:
    """others: eps like x, everything else (B,)."""
    _checks.check_tensor("grad_x", grad_x, dtypes=_checks.FLOATING)
    _checks.check_batch("grad_x", grad_x)
    shape, device = tuple(grad_x.shape), grad_x.device
    _checks.check_tensor("x", x, dtypes=_checks.FLOATING, shape=shape, device=device)
    for name, value in others.items():
        expected = shape if name == "eps" else shape[:1]
        _checks.check_tensor(name, value, dtypes=_checks.FLOATING, shape=expected, device=device)
        if name != "eps" and value.requires_grad:
            raise ValueError(f"{name}: expected no gradient; it is a constant of the schedule")
