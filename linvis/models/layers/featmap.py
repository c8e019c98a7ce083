from __future__ import annotations

from torch import Tensor


def to_featmap(tokens: Tensor, hw: tuple[int, int]) -> Tensor:
    """View tokens (B, Hp * Wp, C) as a map (B, C, Hp, Wp), channels-last without a copy."""
    return tokens.transpose(1, 2).unflatten(2, hw)


def to_tokens(featmap: Tensor) -> Tensor:
    """Map (B, C, Hp, Wp) as tokens (B, Hp * Wp, C), contiguous; a view of a channels-last map."""
    return featmap.flatten(2).transpose(1, 2).contiguous()
