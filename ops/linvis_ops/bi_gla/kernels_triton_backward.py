"""Triton kernel of the gradient of bidirectional gated linear attention.

A program has one chunk of one head, as in kernels_triton.py. It forms the states that enter the
chunk and the gradients by the states that leave it, and turns them into all gradients of the
chunk's tokens; only the inputs are read. README.md of this folder has the formulas.
"""

import triton
import triton.language as tl
from torch import Tensor

from linvis_ops._triton import on_device
from linvis_ops._triton_math import exp2
from linvis_ops.bi_gla.kernels_triton import absorb, entering_state, entering_states
from linvis_ops.bi_gla.kernels_triton_common import (
    add_product,
    base_two,
    in_range,
    load_operand,
    load_row,
    load_rows,
    log_decays,
    operand,
    place,
    product,
    store_rows,
)
from linvis_ops.bi_gla.launch import Launch, launch_for, rows_of


@triton.jit
def factored_gradients(
    q, k, y, g, d_weight, exponent, total, state, d_state, dtype: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """Gradients of one direction of a chunk whose gates are in range.

    Args:
        q: (L, BK), float32.
        k: (L, BK), float32.
        y: Values, an operand (L, BV).
        g: Gradient by the output, an operand (L, BV).
        d_weight: Gradient by the weights of this direction, without a token's weight of itself, an
            operand (L, L).
        exponent: Log decay up to each token, (L, BK), counted from its middle.
        total: Log decay over the chunk, (BK,); its half is the middle.
        state: What enters the chunk, (BK, BV).
        d_state: Gradient by what leaves it, (BK, BV).
        dtype: Of the inputs.
        REVERSE: The direction runs against the sequence.

    Returns:
        Weights (L, L), of which the other direction's half is meaningless; gradients by q, k, v
        and the gates. A token's weight of itself counts in the weights alone.
    """
    q_decay = exp2(exponent)
    k_decay = exp2(-exponent)
    # from the beginning to the middle, and from there to the end
    half = exp2(total / 2)[:, None]
    state *= half
    d_state *= half
    crossing = tl.sum(state * d_state, 1)
    d_state = operand(d_state, dtype)
    q = operand(q * q_decay, dtype)
    k = operand(k * k_decay, dtype)
    weight = product(q, tl.trans(k), dtype)
    dv = product(k, d_state, dtype)
    dq = product(g, tl.trans(operand(state, dtype)), dtype)
    dq = add_product(dq, d_weight, k, dtype)
    dk = product(y, tl.trans(d_state), dtype)
    # operands as the products above saw them, so that pairs on one side of a gate cancel
    k = k.to(tl.float32)
    crossing += tl.sum(k * dk, 0)
    dk = add_product(dk, tl.trans(d_weight), q, dtype)
    dg = crossing[None, :] + tl.cumsum(q.to(tl.float32) * dq - k * dk, 0, reverse=not REVERSE)
    return weight, dq * q_decay, dk * k_decay, dv, dg


@triton.jit
def gradients_token_by_token(
    q, k, y, g, p_k, p_v, p_g, k_stride, v_stride, g_stride, start, T, exponent, total,
    state, d_state, K: tl.constexpr, V: tl.constexpr, L: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Gradients by q, k, v, gates of one direction of a chunk, without a token's weight of itself.

    Arguments as in `factored_gradients`, but exponents are counted from the edge of the chunk.
    """
    dtype: tl.constexpr = p_k.dtype.element_ty
    to_end, _total = log_decays(p_g, g_stride, start, T, K, L, BK, REVERSE, False)
    q_decay = exp2(exponent)
    k_decay = exp2(to_end)
    crossing = tl.sum(state * d_state, 1) * exp2(total)
    d_state = operand(d_state, dtype)
    dv = product(operand(k * k_decay, dtype), d_state, dtype)
    dq = product(g, tl.trans(operand(state, dtype)), dtype) * q_decay
    dk = product(y, tl.trans(d_state), dtype) * k_decay
    later = k * dk
    # tokens that lie before, without the one itself
    dg = crossing[None, :] + tl.cumsum(later, 0, reverse=REVERSE) - later
    row = tl.arange(0, L)[:, None]
    count = tl.minimum(T - start, L)
    g = g.to(tl.float32)
    decay = tl.zeros((L, BK), tl.float32)
    by_pairs = q * dq
    for i in range(count):
        s = i if REVERSE else count - 1 - i
        near = s - 1 if REVERSE else s + 1
        gate = load_row(p_g, g_stride, start + near, (near >= 0) & (near < count), 0, K, BK)
        decay *= exp2(base_two(gate))[None, :]
        a = load_row(p_k, k_stride, start + s, True, 0, K, BK)
        b = load_row(p_v, v_stride, start + s, True, 0, V, BV)
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
    return dq, dk, dv, dg + tl.cumsum(by_pairs, 0, reverse=not REVERSE)


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
    dq,  # (B, T, H, K), contiguous
    dk,
    dv,  # (B, T, H, V), contiguous
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
    """Gradients of one chunk."""
    batch, n, h = place(tl.program_id(0), N, H)
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

    f_state = entering_state(states, index, 0, K, V, BK, BV)
    db_state = entering_state(states, index + 2 * span, 0, K, V, BK, BV)
    for i in range(n - first):
        start = (first + i) * L
        f_state = absorb(
            f_state, p_k, p_v, p_f, k_stride, v_stride, f_stride, start, T, 0,
            K, V, L, BK, BV, False, False,
        )  # fmt: skip
        db_state = absorb(
            db_state, p_q, p_o, p_b, q_stride, o_stride, b_stride, start, T, 0,
            K, V, L, BK, BV, False, True,
        )  # fmt: skip
    b_state = entering_state(states, index + span, 0, K, V, BK, BV)
    df_state = entering_state(states, index + 3 * span, 0, K, V, BK, BV)
    for i in range(last - 1 - n):
        start = (last - 1 - i) * L
        b_state = absorb(
            b_state, p_k, p_v, p_b, k_stride, v_stride, b_stride, start, T, 0,
            K, V, L, BK, BV, True, False,
        )  # fmt: skip
        df_state = absorb(
            df_state, p_q, p_o, p_f, q_stride, o_stride, f_stride, start, T, 0,
            K, V, L, BK, BV, True, True,
        )  # fmt: skip

    start = n * L
    b_q = load_rows(p_q, q_stride, start, T, 0, K, L, BK).to(tl.float32)
    b_k = load_rows(p_k, k_stride, start, T, 0, K, L, BK).to(tl.float32)
    b_v = load_operand(p_v, v_stride, start, T, 0, V, L, BV)
    b_o = load_operand(p_o, o_stride, start, T, 0, V, L, BV)
    f_exponent, f_total = log_decays(p_f, f_stride, start, T, K, L, BK, True, True)
    b_exponent, b_total = log_decays(p_b, b_stride, start, T, K, L, BK, False, True)
    f_middle = f_exponent - f_total[None, :] / 2
    b_middle = b_exponent - b_total[None, :] / 2
    # of a token with itself, in both directions
    own = 2 * tl.sum(b_v.to(tl.float32) * b_o.to(tl.float32), 1)[:, None]
    if in_range(f_middle, b_middle, dtype):
        t = tl.arange(0, L)[:, None]
        s = tl.arange(0, L)[None, :]
        d_weight = product(b_o, tl.trans(b_v), dtype)
        f_weight, b_dq, b_dk, b_dv, df = factored_gradients(
            b_q, b_k, b_v, b_o, operand(tl.where(t > s, d_weight, 0.0), dtype), f_middle, f_total,
            f_state, df_state, dtype, False,
        )  # fmt: skip
        b_weight, dq2, dk2, dv2, db = factored_gradients(
            b_q, b_k, b_v, b_o, operand(tl.where(t < s, d_weight, 0.0), dtype), b_middle, b_total,
            b_state, db_state, dtype, True,
        )  # fmt: skip
        b_dq += dq2
        b_dk += dk2
        weight = tl.where(t >= s, f_weight, 0.0) + tl.where(t <= s, b_weight, 0.0)
        b_dv = add_product(b_dv + dv2, tl.trans(operand(weight, dtype)), b_o, dtype)
    else:
        b_dq, b_dk, b_dv, df = gradients_token_by_token(
            b_q, b_k, b_v, b_o, p_k, p_v, p_f, k_stride, v_stride, f_stride, start, T, f_exponent,
            f_total, f_state, df_state, K, V, L, BK, BV, False,
        )  # fmt: skip
        dq2, dk2, dv2, db = gradients_token_by_token(
            b_q, b_k, b_v, b_o, p_k, p_v, p_b, k_stride, v_stride, b_stride, start, T, b_exponent,
            b_total, b_state, db_state, K, V, L, BK, BV, True,
        )  # fmt: skip
        b_dq += dq2
        b_dk += dk2
        b_dv += dv2 + 2 * tl.sum(b_q * b_k, 1)[:, None] * b_o.to(tl.float32)
    store_rows(dq, half * (b_dq + own * b_k), batch, h, H, start, T, 0, K, L, BK)
    store_rows(dk, half * (b_dk + own * b_q), batch, h, H, start, T, 0, K, L, BK)
    store_rows(dv, half * b_dv, batch, h, H, start, T, 0, V, L, BV)
    store_rows(dg_fwd, half * df, batch, h, H, start, T, 0, K, L, BK)
    store_rows(dg_bwd, half * db, batch, h, H, start, T, 0, K, L, BK)


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
    grads = tuple(x.new_empty(x.shape) for x in (q, k, v, g_fwd, g_bwd))
    half = (key_width**-0.5 if scale is None else scale) / 2
    with on_device(v):
        states = entering_states(rows, launch, with_gradients=True)
        bi_gla_gradient_kernel[(batch * heads * launch.chunks,)](
            *rows.tensors, states, *grads, tokens, heads, launch.chunks, launch.segment,
            launch.segments, half, *rows.strides,
            ALIGN=rows.align, K=key_width, V=v.shape[-1], L=launch.length, BK=launch.keys,
            BV=launch.values, num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
    return grads  # type: ignore[return-value]
