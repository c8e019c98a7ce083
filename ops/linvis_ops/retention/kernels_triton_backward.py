"""Triton kernel of the gradient of retention on sequences.

A program has one chunk of one head, as in kernels_triton.py. It forms the states that enter the
chunk and the gradients by those that leave it, one after the other, and turns them into all
gradients of the chunk's tokens; only the inputs are read. README.md of this folder has formulas.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from linvis_ops._chunks import Launch
from linvis_ops._triton import on_device
from linvis_ops._triton_tiles import (
    add_product,
    load_operand,
    operand,
    place,
    product,
    store_rows,
)
from linvis_ops.retention.kernels_triton import (
    decay,
    entering_state,
    entering_states,
    load_log2,
    own_decays,
)
from linvis_ops.retention.launch import rows_and_launch


@triton.jit(
    do_not_specialize=[
        'T', 'H', 'N', 'R', 'S', 'scale', 'q_b', 'q_t', 'q_h', 'k_b', 'k_t', 'k_h', 'v_b', 'v_t',
        'v_h', 'o_b', 'o_t', 'o_h',
    ]
)  # fmt: skip
def retention_gradient_kernel(
    q,  # (B, T, H, K), any strides that are multiples of ALIGN, the last one 1
    k,
    v,  # (B, T, H, V)
    go,  # (B, T, H, V): gradient by the output
    log_gamma,  # (H,), float32
    states,  # (2 or 4, B, H, S, K, V) of the scan, or None
    dq,  # (B, T, H, K), contiguous; (slices of V, B, T, H, K), float32, where there are several
    dk,
    dv,  # (B, T, H, V), contiguous
    T,
    H,
    N,  # chunks
    R,  # chunks of a segment
    S,  # segments
    scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, o_b, o_t, o_h,
    ALIGN: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BIDIRECTIONAL: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk, from one slice of the values."""
    batch, n, h = place(tl.program_id(0), N, H)
    column = tl.program_id(1) * BV
    # each slice of values has gradients of its own by q and k
    part = tl.num_programs(0).to(tl.int64) // (N * H) * tl.program_id(1)
    dtype: tl.constexpr = q.dtype.element_ty
    p_q = q + (batch * q_b + h * q_h) * ALIGN
    p_k = k + (batch * k_b + h * k_h) * ALIGN
    p_v = v + (batch * v_b + h * v_h) * ALIGN
    p_o = go + (batch * o_b + h * o_h) * ALIGN
    q_stride, k_stride, v_stride, o_stride = q_t * ALIGN, k_t * ALIGN, v_t * ALIGN, o_t * ALIGN
    log2 = load_log2(log_gamma, h)
    index = (batch * H + h) * S + n // R
    span = tl.num_programs(0).to(tl.int64) // N * S
    start = n * L
    row = tl.arange(0, L)
    from_before = decay(log2, row + 1)[:, None]
    from_behind = decay(log2, L - row)[:, None]

    # both are formed before one is used, so that no gradient is kept in registers through a loop
    k_before = entering_state(
        p_k, p_v, k_stride, v_stride, states, index, start, log2, T, N, R, column,
        K, V, L, BK, BV, False,
    )  # fmt: skip
    if BIDIRECTIONAL:
        k_behind = entering_state(
            p_k, p_v, k_stride, v_stride, states, index + span, start, log2, T, N, R, column,
            K, V, L, BK, BV, True,
        )  # fmt: skip
    b_o = load_operand(p_o, o_stride, start, T, column, V, L, BV)
    b_dq = product(b_o, tl.trans(k_before), dtype) * from_before
    if BIDIRECTIONAL:
        b_dq += product(b_o, tl.trans(k_behind), dtype) * from_behind
    b_k = load_operand(p_k, k_stride, start, T, 0, K, L, BK)
    b_v = load_operand(p_v, v_stride, start, T, column, V, L, BV)
    decays = own_decays(log2, L, BIDIRECTIONAL)
    d_weight = operand(product(b_o, tl.trans(b_v), dtype) * decays, dtype)
    b_dq = add_product(b_dq, d_weight, b_k, dtype)
    store_rows(dq, b_dq * scale, part + batch, h, H, start, T, 0, K, L, BK)

    number = index + (3 if BIDIRECTIONAL else 1) * span
    q_behind = entering_state(
        p_q, p_o, q_stride, o_stride, states, number, start, log2, T, N, R, column,
        K, V, L, BK, BV, True,
    )  # fmt: skip
    if BIDIRECTIONAL:
        q_before = entering_state(
            p_q, p_o, q_stride, o_stride, states, index + 2 * span, start, log2, T, N, R, column,
            K, V, L, BK, BV, False,
        )  # fmt: skip
    b_dk = product(b_v, tl.trans(q_behind), dtype) * from_behind
    if BIDIRECTIONAL:
        b_dk += product(b_v, tl.trans(q_before), dtype) * from_before
    b_q = load_operand(p_q, q_stride, start, T, 0, K, L, BK)
    b_dk = add_product(b_dk, tl.trans(d_weight), b_q, dtype)
    store_rows(dk, b_dk * scale, part + batch, h, H, start, T, 0, K, L, BK)
    b_dv = product(b_k, q_behind, dtype) * from_behind
    if BIDIRECTIONAL:
        b_dv += product(b_k, q_before, dtype) * from_before
    weight = operand(product(b_q, tl.trans(b_k), dtype) * decays, dtype)
    b_dv = add_product(b_dv, tl.trans(weight), b_o, dtype)
    store_rows(dv, b_dv * scale, batch, h, H, start, T, column, V, L, BV)


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
    rows, launch = rows_and_launch('bwd', launch, q, k, v, go)
    log_gamma = log_gamma.contiguous()
    slices = triton.cdiv(v.shape[-1], launch.values)
    dv = v.new_empty(v.shape)
    shape, dtype = (q.shape, q.dtype) if slices == 1 else ((slices, *q.shape), torch.float32)
    dq, dk = (q.new_empty(shape, dtype=dtype) for _ in range(2))
    with on_device(v):
        states = entering_states(rows, log_gamma, launch, bidirectional)
        retention_gradient_kernel[(batch * heads * launch.chunks, slices)](
            *rows.tensors, log_gamma, states, dq, dk, dv, tokens, heads, launch.chunks,
            launch.segment, launch.segments, key_width**-0.5 if scale is None else scale,
            *rows.strides, ALIGN=rows.align, K=key_width, V=v.shape[-1], L=launch.length,
            BK=launch.keys, BV=launch.values, BIDIRECTIONAL=bidirectional,
            num_warps=launch.warps, num_stages=launch.stages, maxnreg=launch.registers,
        )  # fmt: skip
    if slices > 1:
        dq, dk = dq.sum(0).to(q.dtype), dk.sum(0).to(q.dtype)
    return dq, dk, dv
