"""Triton kernels of the gradient of Bi-WKV.

The lanes, blocks and sums are those of kernels_triton.py. The forward sums of lanes are computed
again; `bi_wkv_adjoint_kernel` then finds y and its denominator for every token, the sums of
p = gy / denominator and q = p * y over each lane (log weights: minus those of the denominators),
and what each block needs to start from; `bi_wkv_gradient_kernel` turns all this into gradients.
README.md has the formulas.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from linvis_ops._sizes import ceil_div
from linvis_ops._triton import on_device
from linvis_ops._triton_math import LOG2E, divide, exp2
from linvis_ops._triton_sum import sum_rows
from linvis_ops.bi_wkv.kernels_triton import (
    BLOCK,
    LANE,
    NOTHING,
    SPAN,
    block_decay,
    entering_lane,
    fold,
    group_sums,
    in_range,
    join,
    lane_sums,
    load_block,
    load_fields,
    place,
    reference,
    rescale,
    slow_token,
    store_fields,
    sweep,
    weigh,
)
from linvis_ops.bi_wkv.launch import Launch, by_rows, launch_for, rows_between

# Fields of a block: value and distance of its reference with what enters from behind, then the same
# four of the sums of p and q behind it in the lane.
ADJOINT = tl.constexpr(8)


@triton.jit
def adjoint_in_range(w, u, T, L: tl.constexpr):
    """The same for p and q: where far tokens weigh more, their sums may exceed 1 / denominator."""
    return in_range(w, u, L) & (tl.min(w) * T >= -2 * SPAN)


@triton.jit
def gradient_terms(g, numerator, denominator):
    """Return p = g / denominator and q = p * y; y to the last place, since v - y may cancel."""
    inverse = divide(1.0, denominator)
    y = numerator * inverse
    y += (numerator - y * denominator) * inverse
    p = g * inverse
    return p, p * y


@triton.jit
def slow_gradient_terms(
    w2, u, k, v, g, j, count, mask, k_stride: tl.constexpr, v_stride: tl.constexpr,
    g_stride: tl.constexpr, L: tl.constexpr, fv, fd, f0, f1, bv, bd, b0, b1,
):  # fmt: skip
    """Log weight of a denominator, less than zero, and p and q of token j."""
    sums = slow_token(
        w2, u, k, v, j, count, mask, k_stride, v_stride, L, fv, fd, f0, f1, bv, bd, b0, b1
    )
    b_g = tl.load(g + j * g_stride, mask=mask, other=0.0).to(tl.float32)
    p, q = gradient_terms(b_g, sums[10], sums[11])
    return -sums[8], -sums[9], p, q


@triton.jit(do_not_specialize=['T', 'N', 'blocks', 'group', 'k_rows', 'v_rows', 'g_rows'])
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
    group,
    k_rows,
    v_rows,
    g_rows,
    k_stride: tl.constexpr,
    v_stride: tl.constexpr,
    g_stride: tl.constexpr,
    C: tl.constexpr,
    L: tl.constexpr,
    BC: tl.constexpr,
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
    fast = adjoint_in_range(b_w, b_u, T, L)
    fv, fd, f0, f1, bv, bd, b0, b1 = entering_lane(
        w2, lanes, groups, batch, n, N, blocks * L, group, mask, c, C, AT_ONCE
    )
    store_fields(enters + (batch * N + n) * (BLOCK * C) + c, C, mask, fv, fd, f0, f1)
    zero = tl.zeros((BC,), tl.float32)
    pv, pd, p0, p1 = zero + NOTHING, zero, zero, zero  # what tokens after the lane see of it
    av, ad, a0, a1 = zero + NOTHING, zero, zero, zero  # what tokens before a block see of the rest
    start = n * blocks * L
    used = tl.minimum(blocks, tl.cdiv(T - start, L))
    for i in range(used):
        s = used - 1 - i
        t = (start + s * L).to(tl.int64)
        left = T - start - s * L
        p_k = k + (batch * k_rows + t) * k_stride + c
        p_v = v + (batch * v_rows + t) * v_stride + c
        p_g = g + (batch * g_rows + t) * g_stride + c
        block = (batch * N + n) * blocks + s
        qv, qd, q0, q1 = load_fields(states + block * (BLOCK * C) + c, C, mask)
        qv, qd, q0, q1 = join(w2, qv, qd, q0, q1, fv, fd + s * L, f0, f1)
        p_adjoint = adjoint_states + block * (ADJOINT * C) + c
        to_end = (blocks - 1 - s) * L * 1.0
        if fast:
            b_k = load_block(p_k, k_stride, left, mask, float('-inf'), L)
            b_v = load_block(p_v, v_stride, left, mask, 0.0, L)
            b_g = load_block(p_g, g_stride, left, mask, 0.0, L)
            value, distance = reference(w2, b_k, qv, qd, bv, bd, L)
            e, x = weigh(b_k, b_v, value, w2 * distance, L)
            scale = rescale(w2, qv, qd, value, distance)
            q0 *= scale
            q1 *= scale
            scale = rescale(w2, bv, bd, value, distance)
            b0 *= scale
            b1 *= scale
            scale = rescale(w2, av, ad, -value, -distance)
            a0 *= scale
            a1 *= scale
            store_fields(p_adjoint, C, mask, value, distance, b0, b1)
            tl.store(p_adjoint + 6 * C, a0, mask=mask)
            tl.store(p_adjoint + 7 * C, a1, mask=mask)
            behind0, next0 = sweep(b0, d, x, L, True)
            behind1, next1 = sweep(b1, d, e, L, True)
            bv, bd, b0, b1 = value, distance, next0 + lack * b0, next1 + lack * b1
            p, q = (), ()
            for r in tl.static_range(L):
                numerator = (q0 + behind0[L - 1 - r]) + own * x[r]
                denominator = (q1 + behind1[L - 1 - r]) + own * e[r]
                b_p, b_q = gradient_terms(b_g[r], numerator, denominator)
                p = p + (b_p,)
                q = q + (b_q,)
                q0 = q0 * d + x[r]
                q1 = q1 * d + e[r]
            s0 = fold(zero, d, p, L, False)
            s1 = fold(zero, d, q, L, False)
            next0 = fold(a0, d, p, L, True)
            next1 = fold(a1, d, q, L, True)
            pv, pd, p0, p1 = join(w2, pv, pd, p0, p1, -value, to_end - distance, s0, s1)
            av, ad, a0, a1 = -value, -distance, next0 + lack * a0, next1 + lack * a1
        else:
            store_fields(p_adjoint, C, mask, bv, bd, b0, b1)
            store_fields(p_adjoint + 4 * C, C, mask, av, ad, a0, a1)
            count = tl.minimum(left, L)
            ad += L
            for j in range(count):
                x, y, b_p, b_q = slow_gradient_terms(
                    w2, b_u, p_k, p_v, p_g, j, count, mask, k_stride, v_stride, g_stride, L,
                    qv, qd, q0, q1, bv, bd, b0, b1,
                )  # fmt: skip
                pv, pd, p0, p1 = join(w2, pv, pd, p0, p1, x, y + (L - 1 - j) + to_end, b_p, b_q)
                av, ad, a0, a1 = join(w2, av, ad, a0, a1, x, y + j, b_p, b_q)
            bd += L
            for j in range(count):
                x = tl.load(p_k + j * k_stride, mask=mask, other=0.0).to(tl.float32)
                y = tl.load(p_v + j * v_stride, mask=mask, other=0.0).to(tl.float32)
                bv, bd, b0, b1 = join(w2, bv, bd, b0, b1, x, j * 1.0, y, 1.0)
    p_lane = adjoint_lanes + (batch * N + n) * (LANE * C) + c
    store_fields(p_lane, C, mask, pv, pd, p0, p1)
    store_fields(p_lane + LANE // 2 * C, C, mask, av, ad, a0, a1)


@triton.jit(do_not_specialize=['T', 'N', 'blocks', 'group', 'k_rows', 'v_rows', 'g_rows'])
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
    group,
    k_rows,
    v_rows,
    g_rows,
    k_stride: tl.constexpr,
    v_stride: tl.constexpr,
    g_stride: tl.constexpr,
    C: tl.constexpr,
    L: tl.constexpr,
    BC: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Gradients of a lane, from its first block to its last."""
    batch, n, c, mask = place(tl.program_id(0), N, C, BC)
    b_w = tl.load(w + c, mask=mask, other=0.0)
    b_u = tl.load(u + c, mask=mask, other=0.0)
    w2 = b_w * LOG2E
    d, lack = block_decay(b_w, w2, L)
    own = exp2(b_u * LOG2E)
    fast = adjoint_in_range(b_w, b_u, T, L)
    # p: sums of p and q before a block; z: those behind the lane
    pv, pd, p0, p1, zv, zd, z0, z1 = entering_lane(
        w2, adjoint_lanes, adjoint_groups, batch, n, N, blocks * L, group, mask, c, C, AT_ONCE
    )
    fv, fd, f0, f1 = load_fields(enters + (batch * N + n) * (BLOCK * C) + c, C, mask)
    by_w = tl.zeros((BC,), tl.float32)
    by_u = tl.zeros((BC,), tl.float32)
    start = n * blocks * L
    for s in range(tl.minimum(blocks, tl.cdiv(T - start, L))):
        t = (start + s * L).to(tl.int64)
        left = T - start - s * L
        p_k = k + (batch * k_rows + t) * k_stride + c
        p_v = v + (batch * v_rows + t) * v_stride + c
        p_g = g + (batch * g_rows + t) * g_stride + c
        p_out = (batch * T + t) * C + c
        p_adjoint = adjoint_states + (((batch * N + n) * blocks + s) * (ADJOINT * C) + c)
        value, distance, b0, b1 = load_fields(p_adjoint, C, mask)
        a0 = tl.load(p_adjoint + 6 * C, mask=mask, other=0.0)
        a1 = tl.load(p_adjoint + 7 * C, mask=mask, other=0.0)
        rest = zd + (blocks - 1 - s) * L
        if fast:
            b_k = load_block(p_k, k_stride, left, mask, float('-inf'), L)
            b_v = load_block(p_v, v_stride, left, mask, 0.0, L)
            b_g = load_block(p_g, g_stride, left, mask, 0.0, L)
            e, x = weigh(b_k, b_v, value, w2 * distance, L)
            scale = rescale(w2, fv, fd, value, distance)
            f0 *= scale
            f1 *= scale
            scale = rescale(w2, pv, pd, -value, -distance)
            p0 *= scale
            p1 *= scale
            scale = rescale(w2, zv, rest, -value, -distance)
            a0 += z0 * scale
            a1 += z1 * scale
            before0, next0 = sweep(f0, d, x, L, False)
            before1, next1 = sweep(f1, d, e, L, False)
            fv, fd, f0, f1 = value, distance, next0 + lack * f0, next1 + lack * f1
            behind0, behind1, p, q, sum0, sum1 = (), (), (), (), (), ()
            b_dw = tl.zeros((BC,), tl.float32)
            for i in tl.static_range(L):
                numerator = (before0[L - 1 - i] + b0) + own * x[L - 1 - i]
                denominator = (before1[L - 1 - i] + b1) + own * e[L - 1 - i]
                b_p, b_q = gradient_terms(b_g[L - 1 - i], numerator, denominator)
                b_dw += a0 * before0[L - 1 - i] - a1 * before1[L - 1 - i]
                behind0 = behind0 + (b0,)
                behind1 = behind1 + (b1,)
                p = p + (b_p,)
                q = q + (b_q,)
                sum0 = sum0 + (a0 + own * b_p,)
                sum1 = sum1 + (a1 + own * b_q,)
                b0 = b0 * d + x[L - 1 - i]
                b1 = b1 * d + e[L - 1 - i]
                a0 = a0 * d + b_p
                a1 = a1 * d + b_q
            before = p0
            before_q = p1
            for r in tl.static_range(L):
                b_dw += p0 * behind0[L - 1 - r] - p1 * behind1[L - 1 - r]
                total0 = sum0[L - 1 - r] + p0
                total1 = sum1[L - 1 - r] + p1
                b_dk = x[r] * total0 - e[r] * total1
                valid = mask & (r < left)
                tl.store(dv + p_out + r * C, (e[r] * total0).to(dv.dtype.element_ty), mask=valid)
                tl.store(dk + p_out + r * C, b_dk.to(dk.dtype.element_ty), mask=valid)
                by_u += x[r] * p[L - 1 - r] - e[r] * q[L - 1 - r]
                p0 = p0 * d + p[L - 1 - r]
                p1 = p1 * d + q[L - 1 - r]
            by_w += b_dw
            pv, pd, p0, p1 = -value, -distance, p0 + lack * before, p1 + lack * before_q
        else:
            av = tl.load(p_adjoint + 4 * C, mask=mask, other=NOTHING)
            ad = tl.load(p_adjoint + 5 * C, mask=mask, other=0.0)
            av, ad, a0, a1 = join(w2, av, ad, a0, a1, zv, rest, z0, z1)
            count = tl.minimum(left, L)
            for r in range(count):
                x = tl.load(p_k + r * k_stride, mask=mask, other=0.0).to(tl.float32)
                y = tl.load(p_v + r * v_stride, mask=mask, other=0.0).to(tl.float32)
                own_value, own_distance, b_p, b_q = slow_gradient_terms(
                    w2, b_u, p_k, p_v, p_g, r, count, mask, k_stride, v_stride, g_stride, L,
                    fv, fd, f0, f1, value, distance, b0, b1,
                )  # fmt: skip
                sums = slow_token(
                    w2, b_u, p_k, p_v, r, count, mask, k_stride, v_stride, L,
                    fv, fd, f0, f1, value, distance, b0, b1,
                )  # fmt: skip
                pv_r, pd_r, p0_r, p1_r = pv, pd + r, p0, p1
                av_r, ad_r, a0_r, a1_r = av, ad + (L - 1 - r), a0, a1
                for j in range(count):
                    to_value, to_distance, j_p, j_q = slow_gradient_terms(
                        w2, b_u, p_k, p_v, p_g, j, count, mask, k_stride, v_stride, g_stride, L,
                        fv, fd, f0, f1, value, distance, b0, b1,
                    )  # fmt: skip
                    steps = to_distance + tl.abs(tl.abs(r - j) - 1.0)
                    earlier = tl.where(j < r, to_value, NOTHING)
                    pv_r, pd_r, p0_r, p1_r = join(
                        w2, pv_r, pd_r, p0_r, p1_r, earlier, steps, j_p * (j < r), j_q * (j < r)
                    )
                    later = tl.where(j > r, to_value, NOTHING)
                    av_r, ad_r, a0_r, a1_r = join(
                        w2, av_r, ad_r, a0_r, a1_r, later, steps, j_p * (j > r), j_q * (j > r)
                    )
                zero = tl.zeros((BC,), tl.float32)
                scale = rescale(w2, x, zero, -pv_r, -pd_r)
                b_dv = scale * p0_r
                b_dk = scale * (y * p0_r - p1_r)
                scale = rescale(w2, x, zero, -av_r, -ad_r)
                b_dv += scale * a0_r
                b_dk += scale * (y * a0_r - a1_r)
                scale = rescale(w2, x + b_u, zero, -own_value, -own_distance)
                b_du = scale * (y * b_p - b_q)
                tl.store(
                    dv + p_out + r * C, (b_dv + scale * b_p).to(dv.dtype.element_ty), mask=mask
                )
                tl.store(dk + p_out + r * C, (b_dk + b_du).to(dk.dtype.element_ty), mask=mask)
                # divided by what the sums of the fast form are multiplied with at the end
                by_u += b_du * exp2(-b_u * LOG2E)
                scale = rescale(w2, sums[0], sums[1], -av_r, -ad_r)
                by_w += scale * (a0_r * sums[2] - a1_r * sums[3])
                scale = rescale(w2, sums[4], sums[5], -pv_r, -pd_r)
                by_w += scale * (p0_r * sums[6] - p1_r * sums[7])
            nv, nd, n0, n1 = pv, pd + L, p0, p1
            for j in range(count):
                to_value, to_distance, b_p, b_q = slow_gradient_terms(
                    w2, b_u, p_k, p_v, p_g, j, count, mask, k_stride, v_stride, g_stride, L,
                    fv, fd, f0, f1, value, distance, b0, b1,
                )  # fmt: skip
                nv, nd, n0, n1 = join(
                    w2, nv, nd, n0, n1, to_value, to_distance + (L - 1 - j), b_p, b_q
                )
            pv, pd, p0, p1 = nv, nd, n0, n1
            fd += L
            for j in range(count):
                x = tl.load(p_k + j * k_stride, mask=mask, other=0.0).to(tl.float32)
                y = tl.load(p_v + j * v_stride, mask=mask, other=0.0).to(tl.float32)
                fv, fd, f0, f1 = join(w2, fv, fd, f0, f1, x, L - 1.0 - j, y, 1.0)
    p_partial = partial + (batch * N + n) * (2 * C) + c
    tl.store(p_partial, -exp2(-w2) * by_w, mask=mask)
    tl.store(p_partial + C, own * by_u, mask=mask)


