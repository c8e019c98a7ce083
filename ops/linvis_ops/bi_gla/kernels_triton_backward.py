"""Triton kernel of the gradient of bidirectional gated linear attention.

A program has one chunk of one head, as in kernels_triton.py. It forms the states that enter the
chunk and the gradients by the states that leave it, and turns them into all gradients of the
chunk's tokens; only the inputs are read. README.md of this folder has the formulas.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from linvis_ops._chunks import Launch, rows_of
from linvis_ops._triton import on_device
from linvis_ops._triton_tiles import (
    add_product,
    load_operand,
    load_rows,
    operand,
    place,
    product,
    store_rows,
)
from linvis_ops.bi_gla.kernels_triton import absorb, add_entering, entering_states
from linvis_ops.bi_gla.kernels_triton_common import (
    add_crossing,
    choose,
    exp,
    gate_sums,
    in_range,
    load_gates,
    load_row,
    opened,
    own_log_decays,
    whole,
)
from linvis_ops.bi_gla.launch import launch_for


@triton.jit
def to_middle(state, d_state, middle, fits, dtype: tl.constexpr):
    """The state that enters a chunk and the gradient by the one that leaves it, as operands.

    Decayed to the middle of the chunk's range if that fits. The last result is what the two give to
    the gradient by every gate, (BK,).
    """
    half = exp(whole(middle))
    rest = tl.where(fits, 1.0, half * half)
    half = tl.where(fits, half, 1.0)
    state *= half
    d_state *= half
    crossing = tl.sum(state * d_state * rest, 1)
    return operand(state, dtype), operand(d_state, dtype), crossing


@triton.jit
def factored_gradients(
    q, k, y, g, d_weight, log_decay, state, d_state, crossing, dtype: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """Gradients of one direction of a chunk in range, without a token's weight of itself.

    Args:
        q: (L, BK) with its decay, an operand.
        k: (L, BK) with its decay, an operand.
        y: Values, an operand (L, BV).
        g: Gradient by the output, an operand (L, BV).
        d_weight: Gradient by the weights of this direction, an operand (L, L).
        log_decay: Of each token, (L, BK), counted from the middle of the range.
        state: What enters the chunk, decayed up to the middle, an operand (BK, BV).
        d_state: Gradient by what leaves it, decayed back to the middle, an operand (BK, BV).
        crossing: Gradient by the gates that what enters and leaves gives to each, (BK,).
        dtype: Of the inputs.
        REVERSE: The direction runs against the sequence.

    Returns:
        Gradients by q, k and the gates.
    """
    dk = product(y, tl.trans(d_state), dtype)
    within = product(tl.trans(d_weight), q, dtype)
    dq = product(g, tl.trans(state), dtype)
    dq = add_product(dq, d_weight, k, dtype)
    # pairs on both sides of a gate: keys that lie before it with what leaves the chunk, queries
    # behind it with what entered, and pairs within the chunk as a difference of two sums, with the
    # operands as the products saw them, so that pairs on one side cancel
    seen = k.to(tl.float32)
    terms = q.to(tl.float32) * dq - seen * within
    dg = crossing[None, :] + tl.zeros_like(dk)
    dg = add_crossing(dg, seen * dk, terms, dtype, tl.float16, REVERSE)
    return dq * exp(log_decay), (dk + within) * exp(-log_decay), dg


@triton.jit
def gradients_token_by_token(
    q, k, y, g, p_k, p_v, p_g, k_stride, v_stride, g_stride, start, T, column, log_decay,
    state, d_state, crossing, K: tl.constexpr, V: tl.constexpr, L: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Gradients by q, k, v, gates of one direction of a chunk, without a token's weight of itself.

    Arguments as in `factored_gradients`, but q and k are float32 and not decayed, and decays and
    states are those at the edges of the chunk.
    """
    dtype: tl.constexpr = p_k.dtype.element_ty
    digits: tl.constexpr = p_g.dtype.element_ty
    gates = load_gates(p_g, g_stride, start, T, K, L, BK)
    to_end, _total = gate_sums(gates, dtype, digits, not REVERSE, False)
    q_decay = exp(log_decay)
    k_decay = exp(to_end)
    dv = product(operand(k * k_decay, dtype), d_state, dtype)
    dq = product(g, tl.trans(state), dtype) * q_decay
    dk = product(y, tl.trans(d_state), dtype) * k_decay
    keys = k * dk
    row = tl.arange(0, L)[:, None]
    count = tl.minimum(T - start, L)
    g = g.to(tl.float32)
    decay = tl.zeros((L, BK), tl.float32)
    by_pairs = q * dq
    for i in range(count):
        s = i if REVERSE else count - 1 - i
        near = s - 1 if REVERSE else s + 1
        gate = load_row(p_g, g_stride, start + near, (near >= 0) & (near < count), 0, K, BK)
        decay *= exp(opened(gate))[None, :]
        a = load_row(p_k, k_stride, start + s, True, 0, K, BK)
        b = load_row(p_v, v_stride, start + s, True, column, V, BV)
        d_weight = tl.sum(g * b[None, :], 1)[:, None]
        q_part = d_weight * decay * a[None, :]
        k_part = tl.sum(d_weight * decay * q, 0)
        v_part = tl.sum(tl.sum(q * decay * a[None, :], 1)[:, None] * g, 0)
        dq += q_part
        by_pairs += q * q_part
        own = row == s
        dk += tl.where(own, k_part[None, :], 0.0)
        dv += tl.where(own, v_part[None, :], 0.0)
        by_pairs -= tl.where(own, (a * k_part)[None, :], 0.0)
        decay = tl.where(own, 1.0, decay)
    dg = crossing[None, :] + tl.zeros_like(dk)
    dg = add_crossing(dg, keys, by_pairs, dtype, tl.float32, REVERSE)
    return dq, dk, dv, dg


