"""Triton kernels of the gradient of Bi-WKV.

The lanes, blocks and sums are those of kernels_triton.py. The forward sums of lanes are computed
again; `bi_wkv_adjoint_kernel` then finds y and its denominator for every token, the sums of
p = gy / denominator and q = p * y over each lane (log weights: minus those of the denominators),
and what each block needs to start from; `bi_wkv_gradient_kernel` turns all this into gradients.
README.md has the formulas.
"""

import triton
import triton.language as tl
from torch import Tensor

from linvis_ops._triton import on_device
from linvis_ops._triton_math import LOG2E, exp2
from linvis_ops._triton_sum import sum_rows
from linvis_ops.bi_wkv.kernels_triton import fits, group_sums, lane_sums
from linvis_ops.bi_wkv.kernels_triton_blocks import (
    block_adjoints,
    block_decay,
    block_gradients,
    load_block,
    place,
    weigh,
)
from linvis_ops.bi_wkv.kernels_triton_pairs import (
    BLOCK,
    LANE,
    NOTHING,
    entering_lane,
    in_units_of,
    is_plain,
    key_of_middle,
    load_fields,
    store_fields,
)
from linvis_ops.bi_wkv.kernels_triton_pairs_backward import (
    ADJOINT,
    PLAIN,
    pair_adjoints,
    pair_gradients,
)
from linvis_ops.bi_wkv.launch import Launch, by_rows, launch_for, rows_between


