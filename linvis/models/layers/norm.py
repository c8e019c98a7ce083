from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in the dtype of x.

    Autocast would have it compute and write float32, whatever it is given; here it reads and writes
    the dtype of x, and sums in float32.

    Args:
        dims: Size of the last dimension.
        eps: Added to the mean square.
    """

    def __init__(self, dims: int, eps: float = 1e-6) -> None:
        super().__init__(dims, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, shape (..., dims)."""
        # there is no autocast for the meta device, where any other can stand for it
        with torch.autocast('cpu' if x.is_meta else x.device.type, enabled=False):
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of every position of a map (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, shape (B, C, H, W); the result is channels-last."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
