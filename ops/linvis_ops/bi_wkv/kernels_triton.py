"""Triton kernels of Bi-WKV: chunk summaries, a scan over chunks, outputs.

B batch, T tokens, C channels, L chunk length, N = ceil(T / L) chunks, BC channels of a tile. Each
pass exists once and serves both directions of time, and both the forward pass (log weights k,
summands v and 1) and the backward pass (log weights -lse, summands gy and gy * y, with their
moments). Everything is float32 inside.

A logarithm is a pair, value - w * distance, of which the distance is exact; a difference of two
then is precise where both are large. A set of sums is exp(logarithm) * (sum0, sum1), with two
moments in the backward pass: sums weighted by the distance of a term beyond that of the logarithm.
States lie in a tensor (2, B, N, FIELDS, C) with the fields value, distance, sum0, sum1[, moment0,
moment1]; direction 0 holds the tokens before a chunk, 1 those after it.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from linvis_ops._triton import on_device
from linvis_ops.bi_wkv.reference import CHUNK, SPAN

# Up to this |w| the decays within a chunk are factored around its middle.
FACTORED_DECAY = SPAN / (3 * CHUNK)


@triton.jit
def _load(p, batch, t, c, T, C: tl.constexpr, strides):
    """Tile of a (B, T, C) tensor as float32, 0 outside it."""
    mask = (t >= 0) & (t < T) & (c < C)
    offset = batch * strides[0] + t.to(tl.int64) * strides[1] + c.to(tl.int64) * strides[2]
    return tl.load(p + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_terms(inputs, strides, batch, t, c, T, C: tl.constexpr, BACKWARD: tl.constexpr):
    """Log weight (value, distance) and two summands of the tokens t; nothing outside the picture.

    Forward from (k, top, v): k - top, 0, v, 1. Backward from (lse value, lse distance, gy, y):
    -lse, gy, gy * y.
    """
    valid = (t >= 0) & (t < T)
    if BACKWARD:
        value = -_load(inputs[0], batch, t, c, T, C, strides[0])
        distance = -_load(inputs[1], batch, t, c, T, C, strides[0])
        x0 = _load(inputs[2], batch, t, c, T, C, strides[1])
        x1 = x0 * _load(inputs[3], batch, t, c, T, C, strides[0])
    else:
        top = tl.load(inputs[1] + batch * C + c, mask=c < C, other=0.0).to(tl.float32)
        value = _load(inputs[0], batch, t, c, T, C, strides[0]) - top
        distance = tl.zeros_like(value)
        x0 = _load(inputs[2], batch, t, c, T, C, strides[1])
        x1 = tl.zeros_like(value) + tl.where(valid, 1.0, 0.0)
    return tl.where(valid, value, float('-inf')), distance, x0, x1


@triton.jit
def _join(w, value, distance, s0, s1, m0, m1, value2, distance2, t0, t1, n0, n1):
    """Add two sets of sums, each with its logarithm, at the larger of the two logarithms."""
    second = value2 - w * distance2 > value - w * distance
    top_value = tl.where(second, value2, value)
    top_distance = tl.where(second, distance2, distance)
    beyond = distance - top_distance
    beyond2 = distance2 - top_distance
    f = tl.exp((value - top_value) - w * beyond)
    f2 = tl.exp((value2 - top_value) - w * beyond2)
    return (
        top_value,
        top_distance,
        s0 * f + t0 * f2,
        s1 * f + t1 * f2,
        (m0 + beyond * s0) * f + (n0 + beyond2 * t0) * f2,
        (m1 + beyond * s1) * f + (n1 + beyond2 * t1) * f2,
    )


@triton.jit
def _peak(w, value, distance):
    """The largest logarithm of each column of a tile, as rows (1, BC)."""
    rounded = value - w * distance
    is_peak = rounded == tl.max(rounded, 0)[None, :]
    top_distance = tl.max(tl.where(is_peak, distance, float('-inf')), 0)[None, :]
    is_peak = is_peak & (distance == top_distance)
    return tl.max(tl.where(is_peak, value, float('-inf')), 0)[None, :], top_distance


@triton.jit
def _load_state(states, row, N, chunk, c, C: tl.constexpr, FIELDS: tl.constexpr):
    """Value, distance, sums and moments of a chunk; row is direction * B + batch."""
    p = states + (row * N + chunk) * FIELDS * C + c
    mask = c < C
    value = tl.load(p, mask=mask, other=0.0)
    distance = tl.load(p + C, mask=mask, other=0.0)
    s0 = tl.load(p + 2 * C, mask=mask, other=0.0)
    s1 = tl.load(p + 3 * C, mask=mask, other=0.0)
    m0 = tl.zeros_like(s0)
    m1 = tl.zeros_like(s0)
    if FIELDS == 6:
        m0 = tl.load(p + 4 * C, mask=mask, other=0.0)
        m1 = tl.load(p + 5 * C, mask=mask, other=0.0)
    return value, distance, s0, s1, m0, m1


@triton.jit
def _store_state(
    states, row, N, chunk, c, C: tl.constexpr, FIELDS: tl.constexpr, value, distance, s0, s1, m0, m1
):
    p = states + (row * N + chunk) * FIELDS * C + c
    mask = c < C
    tl.store(p, value, mask=mask)
    tl.store(p + C, distance, mask=mask)
    tl.store(p + 2 * C, s0, mask=mask)
    tl.store(p + 3 * C, s1, mask=mask)
    if FIELDS == 6:
        tl.store(p + 4 * C, m0, mask=mask)
        tl.store(p + 5 * C, m1, mask=mask)


@triton.jit(do_not_specialize=['T', 'N', 'B'])
def bi_wkv_summary_kernel(
    w,  # (C,)
    inputs,  # see _load_terms
    strides,
    states,  # (2, B, N, FIELDS, C)
    T,
    N,
    B,
    C: tl.constexpr,
    FIELDS: tl.constexpr,
    L: tl.constexpr,
    BC: tl.constexpr,
):
    """Sums of one chunk as seen by the first token after it (0) and by the last before it (1)."""
    NC: tl.constexpr = (C + BC - 1) // BC
    pid = tl.program_id(0)
    chunk = (pid // NC) % N
    batch = (pid // NC // N).to(tl.int64)
    i = tl.arange(0, L)[:, None]
    c = (pid % NC) * BC + tl.arange(0, BC)[None, :]
    b_w = tl.load(w + c, mask=c < C, other=0.0)  # (1, BC)
    value, distance, x0, x1 = _load_terms(
        inputs, strides, batch, chunk * L + i, c, T, C, FIELDS == 6
    )
    for direction in tl.static_range(2):
        # to the token that sees the summary there are this many steps, less one
        steps = (L - 1 - i if direction == 0 else i).to(tl.float32)
        seen = distance + steps
        top_value, top_distance = _peak(b_w, value, seen)
        beyond = seen - top_distance
        weight = tl.exp((value - top_value) - b_w * beyond)
        _store_state(
            states,
            direction * B + batch,
            N,
            chunk,
            c,
            C,
            FIELDS,
            top_value,
            top_distance,
            tl.sum(weight * x0, 0)[None, :],
            tl.sum(weight * x1, 0)[None, :],
            tl.sum(weight * x0 * beyond, 0)[None, :],
            tl.sum(weight * x1 * beyond, 0)[None, :],
        )


@triton.jit(do_not_specialize=['N', 'B'])
def bi_wkv_scan_kernel(
    w,
    states,
    N,
    B,
    C: tl.constexpr,
    FIELDS: tl.constexpr,
    L: tl.constexpr,
    BC: tl.constexpr,
):
    """Turn the summaries of all chunks into the state that enters each, in place; one direction."""
    NC: tl.constexpr = (C + BC - 1) // BC
    pid = tl.program_id(0)
    c = (pid % NC) * BC + tl.arange(0, BC)
    row = (pid // NC).to(tl.int64)  # direction * B + batch
    b_w = tl.load(w + c, mask=c < C, other=0.0)
    zero = tl.zeros((BC,), tl.float32)
    value, distance, s0, s1, m0, m1 = zero + float('-inf'), zero, zero, zero, zero, zero
    for step in range(N):
        chunk = tl.where(row < B, step, N - 1 - step)
        value2, distance2, t0, t1, n0, n1 = _load_state(states, row, N, chunk, c, C, FIELDS)
        _store_state(states, row, N, chunk, c, C, FIELDS, value, distance, s0, s1, m0, m1)
        value, distance, s0, s1, m0, m1 = _join(
            b_w, value, distance + L, s0, s1, m0, m1, value2, distance2, t0, t1, n0, n1
        )


@triton.jit
def _factored_sums(
    w, u, value, distance, x0, x1, states, batch, chunk, c, N, B, C: tl.constexpr,
    FIELDS: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Sums over all tokens for those of a chunk, with decays factored around its middle."""
    i = tl.arange(0, L)[:, None]
    j = tl.arange(0, L)[None, :]
    middle: tl.constexpr = (L - 1) / 2
    zero = tl.zeros_like(x0)
    top_value, top_distance = _peak(w, value, distance)
    weight = tl.exp((value - top_value) - w * (distance - top_distance))
    rest_value, rest_distance = tl.full(w.shape, float('-inf'), tl.float32), tl.zeros_like(w)
    r0, r1, q0, q1 = zero, zero, zero, zero
    for direction in tl.static_range(2):
        position = (i.to(tl.float32) - middle) * (1 - 2 * direction)
        earlier = (j < i if direction == 0 else j > i).to(tl.float32)  # (L, L)
        table = tl.exp(w * position)
        p0 = weight * x0 * table
        p1 = weight * x1 * table
        s0 = tl.dot(earlier, p0, input_precision='ieee')
        s1 = tl.dot(earlier, p1, input_precision='ieee')
        m0, m1 = zero, zero
        if FIELDS == 6:
            beyond = distance - position - top_distance
            m0 = tl.dot(earlier, p0 * beyond, input_precision='ieee')
            m1 = tl.dot(earlier, p1 * beyond, input_precision='ieee')
        o_value, o_distance, t0, t1, n0, n1 = _load_state(
            states, direction * B + batch, N, chunk, c, C, FIELDS
        )
        side_value, side_distance, s0, s1, m0, m1 = _join(
            w, top_value, top_distance - 1, s0, s1, m0, m1,
            o_value, o_distance + middle, t0, t1, n0, n1,
        )  # fmt: skip
        s0 = s0 / table
        s1 = s1 / table
        m0 = m0 / table + position * s0
        m1 = m1 / table + position * s1
        rest_value, rest_distance, r0, r1, q0, q1 = _join(
            w, rest_value, rest_distance, r0, r1, q0, q1,
            side_value, side_distance, s0, s1, m0, m1,
        )  # fmt: skip
    return _join(
        w, value + u, distance, x0, x1, zero, zero,
        rest_value, rest_distance, r0, r1, q0, q1,
    )  # fmt: skip


