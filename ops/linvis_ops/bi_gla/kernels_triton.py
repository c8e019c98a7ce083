"""Triton kernels of bidirectional gated linear attention: states of segments, scan, outputs.

A chunk is L tokens, a segment some chunks. A program of the output kernel has one chunk of one
head: it forms the state that enters it from either side out of the other chunks of its segment and
what a scan over segments left in memory, and adds what the chunk's own tokens see of each other.
README.md of this folder, Implementation in Triton, has the reasons. Sums are float32; log gates are
natural.

Each direction of a chunk is in range, or it is not: where the gates of the chunk add up to little,
decays between its tokens are products of two factors around the middle of that sum; elsewhere
decays are multiplied up token by token (the functions called token_by_token).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from linvis_ops._chunks import Launch, Rows, rows_of
from linvis_ops._triton import on_device
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
from linvis_ops.bi_gla.kernels_triton_common import (
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

# Segments whose states are loaded together by the scan.
AT_ONCE = tl.constexpr(8)
# Elements of a state in one program of the scan.
SCAN_ELEMENTS = 256


@triton.jit
def absorb(
    state, passed, x, y, p_g, g_stride, start, T, dtype: tl.constexpr, K: tl.constexpr,
    L: tl.constexpr, BK: tl.constexpr, REVERSE: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Add x y^T of a chunk's tokens to a state (BK, BV), decayed up to where the state is.

    Args:
        state: The state, float32.
        passed: Sums of the gates of the chunks between this one and the place of the state, every
            row (L, BK) alike.
        x: (L, BK), float32.
        y: (L, BV), an operand.
        p_g: Gates of the sequence.
        g_stride: Of their tokens.
        start: First token of the chunk.
        T: Tokens of the sequence.
        dtype: Of the inputs.
        K: Key channels.
        L: Tokens of a chunk.
        BK: Key channels of a tile.
        REVERSE: The state lies before the chunk and not behind it.
        OWN: A token's own gate acts on it.

    Returns:
        The state, and `passed` with this chunk's gates.
    """
    g = load_gates(p_g, g_stride, start, T, K, L, BK)
    sums, total = gate_sums(g, dtype, p_g.dtype.element_ty, not REVERSE, OWN)
    state = add_product(state, tl.trans(operand(x * exp(passed + sums), dtype)), y, dtype)
    return state, passed + total


@triton.jit
def walk_segment(
    p_x, p_y, p_up, p_down, x_stride, y_stride, up_stride, down_stride, states, totals,
    index, span, first, last, T, column,
    K: tl.constexpr, V: tl.constexpr, L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OWN: tl.constexpr,
):  # fmt: skip
    """What chunks first..last - 1 alone leave at their end and at their beginning, from one read.

    The state at their end is number `index` in memory, that at their beginning is `span` further.
    """
    dtype: tl.constexpr = p_x.dtype.element_ty
    zero = tl.zeros((L, BK), tl.float32)
    up = tl.zeros((BK, BV), tl.float32)
    down = tl.zeros((BK, BV), tl.float32)
    up_passed = zero
    down_passed = zero
    for i in range(last - first):
        start = (first + i) * L
        x = load_rows(p_x, x_stride, start, T, 0, K, L, BK).to(tl.float32)
        y = load_operand(p_y, y_stride, start, T, column, V, L, BV)
        added, passed = absorb(
            tl.zeros((BK, BV), tl.float32), zero, x, y, p_up, up_stride, start, T,
            dtype, K, L, BK, False, OWN,
        )  # fmt: skip
        up = up * exp(whole(passed)) + added
        up_passed += passed
        down, down_passed = absorb(
            down, down_passed, x, y, p_down, down_stride, start, T, dtype, K, L, BK, True, OWN
        )
    offsets, exist = state_offsets(column, K, V, BK, BV)
    tl.store(states + index * (K * V) + offsets, up, mask=exist)
    tl.store(states + (index + span) * (K * V) + offsets, down, mask=exist)
    if column == 0:
        c = tl.arange(0, BK)
        tl.store(totals + index * K + c, tl.max(up_passed, 0), mask=c < K)
        tl.store(totals + (index + span) * K + c, tl.max(down_passed, 0), mask=c < K)


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
    states,  # (2 or 4, B, H, S, K, V), float32
    totals,  # (2 or 4, B, H, S, K), float32: log decays over segments
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
    """What each segment adds to the states of both directions; with go, to their gradients too.

    In the order of memory: the state that runs along the sequence, the one against it, the
    gradient by the latter (which runs along the sequence), and the gradient by the former.
    """
    batch, m, h = place(tl.program_id(0), S, H)
    column = tl.program_id(1) * BV
    p_f = g_fwd + (batch * f_b + h * f_h) * ALIGN
    p_b = g_bwd + (batch * b_b + h * b_h) * ALIGN
    index = (batch * H + h) * S + m
    span = tl.num_programs(0).to(tl.int64)
    first = m * R
    last = tl.minimum(first + R, N)
    if tl.program_id(2) == 0:
        p_k = k + (batch * k_b + h * k_h) * ALIGN
        p_v = v + (batch * v_b + h * v_h) * ALIGN
        walk_segment(
            p_k, p_v, p_f, p_b, k_t * ALIGN, v_t * ALIGN, f_t * ALIGN, b_t * ALIGN, states, totals,
            index, span, first, last, T, column, K, V, L, BK, BV, False,
        )  # fmt: skip
    elif go is not None:
        p_q = q + (batch * q_b + h * q_h) * ALIGN
        p_o = go + (batch * o_b + h * o_h) * ALIGN
        walk_segment(
            p_q, p_o, p_b, p_f, q_t * ALIGN, o_t * ALIGN, b_t * ALIGN, f_t * ALIGN, states, totals,
            index + 2 * span, span, first, last, T, column, K, V, L, BK, BV, True,
        )  # fmt: skip


