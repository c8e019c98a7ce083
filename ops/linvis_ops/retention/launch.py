"""How the work of the kernels of retention is divided, by rules."""

from dataclasses import replace
from typing import get_args

import torch
from torch import Tensor

from linvis_ops._chunks import (
    VECTOR,
    Launch,
    Pass,
    Rows,
    Rule,
    Rules,
    RulesByDevice,
    divide,
    rows_of,
)

# Most tokens of a chunk.
LONGEST = 256
# Segments are as long as there are programs for the GPU, since nothing else takes states through
# memory. Chunks are the largest whose kernels spill few registers, and none where they form
# warpgroups (README.md, Implementation in Triton).
SMALL = Rule(length=64, segment=2**30, programs=2, stages=3)
LARGE = Rule(length=32, segment=2**30, programs=2, warps=8, state_bytes=16384)
WIDE = Rule(length=16, segment=2**30, programs=2, warps=8, state_bytes=16384)
DEFAULT: Rules = {
    (of, size): rule
    for size, rule in (('small', SMALL), ('large', LARGE), ('wide', WIDE))
    for of in get_args(Pass)
}
RULES: RulesByDevice = {(0, 0): DEFAULT}
# For short dtypes whose rows are moved element by element or masked, and for heads narrower than
# 64, where products of warpgroups are not right (README.md): two warps form no warpgroup.
UNEVEN = Rule(length=32, segment=2**30, warps=2, state_bytes=4096)
# Most tokens of a chunk without tensor cores, whose factors are in registers.
LONGEST_OF_FLOAT32 = 16
# Least width of a head whose products are right.
NARROWEST = 64


def is_even(rows: Rows) -> bool:
    """Whether all rows are whole vectors and fill their tiles, and none is too narrow."""
    widths = rows.tensors[0].shape[-1], rows.tensors[2].shape[-1]
    return (
        rows.align == VECTOR
        and all(width >= NARROWEST and width & (width - 1) == 0 for width in widths)
        and all(x.data_ptr() % (VECTOR * x.element_size()) == 0 for x in rows.tensors)
    )


def launch_for(q: Tensor, v: Tensor, of: Pass, rule: Rule | None = None) -> Launch:
    """Division for queries (B, T, H, K) and values (B, T, H, V) whose rows are even.

    Args:
        q: Tensor of the shape and dtype of the queries, on the device in question.
        v: Tensor of the shape of the values.
        of: Forward or backward pass.
        rule: Instead of the rule of the device.
    """
    launch = divide(q, v, of, RULES, rule)
    # equal segments; where their length is not bounded, no more than the GPU has places for
    most = launch.chunks if rule is None else rule.segment // launch.length
    segments = launch.segments if launch.segment >= most else launch.chunks // launch.segment
    length = launch.length
    if q.dtype == torch.float32:
        length = min(length, LONGEST_OF_FLOAT32)
    chunks = -(-q.shape[1] // length)
    segment = -(-chunks // segments)
    return replace(
        launch, length=length, chunks=chunks, segment=segment, segments=-(-chunks // segment)
    )


def rows_and_launch(of: Pass, launch: Launch | None, *tensors: Tensor) -> tuple[Rows, Launch]:
    """Tensors as the kernels take them and, unless it is given, the division of the work.

    Args:
        of: Forward or backward pass.
        launch: Division that is given, or None.
        tensors: q, k, v, and in the backward pass the gradient by the output.
    """
    rows = rows_of(*tensors, length=LONGEST)
    if launch is None:
        q, _, v, *_ = tensors
        uneven = q.dtype != torch.float32 and not is_even(rows)
        launch = launch_for(q, v, of, UNEVEN if uneven else None)
    return rows, launch
