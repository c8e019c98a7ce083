from __future__ import annotations

import torch
from torch import Tensor

from linvis.models.layers.precision import autocast_dtype
from linvis_ops import q_shift_mix


def shift_and_mix(
    x: Tensor, hw: tuple[int, int], mus: tuple[Tensor, ...], backend: str
) -> tuple[Tensor, ...]:
    """Blend every token with its four neighbours: x * mu + q_shift(x) * (1 - mu) for each mu.

    Args:
        x: Tokens, shape (B, T, C).
        hw: Token grid (rows, columns).
        mus: Weights of the token itself, each of shape (1, 1, C).
        backend: Backend of `linvis_ops.q_shift_mix`.

    Returns:
        One tensor of shape (B, T, C) for each mu; under autocast, in the dtype that its linear
        layers compute in.
    """
    # the operator takes them in float32, even in a model of lower precision
    weights = tuple(mu.flatten().to(torch.promote_types(x.dtype, torch.float32)) for mu in mus)
    return q_shift_mix(x, hw, weights, dtype=autocast_dtype(x), backend=backend)


def mixing_ramp(channels: int, power: float) -> Tensor:
    """Initial mixing weights (i / channels) ** power for channel i, shape (1, 1, channels)."""
    return (torch.arange(channels) / channels).pow(power).view(1, 1, channels)
