"""Bidirectional gated linear attention in plain PyTorch: definition, equal forms, gradient.

B batch, T tokens, H heads, K key width, V value width, L chunk length, N chunks, M blocks of a
chunk. Derivations: README.md of this folder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from linvis_ops._dtypes import accumulation_dtype

# Tokens of a chunk, a power of two.
CHUNK = 16


def _half(scale: float | None, q: Tensor) -> float:
    """Half the scale, so that the two directions are averaged."""
    return (q.shape[-1] ** -0.5 if scale is None else scale) / 2


def _both_directions(
    direction: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_fwd: Tensor,
    g_bwd: Tensor,
    scale: float | None,
) -> Tensor:
    """Mean of a direction and of the same from the other end, scaled, in the dtype of v."""
    dtype = accumulation_dtype(v.dtype)
    q, k, values, g_fwd, g_bwd = (each.to(dtype) for each in (q, k, v, g_fwd, g_bwd))
    forward = direction(q, k, values, g_fwd)
    backward = direction(*(each.flip(1) for each in (q, k, values, g_bwd))).flip(1)
    return (_half(scale, q) * (forward + backward)).to(v.dtype)


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
    q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_bwd: Tensor, scale: float | None = None
) -> Tensor:
    """The definition: a weight for each of the T x T pairs of tokens and each key channel.

    Args:
        q: Queries, (B, T, H, K).
        k: Keys, (B, T, H, K).
        v: Values, (B, T, H, V).
        g_fwd: Log gates of the forward direction, (B, T, H, K).
        g_bwd: Log gates of the backward direction, (B, T, H, K).
        scale: Factor of the output; None: K**-0.5.

    Returns:
        Tensor of shape (B, T, H, V) in the dtype of v; differentiable any number of times. Takes
        O(B T^2 H K) memory.
    """
    return _both_directions(_quadratic_direction, q, k, v, g_fwd, g_bwd, scale)


def _recurrent_direction(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    state = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1])  # (B, H, K, V)
    outputs = []
    for t in range(q.shape[1]):
        state = g[:, t, :, :, None].exp() * state + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append((q[:, t, :, :, None] * state).sum(2))
    return torch.stack(outputs, 1)


def bi_gla_recurrent(
    q: Tensor, k: Tensor, v: Tensor, g_fwd: Tensor, g_bwd: Tensor, scale: float | None = None
) -> Tensor:
    """The recurrent form: one state a direction, token by token.

    Args:
        q: Queries, (B, T, H, K).
        k: Keys, (B, T, H, K).
        v: Values, (B, T, H, V).
        g_fwd: Log gates of the forward direction, (B, T, H, K).
        g_bwd: Log gates of the backward direction, (B, T, H, K).
        scale: Factor of the output; None: K**-0.5.

    Returns:
        Tensor of shape (B, T, H, V) in the dtype of v; differentiable any number of times.
    """
    return _both_directions(_recurrent_direction, q, k, v, g_fwd, g_bwd, scale)


class Level(NamedTuple):
    """Queries in second halves of blocks and keys in first halves, decayed to where halves meet.

    Each is (B, H, N, M, L / (2M), K).
    """

    q: Tensor
    k: Tensor
    q_decay: Tensor
    k_decay: Tensor


class Chunks(NamedTuple):
    """What one direction needs of its chunks.

    Attributes:
        weight: Weight of each value within its chunk, lower triangular, (B, H, N, L, L).
        q_decay: Decay from the beginning of the chunk up to each token, its own gate included,
            (B, H, N, L, K).
        k_decay: Decay from each token to the end of the chunk, its own gate left out,
            (B, H, N, L, K).
        levels: Factors of the weights, the shortest halves first.
    """

    weight: Tensor
    q_decay: Tensor
    k_decay: Tensor
    levels: list[Level]


def _halves(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """First and second halves, (..., M, half, K), of blocks of two halves; views."""
    blocks = x.unflatten(-2, (-1, 2, half))
    return blocks[..., 0, :, :], blocks[..., 1, :, :]


def _between_halves(weight: Tensor, half: int) -> Tensor:
    """Weights from second to first halves, (..., M, half, half), of weights (..., L, L); a view."""
    blocks = weight.shape[-1] // (2 * half)
    tiles = weight.unflatten(-1, (blocks, 2, half)).unflatten(-4, (blocks, 2, half))
    return tiles[..., 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _decayed(q: Tensor, k: Tensor, g: Tensor) -> Chunks:
    """Weights and decays within chunks, from q, k and g, each (B, H, N, L, K).

    Two tokens of a chunk lie on both sides of the middle of just one of the blocks of 2, 4, ... L
    tokens. Their decay is factored there, so that all exponents are sums of gates.
    """
    length = q.shape[-2]
    until = g.clone()  # sum of gates from the block's first token to each
    after = torch.zeros_like(g)  # sum of gates behind each token, to the block's last
    weight = q.new_zeros(*q.shape[:-1], length)
    weight.diagonal(dim1=-2, dim2=-1).copy_((q * k).sum(-1))
    levels = []
    half = 1
    while half < length:
        until_first, until_second = _halves(until, half)
        after_first, _ = _halves(after, half)
        q_decay, k_decay = until_second.exp(), after_first.exp()
        level = Level(
            _halves(q, half)[1] * q_decay, _halves(k, half)[0] * k_decay, q_decay, k_decay
        )
        _between_halves(weight, half).copy_(level.q @ level.k.mT)
        levels.append(level)
        after_first += until_second[..., -1:, :]
        until_second += until_first[..., -1:, :]
        half *= 2
    return Chunks(weight, until.exp_(), after.exp_(), levels)


def _scan(added: Tensor, decay: Tensor, *, backward: bool = False) -> Tensor:
    """States (B, H, N, K, V) before each chunk (behind each if `backward`), written over `added`.

    Args:
        added: What each chunk adds to the state, (B, H, N, K, V).
        decay: Decay of the state over each chunk, (B, H, N, K).
        backward: Run from the last chunk to the first.
    """
    state = torch.zeros_like(added[:, :, 0])
    chunks = range(added.shape[2])
    for n in reversed(chunks) if backward else chunks:
        following = torch.addcmul(added[:, :, n], decay[:, :, n, :, None], state)
        added[:, :, n] = state
        state = following
    return added


def _direction(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Output (B, H, N, L, V) of one direction; inputs are chunks."""
    chunks = _decayed(q, k, g)
    states = _scan((k * chunks.k_decay).mT @ v, chunks.q_decay[..., -1, :])
    return chunks.weight @ v + (q * chunks.q_decay) @ states


