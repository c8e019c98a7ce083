from __future__ import annotations

import torch
from torch import Tensor, nn

from linvis.models.layers.precision import autocast_dtype
from linvis_ops import layer_norm


def _dtype_of_result(x: Tensor, cast_output: bool) -> torch.dtype | None:
    lower = autocast_dtype(x)
    return lower if lower is None or cast_output else torch.float32


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last dimension, by `linvis_ops.layer_norm`.

    Args:
        dims: Size of the last dimension.
        eps: Added to the variance.
        cast_output: Under autocast, round the result to the dtype that linear layers and
            convolutions compute in: for norms in front of these, and behind a mixer, where the
            mixer's own result has that dtype. Otherwise the result is float32 under autocast.

    The operator chooses its backend by itself, whatever that of the mixers;
    LINVIS_OPS_BACKEND=torch takes PyTorch's, with derivatives of any order on a GPU too.
    """

    def __init__(self, dims: int, eps: float = 1e-5, *, cast_output: bool = False) -> None:
        super().__init__(dims, eps)
        self.cast_output = cast_output

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, shape (..., dims)."""
        dtype = _dtype_of_result(x, self.cast_output)
        return layer_norm(x, self.weight, self.bias, self.eps, dtype=dtype)

    def extra_repr(self) -> str:
        """Arguments, as they are printed."""
        return f'{super().extra_repr()}, cast_output={self.cast_output}'


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, by `linvis_ops.layer_norm`.

    Args:
        dims: Size of the last dimension.
        eps: Added to the mean square.
        cast_output: As of `LayerNorm`.
    """

    eps: float

    def __init__(self, dims: int, eps: float = 1e-6, *, cast_output: bool = False) -> None:
        super().__init__(dims, eps=eps)
        self.cast_output = cast_output

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, shape (..., dims)."""
        dtype = _dtype_of_result(x, self.cast_output)
        return layer_norm(x, self.weight, None, self.eps, centred=False, dtype=dtype)

    def extra_repr(self) -> str:
        """Arguments, as they are printed."""
        return f'{super().extra_repr()}, cast_output={self.cast_output}'


class LayerNorm2d(LayerNorm):
    """LayerNorm over the channels of every position of a map (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, shape (B, C, H, W); the result is channels-last."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
