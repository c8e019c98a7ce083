"""Q-Shift with mixes in plain PyTorch: the definition, and its forward and backward by hand.

`acc` is the dtype of the weights, in which everything is computed: float32, or float64 beside
float64 tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from linvis_ops.q_shift.reference import q_shift_by_index, q_shift_sliced

Norm = tuple[Tensor, Tensor, float]  # weight (C,), bias (C,), eps


def q_shift_mix_by_index(
    x: Tensor,
    hw: tuple[int, int],
    mus: Sequence[Tensor],
    norm: Norm | None,
    heads: int,
    dtype: torch.dtype | None,
) -> tuple[Tensor, ...]:
    """The definition: y * mu + q_shift(y) * (1 - mu) for each mu, y = x or its LayerNorm.

    Args:
        x: Tokens, (B, T, C), T = rows * columns or one more (a trailing class token).
        hw: (rows, columns) of the token grid.
        mus: Weights of the token itself, each (C,).
        norm: Weight, bias and eps of the LayerNorm, or None.
        heads: Equal groups of channels, each of which has its own quarters.
        dtype: Of the mixes; None: that of x.

    Returns:
        A tensor of shape (B, T, C) for each mu; differentiable any number of times.
    """
    y = x.to(mus[0].dtype)
    if norm is not None:
        weight, bias, eps = norm
        centred = y - y.mean(2, keepdim=True)
        variance = centred.square().mean(2, keepdim=True)
        y = centred / torch.sqrt(variance + eps) * weight + bias
    shifted = q_shift_by_index(y, hw, heads)
    return tuple((y * mu + shifted * (1 - mu)).to(dtype or x.dtype) for mu in mus)


def _normalised(x: Tensor, stats: Tensor) -> Tensor:
    """(x - mean) / deviation, from stats (2, B, T): mean and reciprocal standard deviation."""
    return (x - stats[0, :, :, None]) * stats[1, :, :, None]


def q_shift_mix_forward(
    x: Tensor,
    mus: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rows: int,
    columns: int,
    heads: int,
    dtype: torch.dtype,
) -> list[Tensor]:
    """The mixes (B, T, C) in dtype, and with a norm its statistics (2, B, T) behind them."""
    y = x.to(mus[0].dtype)
    saved = []
    if weight is not None and bias is not None:
        variance, mean = torch.var_mean(y, 2, correction=0)
        stats = torch.stack([mean, torch.rsqrt(variance + eps)])
        y = _normalised(y, stats) * weight + bias
        saved = [stats]
    shifted = q_shift_sliced(y, rows, columns, heads, adjoint=False)
    mixes = [torch.lerp(shifted, y, mu).to(dtype) for mu in mus]
    return [*(mix.contiguous() for mix in mixes), *saved]


def q_shift_mix_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    mus: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor | None,
    rows: int,
    columns: int,
    heads: int,
) -> tuple[Tensor, Tensor]:
    """Gradient by x (B, T, C), and by all channel weights (M, C): mus, then weight and bias."""
    y = x.to(mus[0].dtype)
    xhat = y
    if weight is not None and bias is not None and stats is not None:
        xhat = _normalised(y, stats)
        y = xhat * weight + bias
    difference = y - q_shift_sliced(y, rows, columns, heads, adjoint=False)
    dy = torch.zeros_like(y)
    from_neighbours = torch.zeros_like(y)
    sums = []
    for grad, mu in zip(grads, mus, strict=True):
        g = grad.to(y.dtype)
        dy.addcmul_(g, mu)
        from_neighbours.addcmul_(g, 1 - mu)
        sums.append((g * difference).sum((0, 1)))
    dy += q_shift_sliced(from_neighbours, rows, columns, heads, adjoint=True)
    dx = dy
    if weight is not None and stats is not None:
        sums += [(dy * xhat).sum((0, 1)), dy.sum((0, 1))]
        dxhat = dy * weight
        along = (dxhat * xhat).mean(2, keepdim=True)
        dx = (dxhat - dxhat.mean(2, keepdim=True) - xhat * along) * stats[1, :, :, None]
    return dx.to(x.dtype).contiguous(), torch.stack(sums)
