"""Triton kernels of Bi-WKV: sums of lanes, sums of groups of lanes, outputs.

One thread works on one channel and walks along a lane of `blocks * L` tokens, in blocks of L that
it holds in registers; a program is BC channels of one lane of one sequence. Nothing is exchanged
between threads: what a lane needs to know of the others passes through memory, between launches.
README.md of this folder, Implementation, has the reasons. Everything is float32 inside.

A log weight is a pair, value - w * distance, of which the distance is exact. A set of sums is that
pair and two sums in units of its exponential; NOTHING as value stands for no tokens. Where |w| or
|u| is so large that the weights of one block leave the range of float32, sums are joined token by
token instead (the functions called _slow).
"""

import triton
import triton.language as tl
from torch import Tensor

from linvis_ops._triton import on_device
from linvis_ops._triton_math import LOG2E, divide, exp2
from linvis_ops.bi_wkv.kernels_triton_pairs import (
    LANE,
    NOTHING,
    entering,
    entering_lane,
    in_units_of,
    join,
    largest,
    load_fields,
    reference,
    rescale,
    slow_token,
    store_fields,
)
from linvis_ops.bi_wkv.launch import Launch, by_rows, launch_for, rows_between

# Largest |w| * L and largest |u| for which a block is computed with one reference.
SPAN = tl.constexpr(20.0)
# Furthest that the largest key of a block may be from the key of the middle token, and largest
# growth of weights along the sequence, for sums to be plain numbers in units of its exponential.
KEYS = tl.constexpr(30.0)
GROWTH = tl.constexpr(20.0)
# Largest binary logarithm of what enters a lane, in the same units.
ENTERING = tl.constexpr(50.0)
# Fields of a block: value, distance and sums of what its first token sees of the lane before it.
BLOCK = tl.constexpr(4)


@triton.jit
def block_decay(w, w2, L: tl.constexpr):
    """exp(-w) in float32, and what L multiplications by it lack of exp(-w L)."""
    p = 1.0 - w / 14  # 1 - exp(-w) as a series, so that it is precise where w is small
    for i in tl.static_range(12):
        p = 1.0 - w / (13 - i) * p
    p *= w
    d = 1.0 - p
    residual = (1.0 - d) - p
    return d, exp2(-w2 * L) * (L * residual) / d


@triton.jit
def in_range(w, u, L: tl.constexpr):
    """Whether the weights of a block stay in the range of float32 beside one reference."""
    return (tl.max(tl.abs(w)) * L <= SPAN) & (tl.max(tl.abs(u)) <= SPAN)


