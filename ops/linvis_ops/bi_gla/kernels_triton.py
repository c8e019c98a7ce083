"""Triton kernels of bidirectional gated linear attention: sums of segments, scan, outputs.

A chunk is L tokens, a segment some chunks. A program of the output kernel walks through a segment,
first against the sequence, leaving the state that enters each chunk from behind in memory, then
along it, with the other state in registers, and computes the outputs of each chunk from both.
Where there are several segments, launches before it find what enters them: the sums that each adds
to the states, and a scan over these. README.md of this folder, Implementation in Triton, has the
reasons. Sums are float32; log gates are natural.

A chunk is in range, or it is not: where its gates add up to little, decays between its tokens are
products of two factors around the middle of that sum. Other chunks are flagged here and computed by
kernels_triton_by_tokens.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from linvis_ops._chunks import Launch, Rows, rows_of
from linvis_ops._sizes import ceil_div
from linvis_ops._triton import on_device
from linvis_ops._triton_math import LOG2E, exp2
from linvis_ops._triton_tiles import (
    add_product,
    load_operand,
    load_rows,
    operand,
    place,
    product,
    store_rows,
)
from linvis_ops.bi_gla.kernels_triton_by_tokens import launch_by_tokens
from linvis_ops.bi_gla.kernels_triton_common import (
    add_weighted,
    any_beyond,
    bound,
    choose,
    exp,
    load_gates,
    load_state,
    load_weights,
    log_decays_behind,
    magnitude,
    make_weights,
    store_state,
    sum_over_tokens,
    to_middle,
)
from linvis_ops.bi_gla.launch import launch_for

# Segments whose states are loaded together by the scan.
AT_ONCE = tl.constexpr(16)
# Elements of a state in one program of the scan.
SCAN_ELEMENTS = 256


@triton.jit(
    do_not_specialize=[
        'T', 'H', 'N', 'R', 'S', 'q_b', 'q_t', 'q_h', 'k_b', 'k_t', 'k_h', 'v_b', 'v_t', 'v_h',
        'f_b', 'f_t', 'f_h', 'b_b', 'b_t', 'b_h', 'o_b', 'o_t', 'o_h',
    ]
)  # fmt: skip
def bi_gla_sum_kernel(
    q,  # (B, T, H, K), any strides that are multiples of ALIGN, the last one 1; or None
    k,
    v,  # (B, T, H, V)
    g_fwd,
    g_bwd,
    go,  # (B, T, H, V): gradient by the output; or None
    weights,  # of make_weights
    sums,  # (2 * PAIRS, B, H, S, K, V), float32: what segments add
    totals,  # (2 * PAIRS, B, H, S, K), float32: log decays over segments
    T,
    H,
    N,  # chunks
    R,  # chunks of a segment
    S,  # segments
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, f_b, f_t, f_h, b_b, b_t, b_h, o_b, o_t, o_h,
    ALIGN: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    """What a segment adds to both states, or to both gradients by them, by one walk along it.

    Pairs are those of the kinds of `bi_gla_state_kernel`, one along the sequence, one against it.
    """
    pid = tl.program_id(0)
    pair = pid % PAIRS
    batch, m, h = place(pid // PAIRS, S, H)
    column = tl.program_id(1) * BV
    dtype: tl.constexpr = k.dtype.element_ty
    digits: tl.constexpr = g_fwd.dtype.element_ty
    p_along = g_fwd + (batch * f_b + h * f_h) * ALIGN
    p_against = g_bwd + (batch * b_b + h * b_h) * ALIGN
    along_stride, against_stride = f_t * ALIGN, b_t * ALIGN
    p_x = k + (batch * k_b + h * k_h) * ALIGN
    p_y = v + (batch * v_b + h * v_h) * ALIGN
    x_stride = k_t * ALIGN
    y_stride = v_t * ALIGN
    if PAIRS == 2:
        of_gradients = pair == 1
        p_f, p_b, f_stride, b_stride = p_along, p_against, along_stride, against_stride
        p_along = tl.where(of_gradients, p_b, p_f)
        p_against = tl.where(of_gradients, p_f, p_b)
        along_stride = tl.where(of_gradients, b_stride, f_stride)
        against_stride = tl.where(of_gradients, f_stride, b_stride)
        p_x = tl.where(of_gradients, q + (batch * q_b + h * q_h) * ALIGN, p_x)
        p_y = tl.where(of_gradients, go + (batch * o_b + h * o_h) * ALIGN, p_y)
        x_stride = tl.where(of_gradients, q_t * ALIGN, x_stride)
        y_stride = tl.where(of_gradients, o_t * ALIGN, y_stride)
    first = m * R
    last = tl.minimum(first + R, N)

    along = tl.zeros((BK, BV), tl.float32)
    against = tl.zeros((BK, BV), tl.float32)
    along_passed = tl.zeros((BK,), tl.float32)
    against_passed = tl.zeros((BK,), tl.float32)
    behind = load_weights(weights, 2 * pair, L)
    before = load_weights(weights, 2 * pair + 1, L)
    for n in range(first, last):
        start = n * L
        zero = tl.zeros((L, BK), tl.float32)
        x = load_rows(p_x, x_stride, start, T, 0, K, L, BK).to(tl.float32)
        y = load_operand(p_y, y_stride, start, T, column, V, L, BV)
        g = load_gates(p_along, along_stride, start, T, K, L, BK)
        total = sum_over_tokens(g, dtype, digits)
        log = add_weighted(zero, behind, g, dtype, digits)
        along *= exp(total)[:, None]
        along = add_product(along, tl.trans(operand(x * exp(log), dtype)), y, dtype)
        along_passed += total
        g = load_gates(p_against, against_stride, start, T, K, L, BK)
        log = add_weighted(zero, before, g, dtype, digits) + against_passed[None, :]
        against = add_product(against, tl.trans(operand(x * exp(log), dtype)), y, dtype)
        against_passed += sum_over_tokens(g, dtype, digits)
    span = tl.num_programs(0) // (PAIRS * S)
    c = tl.arange(0, BK)
    row = ((2 * pair * span + batch * H + h) * S + m).to(tl.int64)
    store_state(sums, along, row, column, K, V, BK, BV)
    tl.store(totals + row * K + c, along_passed, mask=c < K)
    row += span * S
    store_state(sums, against, row, column, K, V, BK, BV)
    tl.store(totals + row * K + c, against_passed, mask=c < K)


@triton.jit(do_not_specialize=['S', 'heads'])
def bi_gla_scan_kernel(
    sums,  # (2 or 4, B, H, S, K, V): of segments alone; of all before (behind) them at the end
    totals,  # (2 or 4, B, H, S, K)
    S,
    heads,  # B * H
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """States that enter the segments, in place; every other one runs against the sequence."""
    row = tl.program_id(0).to(tl.int64)
    against = (row // heads) % 2
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exist = e < K * V
    sums += row * S * (K * V) + e
    totals += row * S * K + e // V
    state = tl.zeros((BLOCK,), tl.float32)
    for m0 in range(0, S, AT_ONCE):
        added, decays = (), ()
        for i in tl.static_range(AT_ONCE):
            m = tl.where(against == 1, S - 1 - m0 - i, m0 + i)
            mask = exist & (m0 + i < S)
            x = tl.load(sums + m.to(tl.int64) * (K * V), mask=mask, other=0.0)
            added = added + (x,)
            decays = decays + (tl.load(totals + m * K, mask=mask, other=0.0),)
        for i in tl.static_range(AT_ONCE):
            m = tl.where(against == 1, S - 1 - m0 - i, m0 + i)
            mask = exist & (m0 + i < S)
            tl.store(sums + m.to(tl.int64) * (K * V), state, mask=mask)
            state = state * exp(decays[i]) + added[i]


@triton.jit(
    do_not_specialize=[
        'T', 'H', 'N', 'R', 'S', 'half', 'q_b', 'q_t', 'q_h', 'k_b', 'k_t', 'k_h', 'v_b', 'v_t',
        'v_h', 'f_b', 'f_t', 'f_h', 'b_b', 'b_t', 'b_h',
    ]
)  # fmt: skip
def bi_gla_out_kernel(
    q,  # (B, T, H, K), any strides that are multiples of ALIGN, the last one 1
    k,
    v,  # (B, T, H, V)
    g_fwd,
    g_bwd,
    o,  # (B, T, H, V), contiguous
    flags,  # (B * N * H,), int8: whether a chunk is out of range, so that its outputs are wrong
    weights,  # of make_weights
    states,  # (2, B, H, N, K, V): what enters each chunk; along the sequence only flagged ones
    sums,  # (2, B, H, S, K, V), float32: what enters each segment; or None for one segment
    T,
    H,
    N,  # chunks
    R,  # chunks of a segment
    S,  # segments
    half,  # half the scale
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, f_b, f_t, f_h, b_b, b_t, b_h,
    ALIGN: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """Outputs of one segment of one head: a walk against the sequence, then one along it."""
    SLICES: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    if sums is not None:
        # first what the launch before read last, which is in the cache
        pid = tl.num_programs(0) - 1 - pid
    batch, m, h = place(pid // SLICES, S, H)
    column = pid % SLICES * BV
    dtype: tl.constexpr = q.dtype.element_ty
    digits: tl.constexpr = g_fwd.dtype.element_ty
    p_q = q + (batch * q_b + h * q_h) * ALIGN
    p_k = k + (batch * k_b + h * k_h) * ALIGN
    p_v = v + (batch * v_b + h * v_h) * ALIGN
    p_f = g_fwd + (batch * f_b + h * f_h) * ALIGN
    p_b = g_bwd + (batch * b_b + h * b_h) * ALIGN
    q_stride, k_stride, v_stride = q_t * ALIGN, k_t * ALIGN, v_t * ALIGN
    f_stride, b_stride = f_t * ALIGN, b_t * ALIGN
    index = batch * H + h
    span = tl.num_programs(0) // (SLICES * S)
    first = m * R
    last = tl.minimum(first + R, N)

    if sums is None:
        state = tl.zeros((BK, BV), tl.float32)
    else:
        state = load_state(sums, (index + span) * S + m, column, tl.float32, K, V, BK, BV)
    before = load_weights(weights, 1, L)
    for i in range(last - first):
        n = last - 1 - i
        start = n * L
        g = load_gates(p_b, b_stride, start, T, K, L, BK)
        total = sum_over_tokens(g, dtype, digits)[:, None]
        middle = to_middle(total, dtype)
        state *= exp(middle)
        store_state(states, state, (index + span) * N + n, column, K, V, BK, BV)
        state *= exp(total - middle)
        log = add_weighted(tl.zeros((L, BK), tl.float32), before, g, dtype, digits)
        x = load_rows(p_k, k_stride, start, T, 0, K, L, BK).to(tl.float32)
        y = load_operand(p_v, v_stride, start, T, column, V, L, BV)
        state = add_product(state, tl.trans(operand(x * exp(log), dtype)), y, dtype)
    # threads read what others wrote
    tl.debug_barrier()

    if sums is None:
        state = tl.zeros((BK, BV), tl.float32)
    else:
        state = load_state(sums, index * S + m, column, tl.float32, K, V, BK, BV)
    rest = tl.full((BK, 1), 1.0, tl.float32)
    f_centred = load_weights(weights, 5, L)
    b_centred = load_weights(weights, 4, L)
    for n in range(first, last):
        start = n * L
        zero = tl.zeros((L, BK), tl.float32)
        g = load_rows(p_b, b_stride, start, T, 0, K, L, BK).to(tl.float32)
        b_log = add_weighted(zero, b_centred, g, dtype, digits)
        g = load_rows(p_f, f_stride, start, T, 0, K, L, BK).to(tl.float32)
        f_log = add_weighted(zero, f_centred, g, dtype, digits)
        farthest = tl.maximum(magnitude(f_log), magnitude(b_log))
        outside = any_beyond(farthest, bound(dtype))
        f_log *= LOG2E
        b_log *= LOG2E
        decay = exp(0.5 * sum_over_tokens(g, dtype, digits))[:, None]
        rest_before = rest
        state_decay = rest * decay
        rest = decay
        x = load_rows(p_q, q_stride, start, T, 0, K, L, BK).to(tl.float32)
        f_q = operand(x * exp2(f_log), dtype)
        b_q = operand(x * exp2(b_log), dtype)
        log = -f_log
        if outside:
            # what other chunks get from this one needs no factors in range
            g = load_gates(p_f, f_stride, start, T, K, L, BK)
            total = tl.sum(g, 0)
            at_middle = rest_before * exp(to_middle(total, dtype))[:, None]
            store_state(states, state * at_middle, index * N + n, column, K, V, BK, BV)
            state_decay = rest_before * exp(total)[:, None]
            rest = tl.full((BK, 1), 1.0, tl.float32)
            log = LOG2E * log_decays_behind(p_f, f_stride, start, T, K, L, BK)
        x = load_rows(p_k, k_stride, start, T, 0, K, L, BK).to(tl.float32)
        keys = operand(x * exp2(log), dtype)
        b_keys = operand(x * exp2(-b_log), dtype)
        state *= state_decay
        seen = operand(state, dtype)
        # the token itself counts in both
        weight = product(f_q, tl.trans(keys), dtype)
        weight = tl.where(choose(L, False), weight, 0.0)
        b_weight = product(b_q, tl.trans(b_keys), dtype)
        weight += tl.where(choose(L, True), b_weight, 0.0)
        y = load_operand(p_v, v_stride, start, T, column, V, L, BV)
        behind = load_state(states, (index + span) * N + n, column, dtype, K, V, BK, BV)
        out = product(b_q, behind, dtype)
        out = add_product(out, f_q, seen, dtype)
        state = add_product(state, tl.trans(keys), y, dtype)
        out = add_product(out, operand(weight, dtype), y, dtype)
        store_rows(o, out * half, batch, h, H, start, T, column, V, L, BV)
        if column == 0:
            tl.store(flags + (batch * N + n) * H + h, outside.to(tl.int8))


def enter(rows: Rows, launch: Launch, weights: Tensor) -> Tensor | None:
    """States that enter the segments from both sides, float32, or None for one segment.

    Args:
        rows: q, k, v, g_fwd, g_bwd, and the gradient by the output, if the gradients by the states
            that leave the segments are wanted, too.
        launch: Division of the tokens.
        weights: What `make_weights` returns.

    Returns:
        (2 or 4, B, H, S, K, V).
    """
    if launch.segments == 1:
        return None
    q, k, v, g_fwd, g_bwd, *go = rows.tensors
    batch, tokens, heads, key_width = k.shape
    value_width = v.shape[-1]
    kinds = 4 if go else 2
    shape = (kinds, batch, heads, launch.segments)
    sums = v.new_empty((*shape, key_width, value_width), dtype=torch.float32)
    totals = v.new_empty((*shape, key_width), dtype=torch.float32)
    slices = ceil_div(value_width, launch.values)
    bi_gla_sum_kernel[(kinds // 2 * batch * heads * launch.segments, slices)](
        q if go else None, k, v, g_fwd, g_bwd, go[0] if go else None, weights, sums, totals,
        tokens, heads, launch.chunks, launch.segment, launch.segments, *rows.strides,
        *(() if go else (0, 0, 0)), ALIGN=rows.align, K=key_width, V=value_width,
        L=launch.length, BK=launch.keys, BV=launch.values, PAIRS=kinds // 2,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    blocks = ceil_div(key_width * value_width, SCAN_ELEMENTS)
    bi_gla_scan_kernel[(kinds * batch * heads, blocks)](
        sums, totals, launch.segments, batch * heads, K=key_width, V=value_width,
        BLOCK=SCAN_ELEMENTS, num_warps=2,
    )  # fmt: skip
    return sums


def new_states(rows: Rows, launch: Launch, kinds: int) -> Tensor:
    """Memory for the states that enter the chunks, in the dtype of operands."""
    k, v = rows.tensors[1:3]
    batch, _, heads, key_width = k.shape
    dtype = torch.bfloat16 if k.dtype == torch.bfloat16 else torch.float32
    return v.new_empty((kinds, batch, heads, launch.chunks, key_width, v.shape[-1]), dtype=dtype)


def bi_gla_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_fwd: Tensor,
    g_bwd: Tensor,
    scale: float | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """Output (B, T, H, V), contiguous, in the dtype of v."""
    batch, tokens, heads, key_width = q.shape
    value_width = v.shape[-1]
    launch = launch or launch_for(q, v, 'fwd')
    rows = rows_of(q, k, v, g_fwd, g_bwd, length=launch.length)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    flags = v.new_empty((batch * heads * launch.chunks,), dtype=torch.int8)
    half = (key_width**-0.5 if scale is None else scale) / 2
    with on_device(v):
        weights = make_weights(q, launch.length)
        sums = enter(rows, launch, weights)
        states = new_states(rows, launch, 2)
        slices = ceil_div(value_width, launch.values)
        bi_gla_out_kernel[(batch * heads * launch.segments * slices,)](
            *rows.tensors, o, flags, weights, states, sums, tokens, heads, launch.chunks,
            launch.segment, launch.segments, half, *rows.strides,
            ALIGN=rows.align, K=key_width, V=value_width, L=launch.length, BK=launch.keys,
            BV=launch.values, num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
        launch_by_tokens(rows, flags, states, o, (), half, launch)
    return o
