"""Triton kernel of gated linear attention for chunks whose gates leave the range of factors.

It is the recurrence itself, token by token from the states at the edges of a chunk, right for all
gates, in float32 and slow. The kernels of kernels_triton.py flag such chunks, whose results of
theirs mean nothing; this kernel runs last and writes these anew.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from linvis_ops._chunks import Launch, Rows
from linvis_ops._sizes import ceil_div
from linvis_ops._triton_tiles import load_rows, place, store_rows
from linvis_ops.bi_gla.kernels_triton_common import (
    exp,
    load_gates,
    load_row,
    load_state,
    opened,
    to_middle,
)

# Chunks of a program, few of which are flagged as a rule.
GROUP = 16
WARPS = 4


@triton.jit
def to_edge(
    states, index, column, gates, dtype: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """State (BK, BV) number `index` of memory at the edge of its chunk.

    gates is the sum (BK,) of those of the chunk.
    """
    state = load_state(states, index, column, tl.float32, K, V, BK, BV)
    return state * exp(-to_middle(gates, dtype))[:, None]


@triton.jit
def token(i, count, REVERSE: tl.constexpr):
    """Number of the token of a chunk that comes after i others."""
    return count - 1 - i if REVERSE else i


@triton.jit
def add_outputs(
    out, state, p_q, p_k, p_v, p_g, q_stride, k_stride, v_stride, g_stride, start, count, column,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Add the outputs (L, BV) of one direction of a chunk to `out`."""
    row = tl.arange(0, out.shape[0])[:, None]
    for i in range(count):
        t = start + token(i, count, REVERSE)
        g = opened(load_row(p_g, g_stride, t, 0, K, BK))
        x = load_row(p_k, k_stride, t, 0, K, BK)
        y = load_row(p_v, v_stride, t, column, V, BV)
        q = load_row(p_q, q_stride, t, 0, K, BK)
        state = state * exp(g)[:, None] + x[:, None] * y[None, :]
        out += tl.where(row == t - start, tl.sum(state * q[:, None], 0)[None, :], 0.0)
    return out