@triton.jit(do_not_specialize=['S', 'heads'])
def bi_gla_scan_kernel(
    states,  # (2 or 4, B, H, S, K, V): of segments alone; of all before (behind) them at the end
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
    states += row * S * (K * V) + e
    totals += row * S * K + e // V
    state = tl.zeros((BLOCK,), tl.float32)
    for m0 in range(0, S, AT_ONCE):
        added, decays = (), ()
        for i in tl.static_range(AT_ONCE):
            m = tl.where(against == 1, S - 1 - m0 - i, m0 + i)
            mask = exist & (m0 + i < S)
            added = added + (tl.load(states + m.to(tl.int64) * (K * V), mask=mask, other=0.0),)
            decays = decays + (tl.load(totals + m * K, mask=mask, other=0.0),)
        for i in tl.static_range(AT_ONCE):
            m = tl.where(against == 1, S - 1 - m0 - i, m0 + i)
            mask = exist & (m0 + i < S)
            tl.store(states + m.to(tl.int64) * (K * V), state, mask=mask)
            state = state * exp(decays[i]) + added[i]


@triton.jit
def add_entering(
    state, passed, states, index, column,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Add state number `index` of memory, decayed by the gates passed; none if memory has none."""
    if states is not None:
        offsets, exist = state_offsets(column, K, V, BK, BV)
        entering = tl.load(states + index * (K * V) + offsets, mask=exist, other=0.0)
        state += entering * exp(whole(passed))
    return state


@triton.jit
def token_by_token(
    out, q, p_k, p_v, p_g, k_stride, v_stride, g_stride, start, T, column,
    K: tl.constexpr, V: tl.constexpr, L: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """Add what each token of a chunk sees of those up to itself (from itself on if REVERSE)."""
    row = tl.arange(0, L)[:, None]
    count = tl.minimum(T - start, L)
    decay = tl.zeros((L, BK), tl.float32)
    for i in range(count):
        s = i if REVERSE else count - 1 - i
        near = s - 1 if REVERSE else s + 1
        gate = load_row(p_g, g_stride, start + near, (near >= 0) & (near < count), 0, K, BK)
        decay = tl.where(row == s, 1.0, decay * exp(opened(gate))[None, :])
        x = load_row(p_k, k_stride, start + s, True, 0, K, BK)
        y = load_row(p_v, v_stride, start + s, True, column, V, BV)
        out += tl.sum(q * decay * x[None, :], 1)[:, None] * y[None, :]
    return out


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
    states,  # (2, B, H, S, K, V) of the scan, or None
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
):  # fmt: skip
    """Outputs of one chunk."""
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
    first = n // R * R
    last = tl.minimum(first + R, N)
    index = (batch * H + h) * S + n // R
    span = tl.num_programs(0).to(tl.int64) // N * S

    zero = tl.zeros((L, BK), tl.float32)
    forward = tl.zeros((BK, BV), tl.float32)
    backward = tl.zeros((BK, BV), tl.float32)
    passed = zero
    for i in range(n - first):
        start = (n - 1 - i) * L
        x = load_rows(p_k, k_stride, start, T, 0, K, L, BK).to(tl.float32)
        y = load_operand(p_v, v_stride, start, T, column, V, L, BV)
        forward, passed = absorb(
            forward, passed, x, y, p_f, f_stride, start, T, dtype, K, L, BK, False, False
        )
    forward = add_entering(forward, passed, states, index, column, K, V, BK, BV)
    passed = zero
    for i in range(last - 1 - n):
        start = (n + 1 + i) * L
        x = load_rows(p_k, k_stride, start, T, 0, K, L, BK).to(tl.float32)
        y = load_operand(p_v, v_stride, start, T, column, V, L, BV)
        backward, passed = absorb(
            backward, passed, x, y, p_b, b_stride, start, T, dtype, K, L, BK, True, False
        )
    backward = add_entering(backward, passed, states, index + span, column, K, V, BK, BV)

    start = n * L
    f_decay, f_middle = own_log_decays(p_f, f_stride, start, T, dtype, K, L, BK, False)
    b_decay, b_middle = own_log_decays(p_b, b_stride, start, T, dtype, K, L, BK, True)
    fits = in_range(f_decay - f_middle, b_decay - b_middle, dtype)
    f_middle = tl.where(fits, f_middle, 0.0)
    b_middle = tl.where(fits, b_middle, 0.0)
    x = load_rows(p_q, q_stride, start, T, 0, K, L, BK).to(tl.float32)
    f_q = operand(x * exp(f_decay - f_middle), dtype)
    b_q = operand(x * exp(b_decay - b_middle), dtype)
    out = product(f_q, operand(forward * exp(whole(f_middle)), dtype), dtype)
    out = add_product(out, b_q, operand(backward * exp(whole(b_middle)), dtype), dtype)
    if fits:
        x = load_rows(p_k, k_stride, start, T, 0, K, L, BK).to(tl.float32)
        y = load_operand(p_v, v_stride, start, T, column, V, L, BV)
        f_weight = product(f_q, tl.trans(operand(x * exp(f_middle - f_decay), dtype)), dtype)
        b_weight = product(b_q, tl.trans(operand(x * exp(b_middle - b_decay), dtype)), dtype)
        # the token itself counts in both
        weight = tl.where(choose(L, False, True), f_weight, 0.0)
        weight += tl.where(choose(L, True, True), b_weight, 0.0)
        out = add_product(out, operand(weight, dtype), y, dtype)
    else:
        out = token_by_token(
            out, x, p_k, p_v, p_f, k_stride, v_stride, f_stride, start, T, column,
            K, V, L, BK, BV, False,
        )  # fmt: skip
        out = token_by_token(
            out, x, p_k, p_v, p_b, k_stride, v_stride, b_stride, start, T, column,
            K, V, L, BK, BV, True,
        )  # fmt: skip
    store_rows(o, out * half, batch, h, H, start, T, column, V, L, BV)


def entering_states(rows: Rows, launch: Launch, *, with_gradients: bool = False) -> Tensor | None:
    """States that enter the segments from both sides, and gradients by them; None for one segment.

    Args:
        rows: q, k, v, g_fwd, g_bwd, and with gradients the gradient by the output.
        launch: Division of the tokens.
        with_gradients: Compute the gradients as well.

    Returns:
        Float32 tensor (2 or 4, B, H, S, K, V) in the order of `bi_gla_state_kernel`.
    """
    if launch.segments == 1:
        return None
    q, k, v, g_fwd, g_bwd, *go = rows.tensors
    batch, tokens, heads, key_width = k.shape
    value_width = v.shape[-1]
    kinds = 4 if with_gradients else 2
    shape = (kinds, batch, heads, launch.segments, key_width)
    states = v.new_empty((*shape, value_width), dtype=torch.float32)
    totals = v.new_empty(shape, dtype=torch.float32)
    slices = triton.cdiv(value_width, launch.values)
    bi_gla_state_kernel[(batch * heads * launch.segments, slices, kinds // 2)](
        q if with_gradients else None, k, v, g_fwd, g_bwd, go[0] if with_gradients else None,
        states, totals, tokens, heads, launch.chunks, launch.segment, launch.segments,
        *rows.strides, *(() if with_gradients else (0, 0, 0)),
        ALIGN=rows.align, K=key_width, V=value_width, L=launch.length, BK=launch.keys,
        BV=launch.values, num_warps=launch.warps, num_stages=launch.stages,
        maxnreg=launch.registers,
    )  # fmt: skip
    blocks = triton.cdiv(key_width * value_width, SCAN_ELEMENTS)
    bi_gla_scan_kernel[(kinds * batch * heads, blocks)](
        states, totals, launch.segments, batch * heads, K=key_width, V=value_width,
        BLOCK=SCAN_ELEMENTS, num_warps=2,
    )  # fmt: skip
    return states


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
    half = (key_width**-0.5 if scale is None else scale) / 2
    with on_device(v):
        states = entering_states(rows, launch)
        slices = triton.cdiv(value_width, launch.values)
        bi_gla_out_kernel[(batch * heads * launch.chunks, slices)](
            *rows.tensors, o, states, tokens, heads, launch.chunks, launch.segment,
            launch.segments, half, *rows.strides,
            ALIGN=rows.align, K=key_width, V=value_width, L=launch.length, BK=launch.keys,
            BV=launch.values, num_warps=launch.warps, num_stages=launch.stages,
            maxnreg=launch.registers,
        )  # fmt: skip
    return o