@triton.jit
def _paired_sums(
    w, u, value, distance, x0, x1, states, batch, chunk, c, N, B, C: tl.constexpr,
    FIELDS: tl.constexpr, L: tl.constexpr, inputs, strides, T,
):  # fmt: skip
    """Sums over all tokens for those of a chunk, pair by pair within it: for any decay."""
    i = tl.arange(0, L)[:, None]
    zero = tl.zeros_like(x0)
    value, distance, s0, s1, m0, m1 = value + u, distance, x0, x1, zero, zero
    for j in range(L):
        t = chunk * L + j + tl.zeros((1, 1), tl.int32)
        value2, distance2, t0, t1 = _load_terms(inputs, strides, batch, t, c, T, C, FIELDS == 6)
        steps = tl.abs(i - j).to(tl.float32) - 1
        value2 = tl.where(i == j, float('-inf'), value2)
        value, distance, s0, s1, m0, m1 = _join(
            w, value, distance, s0, s1, m0, m1, value2, distance2 + steps, t0, t1, 0.0, 0.0
        )
    for direction in tl.static_range(2):
        steps = (i if direction == 0 else L - 1 - i).to(tl.float32)
        o_value, o_distance, t0, t1, n0, n1 = _load_state(
            states, direction * B + batch, N, chunk, c, C, FIELDS
        )
        value, distance, s0, s1, m0, m1 = _join(
            w, value, distance, s0, s1, m0, m1, o_value, o_distance + steps, t0, t1, n0, n1
        )
    return value, distance, s0, s1, m0, m1


