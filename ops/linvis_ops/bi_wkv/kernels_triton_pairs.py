"""Sums of Bi-WKV as pairs, for Triton kernels: right for any keys and decays.

A log weight is a pair, value - w * distance, of which the distance is exact. A set of sums is that
pair and two sums in units of its exponential; NOTHING as value stands for no tokens.

Lanes pass pairs to one another. The walks along a lane in this file join token by token; they are
some hundred times slower than those of plain sums, for which keys or decays must be far from what a
network computes. They are functions that are called, which keeps them apart from the others.
"""

import triton
import triton.language as tl

from linvis_ops._triton_math import LOG2E, exp2
from linvis_ops.bi_wkv.kernels_triton_blocks import place

NOTHING = tl.constexpr(-1e30)
# Fields of a lane: value, distance and two sums of what the tokens after it see of it, then the
# same for the tokens before it.
LANE = tl.constexpr(8)
# Fields of a block: value, distance and sums of what its first token sees of the lane before it.
# The value before the first block is NOTHING; where the sums are plain, it is not.
BLOCK = tl.constexpr(4)


@triton.jit
def exceeds(w2, value, distance, value2, distance2):
    """Whether the second log weight is the larger one."""
    return (value2 - value) * LOG2E > w2 * (distance2 - distance)


@triton.jit
def rescale(w2, value, distance, to_value, to_distance):
    """exp(log weight - log weight of the reference), for a reference that is not much smaller."""
    exponent = (value - to_value) * LOG2E - w2 * (distance - to_distance)
    return exp2(tl.minimum(exponent, 120.0))


@triton.jit
def join(w2, value, distance, s0, s1, value2, distance2, t0, t1):
    """Add two sets of sums, at the larger of their log weights."""
    second = exceeds(w2, value, distance, value2, distance2)
    top_value = tl.where(second, value2, value)
    top_distance = tl.where(second, distance2, distance)
    a = rescale(w2, value, distance, top_value, top_distance)
    b = rescale(w2, value2, distance2, top_value, top_distance)
    return top_value, top_distance, s0 * a + t0 * b, s1 * a + t1 * b


@triton.jit
def in_units_of(w2, value, distance, key):
    """Binary logarithm of what a sum in units of exp(key) is multiplied with."""
    return (value - key) * LOG2E - w2 * distance


@triton.jit
def load_fields(p, c_stride, mask):
    """Four fields in a row: value, distance and two sums; nothing where the mask is false."""
    value = tl.load(p, mask=mask, other=NOTHING)
    distance = tl.load(p + c_stride, mask=mask, other=0.0)
    s0 = tl.load(p + 2 * c_stride, mask=mask, other=0.0)
    s1 = tl.load(p + 3 * c_stride, mask=mask, other=0.0)
    return value, distance, s0, s1


@triton.jit
def store_fields(p, c_stride, mask, value, distance, s0, s1):
    """Store four fields in a row."""
    tl.store(p, value, mask=mask)
    tl.store(p + c_stride, distance, mask=mask)
    tl.store(p + 2 * c_stride, s0, mask=mask)
    tl.store(p + 3 * c_stride, s1, mask=mask)


