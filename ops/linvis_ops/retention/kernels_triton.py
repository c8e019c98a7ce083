"""Triton kernels of retention on sequences: states of segments, scan, outputs.

A chunk is L tokens, a segment some chunks. A program of the output kernel has one chunk of one
head: it forms the state that enters it, in the bidirectional form from either side, out of the
other chunks of its segment and what a scan over segments left in memory, and adds what the chunk's
own tokens see of each other. Every decay is a power of the distance itself. Sums are float32.
README.md of this folder, Implementation in Triton, has the reasons.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from linvis_ops._chunks import Launch, Rows
from linvis_ops._triton import on_device
from linvis_ops._triton_math import LOG2E, exp2
from linvis_ops._triton_tiles import (
    add_product,
    load_operand,
    load_rows,
    operand,
    place,
    product,
    state_offsets,
    store_rows,
)
from linvis_ops.retention.launch import rows_and_launch

# A step whose decay has a logarithm (of base 2) below this forgets all, in float32 as well; its
# products with distances stay numbers.
SHUT = tl.constexpr(-1000.0)
# Segments whose states are loaded together by the scan.
AT_ONCE = tl.constexpr(8)
# Elements of a state in one program of the scan.
SCAN_ELEMENTS = 256


@triton.jit
def load_log2(log_gamma, h):
    """Logarithm of the decay of a head, of base 2, finite."""
    log2 = tl.load(log_gamma + h) * LOG2E
    return tl.where(log2 < SHUT, SHUT, log2)


@triton.jit
def decay(log2, distance):
    """gamma^|distance|; 1 at no distance."""
    return exp2(log2 * tl.abs(distance).to(tl.float32))


@triton.jit
def own_decays(log2, L: tl.constexpr, BIDIRECTIONAL: tl.constexpr):
    """Decays (L, L) between the tokens of a chunk, [query, key]."""
    distance = tl.arange(0, L)[:, None] - tl.arange(0, L)[None, :]
    decays = decay(log2, distance)
    if not BIDIRECTIONAL:
        decays = tl.where(distance >= 0, decays, 0.0)
    return decays


@triton.jit
def absorb(
    state, p_x, p_y, x_stride, y_stride, start, edge, log2, T, column,
    K: tl.constexpr, V: tl.constexpr, L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Add x y^T of a chunk's tokens to a state (BK, BV), decayed up to the token called edge."""
    dtype: tl.constexpr = p_x.dtype.element_ty
    x = load_operand(p_x, x_stride, start, T, 0, K, L, BK)
    y = load_rows(p_y, y_stride, start, T, column, V, L, BV).to(tl.float32)
    y *= decay(log2, start - edge + tl.arange(0, L))[:, None]
    return add_product(state, tl.trans(x), operand(y, dtype), dtype)


