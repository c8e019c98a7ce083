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

import torch
import triton
import triton.language as tl
from torch import Tensor

from linvis_ops._sizes import ceil_div
from linvis_ops._triton import on_device
from linvis_ops._triton_math import LOG2E, divide, exp2
from linvis_ops.bi_wkv.launch import Launch, by_rows, launch_for, rows_between

NOTHING = tl.constexpr(-1e30)
# Largest |w| * L and largest |u| for which a block is computed with one reference.
SPAN = tl.constexpr(20.0)
# Fields of a lane: value, distance and two sums of what the tokens after it see of it, then the
# same for the tokens before it.
LANE = tl.constexpr(8)
# Fields of a block: value, distance and sums of what its first token sees of the lane before it.
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
    w2, lanes, groups, batch, n, N, size, group, mask, c, C: tl.constexpr, AT_ONCE: tl.constexpr
):  # fmt: skip
    """What enters lane n from before and from behind: two sets of sums.

    Lanes of its own group are asked one by one, of the others their groups.
    """
    p_lanes = lanes + batch * N * (LANE * C) + c
    start = n * size
    stop = start + size
    G = (N + group - 1) // group
    g = n // group
    p_groups = groups + batch * G * (LANE * C) + c
    first = g * group
    last = tl.minimum(first + group, N)
    span = size * group
    fv, fd, f0, f1 = entering(w2, p_groups, 0, g, span, start, stop, mask, C, AT_ONCE)
    v, d, s0, s1 = entering(w2, p_lanes, first, n, size, start, stop, mask, C, AT_ONCE)
    fv, fd, f0, f1 = join(w2, fv, fd, f0, f1, v, d, s0, s1)
    bv, bd, b0, b1 = entering(w2, p_groups, g + 1, G, span, start, stop, mask, C, AT_ONCE)
    v, d, s0, s1 = entering(w2, p_lanes, n + 1, last, size, start, stop, mask, C, AT_ONCE)
    bv, bd, b0, b1 = join(w2, bv, bd, b0, b1, v, d, s0, s1)
    return fv, fd, f0, f1, bv, bd, b0, b1


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
    p_k = k + (batch * k_rows + start) * k_stride + c
    p_v = v + (batch * v_rows + start) * v_stride + c
    p_state = states + (batch * N + n) * blocks * (BLOCK * C) + c
    zero = tl.zeros((BC,), tl.float32)
    fv, fd, f0, f1 = zero + NOTHING, zero, zero, zero
    bv, bd, b0, b1 = zero + NOTHING, zero, zero, zero
    for s in range(tl.minimum(blocks, tl.cdiv(T - start, L))):
        left = T - start - s * L
        store_fields(p_state, C, mask, fv, fd, f0, f1)
        if fast:
            b_k = load_block(p_k, k_stride, left, mask, float('-inf'), L)
            b_v = load_block(p_v, v_stride, left, mask, 0.0, L)
            top = zero + NOTHING  # keys may all be -inf
            for r in tl.static_range(L):
                top = tl.maximum(top, b_k[r])
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
    p_lane = lanes + (batch * N + n) * (LANE * C) + c
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


