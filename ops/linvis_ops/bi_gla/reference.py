"""Bidirectional gated linear attention in plain PyTorch: the definition and the recurrent form.

B batch, T tokens, H heads, K key width, V value width. Derivations: README.md of this folder.
"""

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums over tokens: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _quadratic_direction(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Sum over s <= t of (q_t * exp(g_{s+1} + ... + g_t) . k_s) v_s."""
    position = torch.arange(q.shape[1], device=q.device)
    later = (position[:, None] > position[None, :])[..., None, None]  # (T, T, 1, 1): t after s
    log_decay = torch.where(later, g[:, :, None], 0.0).cumsum(1)  # (B, T, T, H, K)
    seen = later | (position[:, None] == position[None, :])[..., None, None]
    decay = torch.where(seen, log_decay, -torch.inf).exp()
    weight = torch.einsum('bthk,btshk,bshk->btsh', q, decay, k)
    return torch.einsum('btsh,bshv->bthv', weight, v)


def bi_gla_quadratic(
    q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_bwd: Tensor, scale: float
) -> Tensor:
    """The definition: a weight for each of the T x T pairs of tokens and each key channel.

    Args:
        q: Queries, (B, T, H, K).
        k: Keys, (B, T, H, K).
        v: Values, (B, T, H, V).
        g_fwd: Log gates of the forward direction, (B, T, H, K).
        g_bwd: Log gates of the backward direction, (B, T, H, K).
        scale: Factor of the output.

    Returns:
        Tensor of shape (B, T, H, V) in the dtype of v; differentiable any number of times. Takes
        O(B T^2 H K) memory.
    """
    dtype = accumulation_dtype(v.dtype)
    q, k, values, g_fwd, g_bwd = (each.to(dtype) for each in (q, k, v, g_fwd, g_bwd))
    forward = _quadratic_direction(q, k, values, g_fwd)
    backward = _quadratic_direction(*(each.flip(1) for each in (q, k, values, g_bwd))).flip(1)
    return (scale / 2 * (forward + backward)).to(v.dtype)


def _recurrent_direction(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    state = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1])  # (B, H, K, V)
    outputs = []
    for t in range(q.shape[1]):
        state = g[:, t, :, :, None].exp() * state + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append((q[:, t, :, :, None] * state).sum(2))
    return torch.stack(outputs, 1)


def bi_gla_recurrent(
    q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_bwd: Tensor, scale: float
) -> Tensor:
    """The recurrent form: one state a direction, token by token.

    Args:
        q: Queries, (B, T, H, K).
        k: Keys, (B, T, H, K).
        v: Values, (B, T, H, V).
        g_fwd: Log gates of the forward direction, (B, T, H, K).
        g_bwd: Log gates of the backward direction, (B, T, H, K).
        scale: Factor of the output.

    Returns:
        Tensor of shape (B, T, H, V) in the dtype of v; differentiable any number of times.
    """
    dtype = accumulation_dtype(v.dtype)
    q, k, values, g_fwd, g_bwd = (each.to(dtype) for each in (q, k, v, g_fwd, g_bwd))
    forward = _recurrent_direction(q, k, values, g_fwd)
    backward = _recurrent_direction(*(each.flip(1) for each in (q, k, values, g_bwd))).flip(1)
    return (scale / 2 * (forward + backward)).to(v.dtype)
