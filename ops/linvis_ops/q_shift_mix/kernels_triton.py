"""Triton kernels of Q-Shift with mixes: statistics of the norm, forward.

B batch, T tokens, C channels, M weights. Tiles and numbers of tokens are those of
`q_shift.kernels_triton`: (BT tokens, BC channels), g = b * T + t. Everything is float32 inside.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from linvis_ops._sizes import ceil_div, next_power_of_two
from linvis_ops._triton import on_device
from linvis_ops.q_shift.kernels_triton import (
    BLOCK_CHANNELS,
    BLOCK_ELEMENTS,
    neighbours,
    vector_size,
)

WARP_ELEMENTS = 256  # of a tile, for each warp: one vector of 16-bit tokens in a thread


@triton.jit(do_not_specialize=['total'])
def q_shift_mix_stats_kernel(
    x,  # (B, T, C), contiguous
    stats,  # (2, B, T)
    total,  # B * T
    eps,
    C: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,  # at least C
):
    """Mean and reciprocal standard deviation over the channels of BT tokens."""
    g = tl.program_id(0) * BT + tl.arange(0, BT)[:, None]
    c = tl.arange(0, BC)[None, :]
    own = g.to(tl.int64) * C + c
    b_x = tl.load(x + own, mask=(g < total) & (c < C), other=0.0).to(tl.float32)
    mean = tl.sum(b_x, 1, keep_dims=True) / C
    centred = tl.where(c < C, b_x - mean, 0.0)
    variance = tl.sum(centred * centred, 1, keep_dims=True) / C
    tl.store(stats + g, mean, mask=g < total)
    tl.store(stats + total + g, 1.0 / tl.sqrt(variance + eps), mask=g < total)


@triton.jit
def load_stats(stats, g, total):
    """Mean and reciprocal standard deviation of the tokens g; zero where there is no token."""
    mask = g.to(tl.uint32) < total.to(tl.uint32)
    mean = tl.load(stats + g, mask=mask, other=0.0)
    return mean, tl.load(stats + total + g, mask=mask, other=0.0)


@triton.jit
def neighbour_stats(mean, scale, distance, stats, g, columns, total):
    """Statistics of the tokens at a distance; mean and scale are those of the tokens themselves.

    They are loaded for each token, not for each channel, and then chosen.
    """
    for way in tl.static_range(4):
        step = (1 if way < 2 else columns) * (1 if way % 2 else -1)
        mean_s, scale_s = load_stats(stats, g + step, total)
        mean = tl.where(distance == step, mean_s, mean)
        scale = tl.where(distance == step, scale_s, scale)
    return mean, scale


@triton.jit
def load_rows(rows, offset, mask):
    """The same part of each of several rows of numbers."""
    tiles = ()
    for i in tl.static_range(len(rows)):
        # Triton knows no unpacking in a tuple
        tiles = tiles + (tl.load(rows[i] + offset, mask=mask, other=0.0),)
    return tiles


@triton.jit(do_not_specialize=['total', 'T', 'rows', 'columns'])
def q_shift_mix_fwd_kernel(
    x,  # (B, T, C), contiguous
    mus,  # M times (C,)
    weight,  # (C,), or None without a norm
    bias,  # as weight
    stats,  # (2, B, T), or None
    mixes,  # M times (B, T, C), contiguous
    total,  # B * T
    T,
    rows,
    columns,
    C: tl.constexpr,
    HEAD: tl.constexpr,
    CLASS_TOKEN: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    VEC: tl.constexpr,
):
    """All mixes of one tile."""
    NC: tl.constexpr = (C + BC - 1) // BC
    pid = tl.program_id(0)
    g = pid // NC * BT + tl.arange(0, BT)[:, None]
    c = pid % NC * BC + tl.arange(0, BC)[None, :]
    valid = (g < total) & (c < C)
    distance, inside = neighbours(g, c, T, rows, columns, HEAD, VEC, 1, CLASS_TOKEN)
    inside = valid & inside
    own = g.to(tl.int64) * C + c
    b_y = tl.load(x + own, mask=valid, other=0.0).to(tl.float32)
    b_s = tl.load(x + ((g + distance).to(tl.int64) * C + c), mask=inside, other=0.0).to(tl.float32)
    if weight is not None:
        b_weight, b_bias = load_rows((weight, bias), c, c < C)
        mean, scale = load_stats(stats, g, total)
        mean_s, scale_s = neighbour_stats(mean, scale, distance, stats, g, columns, total)
        b_y = (b_y - mean) * scale * b_weight + b_bias
        b_s = tl.where(inside, (b_s - mean_s) * scale_s * b_weight + b_bias, 0.0)
    difference = b_y - b_s
    for i in tl.static_range(len(mus)):
        b_mu = tl.load(mus[i] + c, mask=c < C, other=0.0)
        b_mix = b_s + b_mu * difference
        tl.store(mixes[i] + own, b_mix.to(mixes[i].dtype.element_ty), mask=valid)


def _stats(x: Tensor, eps: float) -> Tensor:
    """Mean and reciprocal standard deviation of each token over its channels, (2, B, T)."""
    batch, tokens, channels = x.shape
    stats = x.new_empty((2, batch, tokens), dtype=torch.float32)
    width = next_power_of_two(channels)
    block = max(BLOCK_ELEMENTS // width, 1)
    q_shift_mix_stats_kernel[(ceil_div(batch * tokens, block),)](
        x,
        stats,
        batch * tokens,
        eps,
        C=channels,
        BT=block,
        BC=width,
        num_warps=warps_for(block * width // 2),
    )
    return stats


def warps_for(elements: int) -> int:
    """Warps for a tile with one vector of 16-bit tokens in a thread, within what a GPU takes."""
    return min(max(elements // WARP_ELEMENTS, 4), 16)


def q_shift_mix_forward(
    x: Tensor,
    mus: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rows: int,
    columns: int,
    heads: int,
    dtype: torch.dtype,
) -> list[Tensor]:
    """The mixes (B, T, C) in dtype, and with a norm its statistics (2, B, T) behind them."""
    batch, tokens, channels = x.shape
    x = x.contiguous()
    mixes = [torch.empty_like(x, dtype=dtype) for _ in mus]
    width = min(BLOCK_CHANNELS, next_power_of_two(channels))
    block = BLOCK_ELEMENTS // width
    programs = ceil_div(batch * tokens, block) * ceil_div(channels, width)
    with on_device(x):
        stats = None if weight is None else _stats(x, eps)
        q_shift_mix_fwd_kernel[(programs,)](
            x,
            tuple(mu.contiguous() for mu in mus),
            weight if weight is None else weight.contiguous(),
            bias if bias is None else bias.contiguous(),
            stats,
            tuple(mixes),
            batch * tokens,
            tokens,
            rows,
            columns,
            C=channels,
            HEAD=channels // heads,
            CLASS_TOKEN=tokens != rows * columns,
            BT=block,
            BC=width,
            VEC=vector_size(x, heads),
        )
    return mixes if stats is None else [*mixes, stats]