@triton.jit(do_not_specialize=['N', 'G', 'size', 'group'])
def bi_wkv_group_kernel(
    w,
    lanes,  # (B, N, LANE, C)
    groups,  # (B, G, LANE, C)
    N,
    G,
    size,  # tokens of a lane
    group,  # lanes of a group
    C: tl.constexpr,
    BC: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Sums of the lanes of a group for the tokens outside it."""
    batch, g, c, mask = place(tl.program_id(0), G, C, BC)
    w2 = tl.load(w + c, mask=mask, other=0.0) * LOG2E
    p = lanes + batch * N * (LANE * C) + c
    first = g * group
    last = tl.minimum(first + group, N)
    start = first * size
    stop = start + group * size
    value, distance, s0, s1 = entering(w2, p, first, last, size, stop, stop, mask, C, AT_ONCE)
    p_group = groups + (batch * G + g) * (LANE * C) + c
    store_fields(p_group, C, mask, value, distance, s0, s1)
    value, distance, s0, s1 = entering(w2, p, first, last, size, start, start, mask, C, AT_ONCE)
    store_fields(p_group + LANE // 2 * C, C, mask, value, distance, s0, s1)


@triton.jit
def reference(w2, k, fv, fd, bv, bd, L: tl.constexpr):
    """The largest log weight of a block: of its tokens, and of what enters from both sides."""
    value = k[0]
    for r in tl.static_range(1, L):
        value = tl.maximum(value, k[r])
    distance = tl.zeros_like(value)
    more = exceeds(w2, value, distance, fv, fd)
    value = tl.where(more, fv, value)
    distance = tl.where(more, fd, distance)
    more = exceeds(w2, value, distance, bv, bd)
    return tl.where(more, bv, value), tl.where(more, bd, distance)


@triton.jit
def walk_for_outputs(
    batch, n, c, mask, w, u, k, v, y, lanes, groups, states, T, N, blocks, group, k_rows, v_rows,
    k_stride: tl.constexpr, v_stride: tl.constexpr, C: tl.constexpr, L: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Walk back along lane n, from its last block to its first, and store the outputs."""
    b_w = tl.load(w + c, mask=mask, other=0.0)
    b_u = tl.load(u + c, mask=mask, other=0.0)
    w2 = b_w * LOG2E
    d, lack = block_decay(b_w, w2, L)
    own = exp2(b_u * LOG2E)
    fast = in_range(b_w, b_u, L)
    fv, fd, f0, f1, bv, bd, b0, b1 = entering_lane(
        w2, lanes, groups, batch, n, N, blocks * L, group, mask, c, C, AT_ONCE
    )
    start = n * blocks * L
    used = tl.minimum(blocks, tl.cdiv(T - start, L))
    for i in range(used):
        s = used - 1 - i
        t = (start + s * L).to(tl.int64)
        left = T - start - s * L
        p_k = k + (batch * k_rows + t) * k_stride + c
        p_v = v + (batch * v_rows + t) * v_stride + c
        p_y = y + (batch * T + t) * C + c
        p_state = states + ((batch * N + n) * blocks + s) * (BLOCK * C) + c
        qv, qd, q0, q1 = load_fields(p_state, C, mask)
        qv, qd, q0, q1 = join(w2, qv, qd, q0, q1, fv, fd + s * L, f0, f1)
        if fast:
            b_k = load_block(p_k, k_stride, left, mask, float('-inf'), L)
            b_v = load_block(p_v, v_stride, left, mask, 0.0, L)
            value, distance = reference(w2, b_k, qv, qd, bv, bd, L)
            e, x = weigh(b_k, b_v, value, w2 * distance, L)
            scale = rescale(w2, qv, qd, value, distance)
            q0 *= scale
            q1 *= scale
            scale = rescale(w2, bv, bd, value, distance)
            b0 *= scale
            b1 *= scale
            behind0, a0 = sweep(b0, d, x, L, True)
            behind1, a1 = sweep(b1, d, e, L, True)
            bv, bd, b0, b1 = value, distance, a0 + lack * b0, a1 + lack * b1
            for r in tl.static_range(L):
                numerator = (q0 + behind0[L - 1 - r]) + own * x[r]
                denominator = (q1 + behind1[L - 1 - r]) + own * e[r]
                out = divide(numerator, denominator).to(y.dtype.element_ty)
                tl.store(p_y + r * C, out, mask=mask & (r < left))
                q0 = q0 * d + x[r]
                q1 = q1 * d + e[r]
        else:
            count = tl.minimum(left, L)
            for r in range(count):
                sums = slow_token(
                    w2, b_u, p_k, p_v, r, count, mask, k_stride, v_stride, L,
                    qv, qd, q0, q1, bv, bd, b0, b1,
                )  # fmt: skip
                tl.store(p_y + r * C, (sums[10] / sums[11]).to(y.dtype.element_ty), mask=mask)
            bd += L
            for j in range(count):
                a = tl.load(p_k + j * k_stride, mask=mask, other=0.0).to(tl.float32)
                x = tl.load(p_v + j * v_stride, mask=mask, other=0.0).to(tl.float32)
                bv, bd, b0, b1 = join(w2, bv, bd, b0, b1, a, j * 1.0, x, 1.0)


@triton.jit(do_not_specialize=['T', 'N', 'blocks', 'group', 'k_rows', 'v_rows'])
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
    group,
    k_rows,
    v_rows,
    k_stride: tl.constexpr,
    v_stride: tl.constexpr,
    C: tl.constexpr,
    L: tl.constexpr,
    BC: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """Outputs of a lane, from its last block to its first."""
    # what the launch before read last is read first: it may still be in the cache
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    batch, n, c, mask = place(pid, N, C, BC)
    walk_for_outputs(
        batch, n, c, mask, w, u, k, v, y, lanes, groups, states, T, N, blocks, group, k_rows,
        v_rows, k_stride, v_stride, C, L, AT_ONCE,
    )  # fmt: skip


def lane_sums(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, launch: Launch
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of lanes, of groups (those of the lanes if there is one group), states of blocks."""
    batch, tokens, channels = v.shape
    lanes = v.new_empty((batch, launch.lanes, LANE.value, channels), dtype=w.dtype)
    states = v.new_empty((batch, launch.lanes, launch.blocks, BLOCK.value, channels), dtype=w.dtype)
    tiles = ceil_div(channels, launch.channels)
    bi_wkv_lane_kernel[(batch * launch.lanes * tiles,)](
        w, u, k, v, lanes, states, tokens, launch.lanes, launch.blocks,
        rows_between(k), rows_between(v), k.stride(1), v.stride(1),
        channels, launch.length, launch.channels, num_warps=launch.warps,
    )  # fmt: skip
    return lanes, group_sums(w, lanes, launch), states


def group_sums(w: Tensor, lanes: Tensor, launch: Launch) -> Tensor:
    """Sums of groups of lanes, (B, G, LANE, C); the lanes themselves if there is one."""
    count = ceil_div(launch.lanes, launch.group)
    if count == 1:  # asked for by nobody
        return lanes
    batch, _, fields, channels = lanes.shape
    groups = lanes.new_empty((batch, count, fields, channels))
    bi_wkv_group_kernel[(batch * count * ceil_div(channels, launch.channels),)](
        w, lanes, groups, launch.lanes, count, launch.blocks * launch.length, launch.group,
        channels, launch.channels, launch.at_once, num_warps=launch.warps,
    )  # fmt: skip
    return groups


def bi_wkv_forward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, launch: Launch | None = None
) -> Tensor:
    """Output (B, T, C), contiguous, in the dtype of v."""
    batch, tokens, channels = v.shape
    launch = launch or launch_for(v, 'fwd')
    w, u, k, v = w.contiguous(), u.contiguous(), by_rows(k), by_rows(v)
    y = torch.empty_like(v, memory_format=torch.contiguous_format)
    with on_device(v):
        lanes, groups, states = lane_sums(w, u, k, v, launch)
        tiles = ceil_div(channels, launch.channels)
        bi_wkv_out_kernel[(batch * launch.lanes * tiles,)](
            w, u, k, v, y, lanes, groups, states, tokens, launch.lanes, launch.blocks, launch.group,
            rows_between(k), rows_between(v), k.stride(1), v.stride(1),
            channels, launch.length, launch.channels, launch.at_once,
            num_warps=launch.warps,
        )  # fmt: skip
    return y
