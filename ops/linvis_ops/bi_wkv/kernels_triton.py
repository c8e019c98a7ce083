"""Triton kernels of Bi-WKV: sums of lanes, sums of groups of lanes, outputs.

One thread works on one channel or two and walks along a lane of `blocks * L` tokens, in blocks of
L that it holds in registers; a program is BC channels of one lane of one sequence. Nothing is
exchanged between threads: what a lane needs to know of the others passes through memory, between
launches. README.md of this folder, Implementation, has the reasons. Everything is float32 inside.

Sums are plain numbers in units of exp(key of the middle token) where keys and decays allow it,
which is decided lane by lane; elsewhere they are the pairs of kernels_triton_pairs.py.
"""

import triton
import triton.language as tl
from torch import Tensor

from linvis_ops._triton import on_device
from linvis_ops._triton_math import LOG2E, exp2
from linvis_ops.bi_wkv.kernels_triton_blocks import (
    block_decay,
    block_outputs,
    fold,
    in_range,
    largest,
    load_block,
    place,
    weigh,
)
from linvis_ops.bi_wkv.kernels_triton_pairs import (
    BLOCK,
    LANE,
    entering,
    entering_lane,
    in_units_of,
    is_plain,
    key_of_middle,
    pair_outputs,
    pair_sums,
    store_fields,
)
from linvis_ops.bi_wkv.launch import Launch, by_rows, launch_for, rows_between

# Furthest that the largest key of a block may be from the key of the middle token, and largest
# growth of weights along the sequence, for sums to be plain numbers in units of its exponential:
# with the largest ENTERING and 2 ** 18 tokens, sums of values up to 2 ** 14 stay below 2 ** 126.
KEYS = tl.constexpr(40.0)
GROWTH = tl.constexpr(20.0)
# Largest binary logarithm of what enters a lane, in the same units.
ENTERING = tl.constexpr(64.0)


@triton.jit
def may_be_plain(w, u, T, L: tl.constexpr):
    """Whether decays and bonus allow sums that are plain numbers."""
    return in_range(w, u, L) & (tl.min(w) * T >= -GROWTH)


@triton.jit
def walk_for_sums(
    pid, w, u, k, v, lanes, states, T, N, blocks, k_rows, v_rows,
    k_stride: tl.constexpr, v_stride: tl.constexpr, C: tl.constexpr, L: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """Walk along a lane and store its sums, and what each of its blocks sees before it."""
    batch, n, c, mask = place(pid, N, C, BC)
    b_w = tl.load(w + c, mask=mask, other=0.0)
    b_u = tl.load(u + c, mask=mask, other=0.0)
    w2 = b_w * LOG2E
    d, _lack = block_decay(b_w, w2, L)
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
        pair_sums(
            pid, w, k, v, lanes, states, T, N, blocks, k_rows, v_rows,
            k_stride, v_stride, C, L, BC,
        )  # fmt: skip


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
    walk_for_sums(
        tl.program_id(0), w, u, k, v, lanes, states, T, N, blocks, k_rows, v_rows,
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
def fits(w2, key, fv, fd, bv, bd, mask):
    """Whether what enters a lane from both sides may stand beside plain sums."""
    small = in_units_of(w2, fv, fd, key) <= ENTERING
    small &= in_units_of(w2, bv, bd, key) <= ENTERING
    return tl.min((small | ~mask).to(tl.int32)) > 0


@triton.jit
def walk_for_outputs(
    pid, w, u, k, v, y, lanes, groups, states, T, N, blocks, k_rows, v_rows,
    k_stride: tl.constexpr, v_stride: tl.constexpr, C: tl.constexpr, L: tl.constexpr,
    BC: tl.constexpr, GROUP: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Walk back along a lane, from its last block to its first, and store the outputs."""
    batch, n, c, mask = place(pid, N, C, BC)
    b_w = tl.load(w + c, mask=mask, other=0.0)
    b_u = tl.load(u + c, mask=mask, other=0.0)
    w2 = b_w * LOG2E
    d, lack = block_decay(b_w, w2, L)
    own = exp2(b_u * LOG2E)
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
    if is_plain(p_states, mask) & fits(w2, key, fv, fd, bv, bd, mask):
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
        pair_outputs(
            pid, w, u, k, v, y, lanes, groups, states, T, N, blocks, k_rows, v_rows,
            k_stride, v_stride, C, L, BC, GROUP, AT_ONCE,
        )  # fmt: skip


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
    walk_for_outputs(
        pid, w, u, k, v, y, lanes, groups, states, T, N, blocks, k_rows, v_rows,
        k_stride, v_stride, C, L, BC, GROUP, AT_ONCE,
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
