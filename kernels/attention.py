"""Triton kernels of attention, of its vector-Jacobian product (VJP), and of the derivative of the VJP.

B batch, N tokens, C channels, h heads, D = C/h channels per head. Rows are query tokens, columns key tokens.

No N x N matrix reaches memory: a program holds one tile of it at a time and recomputes the probabilities from
`lse`. A head may be wider than what fits beside a tile (D = 256, 512): inner products over D are summed chunk
by chunk, and the channels of a result are split over programs.

Tiles are named as in the equations of `cdm_fast/ops/attention.py`: `p` probabilities, `grad_x` the gradient
of x in the VJP, `x_dot` the tangent of x along (u_q, u_k, u_v).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from cdm_fast.kernels import on_its_device
from cdm_fast.kernels.attention_tiles import (
    LOG2_E,
    add_product,
    inner,
    inner_dot,
    load_tile,
    of_rows,
    place,
    probabilities,
    probabilities_of_rows,
    store_tile,
    tangents,
)
from torch import Tensor

_LONG = 512  # tokens: a head of this many has four tiles of 128 rows


class Blocks(NamedTuple):
    """How a kernel cuts its work."""

    chunk: int  # channels of one step of an inner product
    out_width: int  # channels of the result that one program computes
    block: int  # tokens of the result that one program computes
    step: int  # tokens of the other side per iteration
    warps: int


@on_its_device
def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, num_heads: int, out: Tensor, lse: Tensor
) -> None:
    """Fills out (B, N, C) and lse (B, h, N) fp32. All contiguous; fp32, bf16 or fp16; N, D of any size."""
    _launch(_forward_kernel, 1, _sizes(q, num_heads), (q, k, v, out, lse), scale)


@on_its_device
def attention_vjp(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    num_heads: int,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
) -> None:
    """Fills grad_q, grad_k, grad_v (B, N, C), given what `attention` filled. All contiguous."""
    sizes = _sizes(q, num_heads)
    delta = _row_dot(g, out, sizes)
    _launch(_vjp_rows_kernel, 1, sizes, (g, q, k, v, lse, delta, grad_q), scale)
    _launch(_vjp_columns_kernel, 2, sizes, (g, q, k, v, lse, delta, grad_k, grad_v), scale)


@on_its_device
def attention_vjp_backward(
    u_q: Tensor,
    u_k: Tensor,
    u_v: Tensor,
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    num_heads: int,
    grad_g: Tensor,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
) -> None:
    """Fills the gradients of `<u_q, grad_q> + <u_k, grad_k> + <u_v, grad_v>` of the VJP. All contiguous."""
    sizes = _sizes(q, num_heads)
    inputs = (u_q, u_k, u_v, g, q, k, v, lse)
    mean = torch.empty_like(lse)
    _launch(_out_dot_kernel, 2, sizes, (u_q, u_k, u_v, q, k, v, lse, mean, grad_g), scale)
    delta, delta_dot = _row_dot(g, out, sizes), _row_dot(g, grad_g, sizes)
    statistics = (mean, delta, delta_dot)
    _launch(_vjp_backward_rows_kernel, 2, sizes, (*inputs, *statistics, grad_q), scale)
    _launch(_vjp_backward_columns_kernel, 3, sizes, (*inputs, *statistics, grad_k, grad_v), scale)


def _sizes(q: Tensor, num_heads: int) -> tuple[int, int, int, int]:
    """(B, N, h, D)"""
    return q.shape[0], q.shape[1], num_heads, q.shape[2] // num_heads


def choose_blocks(
    width: int, dtype: torch.dtype, products: int, num_tokens: int = 0, capability: int = 80
) -> Blocks:
    """How to cut the work for heads of D = width in a kernel that adds `products` products at every step.

    Chosen so that almost no registers spill on sm_80, sm_90 and sm_100, by the assembler's report. `wgmma`
    of sm_90 needs 64 rows or more. There, two programs share the result's channels for heads wider than 128,
    and long sequences of heads up to 64 wide use tiles of 128 rows where registers suffice: these load half
    as many bytes per product and take up to 112 KiB of shared memory.
    """
    padded = max(16, triton.next_power_of_2(width))
    if dtype == torch.float32:  # multiplied without tensor cores, from registers
        return Blocks(chunk=16, out_width=min(padded, 64), block=32, step=16, warps=4)
    if capability == 90 and padded <= 64 and num_tokens >= _LONG:
        block, step = (128, 64) if products < 3 else (64, 32)
        return Blocks(chunk=padded, out_width=padded, block=block, step=step, warps=8)
    if capability == 90 and padded > 128 and products > 1:
        return Blocks(chunk=64, out_width=128, block=64, step=64, warps=8)
    out_width = min(padded, 256)
    block = 64 if products == 1 or out_width == 128 else 32
    return Blocks(chunk=min(padded, 64), out_width=out_width, block=block, step=32, warps=8)


def _capability(tensor: Tensor) -> int:
    """90 for an H100 or H200; 80 for a CPU, where the kernels are interpreted."""
    if tensor.device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return 10 * major + minor


def _launch(
    kernel: triton.JITFunction,
    products: int,
    sizes: tuple[int, int, int, int],
    tensors: tuple[Tensor, ...],
    scale: float,
) -> None:
    batch, num_tokens, num_heads, width = sizes
    blocks = choose_blocks(width, tensors[0].dtype, products, num_tokens, _capability(tensors[0]))
    num_blocks = triton.cdiv(num_tokens, blocks.block)
    grid = (triton.cdiv(width, blocks.out_width) * num_blocks * batch * num_heads,)
    kernel[grid](
        *tensors,
        scale,
        num_tokens,
        num_blocks,
        num_heads,
        WIDTH=width,
        CHUNK=blocks.chunk,
        OUT_WIDTH=blocks.out_width,
        BLOCK=blocks.block,
        STEP=blocks.step,
        num_warps=blocks.warps,
        num_stages=2,
    )


def _row_dot(x: Tensor, y: Tensor, sizes: tuple[int, int, int, int]) -> Tensor:
    """sum over a head's channels of x y: (B, h, N) fp32."""
    batch, num_tokens, num_heads, width = sizes
    result = torch.empty(batch, num_heads, num_tokens, dtype=torch.float32, device=x.device)
    num_blocks = triton.cdiv(num_tokens, 16)
    grid = (num_blocks * batch * num_heads,)
    padded = triton.next_power_of_2(width)
    _row_dot_kernel[grid](
        x, y, result, num_tokens, num_blocks, num_heads, WIDTH=width, PADDED=padded, BLOCK=16
    )
    return result


