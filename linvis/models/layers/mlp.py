from __future__ import annotations

from collections import OrderedDict

from torch import nn

HIDDEN_RATE = 4


def mlp(embed_dims: int) -> nn.Module:
    """Channel mixer: a linear layer to four times the channels, GELU, and one back."""
    hidden = HIDDEN_RATE * embed_dims
    parts = (nn.Linear(embed_dims, hidden), nn.GELU(), nn.Linear(hidden, embed_dims))
    return nn.Sequential(OrderedDict(zip(('fc1', 'act', 'fc2'), parts, strict=True)))