def bi_wkv_backward(
    gy: Tensor, w: Tensor, u: Tensor, k: Tensor, v: Tensor, launch: Launch | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients by w and u (float32, summed in a fixed order), k and v (in their dtype)."""
    batch, tokens, channels = v.shape
    launch = launch or launch_for(v, 'bwd')
    w, u, k, v, gy = w.contiguous(), u.contiguous(), by_rows(k), by_rows(v), by_rows(gy)
    dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
    rows = (batch, launch.lanes)
    with on_device(v):
        lanes, groups, states = lane_sums(w, u, k, v, launch)
        enters = lanes.new_empty((*rows, BLOCK.value, channels))
        adjoint_lanes = torch.empty_like(lanes)
        adjoint_states = lanes.new_empty((*rows, launch.blocks, ADJOINT.value, channels))
        partial = lanes.new_empty((batch * launch.lanes, 2 * channels))
        grid = (batch * launch.lanes * ceil_div(channels, launch.channels),)
        division = (
            tokens, launch.lanes, launch.blocks, launch.group, rows_between(k), rows_between(v),
            rows_between(gy), k.stride(1), v.stride(1), gy.stride(1), channels,
            launch.length, launch.channels, launch.at_once,
        )  # fmt: skip
        bi_wkv_adjoint_kernel[grid](
            w, u, k, v, gy, lanes, groups, states, enters, adjoint_lanes, adjoint_states,
            *division, num_warps=launch.warps,
        )  # fmt: skip
        adjoint_groups = group_sums(w, adjoint_lanes, launch)
        bi_wkv_gradient_kernel[grid](
            w, u, k, v, gy, enters, adjoint_lanes, adjoint_groups, adjoint_states, dk, dv, partial,
            *division, num_warps=launch.warps,
        )  # fmt: skip
    dw, du = sum_rows(partial, 2)
    return dw, du, dk, dv
