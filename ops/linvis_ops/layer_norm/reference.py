"""Normalisation over channels in plain PyTorch: the definition, and PyTorch's own norms.

Everything is computed in float32, or float64 for float64.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> torch.dtype:
    """The dtype in which x is computed with."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def layer_norm_by_moments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    dtype: torch.dtype | None,
) -> Tensor:
    """The definition: (x - mean) / sqrt(variance + eps) * weight + bias over the last dimension.

    Args:
        x: Shape (..., C).
        weight: (C,).
        bias: (C,), or None for zero.
        eps: Added to the variance.
        centred: Subtract the mean; otherwise it counts as zero, in the variance too.
        dtype: Of the result; None: that of x.

    Returns:
        The shape of x; differentiable any number of times.
    """
    y = x.to(_wide(x))
    if centred:
        y = y - y.mean(-1, keepdim=True)
    y = y / torch.sqrt(y.square().mean(-1, keepdim=True) + eps) * weight
    if bias is not None:
        y = y + bias
    return y.to(dtype or x.dtype)


def layer_norm_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centred: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The definition by PyTorch's kernels; contiguous, differentiable."""
    wide = _wide(x)
    y, weight = x.to(wide), weight.to(wide)
    if centred:
        y = F.layer_norm(y, y.shape[-1:], weight, None if bias is None else bias.to(wide), eps)
    else:
        y = F.rms_norm(y, y.shape[-1:], weight, eps)
        y = y if bias is None else y + bias.to(wide)
    return y.to(dtype).contiguous()


def layer_norm_backward(
    gy: Tensor, x: Tensor, weight: Tensor, eps: float, centred: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by x, in its shape and dtype, and by weight and bias, by the formula."""
    wide = _wide(x)
    y, g = x.to(wide), gy.to(wide)
    if centred:
        y = y - y.mean(-1, keepdim=True)
    inverse = torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    y = y * inverse
    over_tokens = tuple(range(x.dim() - 1))
    sums = (g * y).sum(over_tokens), g.sum(over_tokens)
    g = g * weight.to(wide)
    dx = g - y * (g * y).mean(-1, keepdim=True)
    if centred:
        dx = dx - g.mean(-1, keepdim=True)
    return (dx * inverse).to(x.dtype).contiguous(), *sums
