"""Triton kernels of Bi-WKV: chunk summaries, a scan over chunks, outputs.

B batch, T tokens, C channels, L chunk length, N = ceil(T / L) chunks, BC channels of a tile. Each
pass exists once and serves both directions of time and both the forward pass (log weights k,
summands v and 1) and the backward pass (log weights -lse, summands gy and gy * y, with their
moments). Everything is float32 inside.

A summary or state of a chunk, per channel, is exp(scale) * (sum0, sum1[, moment0, moment1]); FIELDS
counts these. They lie in `states` of shape (2, B, N, FIELDS, C): direction 0 holds the tokens
before a chunk, 1 those after it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from linvis_ops._triton import on_device
from linvis_ops.bi_wkv.reference import CHUNK


@triton.jit
def _load(p, batch, t, c, T, C: tl.constexpr, stride_b, stride_t, stride_c, other):
    """Tile (L, BC) of a (B, T, C) tensor as float32; `other` outside it."""
    mask = (t >= 0) & (t < T) & (c < C)
    offset = batch * stride_b + t.to(tl.int64) * stride_t + c.to(tl.int64) * stride_c
    return tl.load(p + offset, mask=mask, other=other).to(tl.float32)


@triton.jit
def _load_summands(
    a,
    v,
    y,
    top,
    batch,
    t,
    c,
    T,
    C: tl.constexpr,
    a_strides,
    v_strides,
    y_strides,
    BACKWARD: tl.constexpr,
):
    """Log weight and summands of the tokens t, none outside the picture.

    Forward (k - top, v, 1), backward (-lse, gy, gy * y).
    """
    b_a = _load(a, batch, t, c, T, C, a_strides[0], a_strides[1], a_strides[2], 0.0)
    b_v = _load(v, batch, t, c, T, C, v_strides[0], v_strides[1], v_strides[2], 0.0)
    if BACKWARD:
        b_a = -b_a
        b_x = b_v * _load(y, batch, t, c, T, C, y_strides[0], y_strides[1], y_strides[2], 0.0)
    else:
        b_a -= tl.load(top + batch * C + c, mask=c < C, other=0.0).to(tl.float32)
        b_x = tl.full(b_v.shape, 1.0, tl.float32)
    valid = (t >= 0) & (t < T)
    return tl.where(valid, b_a, float('-inf')), b_v, tl.where(valid, b_x, 0.0)


@triton.jit(do_not_specialize=['T', 'N', 'B'])
def bi_wkv_summary_kernel(
    w,  # (C,)
    a,  # (B, T, C): k, or lse in the backward pass
    v,  # (B, T, C): v, or gy
    y,  # (B, T, C): unused, or y
    top,  # (B, C): maximum of k over tokens, or unused
    states,  # (2, B, N, FIELDS, C)
    T,
    N,
    B,
    a_strides,
    v_strides,
    y_strides,
    C: tl.constexpr,
    BACKWARD: tl.constexpr,
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
    middle: tl.constexpr = (L - 1) / 2
    position = i.to(tl.float32) - middle
    b_w = tl.load(w + c, mask=c < C, other=0.0)  # (1, BC)
    b_a, b_v, b_x = _load_summands(
        a, v, y, top, batch, chunk * L + i, c, T, C, a_strides, v_strides, y_strides, BACKWARD
    )

    for direction in tl.static_range(2):
        sign = 1 - 2 * direction
        logit = b_a + sign * b_w * position
        peak = tl.max(logit, 0)[None, :]
        weight = tl.exp(logit - peak)
        sum0 = tl.sum(weight * b_v, 0)[None, :]
        sum1 = tl.sum(weight * b_x, 0)[None, :]
        p_s = states + ((direction * B + batch) * N + chunk) * FIELDS * C + c
        tl.store(p_s, peak - b_w * middle, mask=c < C)
        tl.store(p_s + C, sum0, mask=c < C)
        tl.store(p_s + 2 * C, sum1, mask=c < C)
        if BACKWARD:
            distance = middle - sign * position  # to the token that sees the summary, less one
            tl.store(p_s + 3 * C, tl.sum(weight * b_v * distance, 0)[None, :], mask=c < C)
            tl.store(p_s + 4 * C, tl.sum(weight * b_x * distance, 0)[None, :], mask=c < C)


@triton.jit(do_not_specialize=['N', 'B'])
def bi_wkv_scan_kernel(
    w,
    states,
    N,
    B,
    C: tl.constexpr,
    BACKWARD: tl.constexpr,
    FIELDS: tl.constexpr,
    L: tl.constexpr,
    BC: tl.constexpr,
):
    """Turn the summaries of all chunks into the state that enters each, in place; one direction."""
    NC: tl.constexpr = (C + BC - 1) // BC
    pid = tl.program_id(0)
    c = (pid % NC) * BC + tl.arange(0, BC)
    row = pid // NC  # direction * B + batch
    direction = row // B
    mask = c < C
    b_w = tl.load(w + c, mask=mask, other=0.0)
    scale = tl.full((BC,), float('-inf'), tl.float32)
    sum0 = tl.zeros((BC,), tl.float32)
    sum1 = tl.zeros((BC,), tl.float32)
    moment0 = tl.zeros((BC,), tl.float32)
    moment1 = tl.zeros((BC,), tl.float32)
    for step in range(N):
        chunk = tl.where(direction == 0, step, N - 1 - step)
        p_s = states + (row.to(tl.int64) * N + chunk) * FIELDS * C + c
        own_scale = tl.load(p_s, mask=mask, other=0.0)
        own_sum0 = tl.load(p_s + C, mask=mask, other=0.0)
        own_sum1 = tl.load(p_s + 2 * C, mask=mask, other=0.0)
        tl.store(p_s, scale, mask=mask)
        tl.store(p_s + C, sum0, mask=mask)
        tl.store(p_s + 2 * C, sum1, mask=mask)
        decayed = scale - b_w * L
        scale = tl.maximum(decayed, own_scale)
        keep = tl.exp(decayed - scale)
        add = tl.exp(own_scale - scale)
        if BACKWARD:
            own_moment0 = tl.load(p_s + 3 * C, mask=mask, other=0.0)
            own_moment1 = tl.load(p_s + 4 * C, mask=mask, other=0.0)
            tl.store(p_s + 3 * C, moment0, mask=mask)
            tl.store(p_s + 4 * C, moment1, mask=mask)
            moment0 = (moment0 + L * sum0) * keep + own_moment0 * add
            moment1 = (moment1 + L * sum1) * keep + own_moment1 * add
        sum0 = sum0 * keep + own_sum0 * add
        sum1 = sum1 * keep + own_sum1 * add


@triton.jit
def _state(states, direction, batch, chunk, N, B, C: tl.constexpr, FIELDS: tl.constexpr, c):
    """Pointer (1, BC) to the state that enters a chunk from one direction."""
    return states + ((direction * B + batch) * N + chunk) * FIELDS * C + c


@triton.jit(do_not_specialize=['T', 'N', 'B'])
def bi_wkv_fwd_kernel(
    w,
    u,
    k,
    v,
    top,  # (B, C): maximum of k over tokens
    states,
    y,  # (B, T, C), contiguous
    lse,  # (B, T, C), contiguous, float32; written if LSE
    T,
    N,
    B,
    k_strides,
    v_strides,
    LSE: tl.constexpr,
    C: tl.constexpr,
    FIELDS: tl.constexpr,
    L: tl.constexpr,
    BC: tl.constexpr,
):
    """Outputs of one chunk: each token, the chunk's other tokens, the states of both sides."""
    NC: tl.constexpr = (C + BC - 1) // BC
    pid = tl.program_id(0)
    chunk = (pid // NC) % N
    batch = (pid // NC // N).to(tl.int64)
    i = tl.arange(0, L)[:, None]
    t = chunk * L + i
    c = (pid % NC) * BC + tl.arange(0, BC)[None, :]
    mask = c < C
    middle: tl.constexpr = (L - 1) / 2
    position = i.to(tl.float32) - middle
    b_w = tl.load(w + c, mask=mask, other=0.0)
    b_u = tl.load(u + c, mask=mask, other=0.0)
    b_k, b_v, _one = _load_summands(
        k, v, v, top, batch, t, c, T, C, k_strides, v_strides, v_strides, False
    )

    scale = b_k + b_u
    numerator = b_v
    denominator = tl.full(b_v.shape, 1.0, tl.float32)
    for direction in tl.static_range(2):
        sign = 1 - 2 * direction
        # the chunk's own tokens on this side: an exclusive prefix sum, by loading the row beside
        peak = tl.max(b_k + sign * b_w * position, 0)[None, :]
        b_k1, b_v1, b_one1 = _load_summands(
            k, v, v, top, batch, t - sign, c, T, C, k_strides, v_strides, v_strides, False
        )
        within = (i - sign >= 0) & (i - sign < L)
        weight = tl.where(within, tl.exp(b_k1 + sign * b_w * (position - sign) - peak), 0.0)
        inner_num = tl.cumsum(weight * b_v1, 0, reverse=direction == 1)
        inner_den = tl.cumsum(weight * b_one1, 0, reverse=direction == 1)
        inner_scale = peak - b_w * (sign * position - 1)
        # the tokens of all chunks on this side
        p_s = _state(states, direction, batch, chunk, N, B, C, FIELDS, c)
        outer_scale = tl.load(p_s, mask=mask, other=0.0) - b_w * (middle + sign * position)
        outer_num = tl.load(p_s + C, mask=mask, other=0.0)
        outer_den = tl.load(p_s + 2 * C, mask=mask, other=0.0)

        new_scale = tl.maximum(tl.maximum(inner_scale, outer_scale), scale)
        keep = tl.exp(scale - new_scale)
        inner = tl.exp(inner_scale - new_scale)
        outer = tl.exp(outer_scale - new_scale)
        numerator = numerator * keep + inner_num * inner + outer_num * outer
        denominator = denominator * keep + inner_den * inner + outer_den * outer
        scale = new_scale

    out = batch * T * C + t.to(tl.int64) * C + c
    valid = (t < T) & mask
    tl.store(y + out, (numerator / denominator).to(y.dtype.element_ty), mask=valid)
    if LSE:
        tl.store(lse + out, scale + tl.log(denominator), mask=valid)


@triton.jit(do_not_specialize=['T', 'N', 'B'])
def bi_wkv_bwd_kernel(
    w,
    u,
    k,
    v,
    top,  # (B, C): maximum of k over tokens
    gy,
    y,  # (B, T, C), contiguous, float32
    lse,  # (B, T, C), contiguous, float32
    states,
    dk,  # (B, T, C), contiguous
    dv,  # (B, T, C), contiguous
    partial,  # (2, B, N, C), float32: dw and du of one chunk
    T,
    N,
    B,
    k_strides,
    v_strides,
    gy_strides,
    y_strides,
    C: tl.constexpr,
    FIELDS: tl.constexpr,
    L: tl.constexpr,
    BC: tl.constexpr,
):
    """Gradients of one chunk, from decayed sums of gy and gy * y with log weights -lse."""
    NC: tl.constexpr = (C + BC - 1) // BC
    pid = tl.program_id(0)
    chunk = (pid // NC) % N
    batch = (pid // NC // N).to(tl.int64)
    i = tl.arange(0, L)[:, None]
    t = chunk * L + i
    c = (pid % NC) * BC + tl.arange(0, BC)[None, :]
    mask = c < C
    middle: tl.constexpr = (L - 1) / 2
    position = i.to(tl.float32) - middle
    b_w = tl.load(w + c, mask=mask, other=0.0)
    b_u = tl.load(u + c, mask=mask, other=0.0)
    b_k = _load(k, batch, t, c, T, C, k_strides[0], k_strides[1], k_strides[2], 0.0)
    b_k -= tl.load(top + batch * C + c, mask=mask, other=0.0).to(tl.float32)
    b_v = _load(v, batch, t, c, T, C, v_strides[0], v_strides[1], v_strides[2], 0.0)
    b_a, b_g, b_gy = _load_summands(
        lse, gy, y, y, batch, t, c, T, C, y_strides, gy_strides, y_strides, True
    )

    scale = b_a + b_u
    sum0 = b_g
    sum1 = b_gy
    moment0 = tl.zeros_like(b_g)
    moment1 = tl.zeros_like(b_g)
    for direction in tl.static_range(2):
        sign = 1 - 2 * direction
        peak = tl.max(b_a + sign * b_w * position, 0)[None, :]
        b_a1, b_g1, b_gy1 = _load_summands(
            lse, gy, y, y, batch, t - sign, c, T, C, y_strides, gy_strides, y_strides, True
        )
        within = (i - sign >= 0) & (i - sign < L)
        weight = tl.where(within, tl.exp(b_a1 + sign * b_w * (position - sign) - peak), 0.0)
        inner0 = tl.cumsum(weight * b_g1, 0, reverse=direction == 1)
        inner1 = tl.cumsum(weight * b_gy1, 0, reverse=direction == 1)
        placed = weight * sign * (position - sign)
        here = sign * position - 1
        inner_moment0 = here * inner0 - tl.cumsum(placed * b_g1, 0, reverse=direction == 1)
        inner_moment1 = here * inner1 - tl.cumsum(placed * b_gy1, 0, reverse=direction == 1)
        inner_scale = peak - b_w * here

        p_s = _state(states, direction, batch, chunk, N, B, C, FIELDS, c)
        steps = middle + sign * position  # from the chunk's edge
        outer_scale = tl.load(p_s, mask=mask, other=0.0) - b_w * steps
        outer0 = tl.load(p_s + C, mask=mask, other=0.0)
        outer1 = tl.load(p_s + 2 * C, mask=mask, other=0.0)
        outer_moment0 = tl.load(p_s + 3 * C, mask=mask, other=0.0) + steps * outer0
        outer_moment1 = tl.load(p_s + 4 * C, mask=mask, other=0.0) + steps * outer1

        new_scale = tl.maximum(tl.maximum(inner_scale, outer_scale), scale)
        keep = tl.exp(scale - new_scale)
        inner = tl.exp(inner_scale - new_scale)
        outer = tl.exp(outer_scale - new_scale)
        sum0 = sum0 * keep + inner0 * inner + outer0 * outer
        sum1 = sum1 * keep + inner1 * inner + outer1 * outer
        moment0 = moment0 * keep + inner_moment0 * inner + outer_moment0 * outer
        moment1 = moment1 * keep + inner_moment1 * inner + outer_moment1 * outer
        scale = new_scale

    valid = (t < T) & mask
    weight = tl.exp(tl.where(valid, b_k + scale, float('-inf')))
    own = tl.exp(tl.where(valid, b_k + b_u + b_a, float('-inf')))
    out = batch * T * C + t.to(tl.int64) * C + c
    tl.store(dv + out, (weight * sum0).to(dv.dtype.element_ty), mask=valid)
    tl.store(dk + out, (weight * (b_v * sum0 - sum1)).to(dk.dtype.element_ty), mask=valid)
    p_d = partial + (batch * N + chunk) * C + c
    tl.store(p_d, tl.sum(weight * (moment1 - b_v * moment0), 0)[None, :], mask=mask)
    tl.store(p_d + B.to(tl.int64) * N * C, tl.sum(own * (b_v * b_g - b_gy), 0)[None, :], mask=mask)


def _channel_block(channels: int) -> int:
    return min(64, triton.next_power_of_2(channels))


def _states(
    w: Tensor, a: Tensor, v: Tensor, y: Tensor, top: Tensor, backward: bool
) -> tuple[Tensor, dict[str, int], tuple[int, int, int]]:
    """States that enter every chunk, with the constants and the sizes (T, N, B) of the launch."""
    batch, tokens, channels = v.shape
    chunks = triton.cdiv(tokens, CHUNK)
    fields = 5 if backward else 3
    block = _channel_block(channels)
    tiles = triton.cdiv(channels, block)
    constants = {'C': channels, 'FIELDS': fields, 'L': CHUNK, 'BC': block}
    states = torch.empty((2, batch, chunks, fields, channels), dtype=torch.float32, device=v.device)
    bi_wkv_summary_kernel[(tiles * chunks * batch,)](
        w,
        a,
        v,
        y,
        top,
        states,
        tokens,
        chunks,
        batch,
        a.stride(),
        v.stride(),
        y.stride(),
        BACKWARD=backward,
        **constants,
    )
    bi_wkv_scan_kernel[(tiles * 2 * batch,)](
        w, states, chunks, batch, BACKWARD=backward, **constants
    )
    return states, constants, (tokens, chunks, batch)


def _forward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, top: Tensor, y: Tensor, lse: Tensor | None
) -> None:
    """Write y, and lse unless it is None; both contiguous."""
    states, constants, sizes = _states(w, k, v, v, top, backward=False)
    tiles = triton.cdiv(constants['C'], constants['BC'])
    bi_wkv_fwd_kernel[(tiles * sizes[1] * sizes[2],)](
        w,
        u,
        k,
        v,
        top,
        states,
        y,
        y if lse is None else lse,
        *sizes,
        k.stride(),
        v.stride(),
        LSE=lse is not None,
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
    y, lse = torch.empty((2, *v.shape), dtype=torch.float32, device=v.device)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    with on_device(v):
        _forward(w, u, k, v, top, y, lse)
        states, constants, sizes = _states(w, lse, gy, y, top, backward=True)
        tiles = triton.cdiv(constants['C'], constants['BC'])
        _, chunks, batch = sizes
        partial = torch.empty(
            (2, batch * chunks, constants['C']), dtype=torch.float32, device=v.device
        )
        bi_wkv_bwd_kernel[(tiles * chunks * batch,)](
            w,
            u,
            k,
            v,
            top,
            gy,
            y,
            lse,
            states,
            dk,
            dv,
            partial,
            *sizes,
            k.stride(),
            v.stride(),
            gy.stride(),
            y.stride(),
            **constants,
        )
    return partial[0].sum(0), partial[1].sum(0), dk, dv