@triton.jit
def place(pid, N, C: tl.constexpr, BC: tl.constexpr):
    """Sequence, lane, channels of a program, and which of the channels exist."""
    tiles: tl.constexpr = (C + BC - 1) // BC
    c = (pid % tiles) * BC + tl.arange(0, BC)
    if C % BC == 0:
        mask = tl.full((BC,), True, tl.int1)
    else:
        mask = c < C
    return (pid // tiles // N).to(tl.int64), (pid // tiles) % N, c, mask


@triton.jit
def load_block(p, stride: tl.constexpr, left, mask, other: tl.constexpr, L: tl.constexpr):
    """L tokens as float32; `other` beyond the last `left` of the sequence."""
    x = ()
    for r in tl.static_range(L):
        x = x + (tl.load(p + r * stride, mask=mask & (r < left), other=other).to(tl.float32),)
    return x


@triton.jit
def weigh(k, v, value, shift, L: tl.constexpr):
    """Weights exp(k - reference) of the tokens of a block, and their products with v."""
    e, x = (), ()
    for r in tl.static_range(L):
        weight = exp2((k[r] - value) * LOG2E + shift)
        e = e + (weight,)
        x = x + (weight * v[r],)
    return e, x


@triton.jit
def sweep(a, d, x, L: tl.constexpr, REVERSE: tl.constexpr):
    """What each token sees of the tokens before it (or after it), and what the next block sees."""
    seen = ()
    for i in tl.static_range(L):
        seen = seen + (a,)
        a = a * d + x[L - 1 - i if REVERSE else i]
    return seen, a


@triton.jit
def fold(a, d, x, L: tl.constexpr, REVERSE: tl.constexpr):
    """What the next block sees of this one: the second result of `sweep`."""
    for i in tl.static_range(L):
        a = a * d + x[L - 1 - i if REVERSE else i]
    return a


@triton.jit
def key_of_middle(k, batch, T, k_rows, k_stride: tl.constexpr, c, mask):
    """Key of the middle token, the reference of plain sums."""
    p = k + (batch * k_rows + T // 2) * k_stride + c
    return tl.load(p, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def may_be_plain(w, u, T, L: tl.constexpr):
    """Whether decays and bonus allow sums that are plain numbers."""
    return in_range(w, u, L) & (tl.min(w) * T >= -GROWTH)


@triton.jit
def walk_for_sums(
    batch, n, c, mask, w, u, k, v, lanes, states, T, N, blocks, k_rows, v_rows,
    k_stride: tl.constexpr, v_stride: tl.constexpr, C: tl.constexpr, L: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Walk along lane n and store its sums, and what each of its blocks sees before it."""
    b_w = tl.load(w + c, mask=mask, other=0.0)
    b_u = tl.load(u + c, mask=mask, other=0.0)
    w2 = b_w * LOG2E
    d, _lack = block_decay(b_w, w2, L)
    fast = in_range(b_w, b_u, L)
    start = n * blocks * L
    used = tl.minimum(blocks, tl.cdiv(T - start, L))
    p_k = k + (batch * k_rows + start) * k_stride + c
    p_v = v + (batch * v_rows + start) * v_stride + c
    p_state = states + (batch * N + n) * blocks * (BLOCK * C) + c
    p_lane = lanes + (batch * N + n) * (LANE * C) + c
    zero = tl.zeros((BC,), tl.float32)
    key = key_of_middle(k, batch, T, k_rows, k_stride, c, mask)
    f0, f1, b0, b1, furthest = zero, zero, zero, zero, zero
    plain = may_be_plain(b_w, b_u, T, L)
    if plain:
        block = exp2(-w2 * L)
        weight = zero + 1.0
        for s in range(used):
            b_k = load_block(
                p_k + s * L * k_stride, k_stride, T - start - s * L, mask, float('-inf'), L
            )
            b_v = load_block(p_v + s * L * v_stride, v_stride, T - start - s * L, mask, 0.0, L)
            p = p_state + s * (BLOCK * C)
            tl.store(p + 2 * C, f0, mask=mask)
            tl.store(p + 3 * C, f1, mask=mask)
            furthest = tl.maximum(furthest, tl.where(mask, tl.abs(largest(b_k, L) - key), 0.0))
            e, x = weigh(b_k, b_v, key, 0.0, L)
            f0 = f0 * block + fold(zero, d, x, L, False)
            f1 = f1 * block + fold(zero, d, e, L, False)
            b0 += weight * fold(zero, d, x, L, True)
            b1 += weight * fold(zero, d, e, L, True)
            weight *= block
        plain = tl.max(furthest) <= KEYS
    if plain:
        # where sums are joined, a pair holds NOTHING here: before the first block, there is nothing
        tl.store(p_state, key, mask=mask)
        store_fields(p_lane, C, mask, key, zero, f0, f1)
        store_fields(p_lane + LANE // 2 * C, C, mask, key, zero, b0, b1)
    else:
        fv, fd, f0, f1 = zero + NOTHING, zero, zero, zero
        bv, bd, b0, b1 = zero + NOTHING, zero, zero, zero
        for s in range(used):
            left = T - start - s * L
            store_fields(p_state, C, mask, fv, fd, f0, f1)
            if fast:
                b_k = load_block(p_k, k_stride, left, mask, float('-inf'), L)
                b_v = load_block(p_v, v_stride, left, mask, 0.0, L)
                top = largest(b_k, L)
                e, x = weigh(b_k, b_v, top, 0.0, L)
                s0 = fold(zero, d, x, L, False)
                s1 = fold(zero, d, e, L, False)
                fv, fd, f0, f1 = join(w2, fv, fd + L, f0, f1, top, 0.0, s0, s1)
                s0 = fold(zero, d, x, L, True)
                s1 = fold(zero, d, e, L, True)
                bv, bd, b0, b1 = join(w2, bv, bd, b0, b1, top, s * L * 1.0, s0, s1)
            else:
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


@triton.jit(do_not_specialize=['T', 'N', 'blocks', 'k_rows', 'v_rows'])
def bi_wkv_lane_kernel(
    w,  # (C,)
    u,  # (C,)
    k,  # (B, T, C), strides (k_rows * k_stride, k_stride, 1)
    v,
    lanes,  # (B, N, LANE, C)
    states,  # (B, N, blocks, BLOCK, C)
    T,
    N,
    blocks,
    k_rows,
    v_rows,
    k_stride: tl.constexpr,
    v_stride: tl.constexpr,
    C: tl.constexpr,
    L: tl.constexpr,
    BC: tl.constexpr,
):
    """Sums of a lane for the tokens outside it, and for each of its blocks of the tokens before."""
    batch, n, c, mask = place(tl.program_id(0), N, C, BC)
    walk_for_sums(
        batch, n, c, mask, w, u, k, v, lanes, states, T, N, blocks, k_rows, v_rows,
        k_stride, v_stride, C, L, BC,
    )  # fmt: skip


@triton.jit(do_not_specialize=['N', 'G', 'size'])
def bi_wkv_group_kernel(
    w,
    lanes,  # (B, N, LANE, C)
    groups,  # (B, G, LANE, C)
    N,
    G,
    size,  # tokens of a lane
    C: tl.constexpr,
    BC: tl.constexpr,
    GROUP: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Sums of GROUP lanes for the tokens outside the group."""
    batch, g, c, mask = place(tl.program_id(0), G, C, BC)
    w2 = tl.load(w + c, mask=mask, other=0.0) * LOG2E
    p = lanes + batch * N * (LANE * C) + c
    first = g * GROUP
    last = tl.minimum(first + GROUP, N)
    start = first * size
    stop = start + GROUP * size
    value, distance, s0, s1 = entering(w2, p, first, last, size, stop, stop, mask, C, AT_ONCE)
    p_group = groups + (batch * G + g) * (LANE * C) + c
    store_fields(p_group, C, mask, value, distance, s0, s1)
    value, distance, s0, s1 = entering(w2, p, first, last, size, start, start, mask, C, AT_ONCE)
    store_fields(p_group + LANE // 2 * C, C, mask, value, distance, s0, s1)


@triton.jit
def plain_lane(p_state, w2, key, fv, fd, bv, bd, mask):
    """Whether the sums of a lane's blocks are plain, and what enters it fits beside them."""
    was = tl.load(p_state, mask=mask, other=0.0) > NOTHING / 2
    small = in_units_of(w2, fv, fd, key) <= ENTERING
    small &= in_units_of(w2, bv, bd, key) <= ENTERING
    return tl.min((was | ~mask).to(tl.int32)) > 0, tl.min((small | ~mask).to(tl.int32)) > 0


@triton.jit
def block_outputs(
    d, lack, own, e, x, q0, q1, b0, b1, y, left, mask, C: tl.constexpr, L: tl.constexpr
):
    """Store the outputs of a block; returns the sums of it and of what is behind it."""
    behind0, a0 = sweep(b0, d, x, L, True)
    behind1, a1 = sweep(b1, d, e, L, True)
    for r in tl.static_range(L):
        numerator = (q0 + behind0[L - 1 - r]) + own * x[r]
        denominator = (q1 + behind1[L - 1 - r]) + own * e[r]
        out = divide(numerator, denominator).to(y.dtype.element_ty)
        tl.store(y + r * C, out, mask=mask & (r < left))
        q0 = q0 * d + x[r]
        q1 = q1 * d + e[r]
    return a0 + lack * b0, a1 + lack * b1


@triton.jit
def walk_for_outputs(
    batch, n, c, mask, w, u, k, v, y, lanes, groups, states, T, N, blocks, k_rows, v_rows,
    k_stride: tl.constexpr, v_stride: tl.constexpr, C: tl.constexpr, L: tl.constexpr,
    GROUP: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Walk back along lane n, from its last block to its first, and store the outputs."""
    b_w = tl.load(w + c, mask=mask, other=0.0)
    b_u = tl.load(u + c, mask=mask, other=0.0)
    w2 = b_w * LOG2E
    d, lack = block_decay(b_w, w2, L)
    own = exp2(b_u * LOG2E)
    fast = in_range(b_w, b_u, L)
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
    was_plain, small = plain_lane(p_states, w2, key, fv, fd, bv, bd, mask)
    if was_plain & small:
        scale = exp2(in_units_of(w2, fv, fd, key))
        f0 *= scale
        f1 *= scale
        scale = exp2(in_units_of(w2, bv, bd, key))
        b0 *= scale
        b1 *= scale
        for i in range(used):
            s = used - 1 - i
            left = T - start - s * L
            b_k = load_block(p_k + s * L * k_stride, k_stride, left, mask, float('-inf'), L)
            b_v = load_block(p_v + s * L * v_stride, v_stride, left, mask, 0.0, L)
            p_state = p_states + s * (BLOCK * C)
            scale = exp2(-w2 * (s * L))
            q0 = tl.load(p_state + 2 * C, mask=mask, other=0.0) + scale * f0
            q1 = tl.load(p_state + 3 * C, mask=mask, other=0.0) + scale * f1
            e, x = weigh(b_k, b_v, key, 0.0, L)
            b0, b1 = block_outputs(
                d, lack, own, e, x, q0, q1, b0, b1, p_y + s * L * C, left, mask, C, L
            )
    else:
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
            if fast:
                b_k = load_block(p_k_s, k_stride, left, mask, float('-inf'), L)
                b_v = load_block(p_v_s, v_stride, left, mask, 0.0, L)
                value, distance = reference(w2, b_k, qv, qd, bv, bd, L)
                e, x = weigh(b_k, b_v, value, w2 * distance, L)
                scale = rescale(w2, qv, qd, value, distance)
                q0 *= scale
                q1 *= scale
                scale = rescale(w2, bv, bd, value, distance)
                b0, b1 = block_outputs(
                    d, lack, own, e, x, q0, q1, b0 * scale, b1 * scale, p_y_s, left, mask, C, L
                )
                bv, bd = value, distance
            else:
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


@triton.jit(do_not_specialize=['T', 'N', 'blocks', 'k_rows', 'v_rows'])
def bi_wkv_out_kernel(
    w,
    u,
    k,
    v,
    y,  # (B, T, C), contiguous
    lanes,
    groups,
    states,
    T,
    N,
    blocks,
    k_rows,
    v_rows,
    k_stride: tl.constexpr,
    v_stride: tl.constexpr,
    C: tl.constexpr,
    L: tl.constexpr,
    BC: tl.constexpr,
    GROUP: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Outputs of a lane, from its last block to its first."""
    # what the launch before read last is read first: it may still be in the cache
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    batch, n, c, mask = place(pid, N, C, BC)
    walk_for_outputs(
        batch, n, c, mask, w, u, k, v, y, lanes, groups, states, T, N, blocks, k_rows, v_rows,
        k_stride, v_stride, C, L, GROUP, AT_ONCE,
    )  # fmt: skip


def lane_sums(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, launch: Launch
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of lanes, of groups (those of the lanes if there are no groups), states of blocks."""
    batch, tokens, channels = v.shape
    lanes = v.new_empty((batch, launch.lanes, LANE.value, channels), dtype=w.dtype)
    states = v.new_empty((batch, launch.lanes, launch.blocks, BLOCK.value, channels), dtype=w.dtype)
    tiles = triton.cdiv(channels, launch.channels)
    bi_wkv_lane_kernel[(batch * launch.lanes * tiles,)](
        w, u, k, v, lanes, states, tokens, launch.lanes, launch.blocks,
        rows_between(k), rows_between(v), k.stride(1), v.stride(1),
        channels, launch.length, launch.channels, num_warps=launch.warps, maxnreg=launch.registers,
    )  # fmt: skip
    return lanes, group_sums(w, lanes, launch), states


def group_sums(w: Tensor, lanes: Tensor, launch: Launch) -> Tensor:
    """Sums of groups of lanes, (B, G, LANE, C); the lanes themselves if there are no groups."""
    if not launch.group:
        return lanes
    batch, _, fields, channels = lanes.shape
    count = triton.cdiv(launch.lanes, launch.group)
    groups = lanes.new_empty((batch, count, fields, channels))
    bi_wkv_group_kernel[(batch * count * triton.cdiv(channels, launch.channels),)](
        w, lanes, groups, launch.lanes, count, launch.blocks * launch.length,
        channels, launch.channels, launch.group, launch.at_once, num_warps=launch.warps,
    )  # fmt: skip
    return groups


def bi_wkv_forward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, launch: Launch | None = None
) -> Tensor:
    """Output (B, T, C), contiguous, in the dtype of v."""
    batch, tokens, channels = v.shape
    launch = launch or launch_for(v, 'fwd')
    w, u, k, v = w.contiguous(), u.contiguous(), by_rows(k), by_rows(v)
    y = v.new_empty(v.shape)
    with on_device(v):
        lanes, groups, states = lane_sums(w, u, k, v, launch)
        tiles = triton.cdiv(channels, launch.channels)
        bi_wkv_out_kernel[(batch * launch.lanes * tiles,)](
            w, u, k, v, y, lanes, groups, states, tokens, launch.lanes, launch.blocks,
            rows_between(k), rows_between(v), k.stride(1), v.stride(1),
            channels, launch.length, launch.channels, launch.group, launch.at_once,
            num_warps=launch.warps, maxnreg=launch.registers,
        )  # fmt: skip
    return y
