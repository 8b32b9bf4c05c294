"""Operations on one tile of attention's matrices, which the kernels of `attention.py` are made of.

B batch, N tokens, C channels, h heads, D = C/h = WIDTH channels per head. A head of a tensor is given by a
pointer to its first element and the `stride` from token to token. Rows are query tokens, columns key tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def load_tile(
    pointer: tl.tensor,
    tokens: tl.tensor,
    channels: tl.tensor,
    num_tokens: int,
    stride: int,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """pointer[tokens, channels], zero outside."""
    inside = (tokens[:, None] < num_tokens) & (channels[None, :] < WIDTH)
    return tl.load(pointer + tokens[:, None] * stride + channels[None, :], mask=inside, other=0.0)


@triton.jit
def store_tile(
    pointer: tl.tensor,
    tile: tl.tensor,
    tokens: tl.tensor,
    channels: tl.tensor,
    num_tokens: int,
    stride: int,
    WIDTH: tl.constexpr,
) -> None:
    """pointer[tokens, channels] = tile, where inside."""
    inside = (tokens[:, None] < num_tokens) & (channels[None, :] < WIDTH)
    tl.store(
        pointer + tokens[:, None] * stride + channels[None, :], tile.to(pointer.dtype.element_ty), mask=inside
    )


@triton.jit
def dot(x: tl.tensor, y: tl.tensor, tile: tl.tensor) -> tl.tensor:
    """tile + x y, summed in fp32. Operands of fp32 are not rounded to tf32."""
    # Triton's interpreter multiplies the bit patterns of bf16; fp32 holds the same products.
    if _INTERPRETED:
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y, tile, input_precision="ieee")


@triton.jit
def add_inner(
    tile: tl.tensor,
    x: tl.tensor,
    y: tl.tensor,
    x_tokens: tl.tensor,
    y_tokens: tl.tensor,
    num_tokens: int,
    stride: int,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
) -> tl.tensor:
    """tile + x[x_tokens] y[y_tokens]^T"""
    for start in range(0, WIDTH, CHUNK):
        channels = start + tl.arange(0, CHUNK)
        x_tile = load_tile(x, x_tokens, channels, num_tokens, stride, WIDTH)
        y_tile = load_tile(y, y_tokens, channels, num_tokens, stride, WIDTH)
        tile = dot(x_tile, tl.trans(y_tile), tile)
    return tile


@triton.jit
def inner(
    x: tl.tensor,
    y: tl.tensor,
    x_tokens: tl.tensor,
    y_tokens: tl.tensor,
    num_tokens: int,
    stride: int,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
) -> tl.tensor:
    """x[x_tokens] y[y_tokens]^T"""
    tile = tl.zeros((x_tokens.shape[0], y_tokens.shape[0]), tl.float32)
    return add_inner(tile, x, y, x_tokens, y_tokens, num_tokens, stride, WIDTH, CHUNK)


@triton.jit
def inner_dot(
    x: tl.tensor,
    x_dot: tl.tensor,
    y: tl.tensor,
    y_dot: tl.tensor,
    x_tokens: tl.tensor,
    y_tokens: tl.tensor,
    num_tokens: int,
    stride: int,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
) -> tl.tensor:
    """The tangent of `inner`: x_dot[x_tokens] y[y_tokens]^T + x[x_tokens] y_dot[y_tokens]^T"""
    tile = inner(x_dot, y, x_tokens, y_tokens, num_tokens, stride, WIDTH, CHUNK)
    return add_inner(tile, x, y_dot, x_tokens, y_tokens, num_tokens, stride, WIDTH, CHUNK)


@triton.jit
def add_product(
    result: tl.tensor,
    tile: tl.tensor,
    x: tl.tensor,
    tokens: tl.tensor,
    channels: tl.tensor,
    num_tokens: int,
    stride: int,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """result + tile x[tokens, channels]"""
    x_tile = load_tile(x, tokens, channels, num_tokens, stride, WIDTH)
    return dot(tile.to(x_tile.dtype), x_tile, result)


@triton.jit
def probabilities(scores: tl.tensor, lse: tl.tensor, scale: float) -> tl.tensor:
    """exp(scale scores - lse), with scores rounded as the forward kernel rounds them.

    With another rounding, the rows of grad_scores would not sum to zero as closely, and the error would show
    in grad_q where all keys share a large component. The rounding of lse only scales a whole row.
    """
    return tl.exp2(scores * (scale * LOG2_E) - lse * LOG2_E)


@triton.jit
def probabilities_of_rows(
    q: tl.tensor,
    k: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    lse_rows: tl.tensor,
    scale: float,
    num_tokens: int,
    stride: int,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
) -> tl.tensor:
    """A tile of probabilities (rows, columns), 0 for columns beyond the last token."""
    scores = inner(q, k, rows, columns, num_tokens, stride, WIDTH, CHUNK)
    return tl.where(columns[None, :] < num_tokens, probabilities(scores, lse_rows, scale), 0.0)


@triton.jit
def of_rows(
    statistic: tl.tensor, first_row: int, rows: tl.tensor, num_tokens: int, absent: float
) -> tl.tensor:
    """A statistic of these rows of a head; `absent` beyond the last token."""
    return tl.load(statistic + first_row + rows, mask=rows < num_tokens, other=absent)


@triton.jit
def tangents(
    p: tl.tensor,
    scores_dot: tl.tensor,
    grad_p: tl.tensor,
    grad_p_dot: tl.tensor,
    mean: tl.tensor,
    delta: tl.tensor,
    delta_dot: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """(p_dot, grad_scores, grad_scores_dot); statistics of rows come shaped for broadcasting."""
    p_dot = p * (scores_dot - mean)
    centred = grad_p - delta
    return p_dot, p * centred, p_dot * centred + p * (grad_p_dot - delta_dot)


@triton.jit
def place(
    num_blocks: int, num_tokens: int, num_heads: int, WIDTH: tl.constexpr, OUT_WIDTH: tl.constexpr
) -> tuple[int, int, int, int]:
    """This program's part of the result's channels, its block of tokens, and its head's offsets into
    (B, h, N) and (B, N, C)."""
    parts: tl.constexpr = (WIDTH + OUT_WIDTH - 1) // OUT_WIDTH
    part = tl.program_id(0) % parts
    block = tl.program_id(0) // parts % num_blocks
    head = (tl.program_id(0) // (parts * num_blocks)).to(tl.int64)
    first_channel = (head // num_heads) * num_tokens * num_heads * WIDTH + (head % num_heads) * WIDTH
    return part, block, head * num_tokens, first_channel
