"""Triton kernel of Q-Shift. B batch, T tokens, C channels; BT, BC tile sizes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from linvis_ops._triton import on_device

BLOCK_TOKENS = 16


@triton.jit(do_not_specialize=['T', 'rows', 'columns'])
def q_shift_kernel(
    x,  # (B, T, C), any strides
    y,  # (B, T, C), contiguous
    T,
    rows,
    columns,
    stride_b,
    stride_t,
    stride_c,
    C: tl.constexpr,
    sign: tl.constexpr,  # 1, or -1 for the adjoint
    BT: tl.constexpr,
    BC: tl.constexpr,
):
    """One tile of BT tokens and BC channels: load each element from its neighbour, or zero."""
    NC: tl.constexpr = (C + BC - 1) // BC
    pid = tl.program_id(0)
    tile = pid // NC
    blocks = tl.cdiv(T, BT)
    batch = (tile // blocks).to(tl.int64)
    t = (tile % blocks) * BT + tl.arange(0, BT)[:, None]  # (BT, 1)
    c = (pid % NC) * BC + tl.arange(0, BC)[None, :]  # (1, BC)
    quarter: tl.constexpr = C // 4

    shifts = (c < 4 * quarter) & (t < rows * columns)
    d_column = tl.where(c < quarter, -1, tl.where(c < 2 * quarter, 1, 0))
    d_row = tl.where(c < 2 * quarter, 0, tl.where(c < 3 * quarter, -1, 1))
    row = t // columns + tl.where(shifts, d_row * sign, 0)
    column = t % columns + tl.where(shifts, d_column * sign, 0)
    inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    source = tl.where(shifts, row * columns + column, t)
    valid = (t < T) & (c < C)
    p_x = x + batch * stride_b + source.to(tl.int64) * stride_t + c.to(tl.int64) * stride_c
    b_x = tl.load(p_x, mask=valid & (inside | (shifts == 0)), other=0.0)
    tl.store(y + batch * T * C + t.to(tl.int64) * C + c, b_x, mask=valid)


def q_shift(x: Tensor, rows: int, columns: int, adjoint: bool) -> Tensor:
    """Q-Shift of x (B, T, C) on a grid of rows x columns, or its adjoint."""
    batch, tokens, channels = x.shape
    y = torch.empty((batch, tokens, channels), dtype=x.dtype, device=x.device)
    block_channels = min(128, triton.next_power_of_2(channels))
    programs = batch * triton.cdiv(tokens, BLOCK_TOKENS) * triton.cdiv(channels, block_channels)
    with on_device(x):
        q_shift_kernel[(programs,)](
            x,
            y,
            tokens,
            rows,
            columns,
            *x.stride(),
            C=channels,
            sign=-1 if adjoint else 1,
            BT=BLOCK_TOKENS,
            BC=block_channels,
        )
    return y
