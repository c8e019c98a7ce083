"""The gradient of Bi-WKV with sums as pairs, for Triton kernels: right for any keys and decays."""

import triton
import triton.language as tl

from linvis_ops._triton_math import LOG2E, exp2
from linvis_ops.bi_wkv.kernels_triton_blocks import gradient_terms, place
from linvis_ops.bi_wkv.kernels_triton_pairs import (
    BLOCK,
    LANE,
    NOTHING,
    entering_lane,
    is_plain,
    join,
    key_of_middle,
    load_fields,
    rescale,
    slow_token,
    store_fields,
)

# Fields of a block: value and distance of its reference with what enters from behind, then the same
# four of the sums of p and q behind it in the lane.
ADJOINT = tl.constexpr(8)
# Stands for the value of what enters a lane whose sums are plain.
PLAIN = tl.constexpr(1e30)


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


@triton.jit(noinline=True)
def pair_adjoints(
    pid, w, u, k, v, g, lanes, groups, states, enters, adjoint_lanes, adjoint_states, T, N, blocks,
    k_rows, v_rows, g_rows, k_stride: tl.constexpr, v_stride: tl.constexpr,
    g_stride: tl.constexpr, C: tl.constexpr, L: tl.constexpr, BC: tl.constexpr,
    GROUP: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Sums of p and q of a lane, from its last block to its first."""
    batch, n, c, mask = place(pid, N, C, BC)
    b_w = tl.load(w + c, mask=mask, other=0.0)
    b_u = tl.load(u + c, mask=mask, other=0.0)
    w2 = b_w * LOG2E
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
    was_plain = is_plain(p_states, mask)
    store_fields(p_enters, C, mask, fv, fd, f0, f1)
    pv, pd, p0, p1 = zero + NOTHING, zero, zero, zero  # what tokens after the lane see of it
    av, ad, a0, a1 = zero + NOTHING, zero, zero, zero  # what tokens before a block see
    for i in range(used):
        s = used - 1 - i
        left = T - start - s * L
        p_k_s = p_k + s * L * k_stride
        p_v_s = p_v + s * L * v_stride
        p_g_s = p_g + s * L * g_stride
        qv, qd, q0, q1 = load_fields(p_states + s * (BLOCK * C), C, mask)
        qv = tl.where(was_plain, key, qv)
        qd = tl.where(was_plain, 0.0, qd)
        qv, qd, q0, q1 = join(w2, qv, qd, q0, q1, fv, fd + s * L, f0, f1)
        p_adjoint = p_adjoints + s * (ADJOINT * C)
        to_end = (blocks - 1 - s) * L * 1.0
        store_fields(p_adjoint, C, mask, bv, bd, b0, b1)
        store_fields(p_adjoint + 4 * C, C, mask, av, ad, a0, a1)
        count = tl.minimum(left, L)
        ad += L
        for j in range(count):
            x, y, b_p, b_q = slow_gradient_terms(
                w2, b_u, p_k_s, p_v_s, p_g_s, j, count, mask, k_stride, v_stride, g_stride,
                L, qv, qd, q0, q1, bv, bd, b0, b1,
            )  # fmt: skip
            pv, pd, p0, p1 = join(w2, pv, pd, p0, p1, x, y + (L - 1 - j) + to_end, b_p, b_q)
            av, ad, a0, a1 = join(w2, av, ad, a0, a1, x, y + j, b_p, b_q)
        bd += L
        for j in range(count):
            x = tl.load(p_k_s + j * k_stride, mask=mask, other=0.0).to(tl.float32)
            y = tl.load(p_v_s + j * v_stride, mask=mask, other=0.0).to(tl.float32)
            bv, bd, b0, b1 = join(w2, bv, bd, b0, b1, x, j * 1.0, y, 1.0)
    store_fields(p_lane, C, mask, pv, pd, p0, p1)
    store_fields(p_lane + LANE // 2 * C, C, mask, av, ad, a0, a1)


@triton.jit(noinline=True)
def pair_gradients(
    pid, w, u, k, v, g, enters, adjoint_lanes, adjoint_groups, adjoint_states, dk, dv, partial,
    T, N, blocks, k_rows, v_rows, g_rows, k_stride: tl.constexpr, v_stride: tl.constexpr,
    g_stride: tl.constexpr, C: tl.constexpr, L: tl.constexpr, BC: tl.constexpr,
    GROUP: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Gradients of a lane, from its first block to its last."""
    batch, n, c, mask = place(pid, N, C, BC)
    b_w = tl.load(w + c, mask=mask, other=0.0)
    b_u = tl.load(u + c, mask=mask, other=0.0)
    w2 = b_w * LOG2E
    # p: sums of p and q before a block; z: those behind the lane
    pv, pd, p0, p1, zv, zd, z0, z1 = entering_lane(
        w2, adjoint_lanes, adjoint_groups, batch, n, N, blocks * L, mask, c, C, GROUP, AT_ONCE
    )
    fv, fd, f0, f1 = load_fields(enters + (batch * N + n) * (BLOCK * C) + c, C, mask)
    by_w = tl.zeros((BC,), tl.float32)
    by_u = tl.zeros((BC,), tl.float32)
    start = n * blocks * L
    used = tl.minimum(blocks, tl.cdiv(T - start, L))
    p_adjoints = adjoint_states + (batch * N + n) * blocks * (ADJOINT * C) + c
    key = key_of_middle(k, batch, T, k_rows, k_stride, c, mask)
    was_plain = tl.min(((fv > -NOTHING / 2) | ~mask).to(tl.int32)) > 0
    fv = tl.where(was_plain, key, fv)
    for s in range(used):
        t = (start + s * L).to(tl.int64)
        left = T - start - s * L
        p_k = k + (batch * k_rows + t) * k_stride + c
        p_v = v + (batch * v_rows + t) * v_stride + c
        p_g = g + (batch * g_rows + t) * g_stride + c
        p_out = (batch * T + t) * C + c
        p_adjoint = p_adjoints + s * (ADJOINT * C)
        value, distance, b0, b1 = load_fields(p_adjoint, C, mask)
        value = tl.where(was_plain, key, value)
        distance = tl.where(was_plain, 0.0, distance)
        av, ad, a0, a1 = load_fields(p_adjoint + 4 * C, C, mask)
        av = tl.where(was_plain, -key, av)
        ad = tl.where(was_plain, 0.0, ad)
        av, ad, a0, a1 = join(w2, av, ad, a0, a1, zv, zd + (blocks - 1 - s) * L, z0, z1)
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
            tl.store(dv + p_out + r * C, (b_dv + scale * b_p).to(dv.dtype.element_ty), mask=mask)
            tl.store(dk + p_out + r * C, (b_dk + b_du).to(dk.dtype.element_ty), mask=mask)
            by_u += b_du
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
            nv, nd, n0, n1 = join(w2, nv, nd, n0, n1, to_value, to_distance + (L - 1 - j), b_p, b_q)
        pv, pd, p0, p1 = nv, nd, n0, n1
        fd += L
        for j in range(count):
            x = tl.load(p_k + j * k_stride, mask=mask, other=0.0).to(tl.float32)
            y = tl.load(p_v + j * v_stride, mask=mask, other=0.0).to(tl.float32)
            fv, fd, f0, f1 = join(w2, fv, fd, f0, f1, x, L - 1.0 - j, y, 1.0)
    p_partial = partial + (batch * N + n) * (2 * C) + c
    tl.store(p_partial, -exp2(-w2) * by_w, mask=mask)
    tl.store(p_partial + C, by_u, mask=mask)