@triton.jit
def _sums(
    w, u, inputs, strides, states, batch, chunk, c, T, N, B, C: tl.constexpr,
    FIELDS: tl.constexpr, L: tl.constexpr, FACTORED: tl.constexpr,
):  # fmt: skip
    """Bidirectional decayed sums for the tokens of a chunk: logarithm, two sums, two moments."""
    t = chunk * L + tl.arange(0, L)[:, None]
    value, distance, x0, x1 = _load_terms(inputs, strides, batch, t, c, T, C, FIELDS == 6)
    if tl.max(tl.abs(w)) <= FACTORED:
        value, distance, s0, s1, m0, m1 = _factored_sums(
            w, u, value, distance, x0, x1, states, batch, chunk, c, N, B, C, FIELDS, L
        )
    else:
        value, distance, s0, s1, m0, m1 = _paired_sums(
            w, u, value, distance, x0, x1, states, batch, chunk, c, N, B, C, FIELDS, L,
            inputs, strides, T,
        )  # fmt: skip
    return value, distance, s0, s1, m0, m1


@triton.jit(do_not_specialize=['T', 'N', 'B'])
def bi_wkv_fwd_kernel(
    w,
    u,
    inputs,  # k, top (B, C), v
    strides,
    states,
    y,  # (B, T, C), contiguous
    lse,  # (2, B, T, C), float32: value and distance; written if LSE
    T,
    N,
    B,
    LSE: tl.constexpr,
    C: tl.constexpr,
    FIELDS: tl.constexpr,
    FACTORED: tl.constexpr,
    L: tl.constexpr,
    BC: tl.constexpr,
):
    """Outputs of one chunk."""
    NC: tl.constexpr = (C + BC - 1) // BC
    pid = tl.program_id(0)
    chunk = (pid // NC) % N
    batch = (pid // NC // N).to(tl.int64)
    t = chunk * L + tl.arange(0, L)[:, None]
    c = (pid % NC) * BC + tl.arange(0, BC)[None, :]
    b_w = tl.load(w + c, mask=c < C, other=0.0)  # (1, BC)
    b_u = tl.load(u + c, mask=c < C, other=0.0)
    value, distance, numerator, denominator, _m0, _m1 = _sums(
        b_w, b_u, inputs, strides, states, batch, chunk, c, T, N, B, C, FIELDS, L, FACTORED
    )
    out = batch * T * C + t.to(tl.int64) * C + c
    valid = (t < T) & (c < C)
    tl.store(y + out, (numerator / denominator).to(y.dtype.element_ty), mask=valid)
    if LSE:
        tl.store(lse + out, value + tl.log(denominator), mask=valid)
        tl.store(lse + B.to(tl.int64) * T * C + out, distance, mask=valid)


@triton.jit(do_not_specialize=['T', 'N', 'B'])
def bi_wkv_bwd_kernel(
    w,
    u,
    terms,  # k, top (B, C), v
    term_strides,
    inputs,  # lse value, lse distance, gy, y
    strides,
    states,
    dk,  # (B, T, C), contiguous
    dv,  # (B, T, C), contiguous
    partial,  # (2, B, N, C), float32: dw and du of one chunk
    T,
    N,
    B,
    C: tl.constexpr,
    FIELDS: tl.constexpr,
    FACTORED: tl.constexpr,
    L: tl.constexpr,
    BC: tl.constexpr,
):
    """Gradients of one chunk, from decayed sums of gy and gy * y with log weights -lse."""
    NC: tl.constexpr = (C + BC - 1) // BC
    pid = tl.program_id(0)
    chunk = (pid // NC) % N
    batch = (pid // NC // N).to(tl.int64)
    t = chunk * L + tl.arange(0, L)[:, None]
    c = (pid % NC) * BC + tl.arange(0, BC)[None, :]
    mask = c < C
    valid = (t < T) & mask
    b_w = tl.load(w + c, mask=mask, other=0.0)  # (1, BC)
    b_u = tl.load(u + c, mask=mask, other=0.0)
    value, distance, s0, s1, m0, m1 = _sums(
        b_w, b_u, inputs, strides, states, batch, chunk, c, T, N, B, C, FIELDS, L, FACTORED
    )
    m0 += distance * s0
    m1 += distance * s1
    b_k, _zero, b_v, _one = _load_terms(terms, term_strides, batch, t, c, T, C, False)
    own_value, own_distance, b_g, b_gy = _load_terms(inputs, strides, batch, t, c, T, C, True)
    weight = tl.exp(b_k + value - b_w * distance)
    own = tl.exp(b_k + b_u + own_value - b_w * own_distance)
    out = batch * T * C + t.to(tl.int64) * C + c
    tl.store(dv + out, (weight * s0).to(dv.dtype.element_ty), mask=valid)
    tl.store(dk + out, (weight * (b_v * s0 - s1)).to(dk.dtype.element_ty), mask=valid)
    p_d = partial + (batch * N + chunk) * C + c
    b_dw = tl.where(valid, weight * (m1 - b_v * m0), 0.0)
    b_du = tl.where(valid, own * (b_v * b_g - b_gy), 0.0)
    tl.store(p_d, tl.sum(b_dw, 0)[None, :], mask=mask)
    tl.store(p_d + B.to(tl.int64) * N * C, tl.sum(b_du, 0)[None, :], mask=mask)


def _launch(v: Tensor, backward: bool) -> tuple[dict[str, int], tuple[int, int, int], int]:
    """Constants, sizes (T, N, B) and number of channel tiles of the launches for (B, T, C)."""
    batch, tokens, channels = v.shape
    block = min(64, max(16, triton.next_power_of_2(channels)))
    constants = {'C': channels, 'FIELDS': 6 if backward else 4, 'L': CHUNK, 'BC': block}
    return constants, (tokens, triton.cdiv(tokens, CHUNK), batch), triton.cdiv(channels, block)


def _states(
    w: Tensor, inputs: tuple[Tensor, ...], strides: tuple[Any, ...], v: Tensor, backward: bool
) -> Tensor:
    """States that enter every chunk."""
    constants, (tokens, chunks, batch), tiles = _launch(v, backward)
    states = torch.empty(
        (2, batch, chunks, constants['FIELDS'], v.shape[2]), dtype=torch.float32, device=v.device
    )
    bi_wkv_summary_kernel[(tiles * chunks * batch,)](
        w, inputs, strides, states, tokens, chunks, batch, **constants
    )
    bi_wkv_scan_kernel[(tiles * 2 * batch,)](w, states, chunks, batch, **constants)
    return states


def _forward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, top: Tensor, y: Tensor, lse: Tensor | None
) -> None:
    """Write y, and lse unless it is None; both contiguous."""
    inputs, strides = (k, top, v), (k.stride(), v.stride())
    states = _states(w, inputs, strides, v, backward=False)
    constants, sizes, tiles = _launch(v, backward=False)
    bi_wkv_fwd_kernel[(tiles * sizes[1] * sizes[2],)](
        w,
        u,
        inputs,
        strides,
        states,
        y,
        y if lse is None else lse,
        *sizes,
        LSE=lse is not None,
        FACTORED=FACTORED_DECAY,
        **constants,
    )


def bi_wkv_forward(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Output (B, T, C), contiguous, in the dtype of v."""
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    with on_device(v):
        _forward(w.contiguous(), u.contiguous(), k, v, k.amax(1), y, None)
    return y


def bi_wkv_backward(
    gy: Tensor, w: Tensor, u: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by w and u (float32, summed in a fixed order), k and v (in their dtype)."""
    w, u, top = w.contiguous(), u.contiguous(), k.amax(1)
    lse = torch.empty((2, *v.shape), dtype=torch.float32, device=v.device)
    y = torch.empty(v.shape, dtype=torch.float32, device=v.device)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    with on_device(v):
        _forward(w, u, k, v, top, y, lse)
        inputs, strides = (lse[0], lse[1], gy, y), (y.stride(), gy.stride())
        states = _states(w, inputs, strides, v, backward=True)
        constants, sizes, tiles = _launch(v, backward=True)
        _, chunks, batch = sizes
        partial = torch.empty((2, batch * chunks, v.shape[2]), dtype=torch.float32, device=v.device)
        bi_wkv_bwd_kernel[(tiles * chunks * batch,)](
            w,
            u,
            (k, top, v),
            (k.stride(), v.stride()),
            inputs,
            strides,
            states,
            dk,
            dv,
            partial,
            *sizes,
            FACTORED=FACTORED_DECAY,
            **constants,
        )
    return partial[0].sum(0), partial[1].sum(0), dk, dv