@triton.jit
def gradients(
    state, d_state, p_q, p_k, p_v, p_g, p_o, q_stride, k_stride, v_stride, g_stride, o_stride,
    start, count, T, column, K: tl.constexpr, V: tl.constexpr, L: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Gradients by q, k, v, gates of one direction of a chunk, without a token's weight of itself.

    Args:
        state: What enters the chunk, (BK, BV), float32.
        d_state: Gradient by what leaves it, likewise.
        p_q: Queries of the sequence.
        p_k: Keys.
        p_v: Values.
        p_g: Gates.
        p_o: Gradient by the output.
        q_stride: Of tokens.
        k_stride: Of tokens.
        v_stride: Of tokens.
        g_stride: Of tokens.
        o_stride: Of tokens.
        start: First token of the chunk.
        count: Tokens of it.
        T: Tokens of the sequence.
        column: First value channel of the tile.
        K: Key channels.
        V: Value channels.
        L: Tokens of a whole chunk.
        BK: Key channels of a tile.
        BV: Value channels of a tile.
        REVERSE: The direction runs against the sequence.
    """
    row = tl.arange(0, L)[:, None]
    dq = tl.zeros((L, BK), tl.float32)
    dk = tl.zeros((L, BK), tl.float32)
    dv = tl.zeros((L, BV), tl.float32)
    for i in range(count):
        t = start + token(i, count, REVERSE)
        gate = opened(load_row(p_g, g_stride, t, 0, K, BK))
        x = load_row(p_k, k_stride, t, 0, K, BK)
        y = load_row(p_v, v_stride, t, column, V, BV)
        g = load_row(p_o, o_stride, t, column, V, BV)
        state *= exp(gate)[:, None]
        dq += tl.where(row == t - start, tl.sum(state * g[None, :], 1)[None, :], 0.0)
        state += x[:, None] * y[None, :]
    # by all gates, from pairs of tokens on both sides of the end of the chunk
    crossing = tl.sum(state * d_state, 1)
    for i in range(count):
        t = start + token(i, count, not REVERSE)
        gate = opened(load_row(p_g, g_stride, t, 0, K, BK))
        x = load_row(p_k, k_stride, t, 0, K, BK)
        y = load_row(p_v, v_stride, t, column, V, BV)
        q = load_row(p_q, q_stride, t, 0, K, BK)
        g = load_row(p_o, o_stride, t, column, V, BV)
        own = row == t - start
        dk += tl.where(own, tl.sum(d_state * y[None, :], 1)[None, :], 0.0)
        dv += tl.where(own, tl.sum(d_state * x[:, None], 0)[None, :], 0.0)
        d_state = (d_state + q[:, None] * g[None, :]) * exp(gate)[:, None]
    q = load_rows(p_q, q_stride, start, T, 0, K, L, BK).to(tl.float32)
    x = load_rows(p_k, k_stride, start, T, 0, K, L, BK).to(tl.float32)
    dg = crossing[None, :] + tl.cumsum(q * dq - x * dk, 0, reverse=not REVERSE)
    return dq, dk, dv, dg


@triton.jit(
    do_not_specialize=[
        'T', 'H', 'N', 'chunks', 'half', 'q_b', 'q_t', 'q_h', 'k_b', 'k_t', 'k_h', 'v_b',
        'v_t', 'v_h', 'f_b', 'f_t', 'f_h', 'b_b', 'b_t', 'b_h', 'o_b', 'o_t', 'o_h',
    ]
)  # fmt: skip
def bi_gla_by_tokens_kernel(
    q,  # (B, T, H, K), any strides that are multiples of ALIGN, the last one 1
    k,
    v,  # (B, T, H, V)
    g_fwd,
    g_bwd,
    go,  # (B, T, H, V): gradient by the output, or None for outputs
    flags,  # (B * N * H,), int8
    states,  # (2 or 4, B, H, N, K, V)
    o,  # (B, T, H, V), contiguous: the output, with go the gradient by v
    dq,  # (B, T, H, K), contiguous; (slices of V, B, T, H, K), float32, where there are several
    dk,
    dg_fwd,
    dg_bwd,
    T,
    H,
    N,  # chunks of a sequence
    chunks,  # of all sequences and heads
    half,  # half the scale
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, f_b, f_t, f_h, b_b, b_t, b_h, o_b, o_t, o_h,
    ALIGN: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Outputs of the flagged ones of GROUP chunks, or with go their gradients."""
    number = tl.program_id(0) * GROUP
    group = number + tl.arange(0, GROUP)
    flagged = tl.load(flags + group, mask=group < chunks, other=0).to(tl.int32)
    column = tl.program_id(1) * BV
    dtype: tl.constexpr = q.dtype.element_ty
    q_stride, k_stride, v_stride = q_t * ALIGN, k_t * ALIGN, v_t * ALIGN
    f_stride, b_stride = f_t * ALIGN, b_t * ALIGN
    span = (chunks // N).to(tl.int64)
    part = span // H * tl.program_id(1)
    remaining = tl.sum(flagged, 0)
    while remaining > 0:
        if tl.sum(tl.where(group == number, flagged, 0), 0) > 0:
            remaining -= 1
            batch, n, h = place(number, N, H)
            p_q = q + (batch * q_b + h * q_h) * ALIGN
            p_k = k + (batch * k_b + h * k_h) * ALIGN
            p_v = v + (batch * v_b + h * v_h) * ALIGN
            p_f = g_fwd + (batch * f_b + h * f_h) * ALIGN
            p_b = g_bwd + (batch * b_b + h * b_h) * ALIGN
            start = n * L
            count = tl.minimum(T - start, L)
            at = batch * H + h
            gates = tl.sum(load_gates(p_f, f_stride, start, T, K, L, BK), 0)
            f_state = to_edge(states, at * N + n, column, gates, dtype, K, V, BK, BV)
            if go is not None:
                at += 3 * span
                df_state = to_edge(states, at * N + n, column, gates, dtype, K, V, BK, BV)
                at -= 3 * span
            gates = tl.sum(load_gates(p_b, b_stride, start, T, K, L, BK), 0)
            at += span
            b_state = to_edge(states, at * N + n, column, gates, dtype, K, V, BK, BV)
            if go is None:
                out = tl.zeros((L, BV), tl.float32)
                out = add_outputs(
                    out, f_state, p_q, p_k, p_v, p_f, q_stride, k_stride, v_stride, f_stride,
                    start, count, column, K, V, BK, BV, False,
                )  # fmt: skip
                out = add_outputs(
                    out, b_state, p_q, p_k, p_v, p_b, q_stride, k_stride, v_stride, b_stride,
                    start, count, column, K, V, BK, BV, True,
                )  # fmt: skip
                store_rows(o, out * half, batch, h, H, start, T, column, V, L, BV)
            else:
                at += span
                db_state = to_edge(states, at * N + n, column, gates, dtype, K, V, BK, BV)
                p_o = go + (batch * o_b + h * o_h) * ALIGN
                o_stride = o_t * ALIGN
                b_dq, b_dk, dv, dg = gradients(
                    f_state, df_state, p_q, p_k, p_v, p_f, p_o, q_stride, k_stride, v_stride,
                    f_stride, o_stride, start, count, T, column, K, V, L, BK, BV, False,
                )  # fmt: skip
                store_rows(dg_fwd, half * dg, part + batch, h, H, start, T, 0, K, L, BK)
                dq2, dk2, dv2, dg = gradients(
                    b_state, db_state, p_q, p_k, p_v, p_b, p_o, q_stride, k_stride, v_stride,
                    b_stride, o_stride, start, count, T, column, K, V, L, BK, BV, True,
                )  # fmt: skip
                store_rows(dg_bwd, half * dg, part + batch, h, H, start, T, 0, K, L, BK)
                x_q = load_rows(p_q, q_stride, start, T, 0, K, L, BK).to(tl.float32)
                x_k = load_rows(p_k, k_stride, start, T, 0, K, L, BK).to(tl.float32)
                y = load_rows(p_v, v_stride, start, T, column, V, L, BV).to(tl.float32)
                g = load_rows(p_o, o_stride, start, T, column, V, L, BV).to(tl.float32)
                # of a token with itself, in both directions
                own = 2 * tl.sum(y * g, 1)[:, None]
                b_dq += dq2 + own * x_k
                b_dk += dk2 + own * x_q
                dv += dv2 + 2 * tl.sum(x_q * x_k, 1)[:, None] * g
                store_rows(o, half * dv, batch, h, H, start, T, column, V, L, BV)
                store_rows(dq, half * b_dq, part + batch, h, H, start, T, 0, K, L, BK)
                store_rows(dk, half * b_dk, part + batch, h, H, start, T, 0, K, L, BK)
        number += 1


def launch_by_tokens(
    rows: Rows,
    flags: Tensor,
    states: Tensor,
    o: Tensor,
    parts: Sequence[Tensor],
    half: float,
    launch: Launch,
) -> None:
    """Compute flagged chunks.

    Args:
        rows: q, k, v, g_fwd, g_bwd, and for gradients the gradient by the output.
        flags: int8, nonzero for such chunks.
        states: Those that enter the chunks.
        o: The output, for gradients the gradient by v.
        parts: For gradients those by q, k and the gates.
        half: Half the scale.
        launch: Division of the tokens.
    """
    tokens, heads, key_width = rows.tensors[0].shape[1:]
    value_width = o.shape[-1]
    chunks = flags.numel()
    bi_gla_by_tokens_kernel[(ceil_div(chunks, GROUP), ceil_div(value_width, launch.values))](
        *rows.tensors, *(() if parts else (None,)), flags, states, o,
        *(parts or (None, None, None, None)), tokens, heads, launch.chunks, chunks, half,
        *rows.strides, *(() if parts else (0, 0, 0)),
        ALIGN=rows.align, K=key_width, V=value_width, L=launch.length, BK=launch.keys,
        BV=launch.values, GROUP=GROUP, num_warps=WARPS, num_stages=1,
    )  # fmt: skip
