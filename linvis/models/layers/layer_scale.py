from __future__ import annotations

import torch
from torch import Tensor, nn


class LayerScale(nn.Module):
    """x * gamma, with one learnt factor a channel.

    Args:
        dims: Channels.
        init: Initial value of the factors.
    """

    def __init__(self, dims: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dims,), init))

    def forward(self, x: Tensor) -> Tensor:
        """Scale x, shape (..., dims)."""
        return x * self.gamma
