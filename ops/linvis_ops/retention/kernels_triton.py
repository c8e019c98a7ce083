"""Triton kernels of retention on sequences: states of segments, scan, outputs.

A chunk is L tokens, a segment some chunks. A program of the output kernel walks the chunks of a
segment of one head, one after the other, with the state in registers; what enters the segment a
scan over segments has left in memory. Every decay is a power of the distance itself. Sums are
float32.
README.md of this folder, Implementation in Triton, has the reasons.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from linvis_ops._chunks import Launch, Rows
from linvis_ops._sizes import ceil_div
from linvis_ops._triton import on_device
from linvis_ops._triton_math import LOG2E, exp2
from linvis_ops._triton_tiles import (
    add_product,
    as_operand,
    cast,
    load_operand,
    load_rows,
    operand,
    place,
    product,
    store_rows_at,
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
def advance(state, across, x, y, factor, dtype: tl.constexpr):
    """State (BV, BK) with the tokens x (L, BK) and y (L, BV) of a chunk added.

    Args:
        state: Without them, float32.
        across: Its decay.
        x: An operand.
        y: As it is in memory.
        factor: (L,): decays of the tokens.
        dtype: Of the inputs.
    """
    decayed = operand(tl.trans(y).to(tl.float32) * factor[None, :], dtype)
    return add_product(state * across, decayed, x, dtype)


@triton.jit
def offsets_of_state(
    column, k_stride, v_stride, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """Where the elements (BV, BK) of a state are in memory, and which of them exist."""
    c = column + tl.arange(0, BV)[:, None]
    i = tl.arange(0, BK)[None, :]
    exist = i < K
    if V % BV != 0:
        exist = exist & (c < V)
    return c * v_stride + i * k_stride, exist


@triton.jit
def entering_state(
    states, number, exchanged, column, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """State (BV, BK) of the scan with this number; zeros if there is no scan."""
    if states is None:
        state = tl.zeros((BV, BK), tl.float32)
    else:
        offsets, exist = offsets_of_state(column, 1, K, K, V, BK, BV)
        if exchanged:
            offsets, exist = offsets_of_state(column, V, 1, K, V, BK, BV)
        state = tl.load(states + number * (K * V) + offsets, mask=exist, other=0.0)
    return state


@triton.jit
def walk(
    p_q, p_k, p_v, q_stride, k_stride, v_stride, p_o, o_stride, states, number, span, exchanged,
    room, first, last, against, log2, scale, T, column,
    K: tl.constexpr, V: tl.constexpr, L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    BIDIRECTIONAL: tl.constexpr,
):  # fmt: skip
    """Retention of the tokens of a segment, chunk by chunk, with the state in registers.

    Args:
        p_q: Queries of one head, (T, K).
        p_k: Keys, (T, K).
        p_v: Values, (T, V).
        q_stride: Of tokens.
        k_stride: Of tokens.
        v_stride: Of tokens.
        p_o: Where outputs go, (T, V).
        o_stride: Of tokens.
        states: Of the scan, or None.
        number: Of the state that enters the segment where the walk begins.
        span: From there to the number of the state that enters at the other end, if BIDIRECTIONAL.
        exchanged: The states of the scan have values as keys: they are (K, V), else (V, K).
        room: (N, V, K), in the dtype of operands, for states of the chunks, if BIDIRECTIONAL.
        first: First chunk.
        last: Chunk behind the last one.
        against: Tokens see those behind them, unless BIDIRECTIONAL, and the walk goes from last to
            first.
        log2: As `load_log2` gives it.
        scale: Of the products of queries and keys.
        T: Tokens.
        column: First value channel of the tile.
        K: Key channels.
        V: Value channels.
        L: Tokens of a chunk.
        BK: Key channels of a tile.
        BV: Value channels of a tile.
        BIDIRECTIONAL: Tokens see all.
    """
    dtype: tl.constexpr = p_q.dtype.element_ty
    across = decay(log2, L)
    row = tl.arange(0, L)
    if BIDIRECTIONAL:
        # what enters each chunk from the other end is left in memory
        state = entering_state(states, number + span, exchanged, column, K, V, BK, BV)
        factor = decay(log2, row)
        offsets, exist = offsets_of_state(column, 1, K, K, V, BK, BV)
        for i in range(last - first):
            n = last - 1 - i
            b_k = load_operand(p_k, k_stride, n * L, T, 0, K, L, BK)
            b_v = load_rows(p_v, v_stride, n * L, T, column, V, L, BV)
            p = room + n.to(tl.int64) * (K * V)
            tl.store(p + offsets, cast(state, p), mask=exist)
            state = advance(state, across, b_k, b_v, factor, dtype)
        tl.debug_barrier()  # other threads read what is stored
    passed = tl.where(against, L - 1 - row, row)  # tokens of the chunk that were passed before
    factor = decay(log2, L - 1 - passed)
    reading = (decay(log2, passed + 1) * scale)[:, None]
    reading_behind = (decay(log2, L - row) * scale)[:, None]
    distance = passed[:, None] - passed[None, :]
    decays = decay(log2, distance) * scale
    if not BIDIRECTIONAL:
        decays = tl.where(distance >= 0, decays, 0.0)
    state = entering_state(states, number, exchanged, column, K, V, BK, BV)
    for i in range(last - first):
        n = tl.where(against, last - 1 - i, first + i)
        b_q = load_operand(p_q, q_stride, n * L, T, 0, K, L, BK)
        b_k = load_operand(p_k, k_stride, n * L, T, 0, K, L, BK)
        weight = operand(product(b_q, tl.trans(b_k), dtype) * decays, dtype)
        out = product(b_q, tl.trans(operand(state, dtype)), dtype) * reading
        if BIDIRECTIONAL:
            p = room + n.to(tl.int64) * (K * V)
            behind = as_operand(tl.load(p + offsets, mask=exist, other=0.0), dtype)
            out += product(b_q, tl.trans(behind), dtype) * reading_behind
        b_v = load_rows(p_v, v_stride, n * L, T, column, V, L, BV)
        out = add_product(out, weight, as_operand(b_v, dtype), dtype)
        store_rows_at(p_o, o_stride, out, n * L, T, column, V, L, BV)
        state = advance(state, across, b_k, b_v, factor, dtype)


@triton.jit
def store_segment(
    p_x, p_y, x_stride, y_stride, states, index, span, first, last, log2, T, column,
    K: tl.constexpr, V: tl.constexpr, L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    ALONG: tl.constexpr, AGAINST: tl.constexpr,
):  # fmt: skip
    """What chunks first..last - 1 alone leave at their end and at their beginning, from one read.

    The state at their end, if ALONG, is number `index` in memory, that at their beginning, if
    AGAINST, is `span` further.
    """
    dtype: tl.constexpr = p_x.dtype.element_ty
    along = tl.zeros((BV, BK), tl.float32)
    against = tl.zeros((BV, BK), tl.float32)
    row = tl.arange(0, L)
    factor = decay(log2, L - 1 - row)
    across = decay(log2, L)
    for i in range(last - first):
        start = (first + i) * L
        x = load_operand(p_x, x_stride, start, T, 0, K, L, BK)
        y = load_rows(p_y, y_stride, start, T, column, V, L, BV)
        if ALONG:
            along = advance(along, across, x, y, factor, dtype)
        if AGAINST:
            against = advance(against, 1.0, x, y, decay(log2, i * L + row), dtype)
    offsets, exist = offsets_of_state(column, 1, K, K, V, BK, BV)
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
    states,  # (kinds, B, H, S, V, K), float32
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
        if not BIDIRECTIONAL:
            last = tl.where(m == S - 1, first, last)  # no segment reads what it leaves
        store_segment(
            p_k, p_v, k_t * ALIGN, v_t * ALIGN, states, index, span, first, last, log2, T,
            column, K, V, L, BK, BV, True, BIDIRECTIONAL,
        )  # fmt: skip
    elif go is not None:
        p_q = q + (batch * q_b + h * q_h) * ALIGN
        p_o = go + (batch * o_b + h * o_h) * ALIGN
        if BIDIRECTIONAL:
            index += 2 * span
        else:
            last = tl.where(m == 0, first, last)
        store_segment(
            p_q, p_o, q_t * ALIGN, o_t * ALIGN, states, index, span, first, last, log2, T,
            column, K, V, L, BK, BV, BIDIRECTIONAL, True,
        )  # fmt: skip


@triton.jit(do_not_specialize=['S', 'H', 'heads', 'length'])
def retention_scan_kernel(
    states,  # (kinds, B, H, S, V, K): of segments alone; of all before (behind) them at the end
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
    states,  # (1 or 2, B, H, S, V, K) of the scan, or None
    room,  # (B, H, N, V, K), in the dtype of operands, or None if not BIDIRECTIONAL
    T,
    H,
    N,  # chunks
    R,  # chunks of a segment
    S,  # segments
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
    """Outputs of one segment, from one slice of the values."""
    batch, m, h = place(tl.program_id(0), S, H)
    head = batch * H + h
    if BIDIRECTIONAL:
        room += head * N * (K * V)
    walk(
        q + (batch * q_b + h * q_h) * ALIGN,
        k + (batch * k_b + h * k_h) * ALIGN,
        v + (batch * v_b + h * v_h) * ALIGN,
        q_t * ALIGN, k_t * ALIGN, v_t * ALIGN, o + (batch * T * H + h) * V, H * V, states,
        head * S + m, tl.num_programs(0).to(tl.int64), False, room, m * R,
        tl.minimum(m * R + R, N), False, load_log2(log_gamma, h), scale, T,
        tl.program_id(1) * BV, K, V, L, BK, BV, BIDIRECTIONAL,
    )  # fmt: skip


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
        Float32 tensor (kinds, B, H, S, V, K) in the order of `retention_state_kernel`.
    """
    if launch.segments == 1:
        return None
    q, k, v, *go = rows.tensors
    batch, tokens, heads, key_width = k.shape
    value_width = v.shape[-1]
    sources = 1 + len(go)
    kinds = sources * (1 + bidirectional)
    shape = (kinds, batch, heads, launch.segments, value_width, key_width)
    states = v.new_empty(shape, dtype=torch.float32)
    slices = ceil_div(value_width, launch.values)
    retention_state_kernel[(batch * heads * launch.segments, slices, sources)](
        q if go else None, k, v, go[0] if go else None, log_gamma, states, tokens, heads,
        launch.chunks, launch.segment, launch.segments, *rows.strides, *(() if go else (0, 0, 0)),
        ALIGN=rows.align, K=key_width, V=value_width, L=launch.length, BK=launch.keys,
        BV=launch.values, BIDIRECTIONAL=bidirectional, num_warps=launch.warps,
        num_stages=launch.stages,
    )  # fmt: skip
    blocks = ceil_div(key_width * value_width, SCAN_ELEMENTS)
    retention_scan_kernel[(kinds * batch * heads, blocks)](
        states, log_gamma, launch.segments, heads, batch * heads, launch.segment * launch.length,
        K=key_width, V=value_width, BLOCK=SCAN_ELEMENTS, num_warps=2,
    )  # fmt: skip
    return states


