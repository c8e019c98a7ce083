"""How the work of the kernels of gated linear attention is divided, by tuned rules."""

import dataclasses

import torch
from torch import Tensor

from linvis_ops._chunks import (
    LEAST,
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

# On Hopper, Triton turns products of so many rows into those of warpgroups, in programs of so many
# warps. The assembler of Triton 3.6 (ptxas 12.8) then may address their operands by the pointer to
# its stack where registers are spilled: README.md, Implementation in Triton.
WARPGROUP_ROWS = 64
WARPGROUP_WARPS = 4
# Most tokens of a chunk.
LONGEST = 256
# Most key channels for which the gradient forms warpgroups and spills no registers.
WIDEST_GRADIENT = 32
# States go through memory once a chunk, so that segments only make enough programs.
FOREVER = 1 << 30

# Safe on every GPU.
DEFAULT: Rules = {
    ('fwd', 'small'): Rule(length=32, warps=2, segment=FOREVER, programs=2),
    ('fwd', 'large'): Rule(length=32, state_bytes=16384, segment=FOREVER, programs=2),
    ('fwd', 'wide'): Rule(length=16, segment=FOREVER, programs=2),
    ('bwd', 'small'): Rule(length=32, warps=2, segment=FOREVER, programs=1),
    ('bwd', 'large'): Rule(length=32, warps=8, stages=1, segment=FOREVER, programs=1),
    ('bwd', 'wide'): Rule(length=16, warps=8, stages=1, segment=FOREVER, programs=1),
}
RULES: RulesByDevice = {
    (0, 0): DEFAULT,
    (9, 0): {
        **DEFAULT,
        ('fwd', 'small'): Rule(length=64, stages=3, segment=FOREVER, programs=2),
        ('bwd', 'small'): Rule(length=64, segment=FOREVER, programs=1),
    },
}


def is_even(rows: Rows) -> bool:
    """Whether all rows are whole vectors and fill their tiles."""
    return rows.align == VECTOR and all(
        x.shape[-1] >= LEAST
        and x.shape[-1] & (x.shape[-1] - 1) == 0
        and x.data_ptr() % (VECTOR * x.element_size()) == 0
        for x in rows.tensors
    )


def launch_for(
    q: Tensor, v: Tensor, of: Pass, rule: Rule | None = None, *, spills: bool = False
) -> Launch:
    """Division for queries (B, T, H, K) and values (B, T, H, V).

    Only the rules for small heads form warpgroups, which are known to spill no registers then.

    Args:
        q: Tensor of the shape and dtype of the queries, on the device in question.
        v: Tensor of the shape of the values.
        of: Forward or backward pass.
        rule: Instead of the rule of the device.
        spills: Registers may be spilled, even so.
    """
    small = q.dtype == torch.bfloat16 and max(q.shape[-1], v.shape[-1]) <= WARPGROUP_ROWS
    spills |= of == 'bwd' and q.shape[-1] > WIDEST_GRADIENT
    if small and spills and rule is None:
        rule = DEFAULT[of, 'small']
    launch = divide(q, v, of, RULES, rule)
    if (
        q.dtype == torch.float32
        or max(launch.length, launch.keys) < WARPGROUP_ROWS
        or (small and rule is None)
    ):
        return launch
    return dataclasses.replace(launch, warps=min(launch.warps, WARPGROUP_WARPS // 2))


def rows_and_launch(of: Pass, launch: Launch | None, *tensors: Tensor) -> tuple[Rows, Launch]:
    """Tensors as the kernels take them and, unless it is given, the division of the work.

    Args:
        of: Forward or backward pass.
        launch: Division that is given, or None.
        tensors: q, k, v, g_fwd, g_bwd, and in the backward pass the gradient by the output.
    """
    rows = rows_of(*tensors, length=LONGEST)
    if launch is None:
        q, _, v, g_fwd, *_ = tensors
        spills = not is_even(rows) or (of == 'bwd' and g_fwd.dtype != q.dtype)
        launch = launch_for(q, v, of, spills=spills)
    return rows, launch