@triton.jit
def entering_state(
    p_x, p_y, x_stride, y_stride, states, index, start, log2, T, N, R, column,
    K: tl.constexpr, V: tl.constexpr, L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BEHIND: tl.constexpr,
):  # fmt: skip
    """Sum of x y^T over all tokens before a chunk, or behind it, decayed up to the next of them.

    Args:
        p_x: Of one head, (T, K).
        p_y: (T, V).
        x_stride: Of tokens.
        y_stride: Of tokens.
        states: Of the scan, or None.
        index: Number of the state in it that enters the segment.
        start: First token of the chunk.
        log2: As `load_log2` gives it.
        T: Tokens.
        N: Chunks.
        R: Chunks of a segment.
        column: First value channel of the tile.
        K: Key channels.
        V: Value channels.
        L: Tokens of a chunk.
        BK: Key channels of a tile.
        BV: Value channels of a tile.
        BEHIND: Tokens behind the chunk and not before it.

    Returns:
        An operand, (BK, BV).
    """
    n = start // L
    state = tl.zeros((BK, BV), tl.float32)
    if BEHIND:
        edge = start + L
        border = (n // R + 1) * R * L  # first token behind the segment
        first = n + 1
        last = tl.minimum((n // R + 1) * R, N)
    else:
        edge = start - 1
        border = n // R * R * L - 1  # last token before the segment
        first = n // R * R
        last = n
    if states is not None:
        offsets, exist = state_offsets(column, K, V, BK, BV)
        state = tl.load(states + index * (K * V) + offsets, mask=exist, other=0.0)
        state *= decay(log2, edge - border)
    for i in range(last - first):
        state = absorb(
            state, p_x, p_y, x_stride, y_stride, (first + i) * L, edge, log2, T, column,
            K, V, L, BK, BV,
        )  # fmt: skip
    return operand(state, p_x.dtype.element_ty)


@triton.jit
def store_segment(
    p_x, p_y, x_stride, y_stride, states, index, span, first, last, R, log2, T, column,
    K: tl.constexpr, V: tl.constexpr, L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    ALONG: tl.constexpr, AGAINST: tl.constexpr,
):  # fmt: skip
    """What chunks first..last - 1 alone leave at their end and at their beginning, from one read.

    The state at their end, if ALONG, is number `index` in memory, that at their beginning, if
    AGAINST, is `span` further.
    """
    dtype: tl.constexpr = p_x.dtype.element_ty
    along = tl.zeros((BK, BV), tl.float32)
    against = tl.zeros((BK, BV), tl.float32)
    for i in range(last - first):
        start = (first + i) * L
        token = i * L + tl.arange(0, L)
        x = tl.trans(load_operand(p_x, x_stride, start, T, 0, K, L, BK))
        y = load_rows(p_y, y_stride, start, T, column, V, L, BV).to(tl.float32)
        if ALONG:
            decayed = operand(y * decay(log2, R * L - 1 - token)[:, None], dtype)
            along = add_product(along, x, decayed, dtype)
        if AGAINST:
            decayed = operand(y * decay(log2, token)[:, None], dtype)
            against = add_product(against, x, decayed, dtype)
    offsets, exist = state_offsets(column, K, V, BK, BV)
    if ALONG:
        tl.store(states + index * (K * V) + offsets, along, mask=exist)
    if AGAINST:
        tl.store(states + (index + span) * (K * V) + offsets, against, mask=exist)


@triton.jit(
    do_not_specialize=[
        'T', 'H', 'N', 'R', 'S', 'q_b', 'q_t', 'q_h', 'k_b', 'k_t', 'k_h', 'v_b', 'v_t', 'v_h',
        'o_b', 'o_t', 'o_h',
    ]
)  # fmt: skip
def retention_state_kernel(
    q,  # (B, T, H, K), any strides that are multiples of ALIGN, the last one 1; or None
    k,
    v,  # (B, T, H, V)
    go,  # (B, T, H, V): gradient by the output; or None
    log_gamma,  # (H,), float32
    states,  # (kinds, B, H, S, K, V), float32
    T,
    H,
    N,  # chunks
    R,  # chunks of a segment
    S,  # segments
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, o_b, o_t, o_h,
    ALIGN: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BIDIRECTIONAL: tl.constexpr,
):  # fmt: skip
    """What each segment adds to the states; with go, to their gradients too.

    In the order of memory: keys and values along the sequence, and if BIDIRECTIONAL against it;
    with go, queries and go along the sequence if BIDIRECTIONAL, and against it. So every other
    kind, if there are several, runs against the sequence.
    """
    batch, m, h = place(tl.program_id(0), S, H)
    column = tl.program_id(1) * BV
    log2 = load_log2(log_gamma, h)
    index = (batch * H + h) * S + m
    span = tl.num_programs(0).to(tl.int64)
    first = m * R
    last = tl.minimum(first + R, N)
    if tl.program_id(2) == 0:
        p_k = k + (batch * k_b + h * k_h) * ALIGN
        p_v = v + (batch * v_b + h * v_h) * ALIGN
        store_segment(
            p_k, p_v, k_t * ALIGN, v_t * ALIGN, states, index, span, first, last, R, log2, T,
            column, K, V, L, BK, BV, True, BIDIRECTIONAL,
        )  # fmt: skip
    elif go is not None:
        p_q = q + (batch * q_b + h * q_h) * ALIGN
        p_o = go + (batch * o_b + h * o_h) * ALIGN
        if BIDIRECTIONAL:
            index += 2 * span
        store_segment(
            p_q, p_o, q_t * ALIGN, o_t * ALIGN, states, index, span, first, last, R, log2, T,
            column, K, V, L, BK, BV, BIDIRECTIONAL, True,
        )  # fmt: skip


@triton.jit(do_not_specialize=['S', 'H', 'heads', 'length'])
def retention_scan_kernel(
    states,  # (kinds, B, H, S, K, V): of segments alone; of all before (behind) them at the end
    log_gamma,  # (H,), float32
    S,
    H,
    heads,  # B * H
    length,  # tokens of a segment
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """States that enter the segments, in place; every other one runs against the sequence."""
    row = tl.program_id(0).to(tl.int64)
    against = (row // heads) % 2
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exist = e < K * V
    states += row * S * (K * V) + e
    across = decay(load_log2(log_gamma, row % H), length)
    state = tl.zeros((BLOCK,), tl.float32)
    for m0 in range(0, S, AT_ONCE):
        added = ()
        for i in tl.static_range(AT_ONCE):
            m = tl.where(against == 1, S - 1 - m0 - i, m0 + i)
            mask = exist & (m0 + i < S)
            added = added + (tl.load(states + m.to(tl.int64) * (K * V), mask=mask, other=0.0),)
        for i in tl.static_range(AT_ONCE):
            m = tl.where(against == 1, S - 1 - m0 - i, m0 + i)
            mask = exist & (m0 + i < S)
            tl.store(states + m.to(tl.int64) * (K * V), state, mask=mask)
            state = state * across + added[i]


@triton.jit(
    do_not_specialize=[
        'T', 'H', 'N', 'R', 'S', 'scale', 'q_b', 'q_t', 'q_h', 'k_b', 'k_t', 'k_h', 'v_b', 'v_t',
        'v_h',
    ]
)  # fmt: skip
def retention_out_kernel(
    q,  # (B, T, H, K), any strides that are multiples of ALIGN, the last one 1
    k,
    v,  # (B, T, H, V)
    log_gamma,  # (H,), float32
    o,  # (B, T, H, V), contiguous
    states,  # (1 or 2, B, H, S, K, V) of the scan, or None
    T,
    H,
    N,
    R,
    S,
    scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    ALIGN: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BIDIRECTIONAL: tl.constexpr,
):  # fmt: skip
    """Outputs of one chunk."""
    batch, n, h = place(tl.program_id(0), N, H)
    column = tl.program_id(1) * BV
    dtype: tl.constexpr = q.dtype.element_ty
    p_q = q + (batch * q_b + h * q_h) * ALIGN
    p_k = k + (batch * k_b + h * k_h) * ALIGN
    p_v = v + (batch * v_b + h * v_h) * ALIGN
    q_stride, k_stride, v_stride = q_t * ALIGN, k_t * ALIGN, v_t * ALIGN
    log2 = load_log2(log_gamma, h)
    index = (batch * H + h) * S + n // R
    span = tl.num_programs(0).to(tl.int64) // N * S
    start = n * L
    row = tl.arange(0, L)

    k_before = entering_state(
        p_k, p_v, k_stride, v_stride, states, index, start, log2, T, N, R, column,
        K, V, L, BK, BV, False,
    )  # fmt: skip
    if BIDIRECTIONAL:
        k_behind = entering_state(
            p_k, p_v, k_stride, v_stride, states, index + span, start, log2, T, N, R, column,
            K, V, L, BK, BV, True,
        )  # fmt: skip
    b_q = load_operand(p_q, q_stride, start, T, 0, K, L, BK)
    b_k = load_operand(p_k, k_stride, start, T, 0, K, L, BK)
    weight = product(b_q, tl.trans(b_k), dtype) * own_decays(log2, L, BIDIRECTIONAL)
    out = product(b_q, k_before, dtype) * decay(log2, row + 1)[:, None]
    if BIDIRECTIONAL:
        out += product(b_q, k_behind, dtype) * decay(log2, L - row)[:, None]
    b_v = load_operand(p_v, v_stride, start, T, column, V, L, BV)
    out = add_product(out, operand(weight, dtype), b_v, dtype)
    store_rows(o, out * scale, batch, h, H, start, T, column, V, L, BV)


def entering_states(
    rows: Rows, log_gamma: Tensor, launch: Launch, bidirectional: bool
) -> Tensor | None:
    """States that enter the segments, and gradients by them; None for one segment.

    Args:
        rows: q, k, v, and for the gradients too the gradient by the output.
        log_gamma: (H,), contiguous.
        launch: Division of the tokens.
        bidirectional: Of both sides.

    Returns:
        Float32 tensor (kinds, B, H, S, K, V) in the order of `retention_state_kernel`.
    """
    if launch.segments == 1:
        return None
    q, k, v, *go = rows.tensors
    batch, tokens, heads, key_width = k.shape
    value_width = v.shape[-1]
    sources = 1 + len(go)
    kinds = sources * (1 + bidirectional)
    shape = (kinds, batch, heads, launch.segments, key_width, value_width)
    states = v.new_empty(shape, dtype=torch.float32)
    slices = triton.cdiv(value_width, launch.values)
    retention_state_kernel[(batch * heads * launch.segments, slices, sources)](
        q if go else None, k, v, go[0] if go else None, log_gamma, states, tokens, heads,
        launch.chunks, launch.segment, launch.segments, *rows.strides, *(() if go else (0, 0, 0)),
        ALIGN=rows.align, K=key_width, V=value_width, L=launch.length, BK=launch.keys,
        BV=launch.values, BIDIRECTIONAL=bidirectional, num_warps=launch.warps,
        num_stages=launch.stages, maxnreg=launch.registers,
    )  # fmt: skip
    blocks = triton.cdiv(key_width * value_width, SCAN_ELEMENTS)
    retention_scan_kernel[(kinds * batch * heads, blocks)](
        states, log_gamma, launch.segments, heads, batch * heads, launch.segment * launch.length,
        K=key_width, V=value_width, BLOCK=SCAN_ELEMENTS, num_warps=2,
    )  # fmt: skip
    return states


def retention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gamma: Tensor,
    bidirectional: bool = False,
    scale: float | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """Output (B, T, H, V), contiguous, in the dtype of v."""
    batch, tokens, heads, key_width = q.shape
    value_width = v.shape[-1]
    rows, launch = rows_and_launch('fwd', launch, q, k, v)
    log_gamma = log_gamma.contiguous()
    o = v.new_empty(v.shape)
    with on_device(v):
        states = entering_states(rows, log_gamma, launch, bidirectional)
        slices = triton.cdiv(value_width, launch.values)
        retention_out_kernel[(batch * heads * launch.chunks, slices)](
            *rows.tensors, log_gamma, o, states, tokens, heads, launch.chunks, launch.segment,
            launch.segments, key_width**-0.5 if scale is None else scale, *rows.strides,
            ALIGN=rows.align, K=key_width, V=value_width, L=launch.length, BK=launch.keys,
            BV=launch.values, BIDIRECTIONAL=bidirectional, num_warps=launch.warps,
            num_stages=launch.stages, maxnreg=launch.registers,
        )  # fmt: skip
    return o