def room_of_walk(
    rows: Rows, launch: Launch, bidirectional: bool, outputs: int = 1
) -> Tensor | None:
    """Where walks keep the states that enter chunks from the other end.

    Args:
        rows: q, k, v and what else there is.
        launch: Division of the tokens.
        bidirectional: There are such states.
        outputs: Walks that run together.

    Returns:
        Tensor (outputs, B, H, N, V, K) in the dtype of operands; None if not bidirectional.
    """
    if not bidirectional:
        return None
    _, k, v, *_ = rows.tensors
    batch, _, heads, key_width = k.shape
    dtype = torch.bfloat16 if v.dtype == torch.bfloat16 else torch.float32
    shape = (outputs, batch, heads, launch.chunks, v.shape[-1], key_width)
    return v.new_empty(shape, dtype=dtype)


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
        room = room_of_walk(rows, launch, bidirectional)
        slices = ceil_div(value_width, launch.values)
        retention_out_kernel[(batch * heads * launch.segments, slices)](
            *rows.tensors, log_gamma, o, states, room, tokens, heads, launch.chunks, launch.segment,
            launch.segments, key_width**-0.5 if scale is None else scale, *rows.strides,
            ALIGN=rows.align, K=key_width, V=value_width, L=launch.length, BK=launch.keys,
            BV=launch.values, BIDIRECTIONAL=bidirectional, num_warps=launch.warps,
            num_stages=launch.stages,
        )  # fmt: skip
    return o