@triton.jit
def _row_dot_kernel(
    x: tl.tensor,
    y: tl.tensor,
    result: tl.tensor,
    num_tokens: int,
    num_blocks: int,
    num_heads: int,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    _, block, first_row, first = place(num_blocks, num_tokens, num_heads, WIDTH, WIDTH)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    channels = tl.arange(0, PADDED)
    stride = num_heads * WIDTH
    x_tile = load_tile(x + first, rows, channels, num_tokens, stride, WIDTH).to(tl.float32)
    y_tile = load_tile(y + first, rows, channels, num_tokens, stride, WIDTH).to(tl.float32)
    tl.store(result + first_row + rows, tl.sum(x_tile * y_tile, 1), mask=rows < num_tokens)


@triton.jit
def _forward_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    scale: float,
    num_tokens: int,
    num_blocks: int,
    num_heads: int,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """Softmax with a running maximum and sum, so that each column is visited once."""
    part, block, first_row, first = place(num_blocks, num_tokens, num_heads, WIDTH, OUT_WIDTH)
    q, k, v, out = q + first, k + first, v + first, out + first
    stride = num_heads * WIDTH
    rows = block * BLOCK + tl.arange(0, BLOCK)
    channels = part * OUT_WIDTH + tl.arange(0, OUT_WIDTH)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    result = tl.zeros((BLOCK, OUT_WIDTH), tl.float32)
    for start in range(0, num_tokens, STEP):
        columns = start + tl.arange(0, STEP)
        scores = inner(q, k, rows, columns, num_tokens, stride, WIDTH, CHUNK)
        scores = tl.where(columns[None, :] < num_tokens, scores * (scale * LOG2_E), float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        result = add_product(result * shrink[:, None], p, v, columns, channels, num_tokens, stride, WIDTH)
        top = new_top
    store_tile(out, result / total[:, None], rows, channels, num_tokens, stride, WIDTH)
    if part == 0:
        tl.store(lse + first_row + rows, (top + tl.log2(total)) / LOG2_E, mask=rows < num_tokens)


@triton.jit
def _vjp_rows_kernel(
    g: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    grad_q: tl.tensor,
    scale: float,
    num_tokens: int,
    num_blocks: int,
    num_heads: int,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """grad_q of one block of rows."""
    part, block, first_row, first = place(num_blocks, num_tokens, num_heads, WIDTH, OUT_WIDTH)
    g, q, k, v, grad_q = g + first, q + first, k + first, v + first, grad_q + first
    stride = num_heads * WIDTH
    rows = block * BLOCK + tl.arange(0, BLOCK)
    channels = part * OUT_WIDTH + tl.arange(0, OUT_WIDTH)
    lse_rows = of_rows(lse, first_row, rows, num_tokens, float("inf"))[:, None]
    delta_rows = of_rows(delta, first_row, rows, num_tokens, 0.0)[:, None]
    result = tl.zeros((BLOCK, OUT_WIDTH), tl.float32)
    for start in range(0, num_tokens, STEP):
        columns = start + tl.arange(0, STEP)
        p = probabilities_of_rows(q, k, rows, columns, lse_rows, scale, num_tokens, stride, WIDTH, CHUNK)
        grad_p = inner(g, v, rows, columns, num_tokens, stride, WIDTH, CHUNK)
        grad_scores = p * (grad_p - delta_rows)
        result = add_product(result, grad_scores, k, columns, channels, num_tokens, stride, WIDTH)
    store_tile(grad_q, result * scale, rows, channels, num_tokens, stride, WIDTH)


@triton.jit
def _vjp_columns_kernel(
    g: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    lse: tl.tensor,
    delta: tl.tensor,
    grad_k: tl.tensor,
    grad_v: tl.tensor,
    scale: float,
    num_tokens: int,
    num_blocks: int,
    num_heads: int,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """grad_k and grad_v of one block of columns. Tiles are transposed: (columns, rows)."""
    part, block, first_row, first = place(num_blocks, num_tokens, num_heads, WIDTH, OUT_WIDTH)
    g, q, k, v = g + first, q + first, k + first, v + first
    stride = num_heads * WIDTH
    columns = block * BLOCK + tl.arange(0, BLOCK)
    channels = part * OUT_WIDTH + tl.arange(0, OUT_WIDTH)
    result_k = tl.zeros((BLOCK, OUT_WIDTH), tl.float32)
    result_v = tl.zeros((BLOCK, OUT_WIDTH), tl.float32)
    for start in range(0, num_tokens, STEP):
        rows = start + tl.arange(0, STEP)
        # Rows beyond the last token have probability 0, because their lse is infinite.
        lse_rows = of_rows(lse, first_row, rows, num_tokens, float("inf"))[None, :]
        delta_rows = of_rows(delta, first_row, rows, num_tokens, 0.0)[None, :]
        scores = inner(k, q, columns, rows, num_tokens, stride, WIDTH, CHUNK)
        p = probabilities(scores, lse_rows, scale)
        result_v = add_product(result_v, p, g, rows, channels, num_tokens, stride, WIDTH)
        grad_p = inner(v, g, columns, rows, num_tokens, stride, WIDTH, CHUNK)
        grad_scores = p * (grad_p - delta_rows)
        result_k = add_product(result_k, grad_scores, q, rows, channels, num_tokens, stride, WIDTH)
    store_tile(grad_k + first, result_k * scale, columns, channels, num_tokens, stride, WIDTH)
    store_tile(grad_v + first, result_v, columns, channels, num_tokens, stride, WIDTH)


@triton.jit
def _out_dot_kernel(
    u_q: tl.tensor,
    u_k: tl.tensor,
    u_v: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    lse: tl.tensor,
    mean: tl.tensor,
    out_dot: tl.tensor,
    scale: float,
    num_tokens: int,
    num_blocks: int,
    num_heads: int,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """mean and out_dot of one block of rows.

    It takes two passes over the columns: `sum p scores_dot v - mean out` would need only one, but cancels
    badly where all scores change alike.
    """
    part, block, first_row, first = place(num_blocks, num_tokens, num_heads, WIDTH, OUT_WIDTH)
    u_q, u_k, u_v, q, k, v = u_q + first, u_k + first, u_v + first, q + first, k + first, v + first
    stride = num_heads * WIDTH
    rows = block * BLOCK + tl.arange(0, BLOCK)
    channels = part * OUT_WIDTH + tl.arange(0, OUT_WIDTH)
    lse_rows = of_rows(lse, first_row, rows, num_tokens, float("inf"))[:, None]
    mean_rows = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)  # 1, but for the rounding of lse
    for start in range(0, num_tokens, STEP):
        columns = start + tl.arange(0, STEP)
        p = probabilities_of_rows(q, k, rows, columns, lse_rows, scale, num_tokens, stride, WIDTH, CHUNK)
        scores_dot = inner_dot(q, u_q, k, u_k, rows, columns, num_tokens, stride, WIDTH, CHUNK)
        mean_rows += tl.sum(p * scores_dot, 1)
        total += tl.sum(p, 1)
    total = tl.where(rows < num_tokens, total, 1.0)
    mean_rows = mean_rows * scale / total
    result = tl.zeros((BLOCK, OUT_WIDTH), tl.float32)
    for start in range(0, num_tokens, STEP):
        columns = start + tl.arange(0, STEP)
        p = probabilities_of_rows(q, k, rows, columns, lse_rows, scale, num_tokens, stride, WIDTH, CHUNK)
        scores_dot = inner_dot(q, u_q, k, u_k, rows, columns, num_tokens, stride, WIDTH, CHUNK) * scale
        p_dot = p * (scores_dot - mean_rows[:, None])
        result = add_product(result, p_dot, v, columns, channels, num_tokens, stride, WIDTH)
        result = add_product(result, p, u_v, columns, channels, num_tokens, stride, WIDTH)
    store_tile(out_dot + first, result / total[:, None], rows, channels, num_tokens, stride, WIDTH)
    if part == 0:
        tl.store(mean + first_row + rows, mean_rows, mask=rows < num_tokens)


@triton.jit
def _vjp_backward_rows_kernel(
    u_q: tl.tensor,
    u_k: tl.tensor,
    u_v: tl.tensor,
    g: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    lse: tl.tensor,
    mean: tl.tensor,
    delta: tl.tensor,
    delta_dot: tl.tensor,
    grad_q: tl.tensor,
    scale: float,
    num_tokens: int,
    num_blocks: int,
    num_heads: int,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """The tangent of grad_q, one block of rows."""
    part, block, first_row, first = place(num_blocks, num_tokens, num_heads, WIDTH, OUT_WIDTH)
    u_q, u_k, u_v, g = u_q + first, u_k + first, u_v + first, g + first
    q, k, v = q + first, k + first, v + first
    stride = num_heads * WIDTH
    rows = block * BLOCK + tl.arange(0, BLOCK)
    channels = part * OUT_WIDTH + tl.arange(0, OUT_WIDTH)
    lse_rows = of_rows(lse, first_row, rows, num_tokens, float("inf"))[:, None]
    mean_rows = of_rows(mean, first_row, rows, num_tokens, 0.0)[:, None]
    delta_rows = of_rows(delta, first_row, rows, num_tokens, 0.0)[:, None]
    delta_dot_rows = of_rows(delta_dot, first_row, rows, num_tokens, 0.0)[:, None]
    result = tl.zeros((BLOCK, OUT_WIDTH), tl.float32)
    for start in range(0, num_tokens, STEP):
        columns = start + tl.arange(0, STEP)
        p = probabilities_of_rows(q, k, rows, columns, lse_rows, scale, num_tokens, stride, WIDTH, CHUNK)
        scores_dot = inner_dot(q, u_q, k, u_k, rows, columns, num_tokens, stride, WIDTH, CHUNK) * scale
        grad_p = inner(g, v, rows, columns, num_tokens, stride, WIDTH, CHUNK)
        grad_p_dot = inner(g, u_v, rows, columns, num_tokens, stride, WIDTH, CHUNK)
        _, grad_scores, grad_scores_dot = tangents(
            p, scores_dot, grad_p, grad_p_dot, mean_rows, delta_rows, delta_dot_rows
        )
        result = add_product(result, grad_scores_dot, k, columns, channels, num_tokens, stride, WIDTH)
        result = add_product(result, grad_scores, u_k, columns, channels, num_tokens, stride, WIDTH)
    store_tile(grad_q + first, result * scale, rows, channels, num_tokens, stride, WIDTH)


@triton.jit
def _vjp_backward_columns_kernel(
    u_q: tl.tensor,
    u_k: tl.tensor,
    u_v: tl.tensor,
    g: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    lse: tl.tensor,
    mean: tl.tensor,
    delta: tl.tensor,
    delta_dot: tl.tensor,
    grad_k: tl.tensor,
    grad_v: tl.tensor,
    scale: float,
    num_tokens: int,
    num_blocks: int,
    num_heads: int,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    OUT_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """The tangents of grad_k and grad_v, one block of columns. Tiles are transposed: (columns, rows)."""
    part, block, first_row, first = place(num_blocks, num_tokens, num_heads, WIDTH, OUT_WIDTH)
    u_q, u_k, u_v, g = u_q + first, u_k + first, u_v + first, g + first
    q, k, v = q + first, k + first, v + first
    stride = num_heads * WIDTH
    columns = block * BLOCK + tl.arange(0, BLOCK)
    channels = part * OUT_WIDTH + tl.arange(0, OUT_WIDTH)
    result_k = tl.zeros((BLOCK, OUT_WIDTH), tl.float32)
    result_v = tl.zeros((BLOCK, OUT_WIDTH), tl.float32)
    for start in range(0, num_tokens, STEP):
        rows = start + tl.arange(0, STEP)
        # Rows beyond the last token have probability 0, because their lse is infinite.
        lse_rows = of_rows(lse, first_row, rows, num_tokens, float("inf"))[None, :]
        mean_rows = of_rows(mean, first_row, rows, num_tokens, 0.0)[None, :]
        delta_rows = of_rows(delta, first_row, rows, num_tokens, 0.0)[None, :]
        delta_dot_rows = of_rows(delta_dot, first_row, rows, num_tokens, 0.0)[None, :]
        scores = inner(k, q, columns, rows, num_tokens, stride, WIDTH, CHUNK)
        p = probabilities(scores, lse_rows, scale)
        scores_dot = inner_dot(k, u_k, q, u_q, columns, rows, num_tokens, stride, WIDTH, CHUNK) * scale
        grad_p = inner(v, g, columns, rows, num_tokens, stride, WIDTH, CHUNK)
        grad_p_dot = inner(u_v, g, columns, rows, num_tokens, stride, WIDTH, CHUNK)
        p_dot, grad_scores, grad_scores_dot = tangents(
            p, scores_dot, grad_p, grad_p_dot, mean_rows, delta_rows, delta_dot_rows
        )
        result_v = add_product(result_v, p_dot, g, rows, channels, num_tokens, stride, WIDTH)
        result_k = add_product(result_k, grad_scores_dot, q, rows, channels, num_tokens, stride, WIDTH)
        result_k = add_product(result_k, grad_scores, u_q, rows, channels, num_tokens, stride, WIDTH)
    store_tile(grad_k + first, result_k * scale, columns, channels, num_tokens, stride, WIDTH)
    store_tile(grad_v + first, result_v, columns, channels, num_tokens, stride, WIDTH)
