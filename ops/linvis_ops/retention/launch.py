"""How the work of the kernels of retention is divided, by rules."""

from torch import Tensor

from linvis_ops._chunks import Launch, Pass, Rule, Rules, RulesByDevice, divide

# Not tuned: the largest chunks whose kernels spill few registers, and none where they form
# warpgroups (README.md, Implementation in Triton).
DEFAULT: Rules = {
    ('fwd', 'small'): Rule(length=64),
    ('fwd', 'large'): Rule(length=32, warps=8, state_bytes=16384),
    ('fwd', 'wide'): Rule(length=16, warps=8, state_bytes=16384),
    ('bwd', 'small'): Rule(length=32),
    ('bwd', 'large'): Rule(length=32, warps=8, state_bytes=16384),
    ('bwd', 'wide'): Rule(length=16, warps=8, state_bytes=16384),
}
RULES: RulesByDevice = {
    (0, 0): DEFAULT,
    (9, 0): {**DEFAULT, ('bwd', 'small'): Rule(length=64)},
}


def launch_for(q: Tensor, v: Tensor, of: Pass, rule: Rule | None = None) -> Launch:
    """Division for queries (B, T, H, K) and values (B, T, H, V).

    Args:
        q: Tensor of the shape and dtype of the queries, on the device in question.
        v: Tensor of the shape of the values.
        of: Forward or backward pass.
        rule: Instead of the rule of the device.
    """
    return divide(q, v, of, RULES, rule)
