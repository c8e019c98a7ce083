"""Triton kernel of Q-Shift, and the neighbours of tokens, which other kernels take too.

B batch, T tokens, C channels. The tokens of all pictures are numbered g = b * T + t. A tile is
(BT tokens, BC channels); VEC channels of it are what a thread moves at once, and all of them are in
one quarter of one head and have one neighbour.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from linvis_ops._sizes import ceil_div, next_power_of_two
from linvis_ops._triton import on_device

VECTOR_BYTES = 16  # the widest load and store of a thread
BLOCK_CHANNELS = 64
BLOCK_ELEMENTS = 2048  # of a tile: with 16-bit tokens, two vectors for each of 128 threads


@triton.jit
def neighbours(
    g,  # numbers of tokens, (BT, 1)
    c,  # channels, (1, BC)
    T,
    rows,
    columns,
    HEAD: tl.constexpr,  # channels of a head
    VEC: tl.constexpr,
    SIGN: tl.constexpr,  # 1, or -1 for the adjoint
    CLASS_TOKEN: tl.constexpr,
):
    """How far after each token its neighbour is, in tokens, and whether it is in the picture."""
    quarter: tl.constexpr = HEAD // 4
    t = g.to(tl.uint32) % T.to(tl.uint32)
    column = t % columns.to(tl.uint32)
    if quarter == 0:
        group = tl.zeros_like(c) + 4
    else:
        # said of the first channel of a vector, so that the compiler sees one answer for it
        group = (c // VEC * VEC % HEAD) // quarter
    # what passes is its own neighbour in its row
    in_row = (group < 2) | (group > 3)
    step = tl.where(group > 3, 0, tl.where(group % 2 == 0, -SIGN, SIGN))
    distance = tl.where(in_row, step, step * columns)
    grid = rows * columns
    # a position before the first one is beyond the last one as an unsigned number
    position = tl.where(in_row, column, t).to(tl.int32) + distance
    inside = position.to(tl.uint32) < tl.where(in_row, columns, grid).to(tl.uint32)
    if CLASS_TOKEN:
        is_class = t.to(tl.int32) == grid
        distance = tl.where(is_class, 0, distance)
        inside = inside | is_class
    return distance, inside


@triton.jit(do_not_specialize=['total', 'T', 'rows', 'columns'])
def q_shift_kernel(
    x,  # (B, T, C), contiguous
    y,  # (B, T, C), contiguous
    total,  # B * T
    T,
    rows,
    columns,
    C: tl.constexpr,
    HEAD: tl.constexpr,
    SIGN: tl.constexpr,
    CLASS_TOKEN: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    VEC: tl.constexpr,
):
    """One tile: load each vector from its neighbour, or zero."""
    NC: tl.constexpr = (C + BC - 1) // BC
    pid = tl.program_id(0)
    g = pid // NC * BT + tl.arange(0, BT)[:, None]
    c = pid % NC * BC + tl.arange(0, BC)[None, :]
    valid = (g < total) & (c < C)
    distance, inside = neighbours(g, c, T, rows, columns, HEAD, VEC, SIGN, CLASS_TOKEN)
    b_x = tl.load(x + ((g + distance).to(tl.int64) * C + c), mask=valid & inside, other=0.0)
    tl.store(y + (g.to(tl.int64) * C + c), b_x, mask=valid)


def vector_size(x: Tensor, heads: int) -> int:
    """Channels of a vector: as many as a thread moves at once within one quarter of one head."""
    head = x.shape[2] // heads
    return math.gcd(head, head // 4, VECTOR_BYTES // x.element_size())


def q_shift(x: Tensor, rows: int, columns: int, heads: int, adjoint: bool) -> Tensor:
    """Q-Shift of x (B, T, C) on a grid of rows x columns, or its adjoint."""
    batch, tokens, channels = x.shape
    x = x.contiguous()
    y = torch.empty_like(x)
    width = min(BLOCK_CHANNELS, next_power_of_two(channels))
    block = BLOCK_ELEMENTS // width
    programs = ceil_div(batch * tokens, block) * ceil_div(channels, width)
    with on_device(x):
        q_shift_kernel[(programs,)](
            x,
            y,
            batch * tokens,
            tokens,
            rows,
            columns,
            C=channels,
            HEAD=channels // heads,
            SIGN=-1 if adjoint else 1,
            CLASS_TOKEN=tokens != rows * columns,
            BT=block,
            BC=width,
            VEC=vector_size(x, heads),
        )
    return y
