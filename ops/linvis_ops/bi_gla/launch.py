"""How the work of the kernels of gated linear attention is divided, by tuned rules."""

import dataclasses

import torch
from torch import Tensor

from linvis_ops._chunks import (
    Launch,
    Pass,
    Rule,
    Rules,
    RulesByDevice,
    capability_and_processors,
    divide,
)

# On Hopper, Triton turns products of so many rows into those of warpgroups, in programs of so many
# warps, which are not used: README.md, Implementation in Triton.
WARPGROUP_ROWS = 64
WARPGROUP_WARPS = 4
# Sequences and heads for each multiprocessor from which on a sequence is one segment.
MANY = 2
# States go through memory once a chunk, so that segments only make enough programs.
LONG = 1 << 30

DEFAULT: Rules = {
    ('fwd', 'small'): Rule(length=32, warps=2, segment=LONG),
    ('fwd', 'large'): Rule(length=32, state_bytes=16384, segment=LONG),
    ('fwd', 'wide'): Rule(length=16, segment=LONG),
    ('bwd', 'small'): Rule(length=32, warps=2, segment=LONG),
    ('bwd', 'large'): Rule(length=32, warps=8, stages=1, segment=LONG),
    ('bwd', 'wide'): Rule(length=16, warps=8, stages=1, segment=LONG),
}
RULES: RulesByDevice = {(0, 0): DEFAULT}


def launch_for(q: Tensor, v: Tensor, of: Pass, rule: Rule | None = None) -> Launch:
    """Division for queries (B, T, H, K) and values (B, T, H, V); no program forms a warpgroup.

    Args:
        q: Tensor of the shape and dtype of the queries, on the device in question.
        v: Tensor of the shape of the values.
        of: Forward or backward pass.
        rule: Instead of the rule of the device.
    """
    launch = divide(q, v, of, RULES, rule)
    _, processors = capability_and_processors(q.device)
    if rule is None and q.shape[0] * q.shape[2] >= MANY * processors:
        launch = dataclasses.replace(launch, segment=launch.chunks, segments=1)
    if q.dtype == torch.float32 or max(launch.length, launch.keys, launch.values) < WARPGROUP_ROWS:
        return launch
    return dataclasses.replace(launch, warps=min(launch.warps, WARPGROUP_WARPS // 2))
