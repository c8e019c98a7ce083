"""Triton kernels of the norm over channels, forward and backward.

G tokens of C channels, contiguous. A program has tiles of BT tokens and all their channels (BC, a
power of two), so that a token is read once. Everything is float32 inside.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from linvis_ops._triton import on_device
from linvis_ops._triton_sum import sum_rows
from linvis_ops._triton_tiles import cast

# Elements of a tile: 16 of each thread of four warps, in the backward pass 8.
ELEMENTS = 2048
BACKWARD_ELEMENTS = 1024
WARPS = 4
MOST_WARPS = 16
# Programs of the backward pass, as many as a large GPU runs at once. Each writes sums for every
# channel, so more of them cost traffic.
BACKWARD_PROGRAMS = 1056


@triton.jit
def normalised(b_x, inside, eps, C: tl.constexpr, CENTRED: tl.constexpr):
    """Tokens (BT, BC) without weight and bias, zero beyond C; and their factors (BT, 1)."""
    if CENTRED:
        mean = tl.sum(b_x, 1, keep_dims=True) / C
        b_x = tl.where(inside, b_x - mean, 0.0)
    factor = 1.0 / tl.sqrt(tl.sum(b_x * b_x, 1, keep_dims=True) / C + eps)
    return b_x * factor, factor


@triton.jit(do_not_specialize=['total'])
def layer_norm_fwd_kernel(
    x,  # (G, C), contiguous
    weight,  # (C,)
    bias,  # (C,), or None
    y,  # (G, C), contiguous
    total,  # G
    eps,
    C: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    CENTRED: tl.constexpr,
):
    """One tile."""
    g = tl.program_id(0) * BT + tl.arange(0, BT)[:, None]
    c = tl.arange(0, BC)[None, :]
    own = g.to(tl.int64) * C + c
    valid = (g < total) & (c < C)
    b_x = tl.load(x + own, mask=valid, other=0.0).to(tl.float32)
    b_y, _ = normalised(b_x, c < C, eps, C, CENTRED)
    b_y *= tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    if bias is not None:
        b_y += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    tl.store(y + own, cast(b_y, y), mask=valid)


@triton.jit(do_not_specialize=['total', 'tiles'])
def layer_norm_bwd_kernel(
    gy,  # (G, C), contiguous
    x,  # (G, C), contiguous
    weight,  # (C,)
    dx,  # (G, C), contiguous
    partial,  # (programs, 2, C), float32: gradients by weight and bias
    total,  # G
    tiles,  # of a program, one after another
    eps,
    C: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,
    CENTRED: tl.constexpr,
):
    """Gradients of one run of tokens: dx, and sums over the run for weight and bias."""
    run = tl.program_id(0)
    c = tl.arange(0, BC)[None, :]
    b_weight = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    dweight = tl.zeros((BT, BC), tl.float32)
    dbias = tl.zeros((BT, BC), tl.float32)
    for tile in range(tiles):
        g = (run * tiles + tile) * BT + tl.arange(0, BT)[:, None]
        own = g.to(tl.int64) * C + c
        valid = (g < total) & (c < C)
        b_x = tl.load(x + own, mask=valid, other=0.0).to(tl.float32)
        b_gy = tl.load(gy + own, mask=valid, other=0.0).to(tl.float32)
        b_y, factor = normalised(b_x, c < C, eps, C, CENTRED)
        dweight += b_gy * b_y
        dbias += b_gy
        b_g = b_gy * b_weight
        b_dx = b_g - b_y * (tl.sum(b_g * b_y, 1, keep_dims=True) / C)
        if CENTRED:
            b_dx -= tl.sum(b_g, 1, keep_dims=True) / C
        tl.store(dx + own, cast(b_dx * factor, dx), mask=valid)
    p = partial + run * (2 * C) + c
    tl.store(p, tl.sum(dweight, 0, keep_dims=True), mask=c < C)
    tl.store(p + C, tl.sum(dbias, 0, keep_dims=True), mask=c < C)


def _warps(elements: int, of: int) -> int:
    """Warps of a program whose tile has so many elements, WARPS for `of` of them."""
    return min(max(WARPS * elements // of, WARPS), MOST_WARPS)


def layer_norm_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The normalised tokens, contiguous, in dtype."""
    channels = x.shape[-1]
    total = x.numel() // channels
    x = x.contiguous()
    y = torch.empty_like(x, dtype=dtype)
    width = triton.next_power_of_2(channels)
    block = max(ELEMENTS // width, 1)
    with on_device(x):
        layer_norm_fwd_kernel[(triton.cdiv(total, block),)](
            x,
            weight.contiguous(),
            bias if bias is None else bias.contiguous(),
            y,
            total,
            eps,
            C=channels,
            BT=block,
            BC=width,
            CENTRED=centred,
            num_warps=_warps(block * width, ELEMENTS),
        )
    return y


def layer_norm_backward(
    gy: Tensor, x: Tensor, weight: Tensor, eps: float, centred: bool
) -> tuple[Tensor, Tensor]:
    """Gradient by x, in its shape and dtype, and those by weight and bias, (2, C), float32."""
    channels = x.shape[-1]
    total = x.numel() // channels
    x = x.contiguous()
    dx = torch.empty_like(x)
    width = triton.next_power_of_2(channels)
    block = max(BACKWARD_ELEMENTS // width, 1)
    blocks = triton.cdiv(total, block)
    tiles = triton.cdiv(blocks, BACKWARD_PROGRAMS)
    runs = triton.cdiv(blocks, tiles)
    partial = x.new_empty((runs, 2 * channels), dtype=torch.float32)
    with on_device(x):
        layer_norm_bwd_kernel[(runs,)](
            gy.contiguous(),
            x,
            weight.contiguous(),
            dx,
            partial,
            total,
            tiles,
            eps,
            C=channels,
            BT=block,
            BC=width,
            CENTRED=centred,
            num_warps=_warps(block * width, BACKWARD_ELEMENTS),
        )
    (sums,) = sum_rows(partial)
    return dx, sums.view(2, channels)