@triton.jit(do_not_specialize=['T', 'N', 'blocks', 'k_rows', 'v_rows', 'g_rows'])
def bi_wkv_adjoint_kernel(
    w,
    u,
    k,
    v,
    g,  # (B, T, C): gradient by y
    lanes,  # (B, N, LANE, C): forward sums
    groups,
    states,  # (B, N, blocks, BLOCK, C)
    enters,  # (B, N, BLOCK, C): what the first token of a lane sees before it
    adjoint_lanes,  # (B, N, LANE, C): sums of p and q
    adjoint_states,  # (B, N, blocks, ADJOINT, C)
    T,
    N,
    blocks,
    k_rows,
    v_rows,
    g_rows,
    k_stride: tl.constexpr,
    v_stride: tl.constexpr,
    g_stride: tl.constexpr,
    C: tl.constexpr,
    L: tl.constexpr,
    BC: tl.constexpr,
    GROUP: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Sums of p and q of a lane, from its last block to its first."""
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    batch, n, c, mask = place(pid, N, C, BC)
    b_w = tl.load(w + c, mask=mask, other=0.0)
    b_u = tl.load(u + c, mask=mask, other=0.0)
    w2 = b_w * LOG2E
    d, lack = block_decay(b_w, w2, L)
    own = exp2(b_u * LOG2E)
    fv, fd, f0, f1, bv, bd, b0, b1 = entering_lane(
        w2, lanes, groups, batch, n, N, blocks * L, mask, c, C, GROUP, AT_ONCE
    )
    zero = tl.zeros((BC,), tl.float32)
    start = n * blocks * L
    used = tl.minimum(blocks, tl.cdiv(T - start, L))
    p_k = k + (batch * k_rows + start) * k_stride + c
    p_v = v + (batch * v_rows + start) * v_stride + c
    p_g = g + (batch * g_rows + start) * g_stride + c
    p_enters = enters + (batch * N + n) * (BLOCK * C) + c
    p_states = states + (batch * N + n) * blocks * (BLOCK * C) + c
    p_adjoints = adjoint_states + (batch * N + n) * blocks * (ADJOINT * C) + c
    p_lane = adjoint_lanes + (batch * N + n) * (LANE * C) + c
    key = key_of_middle(k, batch, T, k_rows, k_stride, c, mask)
    if is_plain(p_states, mask) & fits(w2, key, fv, fd, bv, bd, mask):
        scale = exp2(in_units_of(w2, fv, fd, key))
        f0 *= scale
        f1 *= scale
        scale = exp2(in_units_of(w2, bv, bd, key))
        b0 *= scale
        b1 *= scale
        store_fields(p_enters, C, mask, zero + PLAIN, zero, f0, f1)
        p0, p1, a0, a1 = zero, zero, zero, zero
        for i in range(used):
            s = used - 1 - i
            left = T - start - s * L
            b_k = load_block(p_k + s * L * k_stride, k_stride, left, mask, float('-inf'), L)
            b_v = load_block(p_v + s * L * v_stride, v_stride, left, mask, 0.0, L)
            b_g = load_block(p_g + s * L * g_stride, g_stride, left, mask, 0.0, L)
            p_state = p_states + s * (BLOCK * C)
            scale = exp2(-w2 * (s * L))
            q0 = tl.load(p_state + 2 * C, mask=mask, other=0.0) + scale * f0
            q1 = tl.load(p_state + 3 * C, mask=mask, other=0.0) + scale * f1
            p_adjoint = p_adjoints + s * (ADJOINT * C)
            tl.store(p_adjoint + 2 * C, b0, mask=mask)
            tl.store(p_adjoint + 3 * C, b1, mask=mask)
            tl.store(p_adjoint + 6 * C, a0, mask=mask)
            tl.store(p_adjoint + 7 * C, a1, mask=mask)
            e, x = weigh(b_k, b_v, key, 0.0, L)
            s0, s1, b0, b1, a0, a1 = block_adjoints(
                d, lack, own, e, x, b_g, q0, q1, b0, b1, a0, a1, L
            )
            scale = exp2(-w2 * ((blocks - 1 - s) * L))
            p0 += scale * s0
            p1 += scale * s1
        store_fields(p_lane, C, mask, -key, zero, p0, p1)
        store_fields(p_lane + LANE // 2 * C, C, mask, -key, zero, a0, a1)
    else:
        pair_adjoints(
            pid, w, u, k, v, g, lanes, groups, states, enters, adjoint_lanes, adjoint_states,
            T, N, blocks, k_rows, v_rows, g_rows, k_stride, v_stride, g_stride, C, L, BC,
            GROUP, AT_ONCE,
        )  # fmt: skip


@triton.jit(do_not_specialize=['T', 'N', 'blocks', 'k_rows', 'v_rows', 'g_rows'])
def bi_wkv_gradient_kernel(
    w,
    u,
    k,
    v,
    g,
    enters,
    adjoint_lanes,
    adjoint_groups,
    adjoint_states,
    dk,  # (B, T, C), contiguous
    dv,  # (B, T, C), contiguous
    partial,  # (B, N, 2 * C): dw and du of one lane
    T,
    N,
    blocks,
    k_rows,
    v_rows,
    g_rows,
    k_stride: tl.constexpr,
    v_stride: tl.constexpr,
    g_stride: tl.constexpr,
    C: tl.constexpr,
    L: tl.constexpr,
    BC: tl.constexpr,
    GROUP: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Gradients of a lane, from its first block to its last."""
    pid = tl.program_id(0)
    batch, n, c, mask = place(pid, N, C, BC)
    b_w = tl.load(w + c, mask=mask, other=0.0)
    b_u = tl.load(u + c, mask=mask, other=0.0)
    w2 = b_w * LOG2E
    d, lack = block_decay(b_w, w2, L)
    own = exp2(b_u * LOG2E)
    # p: sums of p and q before a block; z: those behind the lane
    pv, pd, p0, p1, zv, zd, z0, z1 = entering_lane(
        w2, adjoint_lanes, adjoint_groups, batch, n, N, blocks * L, mask, c, C, GROUP, AT_ONCE
    )
    fv, _fd, f0, f1 = load_fields(enters + (batch * N + n) * (BLOCK * C) + c, C, mask)
    by_w = tl.zeros((BC,), tl.float32)
    by_u = tl.zeros((BC,), tl.float32)
    start = n * blocks * L
    used = tl.minimum(blocks, tl.cdiv(T - start, L))
    p_adjoints = adjoint_states + (batch * N + n) * blocks * (ADJOINT * C) + c
    key = key_of_middle(k, batch, T, k_rows, k_stride, c, mask)
    was_plain = tl.min(((fv > -NOTHING / 2) | ~mask).to(tl.int32)) > 0
    if was_plain & fits(w2, -key, pv, pd, zv, zd, mask):
        scale = exp2(in_units_of(w2, pv, pd, -key))
        p0 *= scale
        p1 *= scale
        scale = exp2(in_units_of(w2, zv, zd, -key))
        z0 *= scale
        z1 *= scale
        for s in range(used):
            t = start + s * L
            left = T - t
            b_k = load_block(
                k + (batch * k_rows + t) * k_stride + c, k_stride, left, mask, float('-inf'), L
            )
            b_v = load_block(v + (batch * v_rows + t) * v_stride + c, v_stride, left, mask, 0.0, L)
            b_g = load_block(g + (batch * g_rows + t) * g_stride + c, g_stride, left, mask, 0.0, L)
            p_adjoint = p_adjoints + s * (ADJOINT * C)
            b0 = tl.load(p_adjoint + 2 * C, mask=mask, other=0.0)
            b1 = tl.load(p_adjoint + 3 * C, mask=mask, other=0.0)
            scale = exp2(-w2 * ((blocks - 1 - s) * L))
            a0 = tl.load(p_adjoint + 6 * C, mask=mask, other=0.0) + scale * z0
            a1 = tl.load(p_adjoint + 7 * C, mask=mask, other=0.0) + scale * z1
            e, x = weigh(b_k, b_v, key, 0.0, L)
            p_out = (batch * T + t) * C + c
            f0, f1, p0, p1, b_dw, b_du = block_gradients(
                d, lack, own, e, x, b_g, f0, f1, b0, b1, a0, a1, p0, p1,
                dk + p_out, dv + p_out, left, mask, C, L,
            )  # fmt: skip
            by_w += b_dw
            by_u += b_du
        p_partial = partial + (batch * N + n) * (2 * C) + c
        tl.store(p_partial, -exp2(-w2) * by_w, mask=mask)
        tl.store(p_partial + C, own * by_u, mask=mask)
    else:
        pair_gradients(
            pid, w, u, k, v, g, enters, adjoint_lanes, adjoint_groups, adjoint_states, dk, dv,
            partial, T, N, blocks, k_rows, v_rows, g_rows, k_stride, v_stride, g_stride, C, L, BC,
            GROUP, AT_ONCE,
        )  # fmt: skip


def bi_wkv_backward(
    gy: Tensor, w: Tensor, u: Tensor, k: Tensor, v: Tensor, launch: Launch | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by w and u (float32, summed in a fixed order), k and v (in their dtype)."""
    batch, tokens, channels = v.shape
    launch = launch or launch_for(v, 'bwd')
    w, u, k, v, gy = w.contiguous(), u.contiguous(), by_rows(k), by_rows(v), by_rows(gy)
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    rows = (batch, launch.lanes)
    with on_device(v):
        lanes, groups, states = lane_sums(w, u, k, v, launch)
        enters = lanes.new_empty((*rows, BLOCK.value, channels))
        adjoint_lanes = lanes.new_empty(lanes.shape)
        adjoint_states = lanes.new_empty((*rows, launch.blocks, ADJOINT.value, channels))
        partial = lanes.new_empty((batch * launch.lanes, 2 * channels))
        grid = (batch * launch.lanes * triton.cdiv(channels, launch.channels),)
        division = (
            tokens, launch.lanes, launch.blocks, rows_between(k), rows_between(v),
            rows_between(gy), k.stride(1), v.stride(1), gy.stride(1), channels,
            launch.length, launch.channels, launch.group, launch.at_once,
        )  # fmt: skip
        bi_wkv_adjoint_kernel[grid](
            w, u, k, v, gy, lanes, groups, states, enters, adjoint_lanes, adjoint_states,
            *division, num_warps=launch.warps, maxnreg=launch.registers,
        )  # fmt: skip
        adjoint_groups = group_sums(w, adjoint_lanes, launch)
        bi_wkv_gradient_kernel[grid](
            w, u, k, v, gy, enters, adjoint_lanes, adjoint_groups, adjoint_states, dk, dv, partial,
            *division, num_warps=launch.warps, maxnreg=launch.registers,
        )  # fmt: skip
    dw, du = sum_rows(partial, 2)
    return dw, du, dk, dv
