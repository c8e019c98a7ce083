"""Triton kernel of the gradients of retention on sequences, each a retention with exchanged roles.

README.md of this folder, Gradient, has the table of roles.
"""

import triton
import triton.language as tl
from torch import Tensor

from linvis_ops._chunks import LEAST, Launch, power_of_two
from linvis_ops._sizes import ceil_div
from linvis_ops._triton import on_device
from linvis_ops._triton_tiles import place
from linvis_ops.retention.kernels_triton import entering_states, load_log2, room_of_walk, walk
from linvis_ops.retention.launch import rows_and_launch


@triton.jit(
    do_not_specialize=[
        'T', 'H', 'N', 'R', 'S', 'scale', 'q_b', 'q_t', 'q_h', 'k_b', 'k_t', 'k_h', 'v_b', 'v_t',
        'v_h', 'o_b', 'o_t', 'o_h',
    ]
)  # fmt: skip
def retention_gradient_kernel(
    q,  # (B, T, H, K or V), any strides that are multiples of ALIGN, the last one 1
    k,
    v,
    go,  # gradient by the output
    log_gamma,  # (H,), float32
    states,  # (2 or 4, B, H, S, ..) of the scan, or None
    room,  # (OUTPUTS, B, H, N, ..), in the dtype of operands, or None if not BIDIRECTIONAL
    dq,  # contiguous
    dk,
    dv,
    T,
    H,
    N,  # chunks
    R,  # chunks of a segment
    S,  # segments
    scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, o_b, o_t, o_h,
    ALIGN: tl.constexpr,
    K: tl.constexpr,  # of the tensors in the role of keys
    V: tl.constexpr,  # of those in the role of values
    L: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BIDIRECTIONAL: tl.constexpr,
    FIRST: tl.constexpr,
    OUTPUTS: tl.constexpr,
):  # fmt: skip
    """One slice of one gradient of one segment: by q, k and v, of which FIRST is the first one."""
    programs = tl.num_programs(0).to(tl.int64) // OUTPUTS
    batch, m, h = place(tl.program_id(0) // OUTPUTS, S, H)
    which = FIRST + tl.program_id(0) % OUTPUTS
    head = batch * H + h
    number = head * S + m
    if BIDIRECTIONAL:
        room += ((which - FIRST) * (programs // S) + head) * N * (K * V)
        if which > 0:
            number += 2 * programs
    elif which > 0:
        number += programs
    q += (batch * q_b + h * q_h) * ALIGN
    k += (batch * k_b + h * k_h) * ALIGN
    v += (batch * v_b + h * v_h) * ALIGN
    go += (batch * o_b + h * o_h) * ALIGN
    # in the roles of queries, keys and values
    if which == 0:
        p_q, p_k, p_v, p_o = go, v, k, dq
        q_stride, k_stride, v_stride = o_t, v_t, k_t
    elif which == 1:
        p_q, p_k, p_v, p_o = v, go, q, dk
        q_stride, k_stride, v_stride = v_t, o_t, q_t
    else:
        p_q, p_k, p_v, p_o = k, q, go, dv
        q_stride, k_stride, v_stride = k_t, q_t, o_t
    walk(
        p_q, p_k, p_v, q_stride * ALIGN, k_stride * ALIGN, v_stride * ALIGN,
        p_o + (batch * T * H + h) * V, H * V, states, number, programs, which < 2, room, m * R,
        tl.minimum(m * R + R, N), (which > 0) & (not BIDIRECTIONAL), load_log2(log_gamma, h),
        scale, T, tl.program_id(1) * BV, K, V, L, BK, BV, BIDIRECTIONAL,
    )  # fmt: skip


def retention_backward(
    go: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gamma: Tensor,
    bidirectional: bool = False,
    scale: float | None = None,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by q, k and v, contiguous, each in the dtype of its tensor."""
    batch, tokens, heads, key_width = q.shape
    value_width = v.shape[-1]
    rows, launch = rows_and_launch('bwd', launch, q, k, v, go)
    log_gamma = log_gamma.contiguous()
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    # first gradient, number of them, widths of what is in the roles of keys and of values
    if key_width == value_width:
        calls = [(0, 3, key_width, value_width)]
    else:
        calls = [(0, 2, value_width, key_width), (2, 1, key_width, value_width)]
    with on_device(v):
        states = entering_states(rows, log_gamma, launch, bidirectional)
        for first, outputs, keys, values in calls:
            bk = power_of_two(keys)
            bv = min(power_of_two(values), max(launch.keys * launch.values // bk, LEAST))
            room = room_of_walk(rows, launch, bidirectional, outputs)
            programs = outputs * batch * heads * launch.segments
            retention_gradient_kernel[(programs, ceil_div(values, bv))](
                *rows.tensors, log_gamma, states, room, dq, dk, dv, tokens, heads, launch.chunks,
                launch.segment, launch.segments, key_width**-0.5 if scale is None else scale,
                *rows.strides, ALIGN=rows.align, K=keys, V=values, L=launch.length, BK=bk, BV=bv,
                BIDIRECTIONAL=bidirectional, FIRST=first, OUTPUTS=outputs, num_warps=launch.warps,
                num_stages=launch.stages,
            )  # fmt: skip
    return dq, dk, dv