@triton.jit(
    do_not_specialize=[
        'T', 'H', 'N', 'R', 'S', 'half', 'q_b', 'q_t', 'q_h', 'k_b', 'k_t', 'k_h', 'v_b', 'v_t',
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
    states,  # (4, B, H, S, K, V) of the scan, or None
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
    """Gradients of one chunk, from one slice of the values."""
    batch, n, h = place(tl.program_id(0), N, H)
    column = tl.program_id(1) * BV
    # each slice of values has gradients of its own by the other inputs
    part = tl.num_programs(0).to(tl.int64) // (N * H) * tl.program_id(1)
    dtype: tl.constexpr = q.dtype.element_ty
    p_q = q + (batch * q_b + h * q_h) * ALIGN
    p_k = k + (batch * k_b + h * k_h) * ALIGN
    p_v = v + (batch * v_b + h * v_h) * ALIGN
    p_f = g_fwd + (batch * f_b + h * f_h) * ALIGN
    p_b = g_bwd + (batch * b_b + h * b_h) * ALIGN
    p_o = go + (batch * o_b + h * o_h) * ALIGN
    q_stride, k_stride, v_stride = q_t * ALIGN, k_t * ALIGN, v_t * ALIGN
    f_stride, b_stride, o_stride = f_t * ALIGN, b_t * ALIGN, o_t * ALIGN
    first = n // R * R
    last = tl.minimum(first + R, N)
    index = (batch * H + h) * S + n // R
    span = tl.num_programs(0).to(tl.int64) // N * S

    zero = tl.zeros((L, BK), tl.float32)
    f_state = tl.zeros((BK, BV), tl.float32)
    b_state = tl.zeros((BK, BV), tl.float32)
    df_state = tl.zeros((BK, BV), tl.float32)
    db_state = tl.zeros((BK, BV), tl.float32)
    f_passed = zero
    b_passed = zero
    for i in range(n - first):
        start = (n - 1 - i) * L
        x = load_rows(p_k, k_stride, start, T, 0, K, L, BK).to(tl.float32)
        y = load_operand(p_v, v_stride, start, T, column, V, L, BV)
        f_state, f_passed = absorb(
            f_state, f_passed, x, y, p_f, f_stride, start, T, dtype, K, L, BK, False, False
        )
        x = load_rows(p_q, q_stride, start, T, 0, K, L, BK).to(tl.float32)
        y = load_operand(p_o, o_stride, start, T, column, V, L, BV)
        db_state, b_passed = absorb(
            db_state, b_passed, x, y, p_b, b_stride, start, T, dtype, K, L, BK, False, True
        )
    f_state = add_entering(f_state, f_passed, states, index, column, K, V, BK, BV)
    db_state = add_entering(db_state, b_passed, states, index + 2 * span, column, K, V, BK, BV)
    f_passed = zero
    b_passed = zero
    for i in range(last - 1 - n):
        start = (n + 1 + i) * L
        x = load_rows(p_k, k_stride, start, T, 0, K, L, BK).to(tl.float32)
        y = load_operand(p_v, v_stride, start, T, column, V, L, BV)
        b_state, b_passed = absorb(
            b_state, b_passed, x, y, p_b, b_stride, start, T, dtype, K, L, BK, True, False
        )
        x = load_rows(p_q, q_stride, start, T, 0, K, L, BK).to(tl.float32)
        y = load_operand(p_o, o_stride, start, T, column, V, L, BV)
        df_state, f_passed = absorb(
            df_state, f_passed, x, y, p_f, f_stride, start, T, dtype, K, L, BK, True, True
        )
    b_state = add_entering(b_state, b_passed, states, index + span, column, K, V, BK, BV)
    df_state = add_entering(df_state, f_passed, states, index + 3 * span, column, K, V, BK, BV)

    start = n * L
    f_decay, f_middle = own_log_decays(p_f, f_stride, start, T, dtype, K, L, BK, False)
    b_decay, b_middle = own_log_decays(p_b, b_stride, start, T, dtype, K, L, BK, True)
    fits = in_range(f_decay - f_middle, b_decay - b_middle, dtype)
    f_state, df_state, f_crossing = to_middle(f_state, df_state, f_middle, fits, dtype)
    b_state, db_state, b_crossing = to_middle(b_state, db_state, b_middle, fits, dtype)
    b_v = load_operand(p_v, v_stride, start, T, column, V, L, BV)
    b_o = load_operand(p_o, o_stride, start, T, column, V, L, BV)
    # of a token with itself, in both directions
    own = 2 * tl.sum(b_v.to(tl.float32) * b_o.to(tl.float32), 1)[:, None]
    if fits:
        f_decay -= f_middle
        b_decay -= b_middle
        x_q = load_rows(p_q, q_stride, start, T, 0, K, L, BK).to(tl.float32)
        x_k = load_rows(p_k, k_stride, start, T, 0, K, L, BK).to(tl.float32)
        f_q = operand(x_q * exp(f_decay), dtype)
        f_k = operand(x_k * exp(-f_decay), dtype)
        r_q = operand(x_q * exp(b_decay), dtype)
        r_k = operand(x_k * exp(-b_decay), dtype)
        weight = tl.where(choose(L, False, True), product(f_q, tl.trans(f_k), dtype), 0.0)
        weight += tl.where(choose(L, True, True), product(r_q, tl.trans(r_k), dtype), 0.0)
        b_dv = product(tl.trans(operand(weight, dtype)), b_o, dtype)
        b_dv = add_product(b_dv, f_k, df_state, dtype)
        b_dv = add_product(b_dv, r_k, db_state, dtype)
        store_rows(dv, half * b_dv, batch, h, H, start, T, column, V, L, BV)
        d_weight = product(b_o, tl.trans(b_v), dtype)
        inner = operand(tl.where(choose(L, False, False), d_weight, 0.0), dtype)
        b_dq, b_dk, df = factored_gradients(
            f_q, f_k, b_v, b_o, inner, f_decay, f_state, df_state, f_crossing, dtype, False
        )
        inner = operand(tl.where(choose(L, True, False), d_weight, 0.0), dtype)
        dq2, dk2, db = factored_gradients(
            r_q, r_k, b_v, b_o, inner, b_decay, b_state, db_state, b_crossing, dtype, True
        )
        b_dq += dq2
        b_dk += dk2
    else:
        x_q = load_rows(p_q, q_stride, start, T, 0, K, L, BK).to(tl.float32)
        x_k = load_rows(p_k, k_stride, start, T, 0, K, L, BK).to(tl.float32)
        b_dq, b_dk, b_dv, df = gradients_token_by_token(
            x_q, x_k, b_v, b_o, p_k, p_v, p_f, k_stride, v_stride, f_stride, start, T, column,
            f_decay, f_state, df_state, f_crossing, K, V, L, BK, BV, False,
        )  # fmt: skip
        dq2, dk2, dv2, db = gradients_token_by_token(
            x_q, x_k, b_v, b_o, p_k, p_v, p_b, k_stride, v_stride, b_stride, start, T, column,
            b_decay, b_state, db_state, b_crossing, K, V, L, BK, BV, True,
        )  # fmt: skip
        b_dq += dq2
        b_dk += dk2
        b_dv += dv2 + 2 * tl.sum(x_q * x_k, 1)[:, None] * b_o.to(tl.float32)
        store_rows(dv, half * b_dv, batch, h, H, start, T, column, V, L, BV)
    x_q = load_rows(p_q, q_stride, start, T, 0, K, L, BK).to(tl.float32)
    x_k = load_rows(p_k, k_stride, start, T, 0, K, L, BK).to(tl.float32)
    store_rows(dq, half * (b_dq + own * x_k), part + batch, h, H, start, T, 0, K, L, BK)
    store_rows(dk, half * (b_dk + own * x_q), part + batch, h, H, start, T, 0, K, L, BK)
    store_rows(dg_fwd, half * df, part + batch, h, H, start, T, 0, K, L, BK)
    store_rows(dg_bwd, half * db, part + batch, h, H, start, T, 0, K, L, BK)


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
    with on_device(v):
        states = entering_states(rows, launch, with_gradients=True)
        bi_gla_gradient_kernel[(batch * heads * launch.chunks, slices)](
            *rows.tensors, states, dv, *parts, tokens, heads, launch.chunks, launch.segment,
            launch.segments, half, *rows.strides,
            ALIGN=rows.align, K=key_width, V=v.shape[-1], L=launch.length, BK=launch.keys,
            BV=launch.values, num_warps=launch.warps, num_stages=launch.stages,
            maxnreg=launch.registers,
        )  # fmt: skip
    if slices > 1:
        parts = tuple(
            x.sum(0).to(like.dtype) for x, like in zip(parts, (q, k, g_fwd, g_bwd), strict=True)
        )
    dq, dk, dg_fwd, dg_bwd = parts
    return dq, dk, dv, dg_fwd, dg_bwd
