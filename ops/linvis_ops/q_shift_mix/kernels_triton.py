"""Triton kernels of Q-Shift with mixes: statistics of the norm, forward, backward.

B batch, T tokens, C channels, M weights. Tiles and numbers of tokens are those of
`q_shift.kernels_triton`: (BT tokens, BC channels), g = b * T + t. Everything is float32 inside.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from linvis_ops._triton import on_device
from linvis_ops._triton_sum import sum_rows
from linvis_ops.q_shift.kernels_triton import (
    BLOCK_CHANNELS,
    BLOCK_ELEMENTS,
    neighbours,
    vector_size,
)

# Elements of a tile in the backward pass, where a thread holds one vector and its running sums.
BACKWARD_ELEMENTS = 1024
# Programs of the backward pass: as many as a large GPU runs at once, with a norm fewer because of
# its registers. Each writes a partial sum for every channel, so more of them cost traffic.
BACKWARD_PROGRAMS = 640
BACKWARD_PROGRAMS_WITH_NORM = 384
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


@triton.jit
def mix_gradients(grads, own, other, valid, inside, b_y, b_mus, sums):
    """Gradient by y of a tile, and sums for the gradients by the weights with the tile added."""
    b_dy = tl.zeros_like(b_y)
    new_sums = ()
    for i in tl.static_range(len(grads)):
        b_g = tl.load(grads[i] + own, mask=valid, other=0.0).to(tl.float32)
        b_s = tl.load(grads[i] + other, mask=inside, other=0.0).to(tl.float32)
        difference = b_g - b_s
        b_dy += b_s + b_mus[i] * difference
        # over all tokens, g (y - shift(y)) and (g - adjoint(g)) y have one sum
        new_sums = new_sums + (sums[i] + b_y * difference,)
    return b_dy, new_sums


@triton.jit(do_not_specialize=['total', 'T', 'rows', 'columns', 'tiles'])
def q_shift_mix_bwd_kernel(
    grads,  # M times (B, T, C), contiguous
    x,  # (B, T, C), contiguous
    mus,  # M times (C,)
    weight,  # (C,), or None without a norm
    bias,  # as weight
    stats,  # (2, B, T), or None
    dx,  # (B, T, C), contiguous
    partial,  # (runs of tokens, M, or M + 2 with a norm, C), float32
    total,  # B * T
    T,
    rows,
    columns,
    tiles,  # of a program, one after another; with a norm a tile holds all channels
    C: tl.constexpr,
    HEAD: tl.constexpr,
    CLASS_TOKEN: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    VEC: tl.constexpr,
):
    """Gradients of one run of tokens: dx, and sums over the run for the weights of channels."""
    NC: tl.constexpr = (C + BC - 1) // BC
    M: tl.constexpr = len(mus)
    NORM: tl.constexpr = weight is not None
    pid = tl.program_id(0)
    run = pid // NC
    c = pid % NC * BC + tl.arange(0, BC)[None, :]
    b_mus = load_rows(mus, c, c < C)
    zero = tl.zeros((BT, BC), tl.float32)
    dmus = (zero,) * M
    dweight = zero
    dbias = zero
    if NORM:
        b_weight, b_bias = load_rows((weight, bias), c, c < C)
    for tile in range(tiles):
        g = (run * tiles + tile) * BT + tl.arange(0, BT)[:, None]
        valid = (g < total) & (c < C)
        distance, inside = neighbours(g, c, T, rows, columns, HEAD, VEC, -1, CLASS_TOKEN)
        own = g.to(tl.int64) * C + c
        other = (g + distance).to(tl.int64) * C + c
        b_y = tl.load(x + own, mask=valid, other=0.0).to(tl.float32)
        if NORM:
            mean, scale = load_stats(stats, g, total)
            xhat = (b_y - mean) * scale
            b_y = xhat * b_weight + b_bias
        b_dx, dmus = mix_gradients(grads, own, other, valid, valid & inside, b_y, b_mus, dmus)
        if NORM:
            dweight += b_dx * xhat
            dbias += b_dx
            # zero in channels beyond C, as dy is
            dxhat = b_dx * b_weight
            along = tl.sum(dxhat * xhat, 1, keep_dims=True) / C
            b_dx = (dxhat - tl.sum(dxhat, 1, keep_dims=True) / C - xhat * along) * scale
        tl.store(dx + own, b_dx.to(dx.dtype.element_ty), mask=valid)
    p_partial = partial + run * ((M + 2 * NORM) * C) + c
    for i in tl.static_range(M):
        tl.store(p_partial + i * C, tl.sum(dmus[i], 0, keep_dims=True), mask=c < C)
    if NORM:
        tl.store(p_partial + M * C, tl.sum(dweight, 0, keep_dims=True), mask=c < C)
        tl.store(p_partial + (M + 1) * C, tl.sum(dbias, 0, keep_dims=True), mask=c < C)


def _stats(x: Tensor, eps: float) -> Tensor:
    """Mean and reciprocal standard deviation of each token over its channels, (2, B, T)."""
    batch, tokens, channels = x.shape
    stats = x.new_empty((2, batch, tokens), dtype=torch.float32)
    width = triton.next_power_of_2(channels)
    block = max(BLOCK_ELEMENTS // width, 1)
    q_shift_mix_stats_kernel[(triton.cdiv(batch * tokens, block),)](
        x,
        stats,
        batch * tokens,
        eps,
        C=channels,
        BT=block,
        BC=width,
        num_warps=_warps(block * width // 2),
    )
    return stats


def _warps(elements: int) -> int:
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
    width = min(BLOCK_CHANNELS, triton.next_power_of_2(channels))
    block = BLOCK_ELEMENTS // width
    programs = triton.cdiv(batch * tokens, block) * triton.cdiv(channels, width)
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


def q_shift_mix_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    mus: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor | None,
    rows: int,
    columns: int,
    heads: int,
) -> tuple[Tensor, Tensor]:
    """Gradient by x (B, T, C), and by all channel weights (M, C): mus, then weight and bias."""
    batch, tokens, channels = x.shape
    x = x.contiguous()
    dx = torch.empty_like(x)
    width = triton.next_power_of_2(channels)
    if weight is None:  # else sums over the channels of a token need all of them in one tile
        width = min(width, BLOCK_CHANNELS)
    block = max(BACKWARD_ELEMENTS // width, 1)
    blocks = triton.cdiv(batch * tokens, block)
    parts = triton.cdiv(channels, width)
    programs = BACKWARD_PROGRAMS if weight is None else BACKWARD_PROGRAMS_WITH_NORM
    tiles = triton.cdiv(blocks * parts, programs)
    runs = triton.cdiv(blocks, tiles)
    parameters = len(mus) + (0 if weight is None else 2)
    partial = x.new_empty((runs, parameters * channels), dtype=torch.float32)
    with on_device(x):
        q_shift_mix_bwd_kernel[(runs * parts,)](
            tuple(grad.contiguous() for grad in grads),
            x,
            tuple(mu.contiguous() for mu in mus),
            weight if weight is None else weight.contiguous(),
            bias if bias is None else bias.contiguous(),
            stats if stats is None else stats.contiguous(),
            dx,
            partial,
            batch * tokens,
            tokens,
            rows,
            columns,
            tiles,
            C=channels,
            HEAD=channels // heads,
            CLASS_TOKEN=tokens != rows * columns,
            BT=block,
            BC=width,
            VEC=vector_size(x, heads),
            num_warps=_warps(block * width),
            num_stages=1,
        )
    (sums,) = sum_rows(partial)
    return dx, sums.view(parameters, channels)
