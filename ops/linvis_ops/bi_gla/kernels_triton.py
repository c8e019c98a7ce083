"""Triton kernels of bidirectional gated linear attention: states, scan, outputs.

A chunk is L tokens, a segment some chunks. A program of the state kernel walks through a segment
and leaves the state that enters each of its chunks, as far as the segment goes; where there are
several segments, a scan adds up what they leave to each other. A program of the output kernel has
one chunk of one head: it reads the states that enter it from either side, and adds what the chunk's
own tokens see of each other. README.md of this folder, Implementation in Triton, has the reasons.
Sums are float32; log gates are natural.

A chunk is in range, or it is not: where its gates add up to little, decays between its tokens are
products of two factors around the middle of that sum. Other chunks are flagged here and computed by
kernels_triton_by_tokens.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from linvis_ops._chunks import Launch, Rows, rows_of
from linvis_ops._triton import on_device
from linvis_ops._triton_tiles import (
    add_product,
    cast,
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
    choose,
    count_outside,
    exp,
    load_gates,
    load_state,
    load_weights,
    log_decays_from_middle,
    make_weights,
    state_places,
    to_middle,
)
from linvis_ops.bi_gla.launch import launch_for

# Segments whose states are loaded together by the scan.
AT_ONCE = tl.constexpr(8)
# Elements of a state in one program of the scan.
SCAN_ELEMENTS = 256


@triton.jit(
    do_not_specialize=[
        'T', 'H', 'N', 'R', 'S', 'q_b', 'q_t', 'q_h', 'k_b', 'k_t', 'k_h', 'v_b', 'v_t', 'v_h',
        'f_b', 'f_t', 'f_h', 'b_b', 'b_t', 'b_h', 'o_b', 'o_t', 'o_h',
    ]
)  # fmt: skip
def bi_gla_state_kernel(
    q,  # (B, T, H, K), any strides that are multiples of ALIGN, the last one 1; or None
    k,
    v,  # (B, T, H, V)
    g_fwd,
    g_bwd,
    go,  # (B, T, H, V): gradient by the output; or None
    states,  # (KINDS, B, H, N, V, K): what enters each chunk, as far as its segment goes
    weights,  # of make_weights
    logs,  # (KINDS, B, H, N, K), float32: log decays of what enters the segment; or None
    sums,  # (KINDS, B, H, S, V, K): what each segment adds; or None
    totals,  # (KINDS, B, H, S, K), float32: log decays over segments; or None
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
    KINDS: tl.constexpr,
):  # fmt: skip
    """States that enter chunks, decayed up to the chunk's middle, one segment and kind a program.

    Kinds are in the order of memory the state that runs along the sequence, the one against it;
    with four kinds also the gradient by the latter (which runs along the sequence), and the
    gradient by the former. logs, sums and totals are there if segments are several.
    """
    pid = tl.program_id(0)
    kind = pid % KINDS
    batch, m, h = place(pid // KINDS, S, H)
    column = tl.program_id(1) * BV
    dtype: tl.constexpr = k.dtype.element_ty
    digits: tl.constexpr = g_fwd.dtype.element_ty
    against = kind % 2 == 1
    forward = (kind == 0) | (kind == 3)
    p_g = tl.where(
        forward,
        g_fwd + (batch * f_b + h * f_h) * ALIGN,
        g_bwd + (batch * b_b + h * b_h) * ALIGN,
    )
    g_stride = tl.where(forward, f_t, b_t) * ALIGN
    p_x = k + (batch * k_b + h * k_h) * ALIGN
    p_y = v + (batch * v_b + h * v_h) * ALIGN
    x_stride = k_t * ALIGN
    y_stride = v_t * ALIGN
    if KINDS == 4:
        by_state = kind < 2
        p_x = tl.where(by_state, p_x, q + (batch * q_b + h * q_h) * ALIGN)
        p_y = tl.where(by_state, p_y, go + (batch * o_b + h * o_h) * ALIGN)
        x_stride = tl.where(by_state, x_stride, q_t * ALIGN)
        y_stride = tl.where(by_state, y_stride, o_t * ALIGN)
    # a token's own gate acts on what its query sees, and not on its key
    between = load_weights(weights, kind, L)
    every = tl.full((BV, L), 1.0, tl.float32)
    if dtype != tl.float32:
        every = operand(every, tl.bfloat16)
    row = (kind * (tl.num_programs(0) // (KINDS * S * H)) + batch) * H + h
    places, exist = state_places(column, K, V, BK, BV)
    first = m * R
    last = tl.minimum(first + R, N)

    state = tl.zeros((BV, BK), tl.float32)
    passed = tl.zeros((BK,), tl.float32)
    for i in range(last - first):
        n = tl.where(against, last - 1 - i, first + i)
        start = n * L
        g = load_gates(p_g, g_stride, start, T, K, L, BK)
        # in every row alike
        total = add_weighted(tl.zeros((BV, BK), tl.float32), every, g, dtype, digits)
        p = states + (row * N + n) * (V * K) + places
        tl.store(p, cast(state * exp(to_middle(total, dtype)), states), mask=exist)
        if logs is not None:
            over = tl.sum(g, 0)
            c = tl.arange(0, BK)
            p = logs + (row * N + n) * K + c
            tl.store(p, passed + to_middle(over, dtype), mask=c < K)
            passed += over
        log = add_weighted(tl.zeros((L, BK), tl.float32), between, g, dtype, digits)
        x = load_rows(p_x, x_stride, start, T, 0, K, L, BK).to(tl.float32)
        y = load_operand(p_y, y_stride, start, T, column, V, L, BV)
        state *= exp(total)
        state = add_product(state, tl.trans(y), operand(x * exp(log), dtype), dtype)
    if logs is not None:
        tl.store(sums + (row * S + m) * (V * K) + places, cast(state, sums), mask=exist)
        c = tl.arange(0, BK)
        tl.store(totals + (row * S + m) * K + c, passed, mask=c < K)


@triton.jit(do_not_specialize=['S', 'heads'])
def bi_gla_scan_kernel(
    sums,  # (2 or 4, B, H, S, V, K): of segments alone; of all before (behind) them at the end
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
    totals += row * S * K + e % K
    state = tl.zeros((BLOCK,), tl.float32)
    for m0 in range(0, S, AT_ONCE):
        added, decays = (), ()
        for i in tl.static_range(AT_ONCE):
            m = tl.where(against == 1, S - 1 - m0 - i, m0 + i)
            mask = exist & (m0 + i < S)
            x = tl.load(sums + m.to(tl.int64) * (K * V), mask=mask, other=0.0)
            added = added + (x.to(tl.float32),)
            decays = decays + (tl.load(totals + m * K, mask=mask, other=0.0),)
        for i in tl.static_range(AT_ONCE):
            m = tl.where(against == 1, S - 1 - m0 - i, m0 + i)
            mask = exist & (m0 + i < S)
            tl.store(sums + m.to(tl.int64) * (K * V), cast(state, sums), mask=mask)
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
    states,  # (2 or 4, B, H, N, V, K), or None for one chunk
    logs,  # (2 or 4, B, H, N, K), or None for one segment
    sums,  # (2 or 4, B, H, S, V, K) of the scan, or None for one segment
    T,
    H,
    N,
    R,
    S,
    half,  # half the scale
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, f_b, f_t, f_h, b_b, b_t, b_h,
    ALIGN: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    TURNED: tl.constexpr,
):  # fmt: skip
    """Outputs of one chunk; the gradient by v if TURNED.

    That gradient is the output with q and k exchanged, the gradient by the output in place of v,
    and the gradients by the states in place of these.
    """
    batch, n, h = place(tl.program_id(0), N, H)
    column = tl.program_id(1) * BV
    dtype: tl.constexpr = q.dtype.element_ty
    p_q = q + (batch * q_b + h * q_h) * ALIGN
    p_k = k + (batch * k_b + h * k_h) * ALIGN
    p_v = v + (batch * v_b + h * v_h) * ALIGN
    p_f = g_fwd + (batch * f_b + h * f_h) * ALIGN
    p_b = g_bwd + (batch * b_b + h * b_h) * ALIGN
    q_stride, k_stride, v_stride = q_t * ALIGN, k_t * ALIGN, v_t * ALIGN
    f_stride, b_stride = f_t * ALIGN, b_t * ALIGN
    index = batch * H + h
    span = tl.num_programs(0) // N
    m = n // R
    start = n * L

    f_log = log_decays_from_middle(weights, 5, p_f, f_stride, start, T, dtype, K, L, BK)
    b_log = log_decays_from_middle(weights, 4, p_b, b_stride, start, T, dtype, K, L, BK)
    if column == 0:
        outside = count_outside(f_log, dtype) + count_outside(b_log, dtype)
        tl.store(flags + tl.program_id(0), (outside > 0).to(tl.int8))
    if TURNED:
        f_log = -f_log
        b_log = -b_log
    x = load_rows(p_q, q_stride, start, T, 0, K, L, BK).to(tl.float32)
    f_q = operand(x * exp(f_log), dtype)
    b_q = operand(x * exp(b_log), dtype)
    x = load_rows(p_k, k_stride, start, T, 0, K, L, BK).to(tl.float32)
    f_weight = product(f_q, tl.trans(operand(x * exp(-f_log), dtype)), dtype)
    b_weight = product(b_q, tl.trans(operand(x * exp(-b_log), dtype)), dtype)
    # the token itself counts in both
    weight = tl.where(choose(L, TURNED, True), f_weight, 0.0)
    weight += tl.where(choose(L, not TURNED, True), b_weight, 0.0)
    y = load_operand(p_v, v_stride, start, T, column, V, L, BV)
    at = index + (3 * span if TURNED else 0)
    state = load_state(states, logs, sums, at, n, m, N, S, column, dtype, K, V, BK, BV)
    out = product(f_q, tl.trans(state), dtype)
    at = index + (2 * span if TURNED else span)
    state = load_state(states, logs, sums, at, n, m, N, S, column, dtype, K, V, BK, BV)
    out = add_product(out, b_q, tl.trans(state), dtype)
    out = add_product(out, operand(weight, dtype), y, dtype)
    store_rows(o, out * half, batch, h, H, start, T, column, V, L, BV)


def entering_states(
    rows: Rows, launch: Launch, weights: Tensor, *, with_gradients: bool = False
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """States that enter the chunks from both sides, and gradients by them.

    Args:
        rows: q, k, v, g_fwd, g_bwd, and with gradients the gradient by the output.
        launch: Division of the tokens.
        weights: What `make_weights` returns.
        with_gradients: Compute the gradients as well.

    Returns:
        states, logs and sums as the kernels that read them take them; what they need not is None.
    """
    if launch.chunks == 1:
        return None, None, None
    q, k, v, g_fwd, g_bwd, *go = rows.tensors
    batch, tokens, heads, key_width = k.shape
    value_width = v.shape[-1]
    kinds = 4 if with_gradients else 2
    shape = (kinds, batch, heads)
    # they become operands
    dtype = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
    states = v.new_empty((*shape, launch.chunks, value_width, key_width), dtype=dtype)
    logs = sums = totals = None
    if launch.segments > 1:
        logs = v.new_empty((*shape, launch.chunks, key_width), dtype=torch.float32)
        sums = v.new_empty((*shape, launch.segments, value_width, key_width), dtype=dtype)
        totals = v.new_empty((*shape, launch.segments, key_width), dtype=torch.float32)
    slices = triton.cdiv(value_width, launch.values)
    bi_gla_state_kernel[(kinds * batch * heads * launch.segments, slices)](
        q if with_gradients else None, k, v, g_fwd, g_bwd, go[0] if with_gradients else None,
        states, weights, logs, sums, totals, tokens, heads, launch.chunks,
        launch.segment, launch.segments, *rows.strides, *(() if with_gradients else (0, 0, 0)),
        ALIGN=rows.align, K=key_width, V=value_width, L=launch.length, BK=launch.keys,
        BV=launch.values, KINDS=kinds, num_warps=launch.warps, num_stages=launch.stages,
        maxnreg=launch.registers,
    )  # fmt: skip
    if launch.segments > 1:
        blocks = triton.cdiv(key_width * value_width, SCAN_ELEMENTS)
        bi_gla_scan_kernel[(kinds * batch * heads, blocks)](
            sums, totals, launch.segments, batch * heads, K=key_width, V=value_width,
            BLOCK=SCAN_ELEMENTS, num_warps=2,
        )  # fmt: skip
    return states, logs, sums


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
    o = v.new_empty(v.shape)
    flags = v.new_empty((batch * heads * launch.chunks,), dtype=torch.int8)
    half = (key_width**-0.5 if scale is None else scale) / 2
    with on_device(v):
        weights = make_weights(q, launch.length)
        entering = entering_states(rows, launch, weights)
        slices = triton.cdiv(value_width, launch.values)
        bi_gla_out_kernel[(batch * heads * launch.chunks, slices)](
            *rows.tensors, o, flags, weights, *entering, tokens, heads, launch.chunks,
            launch.segment, launch.segments, half, *rows.strides,
            ALIGN=rows.align, K=key_width, V=value_width, L=launch.length, BK=launch.keys,
            BV=launch.values, TURNED=False, num_warps=launch.warps, num_stages=launch.stages,
            maxnreg=launch.registers,
        )  # fmt: skip
        launch_by_tokens(rows, flags, entering, o, (), half, launch)
    return o
