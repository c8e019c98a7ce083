"""How the work of the kernels of gated linear attention is divided, by tuned rules."""

import dataclasses

import torch
from torch import Tensor

from linvis_ops._chunks import Launch, Pass, Rule, Rules, RulesByDevice, divide

# On Hopper, Triton turns products of so many rows into those of warpgroups, in programs of so many
# warps. The assembler of Triton 3.6 (ptxas 12.8) then may address their operands by the pointer to
# its stack where registers are spilled: README.md, Implementation in Triton.
WARPGROUP_ROWS = 64
WARPGROUP_WARPS = 4

# Safe on every GPU.
DEFAULT: Rules = {
    ('fwd', 'small'): Rule(length=32, warps=2),
    ('fwd', 'large'): Rule(length=32, state_bytes=16384),
    ('fwd', 'wide'): Rule(length=16),
    ('bwd', 'small'): Rule(length=32, warps=2),
    ('bwd', 'large'): Rule(length=32, warps=8, stages=1),
    ('bwd', 'wide'): Rule(length=16, warps=8, stages=1),
}
RULES: RulesByDevice = {
    (0, 0): DEFAULT,
    (9, 0): {
        **DEFAULT,
        ('fwd', 'small'): Rule(length=32, warps=2, segment=128, stages=3),
        ('bwd', 'small'): Rule(length=32, warps=2, segment=128),
    },
}


def launch_for(q: Tensor, v: Tensor, of: Pass, rule: Rule | None = None) -> Launch:
    """Division for queries (B, T, H, K) and values (B, T, H, V); no program forms a warpgroup.

    Args:
        q: Tensor of the shape and dtype of the queries, on the device in question.
        v: Tensor of the shape of the values.
        of: Forward or backward pass.
        rule: Instead of the rule of the device.
    """
    launch = divide(q, v, of, RULES, rule)
    if q.dtype == torch.float32 or max(launch.length, launch.keys) < WARPGROUP_ROWS:
        return launch
    return dataclasses.replace(launch, warps=min(launch.warps, WARPGROUP_WARPS // 2))
