"""Triton kernels of the norm over channels, forward and backward.

G tokens of C channels, contiguous. A program has tiles of BT tokens and all their channels (BC, a
power of two), so that a token is read once. Everything is float32 inside.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from linvis_ops._sizes import ceil_div, next_power_of_two
from linvis_ops._triton import on_device
from linvis_ops._triton_sum import sum_rows
from linvis_ops._triton_tiles import cast

# Elements of a tile of narrow tokens, in programs of so many warps.
ELEMENTS = 2048
BACKWARD_ELEMENTS = 1024
WARPS = 4
# From this width on, so many elements are one warp's, which needs no other for its sums; loads of
# the backward pass are under way for so many tiles.
WIDE = 256
WARP_ELEMENTS = 1024
WIDE_STAGES = 3
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
    STAGES: tl.constexpr,
):
    """Gradients of one run of tokens: dx, and sums over the run for weight and bias."""
    run = tl.program_id(0)
    c = tl.arange(0, BC)[None, :]
    b_weight = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    dweight = tl.zeros((BT, BC), tl.float32)
    dbias = tl.zeros((BT, BC), tl.float32)
    for tile in tl.range(0, tiles, num_stages=STAGES):
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


def _tile(channels: int, elements: int) -> tuple[int, int, int]:
    """Tokens and channels of a tile, and warps; a tile of narrow tokens has so many elements."""
    width = next_power_of_two(channels)
    if width < WIDE:
        return elements // width, width, WARPS
    return max(WARP_ELEMENTS // width, 1), width, max(width // WARP_ELEMENTS, 1)


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
    block, width, warps = _tile(channels, ELEMENTS)
    with on_device(x):
        layer_norm_fwd_kernel[(ceil_div(total, block),)](
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
            num_warps=warps,
        )
    return y


def layer_norm_backward(
    gy: Tensor, x: Tensor, weight: Tensor, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, in its shape and dtype, and by weight and bias, (C,), float32."""
    channels = x.shape[-1]
    total = x.numel() // channels
    x = x.contiguous()
    dx = torch.empty_like(x)
    block, width, warps = _tile(channels, BACKWARD_ELEMENTS)
    blocks = ceil_div(total, block)
    tiles = ceil_div(blocks, BACKWARD_PROGRAMS)
    runs = ceil_div(blocks, tiles)
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
            STAGES=WIDE_STAGES if width >= WIDE else 1,
            num_warps=warps,
        )
    dweight, dbias = sum_rows(partial, 2)
    return dx, dweight, dbias
