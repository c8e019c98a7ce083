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
# With fewer there are as many segments as make so many programs of outputs for each multiprocessor,
# which all run at once.
PROGRAMS = 4
# States go through memory once a chunk, so that segments only make enough programs.
LONG = 1 << 30
# Widest small keys whose gradients fit the registers in chunks of 32 tokens.
NARROW = 32

DEFAULT: Rules = {
    ('fwd', 'small'): Rule(length=32, warps=2, stages=3, state_bytes=4096, segment=LONG),
    ('fwd', 'large'): Rule(length=16, segment=LONG),
    ('fwd', 'wide'): Rule(length=16, warps=8, segment=LONG),
    ('bwd', 'small'): Rule(length=32, warps=2, stages=3, segment=LONG),
    ('bwd', 'large'): Rule(length=16, stages=1, segment=LONG),
    ('bwd', 'wide'): Rule(length=16, warps=8, stages=1, segment=LONG),
}
RULES: RulesByDevice = {(0, 0): DEFAULT}
HALVED = dataclasses.replace(DEFAULT['bwd', 'small'], length=16)


def launch_for(q: Tensor, v: Tensor, of: Pass, rule: Rule | None = None) -> Launch:
    """Division for queries (B, T, H, K) and values (B, T, H, V); no program forms a warpgroup.

    Args:
        q: Tensor of the shape and dtype of the queries, on the device in question.
        v: Tensor of the shape of the values.
        of: Forward or backward pass.
        rule: Instead of the rule of the device.
    """
    tuned = rule is None
    width, value_width = q.shape[-1], v.shape[-1]
    small = q.dtype == torch.bfloat16 and max(width, value_width) <= 64
    if tuned and of == 'bwd' and small and width > NARROW:
        rule = HALVED
    launch = divide(q, v, of, RULES, rule)
    if tuned and launch.segments > 1:
        _, processors = capability_and_processors(q.device)
        heads = q.shape[0] * q.shape[2]
        segments = 1 if heads >= MANY * processors else PROGRAMS * processors // heads
        segment = -(-launch.chunks // segments)
        launch = dataclasses.replace(launch, segment=segment, segments=-(-launch.chunks // segment))
    if q.dtype == torch.float32 or max(launch.length, launch.keys) < WARPGROUP_ROWS:
        return launch
    return dataclasses.replace(launch, warps=min(launch.warps, WARPGROUP_WARPS // 2))