@triton.jit
def entering(
    w2, sums, first, last, size, start, stop, mask, C: tl.constexpr, AT_ONCE: tl.constexpr
):
    """Joined sums of the entries first..last - 1, each of `size` tokens, for the tokens between.

    All entries are on one side of the tokens start..stop - 1, and are seen by the nearest of these.
    """
    nothing = tl.zeros_like(w2)
    value, distance, s0, s1 = nothing + NOTHING, nothing, nothing, nothing
    for m0 in range(first, last, AT_ONCE):
        values, distances, x0s, x1s = (), (), (), ()
        old_value = value
        old_distance = distance
        for i in tl.static_range(AT_ONCE):
            m = m0 + i
            before = m * size < start
            gap = tl.where(before, start - (m + 1) * size, m * size - stop)
            p = sums + m * (LANE * C) + tl.where(before, 0, LANE // 2 * C)
            x, y, x0, x1 = load_fields(p, C, mask & (m < last))
            values = values + (x,)
            distances = distances + (y + gap.to(tl.float32),)
            x0s = x0s + (x0,)
            x1s = x1s + (x1,)
        for i in tl.static_range(AT_ONCE):
            more = exceeds(w2, value, distance, values[i], distances[i])
            value = tl.where(more, values[i], value)
            distance = tl.where(more, distances[i], distance)
        scale = rescale(w2, old_value, old_distance, value, distance)
        s0 *= scale
        s1 *= scale
        for i in tl.static_range(AT_ONCE):
            scale = rescale(w2, values[i], distances[i], value, distance)
            s0 += scale * x0s[i]
            s1 += scale * x1s[i]
    return value, distance, s0, s1


@triton.jit
def entering_lane(
    w2, lanes, groups, batch, n, N, size, mask, c, C: tl.constexpr, GROUP: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """What enters lane n from before and from behind: two sets of sums."""
    p_lanes = lanes + batch * N * (LANE * C) + c
    start = n * size
    stop = start + size
    if GROUP == 0:
        fv, fd, f0, f1 = entering(w2, p_lanes, 0, n, size, start, stop, mask, C, AT_ONCE)
        bv, bd, b0, b1 = entering(w2, p_lanes, n + 1, N, size, start, stop, mask, C, AT_ONCE)
    else:
        G = (N + GROUP - 1) // GROUP
        g = n // GROUP
        p_groups = groups + batch * G * (LANE * C) + c
        first = g * GROUP
        last = tl.minimum(first + GROUP, N)
        span = size * GROUP
        fv, fd, f0, f1 = entering(w2, p_groups, 0, g, span, start, stop, mask, C, AT_ONCE)
        v, d, s0, s1 = entering(w2, p_lanes, first, n, size, start, stop, mask, C, AT_ONCE)
        fv, fd, f0, f1 = join(w2, fv, fd, f0, f1, v, d, s0, s1)
        bv, bd, b0, b1 = entering(w2, p_groups, g + 1, G, span, start, stop, mask, C, AT_ONCE)
        v, d, s0, s1 = entering(w2, p_lanes, n + 1, last, size, start, stop, mask, C, AT_ONCE)
        bv, bd, b0, b1 = join(w2, bv, bd, b0, b1, v, d, s0, s1)
    return fv, fd, f0, f1, bv, bd, b0, b1


@triton.jit
def key_of_middle(k, batch, T, k_rows, k_stride: tl.constexpr, c, mask):
    """Key of the middle token, the reference of plain sums."""
    p = k + (batch * k_rows + T // 2) * k_stride + c
    return tl.load(p, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def is_plain(p_states, mask):
    """Whether the sums of a lane's blocks are plain numbers in units of exp(key_of_middle)."""
    was = tl.load(p_states, mask=mask, other=0.0) > NOTHING / 2
    return tl.min((was | ~mask).to(tl.int32)) > 0


@triton.jit
def slow_token(
    w2, u, k, v, i, count, mask, k_stride: tl.constexpr, v_stride: tl.constexpr, L: tl.constexpr,
    fv, fd, f0, f1, bv, bd, b0, b1,
):  # fmt: skip
    """Sums for token i of a block of `count`, joined token by token: before, behind, all.

    f is what the first token of the block sees before it and b what the last of L sees behind it.
    """
    fd += i
    bd += L - 1 - i
    for j in range(count):
        x = tl.load(k + j * k_stride, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(v + j * v_stride, mask=mask, other=0.0).to(tl.float32)
        steps = tl.abs(i - j) - 1.0
        earlier = tl.where(j < i, x, NOTHING)
        fv, fd, f0, f1 = join(
            w2, fv, fd, f0, f1, earlier, tl.abs(steps), y * (j < i), 1.0 * (j < i)
        )
        later = tl.where(j > i, x, NOTHING)
        bv, bd, b0, b1 = join(w2, bv, bd, b0, b1, later, tl.abs(steps), y * (j > i), 1.0 * (j > i))
    value, distance, s0, s1 = join(w2, fv, fd, f0, f1, bv, bd, b0, b1)
    x = tl.load(k + i * k_stride, mask=mask, other=0.0).to(tl.float32) + u
    y = tl.load(v + i * v_stride, mask=mask, other=0.0).to(tl.float32)
    value, distance, s0, s1 = join(w2, value, distance, s0, s1, x, 0.0, y, 1.0)
    return fv, fd, f0, f1, bv, bd, b0, b1, value, distance, s0, s1


@triton.jit(noinline=True)
def pair_sums(
    pid, w, k, v, lanes, states, T, N, blocks, k_rows, v_rows, k_stride: tl.constexpr,
    v_stride: tl.constexpr, C: tl.constexpr, L: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Walk along a lane and store its sums, and what each of its blocks sees before it."""
    batch, n, c, mask = place(pid, N, C, BC)
    b_w = tl.load(w + c, mask=mask, other=0.0)
    w2 = b_w * LOG2E
    start = n * blocks * L
    used = tl.minimum(blocks, tl.cdiv(T - start, L))
    p_k = k + (batch * k_rows + start) * k_stride + c
    p_v = v + (batch * v_rows + start) * v_stride + c
    p_state = states + (batch * N + n) * blocks * (BLOCK * C) + c
    p_lane = lanes + (batch * N + n) * (LANE * C) + c
    zero = tl.zeros((BC,), tl.float32)
    fv, fd, f0, f1 = zero + NOTHING, zero, zero, zero
    bv, bd, b0, b1 = zero + NOTHING, zero, zero, zero
    for s in range(used):
        left = T - start - s * L
        store_fields(p_state, C, mask, fv, fd, f0, f1)
        for j in range(tl.minimum(left, L)):
            x = tl.load(p_k + j * k_stride, mask=mask, other=0.0).to(tl.float32)
            y = tl.load(p_v + j * v_stride, mask=mask, other=0.0).to(tl.float32)
            fv, fd, f0, f1 = join(w2, fv, fd + 1, f0, f1, x, 0.0, y, 1.0)
            bv, bd, b0, b1 = join(w2, bv, bd, b0, b1, x, (s * L + j) * 1.0, y, 1.0)
        p_k += L * k_stride
        p_v += L * v_stride
        p_state += BLOCK * C
    store_fields(p_lane, C, mask, fv, fd, f0, f1)
    store_fields(p_lane + LANE // 2 * C, C, mask, bv, bd, b0, b1)


@triton.jit(noinline=True)
def pair_outputs(
    pid, w, u, k, v, y, lanes, groups, states, T, N, blocks, k_rows, v_rows,
    k_stride: tl.constexpr, v_stride: tl.constexpr, C: tl.constexpr, L: tl.constexpr,
    BC: tl.constexpr, GROUP: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Walk back along a lane, from its last block to its first, and store the outputs."""
    batch, n, c, mask = place(pid, N, C, BC)
    b_w = tl.load(w + c, mask=mask, other=0.0)
    b_u = tl.load(u + c, mask=mask, other=0.0)
    w2 = b_w * LOG2E
    fv, fd, f0, f1, bv, bd, b0, b1 = entering_lane(
        w2, lanes, groups, batch, n, N, blocks * L, mask, c, C, GROUP, AT_ONCE
    )
    start = n * blocks * L
    used = tl.minimum(blocks, tl.cdiv(T - start, L))
    p_k = k + (batch * k_rows + start) * k_stride + c
    p_v = v + (batch * v_rows + start) * v_stride + c
    p_y = y + (batch * T + start) * C + c
    p_states = states + (batch * N + n) * blocks * (BLOCK * C) + c
    key = key_of_middle(k, batch, T, k_rows, k_stride, c, mask)
    was_plain = is_plain(p_states, mask)
    for i in range(used):
        s = used - 1 - i
        left = T - start - s * L
        p_k_s = p_k + s * L * k_stride
        p_v_s = p_v + s * L * v_stride
        p_y_s = p_y + s * L * C
        qv, qd, q0, q1 = load_fields(p_states + s * (BLOCK * C), C, mask)
        qv = tl.where(was_plain, key, qv)
        qd = tl.where(was_plain, 0.0, qd)
        qv, qd, q0, q1 = join(w2, qv, qd, q0, q1, fv, fd + s * L, f0, f1)
        count = tl.minimum(left, L)
        for r in range(count):
            sums = slow_token(
                w2, b_u, p_k_s, p_v_s, r, count, mask, k_stride, v_stride, L,
                qv, qd, q0, q1, bv, bd, b0, b1,
            )  # fmt: skip
            tl.store(p_y_s + r * C, (sums[10] / sums[11]).to(y.dtype.element_ty), mask=mask)
        bd += L
        for j in range(count):
            a = tl.load(p_k_s + j * k_stride, mask=mask, other=0.0).to(tl.float32)
            x = tl.load(p_v_s + j * v_stride, mask=mask, other=0.0).to(tl.float32)
            bv, bd, b0, b1 = join(w2, bv, bd, b0, b1, a, j * 1.0, x, 1.0)
