"""Triton kernel of the gradient of bidirectional gated linear attention.

A program has one chunk of one head, as in kernels_triton.py. It reads the states that enter the
chunk and the gradients by the states that leave it, and turns them into the gradients by queries,
keys and gates; that by values comes from `bi_gla_out_kernel`. Of the forward pass only the inputs
are read. README.md of this folder has the formulas.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from linvis_ops._chunks import Launch, rows_of
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
from linvis_ops.bi_gla.kernels_triton import enter, launch_states, new_states
from linvis_ops.bi_gla.kernels_triton_by_tokens import launch_by_tokens
from linvis_ops.bi_gla.kernels_triton_common import (
    add_weighted,
    any_outside,
    bound,
    choose,
    exp,
    load_gates,
    load_ones,
    load_state,
    load_weights,
    log_decays_behind,
    log_decays_from_middle,
    make_weights,
    multiplied,
    store_state,
    sum_over_tokens,
    to_middle,
)
from linvis_ops.bi_gla.launch import launch_for


@triton.jit(
    do_not_specialize=[
        'T', 'H', 'N', 'half', 'q_b', 'q_t', 'q_h', 'k_b', 'k_t', 'k_h', 'f_b', 'f_t', 'f_h', 'b_b', 'b_t', 'b_h', 'o_b', 'o_t', 'o_h',
    ]
)  # fmt: skip
def bi_gla_value_gradient_kernel(
    q,  # (B, T, H, K), any strides that are multiples of ALIGN, the last one 1
    k,
    g_fwd,
    g_bwd,
    go,  # (B, T, H, V): gradient by the output
    dv,  # (B, T, H, V), contiguous
    flags,  # (B * N * H,), int8: whether a chunk is out of range, so that its results are wrong
    weights,  # of make_weights
    states,  # (4, B, H, N, K, V)
    T,
    H,
    N,  # chunks
    half,  # half the scale
    q_b, q_t, q_h, k_b, k_t, k_h, f_b, f_t, f_h, b_b, b_t, b_h, o_b, o_t, o_h,
    ALIGN: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    REVERSED: tl.constexpr,
):  # fmt: skip
    """Gradient by the values of one chunk.

    It is the output with q and k exchanged, the gradient by the output in place of v, and the
    gradients by the states in place of these.
    """
    pid = tl.program_id(0)
    if REVERSED:
        pid = tl.num_programs(0) - 1 - pid
    batch, n, h = place(pid, N, H)
    column = tl.program_id(1) * BV
    dtype: tl.constexpr = q.dtype.element_ty
    p_q = q + (batch * q_b + h * q_h) * ALIGN
    p_k = k + (batch * k_b + h * k_h) * ALIGN
    p_f = g_fwd + (batch * f_b + h * f_h) * ALIGN
    p_b = g_bwd + (batch * b_b + h * b_h) * ALIGN
    p_o = go + (batch * o_b + h * o_h) * ALIGN
    q_stride, k_stride = q_t * ALIGN, k_t * ALIGN
    f_stride, b_stride, o_stride = f_t * ALIGN, b_t * ALIGN, o_t * ALIGN
    index = batch * H + h
    span = tl.num_programs(0) // N
    start = n * L

    f_log = log_decays_from_middle(weights, 5, p_f, f_stride, start, T, dtype, K, L, BK)
    b_log = log_decays_from_middle(weights, 4, p_b, b_stride, start, T, dtype, K, L, BK)
    if column == 0:
        tl.store(flags + pid, any_outside(f_log, b_log, dtype).to(tl.int8))
    x = load_rows(p_k, k_stride, start, T, 0, K, L, BK).to(tl.float32)
    f_k = operand(x * exp(-f_log), dtype)
    b_k = operand(x * exp(-b_log), dtype)
    x = load_rows(p_q, q_stride, start, T, 0, K, L, BK).to(tl.float32)
    f_weight = product(f_k, tl.trans(operand(x * exp(f_log), dtype)), dtype)
    b_weight = product(b_k, tl.trans(operand(x * exp(b_log), dtype)), dtype)
    # the token itself counts in both
    weight = tl.where(choose(L, True, True), f_weight, 0.0)
    weight += tl.where(choose(L, False, True), b_weight, 0.0)
    y = load_operand(p_o, o_stride, start, T, column, V, L, BV)
    state = load_state(states, (index + 3 * span) * N + n, column, dtype, K, V, BK, BV)
    out = product(f_k, state, dtype)
    state = load_state(states, (index + 2 * span) * N + n, column, dtype, K, V, BK, BV)
    out = add_product(out, b_k, state, dtype)
    out = add_product(out, operand(weight, dtype), y, dtype)
    store_rows(dv, out * half, batch, h, H, start, T, column, V, L, BV)


@triton.jit(
    do_not_specialize=[
        'T', 'H', 'N', 'half', 'q_b', 'q_t', 'q_h', 'k_b', 'k_t', 'k_h', 'v_b', 'v_t',
        'v_h', 'f_b', 'f_t', 'f_h', 'b_b', 'b_t', 'b_h', 'o_b', 'o_t', 'o_h',
    ]
)  # fmt: skip
def bi_gla_gradient_kernel(
    q,  # (B, T, H, K), any strides that are multiples of ALIGN, the last one 1
    k,
    v,  # (B, T, H, V)
    g_fwd,
    g_bwd,
    go,  # (B, T, H, V): gradient by the output
    weights,  # of make_weights
    states,  # (4, B, H, N, K, V)
    dq,  # (B, T, H, K), contiguous; (slices of V, B, T, H, K), float32, where there are several
    dk,
    dg_fwd,
    dg_bwd,
    T,
    H,
    N,  # chunks
    half,  # half the scale
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, f_b, f_t, f_h, b_b, b_t, b_h, o_b, o_t, o_h,
    ALIGN: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    REVERSED: tl.constexpr,
):  # fmt: skip
    """Gradients by q, k and gates of one chunk, from one slice of the values."""
    pid = tl.program_id(0)
    if REVERSED:
        pid = tl.num_programs(0) - 1 - pid
    batch, n, h = place(pid, N, H)
    column = tl.program_id(1) * BV
    # each slice of values has gradients of its own by the other inputs
    first = batch
    if V > BV:
        first += tl.num_programs(0).to(tl.int64) // (N * H) * tl.program_id(1)
    dtype: tl.constexpr = q.dtype.element_ty
    p_q = q + (batch * q_b + h * q_h) * ALIGN
    p_k = k + (batch * k_b + h * k_h) * ALIGN
    p_v = v + (batch * v_b + h * v_h) * ALIGN
    p_f = g_fwd + (batch * f_b + h * f_h) * ALIGN
    p_b = g_bwd + (batch * b_b + h * b_h) * ALIGN
    p_o = go + (batch * o_b + h * o_h) * ALIGN
    q_stride, k_stride, v_stride = q_t * ALIGN, k_t * ALIGN, v_t * ALIGN
    f_stride, b_stride, o_stride = f_t * ALIGN, b_t * ALIGN, o_t * ALIGN
    index = batch * H + h
    span = tl.num_programs(0) // N
    start = n * L

    y = load_operand(p_v, v_stride, start, T, column, V, L, BV)
    g = load_operand(p_o, o_stride, start, T, column, V, L, BV)
    row = tl.arange(0, L)[:, None]
    other = tl.arange(0, L)[None, :]
    b_dq = tl.zeros((L, BK), tl.float32)
    b_dk = tl.zeros((L, BK), tl.float32)
    # what a compiler moves out of the loop is in registers all the time
    for direction in tl.range(2, num_stages=1, disable_licm=True):
        before = load_weights(weights, 1 - direction, L)
        d_weight = product(g, tl.trans(y), dtype)
        # of a token with itself
        own = tl.sum(tl.where(other == row, d_weight, 0.0), 1)[:, None]
        d_weight = multiplied(operand(d_weight, dtype), before, dtype)
        at = index + span * direction
        state = load_state(states, at * N + n, column, dtype, K, V, BK, BV)
        at = index + span * (3 - direction)
        d_state = load_state(states, at * N + n, column, dtype, K, V, BK, BV)
        # to the gates, from pairs of tokens on both sides of the chunk
        crossing = multiplied(state, d_state, dtype)
        dg = product(operand(tl.full((L, BV), 1.0, tl.float32), dtype), tl.trans(crossing), dtype)
        p_g = tl.where(direction == 1, p_b, p_f)
        g_stride = tl.where(direction == 1, b_stride, f_stride)
        log = LOG2E * log_decays_from_middle(
            weights, 5 - direction, p_g, g_stride, start, T, dtype, K, L, BK
        )
        x_k = load_rows(p_k, k_stride, start, T, 0, K, L, BK).to(tl.float32)
        decay = exp2(-log)
        b_dq += own * x_k
        b_k = operand(x_k * decay, dtype)
        dk_out = product(y, tl.trans(d_state), dtype)
        # from keys before a gate with what leaves the chunk
        seen = b_k.to(tl.float32)
        dg = add_weighted(dg, before, seen * dk_out, dtype, dtype)
        x_q = load_rows(p_q, q_stride, start, T, 0, K, L, BK).to(tl.float32)
        b_dk += own * x_q
        b_q = operand(x_q * exp2(log), dtype)
        dk_within = product(tl.trans(d_weight), b_q, dtype)
        b_dk += (dk_out + dk_within) * decay
        terms = -seen * dk_within
        b_dq_now = product(g, tl.trans(state), dtype)
        b_dq_now = add_product(b_dq_now, d_weight, b_k, dtype)
        b_dq += b_dq_now * exp2(log)
        # from queries behind a gate with what entered, and from pairs within the chunk as a
        # difference of two sums, with the operands as the products saw them, so that pairs on one
        # side of the gate cancel
        terms += b_q.to(tl.float32) * b_dq_now
        behind = load_weights(weights, 2 + direction, L)
        dg = add_weighted(dg, behind, terms, dtype, tl.float16)
        p_dg = tl.where(direction == 1, dg_bwd, dg_fwd)
        store_rows(p_dg, half * dg, first, h, H, start, T, 0, K, L, BK)
    store_rows(dq, half * b_dq, first, h, H, start, T, 0, K, L, BK)
    store_rows(dk, half * b_dk, first, h, H, start, T, 0, K, L, BK)


@triton.jit(
    do_not_specialize=[
        'T', 'H', 'N', 'half', 'q_b', 'q_t', 'q_h', 'k_b', 'k_t', 'k_h', 'v_b', 'v_t',
        'v_h', 'f_b', 'f_t', 'f_h', 'b_b', 'b_t', 'b_h', 'o_b', 'o_t', 'o_h',
    ]
)  # fmt: skip
def bi_gla_fused_kernel(
    q,  # (B, T, H, K), any strides that are multiples of ALIGN, the last one 1
    k,
    v,  # (B, T, H, V)
    g_fwd,
    g_bwd,
    go,  # (B, T, H, V): gradient by the output
    weights,  # of make_weights
    states,  # (4, B, H, N, K, V)
    dv,  # (B, T, H, V), contiguous
    flags,
    dq,  # (B, T, H, K), contiguous; (slices of V, B, T, H, K), float32, where there are several
    dk,
    dg_fwd,
    dg_bwd,
    T,
    H,
    N,  # chunks
    half,  # half the scale
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, f_b, f_t, f_h, b_b, b_t, b_h, o_b, o_t, o_h,
    ALIGN: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    REVERSED: tl.constexpr,
):  # fmt: skip
    """Gradients by q, k and gates of one chunk, from one slice of the values."""
    pid = tl.program_id(0)
    if REVERSED:
        pid = tl.num_programs(0) - 1 - pid
    batch, n, h = place(pid, N, H)
    column = tl.program_id(1) * BV
    # each slice of values has gradients of its own by the other inputs
    first = batch
    if V > BV:
        first += tl.num_programs(0).to(tl.int64) // (N * H) * tl.program_id(1)
    dtype: tl.constexpr = q.dtype.element_ty
    p_q = q + (batch * q_b + h * q_h) * ALIGN
    p_k = k + (batch * k_b + h * k_h) * ALIGN
    p_v = v + (batch * v_b + h * v_h) * ALIGN
    p_f = g_fwd + (batch * f_b + h * f_h) * ALIGN
    p_b = g_bwd + (batch * b_b + h * b_h) * ALIGN
    p_o = go + (batch * o_b + h * o_h) * ALIGN
    q_stride, k_stride, v_stride = q_t * ALIGN, k_t * ALIGN, v_t * ALIGN
    f_stride, b_stride, o_stride = f_t * ALIGN, b_t * ALIGN, o_t * ALIGN
    index = batch * H + h
    span = tl.num_programs(0) // N
    start = n * L

    y = load_operand(p_v, v_stride, start, T, column, V, L, BV)
    g = load_operand(p_o, o_stride, start, T, column, V, L, BV)
    row = tl.arange(0, L)[:, None]
    other = tl.arange(0, L)[None, :]
    b_dq = tl.zeros((L, BK), tl.float32)
    b_dk = tl.zeros((L, BK), tl.float32)
    b_dv = tl.zeros((L, BV), tl.float32)
    outside = tl.full((), 0, tl.int32)
    # what a compiler moves out of the loop is in registers all the time
    for direction in tl.range(2, num_stages=1, disable_licm=True):
        before = load_weights(weights, 1 - direction, L)
        d_weight = product(g, tl.trans(y), dtype)
        # of a token with itself
        own = tl.sum(tl.where(other == row, d_weight, 0.0), 1)[:, None]
        d_weight = multiplied(operand(d_weight, dtype), before, dtype)
        at = index + span * direction
        state = load_state(states, at * N + n, column, dtype, K, V, BK, BV)
        at = index + span * (3 - direction)
        d_state = load_state(states, at * N + n, column, dtype, K, V, BK, BV)
        # to the gates, from pairs of tokens on both sides of the chunk
        crossing = multiplied(state, d_state, dtype)
        dg = product(operand(tl.full((L, BV), 1.0, tl.float32), dtype), tl.trans(crossing), dtype)
        p_g = tl.where(direction == 1, p_b, p_f)
        g_stride = tl.where(direction == 1, b_stride, f_stride)
        log = LOG2E * log_decays_from_middle(
            weights, 5 - direction, p_g, g_stride, start, T, dtype, K, L, BK
        )
        x_k = load_rows(p_k, k_stride, start, T, 0, K, L, BK).to(tl.float32)
        fit = tl.abs(log) <= LOG2E * bound(dtype)
        outside = tl.maximum(outside, tl.max(1 - fit.to(tl.int32)))
        decay = exp2(-log)
        b_dq += own * x_k
        b_k = operand(x_k * decay, dtype)
        b_dv = add_product(b_dv, b_k, d_state, dtype)
        dk_out = product(y, tl.trans(d_state), dtype)
        # from keys before a gate with what leaves the chunk
        seen = b_k.to(tl.float32)
        dg = add_weighted(dg, before, seen * dk_out, dtype, dtype)
        x_q = load_rows(p_q, q_stride, start, T, 0, K, L, BK).to(tl.float32)
        b_dk += own * x_q
        b_q = operand(x_q * exp2(log), dtype)
        until = load_weights(weights, 3 - direction, L)
        weight = product(b_q, tl.trans(b_k), dtype)
        weight = multiplied(operand(weight, dtype), until, dtype)
        b_dv = add_product(b_dv, tl.trans(weight), g, dtype)
        dk_within = product(tl.trans(d_weight), b_q, dtype)
        b_dk += (dk_out + dk_within) * decay
        terms = -seen * dk_within
        b_dq_now = product(g, tl.trans(state), dtype)
        b_dq_now = add_product(b_dq_now, d_weight, b_k, dtype)
        b_dq += b_dq_now * exp2(log)
        # from queries behind a gate with what entered, and from pairs within the chunk as a
        # difference of two sums, with the operands as the products saw them, so that pairs on one
        # side of the gate cancel
        terms += b_q.to(tl.float32) * b_dq_now
        behind = load_weights(weights, 2 + direction, L)
        dg = add_weighted(dg, behind, terms, dtype, tl.float16)
        p_dg = tl.where(direction == 1, dg_bwd, dg_fwd)
        store_rows(p_dg, half * dg, first, h, H, start, T, 0, K, L, BK)
    store_rows(dv, half * b_dv, batch, h, H, start, T, column, V, L, BV)
    if column == 0:
        tl.store(flags + pid, outside.to(tl.int8))
    store_rows(dq, half * b_dq, first, h, H, start, T, 0, K, L, BK)
    store_rows(dk, half * b_dk, first, h, H, start, T, 0, K, L, BK)


@triton.jit(
    do_not_specialize=[
        'T', 'H', 'N', 'R', 'S', 'half', 'q_b', 'q_t', 'q_h', 'k_b', 'k_t', 'k_h', 'v_b', 'v_t',
        'v_h', 'f_b', 'f_t', 'f_h', 'b_b', 'b_t', 'b_h', 'o_b', 'o_t', 'o_h',
    ]
)  # fmt: skip
def bi_gla_walk_gradient_kernel(
    q,  # (B, T, H, K), any strides that are multiples of ALIGN, the last one 1
    k,
    v,  # (B, T, H, V)
    g_fwd,
    g_bwd,
    go,  # (B, T, H, V): gradient by the output
    weights,  # of make_weights
    states,  # (4, B, H, N, K, V): what enters each chunk; along the sequence only flagged ones
    sums,  # (4, B, H, S, K, V), float32: what enters each segment; or None for one segment
    flags,  # (B * N * H,), int8: whether a chunk is out of range, so that its results are wrong
    dv,  # (B, T, H, V), contiguous
    dq,  # (B, T, H, K), contiguous; (slices of V, B, T, H, K), float32, where there are several
    dk,
    dg_fwd,
    dg_bwd,
    T,
    H,
    N,  # chunks
    R,  # chunks of a segment
    S,  # segments
    half,  # half the scale
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, f_b, f_t, f_h, b_b, b_t, b_h, o_b, o_t, o_h,
    ALIGN: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """Gradients of one segment of one head: a walk against the sequence, then one along it."""
    SLICES: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    batch, m, h = place(pid // SLICES, S, H)
    column = pid % SLICES * BV
    # each slice of values has gradients of its own by the other inputs
    part = batch + tl.num_programs(0).to(tl.int64) // (SLICES * S * H) * (pid % SLICES)
    dtype: tl.constexpr = q.dtype.element_ty
    digits: tl.constexpr = g_fwd.dtype.element_ty
    p_q = q + (batch * q_b + h * q_h) * ALIGN
    p_k = k + (batch * k_b + h * k_h) * ALIGN
    p_v = v + (batch * v_b + h * v_h) * ALIGN
    p_f = g_fwd + (batch * f_b + h * f_h) * ALIGN
    p_b = g_bwd + (batch * b_b + h * b_h) * ALIGN
    p_o = go + (batch * o_b + h * o_h) * ALIGN
    q_stride, k_stride, v_stride = q_t * ALIGN, k_t * ALIGN, v_t * ALIGN
    f_stride, b_stride, o_stride = f_t * ALIGN, b_t * ALIGN, o_t * ALIGN
    index = batch * H + h
    span = tl.num_programs(0) // (SLICES * S)
    first = m * R
    last = tl.minimum(first + R, N)
    # against the sequence: states, and gradients by those that run along it
    at_s = (index + span) * N
    at_d = (index + 3 * span) * N
    if sums is None:
        state = tl.zeros((BK, BV), tl.float32)
        d_state = tl.zeros((BK, BV), tl.float32)
    else:
        state = load_state(sums, (index + span) * S + m, column, tl.float32, K, V, BK, BV)
        d_state = load_state(sums, (index + 3 * span) * S + m, column, tl.float32, K, V, BK, BV)
    before = load_weights(weights, 1, L)
    until = load_weights(weights, 3, L)
    for i in range(last - first):
        n = last - 1 - i
        start = n * L
        zero = tl.zeros((L, BK), tl.float32)
        b_gates = load_gates(p_b, b_stride, start, T, K, L, BK)
        b_decay = exp(to_middle(sum_over_tokens(b_gates, dtype, digits), dtype))[:, None]
        f_gates = load_gates(p_f, f_stride, start, T, K, L, BK)
        f_decay = exp(to_middle(sum_over_tokens(f_gates, dtype, digits), dtype))[:, None]
        state *= b_decay
        store_state(states, state, at_s + n, column, K, V, BK, BV)
        d_state *= f_decay
        store_state(states, d_state, at_d + n, column, K, V, BK, BV)
        state *= b_decay
        log = add_weighted(zero, before, b_gates, dtype, digits)
        x = load_rows(p_k, k_stride, start, T, 0, K, L, BK).to(tl.float32)
        y = load_operand(p_v, v_stride, start, T, column, V, L, BV)
        state = add_product(state, tl.trans(operand(x * exp(log), dtype)), y, dtype)
        d_state *= f_decay
        log = add_weighted(zero, until, f_gates, dtype, digits)
        x = load_rows(p_q, q_stride, start, T, 0, K, L, BK).to(tl.float32)
        y = load_operand(p_o, o_stride, start, T, column, V, L, BV)
        d_state = add_product(d_state, tl.trans(operand(x * exp(log), dtype)), y, dtype)
    # threads read what others wrote
    tl.debug_barrier()

    if sums is None:
        state = tl.zeros((BK, BV), tl.float32)
        d_state = tl.zeros((BK, BV), tl.float32)
    else:
        state = load_state(sums, index * S + m, column, tl.float32, K, V, BK, BV)
        d_state = load_state(sums, (index + 2 * span) * S + m, column, tl.float32, K, V, BK, BV)
    ones = operand(tl.full((L, BV), 1.0, tl.float32), dtype)
    row = tl.arange(0, L)[:, None]
    other = tl.arange(0, L)[None, :]
    for n in range(first, last):
        start = n * L
        zero = tl.zeros((L, BK), tl.float32)
        b_gates = load_rows(p_b, b_stride, start, T, 0, K, L, BK).to(tl.float32)
        b_decay = exp(0.5 * sum_over_tokens(b_gates, dtype, digits))[:, None]
        b_log = add_weighted(zero, load_weights(weights, 4, L), b_gates, dtype, digits)
        f_gates = load_rows(p_f, f_stride, start, T, 0, K, L, BK).to(tl.float32)
        f_decay = exp(0.5 * sum_over_tokens(f_gates, dtype, digits))[:, None]
        f_log = add_weighted(zero, load_weights(weights, 5, L), f_gates, dtype, digits)
        outside = any_outside(f_log, b_log, dtype)
        f_rest, b_rest = f_decay, b_decay
        if outside:
            # what other chunks get from this one needs no factors in range
            gates = load_gates(p_f, f_stride, start, T, K, L, BK)
            total = tl.sum(gates, 0)
            x = state * exp(to_middle(total, dtype))[:, None]
            store_state(states, x, index * N + n, column, K, V, BK, BV)
            f_decay = exp(total)[:, None]
            gates = load_gates(p_b, b_stride, start, T, K, L, BK)
            total = tl.sum(gates, 0)
            x = d_state * exp(to_middle(total, dtype))[:, None]
            store_state(states, x, (index + 2 * span) * N + n, column, K, V, BK, BV)
            b_decay = exp(total)[:, None]
        y = load_operand(p_v, v_stride, start, T, column, V, L, BV)
        g = load_operand(p_o, o_stride, start, T, column, V, L, BV)
        d_weight = product(g, tl.trans(y), dtype)
        # of a token with itself
        own = tl.sum(tl.where(other == row, d_weight, 0.0), 1)[:, None]
        x_q = load_rows(p_q, q_stride, start, T, 0, K, L, BK).to(tl.float32)
        x_k = load_rows(p_k, k_stride, start, T, 0, K, L, BK).to(tl.float32)
        b_dq = 2 * own * x_k
        b_dk = 2 * own * x_q

        # along the sequence
        q_factor = exp(f_log)
        k_factor = exp(-f_log)
        b_q = operand(x_q * q_factor, dtype)
        b_k = operand(x_k * k_factor, dtype)
        weight = tl.where(other <= row, product(b_q, tl.trans(b_k), dtype), 0.0)
        state *= f_decay
        seen = operand(state, dtype)
        d_seen = load_state(states, at_d + n, column, dtype, K, V, BK, BV)
        b_dv = product(b_k, d_seen, dtype)
        dg = product(ones, tl.trans(multiplied(seen, d_seen, dtype)), dtype)
        d_triangle = operand(tl.where(other < row, d_weight, 0.0), dtype)
        dk_out = product(y, tl.trans(d_seen), dtype)
        dg = add_weighted(dg, load_weights(weights, 1, L), b_k.to(tl.float32) * dk_out, dtype, dtype)
        dk_within = product(tl.trans(d_triangle), b_q, dtype)
        b_dk += (dk_out + dk_within) * k_factor
        now = product(g, tl.trans(seen), dtype)
        now = add_product(now, d_triangle, b_k, dtype)
        b_dq += now * q_factor
        terms = b_q.to(tl.float32) * now - b_k.to(tl.float32) * dk_within
        dg = add_weighted(dg, load_weights(weights, 2, L), terms, dtype, tl.float16)
        store_rows(dg_fwd, half * dg, part, h, H, start, T, 0, K, L, BK)
        middle = state
        state = add_product(middle, tl.trans(b_k), y, dtype) * f_rest
        if outside:
            log = log_decays_behind(p_f, f_stride, start, T, K, L, BK, False)
            x = load_rows(p_k, k_stride, start, T, 0, K, L, BK).to(tl.float32)
            x = operand(x * exp(log), dtype)
            x_v = load_operand(p_v, v_stride, start, T, column, V, L, BV)
            state = add_product(middle, tl.trans(x), x_v, dtype)

        # against it
        q_factor = exp(b_log)
        k_factor = exp(-b_log)
        b_q = operand(x_q * q_factor, dtype)
        b_k = operand(x_k * k_factor, dtype)
        weight += tl.where(other >= row, product(b_q, tl.trans(b_k), dtype), 0.0)
        d_state *= b_decay
        seen = load_state(states, at_s + n, column, dtype, K, V, BK, BV)
        d_seen = operand(d_state, dtype)
        b_dv = add_product(b_dv, b_k, d_seen, dtype)
        dg = product(ones, tl.trans(multiplied(seen, d_seen, dtype)), dtype)
        d_triangle = operand(tl.where(other > row, d_weight, 0.0), dtype)
        dk_out = product(y, tl.trans(d_seen), dtype)
        dg = add_weighted(dg, load_weights(weights, 0, L), b_k.to(tl.float32) * dk_out, dtype, dtype)
        dk_within = product(tl.trans(d_triangle), b_q, dtype)
        b_dk += (dk_out + dk_within) * k_factor
        now = product(g, tl.trans(seen), dtype)
        now = add_product(now, d_triangle, b_k, dtype)
        b_dq += now * q_factor
        terms = b_q.to(tl.float32) * now - b_k.to(tl.float32) * dk_within
        dg = add_weighted(dg, load_weights(weights, 3, L), terms, dtype, tl.float16)
        store_rows(dg_bwd, half * dg, part, h, H, start, T, 0, K, L, BK)
        middle = d_state
        d_state = add_product(middle, tl.trans(b_q), g, dtype) * b_rest
        if outside:
            log = log_decays_behind(p_b, b_stride, start, T, K, L, BK, True)
            x = load_rows(p_q, q_stride, start, T, 0, K, L, BK).to(tl.float32)
            x = operand(x * exp(log), dtype)
            x_o = load_operand(p_o, o_stride, start, T, column, V, L, BV)
            d_state = add_product(middle, tl.trans(x), x_o, dtype)

        b_dv = add_product(b_dv, tl.trans(operand(weight, dtype)), g, dtype)
        store_rows(dv, half * b_dv, batch, h, H, start, T, column, V, L, BV)
        store_rows(dq, half * b_dq, part, h, H, start, T, 0, K, L, BK)
        store_rows(dk, half * b_dk, part, h, H, start, T, 0, K, L, BK)
        if column == 0:
            tl.store(flags + (batch * N + n) * H + h, outside.to(tl.int8))


def bi_gla_backward(
    go: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_fwd: Tensor,
    g_bwd: Tensor,
    scale: float | None = None,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients by q, k, v, g_fwd and g_bwd, contiguous, each in the dtype of its tensor."""
    batch, tokens, heads, key_width = q.shape
    launch = launch or launch_for(q, v, 'bwd')
    rows = rows_of(q, k, v, g_fwd, g_bwd, go, length=launch.length)
    slices = triton.cdiv(v.shape[-1], launch.values)
    dv = v.new_empty(v.shape)
    parts = tuple(
        x.new_empty(x.shape)
        if slices == 1
        else x.new_empty((slices, *x.shape), dtype=torch.float32)
        for x in (q, k, g_fwd, g_bwd)
    )
    half = (key_width**-0.5 if scale is None else scale) / 2
    flags = v.new_empty((batch * heads * launch.chunks,), dtype=torch.int8)
    q, k, v, g_fwd, g_bwd, go = rows.tensors
    of_q, of_k, _, of_f, of_b, of_o = (rows.strides[3 * i : 3 * i + 3] for i in range(6))
    division = {
        'ALIGN': rows.align, 'K': key_width, 'V': v.shape[-1], 'L': launch.length,
        'BK': launch.keys, 'BV': launch.values, 'num_warps': launch.warps,
        'num_stages': launch.stages, 'maxnreg': launch.registers,
    }  # fmt: skip
    sizes = (tokens, heads, launch.chunks, half)
    grid = (batch * heads * launch.chunks, slices)
    with on_device(v):
        weights = make_weights(q, launch.length)
        sums = enter(rows, launch, weights, with_gradients=True)
        states = new_states(rows, launch, 4)
        import os
        if os.environ.get('FUSED'):
            launch_states(rows, launch, weights, states, sums)
            bi_gla_fused_kernel[grid](*rows.tensors, weights, states, dv, flags, *parts, *sizes, *rows.strides, REVERSED=sums is None, **division)
        elif os.environ.get('WALK'):
            bi_gla_walk_gradient_kernel[(batch * heads * launch.segments * slices,)](
                *rows.tensors, weights, states, sums, flags, dv, *parts, tokens, heads,
                launch.chunks, launch.segment, launch.segments, half, *rows.strides, **division
            )
        else:
            launch_states(rows, launch, weights, states, sums)
            bi_gla_value_gradient_kernel[grid](
                q, k, g_fwd, g_bwd, go, dv, flags, weights, states, *sizes, *of_q, *of_k, *of_f,
                *of_b, *of_o, REVERSED=sums is None, **division,
            )  # fmt: skip
            bi_gla_gradient_kernel[grid](
                *rows.tensors, weights, states, *parts, *sizes, *rows.strides, REVERSED=sums is not None, **division
            )
        launch_by_tokens(rows, flags, states, dv, parts, half, launch)
    if slices > 1:
        parts = tuple(
            x.sum(0).to(like.dtype) for x, like in zip(parts, (q, k, g_fwd, g_bwd), strict=True)
        )
    dq, dk, dg_fwd, dg_bwd = parts
    return dq, dk, dv, dg_fwd, dg_bwd
