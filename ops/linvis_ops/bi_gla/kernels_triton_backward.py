"""Triton kernels of the gradient of bidirectional gated linear attention.

A program of the state kernel walks through a segment, as in kernels_triton.py, for a state or for
the gradient by one, and leaves it in memory at every chunk. A program of the gradient kernel has
one chunk of one head: it reads the states that enter the chunk and the gradients by the states that
leave it, and turns them into the gradients by queries, keys, values and gates. Of the forward pass
only the inputs are read. README.md of this folder has the formulas.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from linvis_ops._chunks import Launch, rows_of
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
from linvis_ops.bi_gla.kernels_triton import enter, new_states
from linvis_ops.bi_gla.kernels_triton_by_tokens import launch_by_tokens
from linvis_ops.bi_gla.kernels_triton_common import (
    add_weighted,
    any_beyond,
    bound,
    exp,
    kept,
    load_gates,
    load_state,
    load_weights,
    log_decays_from_middle,
    magnitude,
    make_weights,
    multiplied,
    store_state,
    sum_over_tokens,
    to_middle,
)
from linvis_ops.bi_gla.launch import launch_for

# Most stages of the loop over directions: two load its tiles by copies that are waited for once a
# direction, and three take so much shared memory that fewer programs run.
MOST_AHEAD = 2


@triton.jit(
    do_not_specialize=[
        'T', 'H', 'N', 'R', 'S', 'q_b', 'q_t', 'q_h', 'k_b', 'k_t', 'k_h', 'v_b', 'v_t', 'v_h',
        'f_b', 'f_t', 'f_h', 'b_b', 'b_t', 'b_h', 'o_b', 'o_t', 'o_h',
    ]
)  # fmt: skip
def bi_gla_state_kernel(
    q,  # (B, T, H, K), any strides that are multiples of ALIGN, the last one 1
    k,
    v,  # (B, T, H, V)
    g_fwd,
    g_bwd,
    go,  # (B, T, H, V): gradient by the output
    weights,  # of make_weights
    states,  # (4, B, H, N, K, V): what enters each chunk
    sums,  # (4, B, H, S, K, V), float32: what enters each segment; or None for one segment
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
):  # fmt: skip
    """States and gradients by states at chunks, decayed up to a chunk's middle.

    A program has one segment of one kind. Kinds are in the order of memory the state that runs
    along the sequence, the one against it, the gradient by the latter, which runs along the
    sequence, and the gradient by the former.
    """
    pid = tl.program_id(0)
    if sums is not None:
        # first what the launch before read last, which is in the cache
        pid = tl.num_programs(0) - 1 - pid
    kind = pid % 4
    batch, m, h = place(pid // 4, S, H)
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
    by_state = kind < 2
    p_x = tl.where(
        by_state, k + (batch * k_b + h * k_h) * ALIGN, q + (batch * q_b + h * q_h) * ALIGN
    )
    p_y = tl.where(
        by_state, v + (batch * v_b + h * v_h) * ALIGN, go + (batch * o_b + h * o_h) * ALIGN
    )
    x_stride = tl.where(by_state, k_t, q_t) * ALIGN
    y_stride = tl.where(by_state, v_t, o_t) * ALIGN
    row = (kind * (tl.num_programs(0) // (4 * S * H)) + batch) * H + h
    first = m * R
    last = tl.minimum(first + R, N)

    if sums is not None:
        state = load_state(sums, row * S + m, column, tl.float32, K, V, BK, BV)
    else:
        state = tl.zeros((BK, BV), tl.float32)
    # a token's own gate acts on what its query sees, and not on its key
    between = load_weights(weights, kind, L)
    for i in range(last - first):
        n = tl.where(against, last - 1 - i, first + i)
        start = n * L
        g = load_gates(p_g, g_stride, start, T, K, L, BK)
        total = sum_over_tokens(g, dtype, digits)[:, None]
        middle = to_middle(total, dtype)
        state *= exp(middle)
        store_state(states, state, row * N + n, column, K, V, BK, BV)
        state *= exp(total - middle)
        log = add_weighted(tl.zeros((L, BK), tl.float32), between, g, dtype, digits)
        x = load_rows(p_x, x_stride, start, T, 0, K, L, BK).to(tl.float32)
        y = load_operand(p_y, y_stride, start, T, column, V, L, BV)
        state = add_product(state, tl.trans(operand(x * exp(log), dtype)), y, dtype)


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
    dv,  # (B, T, H, V), contiguous
    flags,  # (B * N * H,), int8: whether a chunk is out of range, so that its results are wrong
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
    AHEAD: tl.constexpr,
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
    outside = tl.full((), False, tl.int1)
    # what a compiler moves out of the loop is in registers all the time
    for direction in tl.range(2, num_stages=AHEAD, disable_licm=True):
        before = load_weights(weights, 1 - direction, L)
        d_weight = product(g, tl.trans(y), dtype)
        # of a token with itself
        own = tl.sum(tl.where(other == row, d_weight, 0.0), 1)[:, None]
        d_weight = kept(operand(d_weight, dtype), before)
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
        outside = outside | any_beyond(magnitude(log), LOG2E * bound(dtype))
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
        weight = kept(operand(weight, dtype), until)
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
    slices = ceil_div(v.shape[-1], launch.values)
    dv = torch.empty_like(v, memory_format=torch.contiguous_format)
    parts = tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format)
        if slices == 1
        else x.new_empty((slices, *x.shape), dtype=torch.float32)
        for x in (q, k, g_fwd, g_bwd)
    )
    half = (key_width**-0.5 if scale is None else scale) / 2
    flags = v.new_empty((batch * heads * launch.chunks,), dtype=torch.int8)
    division = {
        'ALIGN': rows.align, 'K': key_width, 'V': v.shape[-1], 'L': launch.length,
        'BK': launch.keys, 'BV': launch.values, 'num_warps': launch.warps,
        'num_stages': launch.stages,
    }  # fmt: skip
    with on_device(v):
        weights = make_weights(q, launch.length)
        sums = enter(rows, launch, weights)
        states = new_states(rows, launch, 4)
        bi_gla_state_kernel[(4 * batch * heads * launch.segments, slices)](
            *rows.tensors, weights, states, sums, tokens, heads, launch.chunks, launch.segment,
            launch.segments, *rows.strides, **division,
        )  # fmt: skip
        bi_gla_gradient_kernel[(batch * heads * launch.chunks, slices)](
            *rows.tensors, weights, states, dv, flags, *parts, tokens, heads, launch.chunks, half,
            *rows.strides, REVERSED=sums is None, AHEAD=min(launch.stages, MOST_AHEAD), **division,
        )  # fmt: skip
        launch_by_tokens(rows, flags, states, dv, parts, half, launch)
    if slices > 1:
        parts = tuple(
            x.sum(0).to(like.dtype) for x, like in zip(parts, (q, k, g_fwd, g_bwd), strict=True)
        )
    dq, dk, dg_fwd, dg_bwd = parts
    return dq, dk, dv, dg_fwd, dg_bwd