def _direction_backward(
    go: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of one direction by q, k, v and g; all are chunks."""
    weight, q_decay, k_decay, levels = _decayed(q, k, g)
    q_read, k_left = q * q_decay, k * k_decay
    decay = q_decay[..., -1, :]  # (B, H, N, K)
    states = _scan(k_left.mT @ v, decay)
    d_states = _scan(q_read.mT @ go, decay, backward=True)

    dv = weight.mT @ go + k_left @ d_states
    d_weight = go @ v.mT
    own = d_weight.diagonal(dim1=-2, dim2=-1)[..., None]
    d_read, d_left = go @ states.mT, v @ d_states.mT
    dq, dk = torch.addcmul(own * k, d_read, q_decay), torch.addcmul(own * q, d_left, k_decay)
    # gradients by the sums of gates in _decayed, the longest blocks first; nothing is subtracted
    until, after = d_read * q_read, d_left * k_left
    total = (decay * (states * d_states).sum(-1))[..., None, :]  # (B, H, N, M, K): of whole blocks
    for level in reversed(levels):
        half = level.q.shape[-2]
        _, until_second = _halves(until, half)
        after_first, _ = _halves(after, half)
        totals = total + until_second.sum(-2), total + after_first.sum(-2)
        total = torch.stack(totals, -2).flatten(-3, -2)
        d_between = _between_halves(d_weight, half)
        d_q, d_k = d_between @ level.k, d_between.mT @ level.q
        until_second.addcmul_(d_q, level.q)
        after_first.addcmul_(d_k, level.k)
        _halves(dq, half)[1].addcmul_(d_q, level.q_decay)
        _halves(dk, half)[0].addcmul_(d_k, level.k_decay)
    return dq, dk, dv, until + total


def _chunked(x: Tensor, dtype: torch.dtype, chunk: int, *, flipped: bool) -> Tensor:
    """Tokens (B, T, H, K) as chunks (B, H, N, L, K), padded with zeros."""
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f'bi_gla: chunk must be a power of two, got {chunk}.')
    while chunk >= 2 * x.shape[1]:
        chunk //= 2
    x = x.flip(1) if flipped else x
    x = F.pad(x.to(dtype), (0, 0, 0, 0, 0, -x.shape[1] % chunk))
    return x.unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4).contiguous()


def _flat(x: Tensor, tokens: int, *, flipped: bool) -> Tensor:
    """Chunks (B, H, N, L, K) as tokens (B, T, H, K)."""
    x = x.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :tokens]
    return x.flip(1) if flipped else x


def bi_gla_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_fwd: Tensor,
    g_bwd: Tensor,
    scale: float | None = None,
    *,
    chunk: int = CHUNK,
) -> Tensor:
    """The linear-time form: weights within chunks, and states between them.

    Args:
        q: Queries, (B, T, H, K).
        k: Keys, (B, T, H, K).
        v: Values, (B, T, H, V).
        g_fwd: Log gates of the forward direction, (B, T, H, K).
        g_bwd: Log gates of the backward direction, (B, T, H, K).
        scale: Factor of the output; None: K**-0.5.
        chunk: Chunk length, a power of two; the result does not depend on it.

    Returns:
        Contiguous tensor of shape (B, T, H, V) in the dtype of v.
    """
    dtype = accumulation_dtype(v.dtype)
    total: Tensor | None = None
    for g, flipped in ((g_fwd, False), (g_bwd, True)):
        inputs = (_chunked(each, dtype, chunk, flipped=flipped) for each in (q, k, v, g))
        output = _flat(_direction(*inputs), v.shape[1], flipped=flipped)
        total = output if total is None else total + output
    assert total is not None
    return (total * _half(scale, q)).to(v.dtype).contiguous()


def bi_gla_backward(
    go: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g_fwd: Tensor,
    g_bwd: Tensor,
    scale: float | None = None,
    *,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradient of bidirectional gated linear attention, hand-written, in linear time.

    Nothing but the inputs is needed: weights and states are computed again.

    Args:
        go: Gradient by the output, (B, T, H, V).
        q: Queries, (B, T, H, K).
        k: Keys, (B, T, H, K).
        v: Values, (B, T, H, V).
        g_fwd: Log gates of the forward direction, (B, T, H, K).
        g_bwd: Log gates of the backward direction, (B, T, H, K).
        scale: Factor of the output; None: K**-0.5.
        chunk: Chunk length, a power of two.

    Returns:
        Gradients by q, k, v, g_fwd and g_bwd, contiguous, each in the shape and dtype of its
        tensor.
    """
    dtype = accumulation_dtype(v.dtype)
    grad = go.to(dtype) * _half(scale, q)
    shared: list[list[Tensor]] = []
    gates = []
    for g, flipped in ((g_fwd, False), (g_bwd, True)):
        inputs = (_chunked(each, dtype, chunk, flipped=flipped) for each in (grad, q, k, v, g))
        *by_tokens, dg = (
            _flat(each, v.shape[1], flipped=flipped) for each in _direction_backward(*inputs)
        )
        shared.append(by_tokens)
        gates.append(dg.to(g.dtype).contiguous())
    dq, dk, dv = (
        (first + second).to(like.dtype).contiguous()
        for first, second, like in zip(*shared, (q, k, v), strict=True)
    )
    return dq, dk, dv, gates[0], gates[1]
