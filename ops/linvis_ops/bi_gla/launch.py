"""How the work of the kernels of gated linear attention is divided, by tuned rules."""

from torch import Tensor

from linvis_ops._chunks import Launch, Pass, Rule, Rules, RulesByDevice, divide

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
    """Division for queries (B, T, H, K) and values (B, T, H, V).

    Args:
        q: Tensor of the shape and dtype of the queries, on the device in question.
        v: Tensor of the shape of the values.
        of: Forward or backward pass.
        rule: Instead of the rule of the device.
    """
    return divide(q, v, of, RULES, rule)
