"""Bi-WKV in plain PyTorch: the definition, the linear-time form and its gradient.

B batch, T tokens, C channels, L chunk length, N chunks. Derivations: README.md of this folder.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Within a chunk, decays are factored around its middle: the factors span exp(+-|w| L), which float32 holds for
# |w| <= 2.5 a token whatever the keys are.
CHUNK = 16


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of sums over tokens: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def bi_wkv_quadratic(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition: a softmax over all T x T pairs of tokens, one per channel.

    Args:
        w: Decay per token step, (C,).
        u: Bonus of the token itself, (C,).
        k: Keys, (B, T, C).
        v: Values, (B, T, C).

    Returns:
        Tensor of shape (B, T, C) in the dtype of v; differentiable any number of times. Takes O(B T^2 C) memory.
    """
    dtype = accumulation_dtype(v.dtype)
    tokens = k.shape[1]
    position = torch.arange(tokens, device=k.device)
    distance = (position[:, None] - position[None, :]).abs()[..., None]  # (T, T, 1)
    bias = torch.where(distance == 0, u.to(dtype), -w.to(dtype) * (distance - 1))  # (T, T, C)
    weight = torch.softmax(bias + k.to(dtype)[:, None], dim=2)  # (B, T, T, C)
    return torch.einsum('btsc,bsc->btc', weight, v.to(dtype)).to(v.dtype)


class DecayedSums(NamedTuple):
    """Sums over s of exp(b[t, s] + a[s]) x[s], for every t, as exp(scale) * sums.

    Attributes:
        scale: (B, T, C).
        sums: (X, B, T, C), one for each x.
        moments: (X, B, T, C), the same sums over s != t with the further factor |t - s| - 1; None if not asked for.
    """

    scale: Tensor
    sums: Tensor
    moments: Tensor | None


class _Side(NamedTuple):
    """Sums over the tokens on one side of t, each as exp(log-scale) * sums; chunked shapes as in decayed_sums."""

    inner_scale: Tensor  # (B, N, L, C)
    inner: Tensor  # (X, B, N, L, C): tokens of the same chunk
    inner_moment: Tensor | None
    outer_scale: Tensor  # (B, N, L, C)
    outer: Tensor  # (X, B, N, 1, C): tokens of the chunks before
    outer_moment: Tensor | None


def _exclusive_cumsum(x: Tensor, dim: int) -> Tensor:
    """Sum of all earlier elements; not `cumsum - x`, which cancels where x dominates."""
    total = x.cumsum(dim).narrow(dim, 0, x.shape[dim] - 1)
    return torch.cat([torch.zeros_like(x.narrow(dim, 0, 1)), total], dim)


def _side_before(w: Tensor, a: Tensor, x: Tensor, moments: bool) -> _Side:
    """Sums over s < t of exp(-w (t - s - 1) + a[s]) x[s], for a (B, N, L, C) and x (X, B, N, L, C)."""
    batch, chunks, length, channels = a.shape
    index = torch.arange(length, device=a.device, dtype=a.dtype)[:, None]  # (L, 1)
    middle = (length - 1) / 2
    position = index - middle
    logit = a + w * position
    top = logit.amax(2, keepdim=True)  # (B, N, 1, C)
    weighted = torch.exp(logit - top) * x
    inner = _exclusive_cumsum(weighted, 3)
    total = weighted.sum(3)  # (X, B, N, C)
    total_scale = (top - w * middle)[:, :, 0]  # as seen by the first token of the next chunk
    inner_moment = total_moment = None
    if moments:
        placed = weighted * position
        inner_moment = (position - 1) * inner - _exclusive_cumsum(placed, 3)
        total_moment = middle * total - placed.sum(3)

    state = x.new_zeros((x.shape[0], batch, channels))
    state_moment = torch.zeros_like(state)
    state_scale = a.new_full((batch, channels), -torch.inf)
    states, state_moments, state_scales = [], [], []
    for n in range(chunks):
        states.append(state)
        state_moments.append(state_moment)
        state_scales.append(state_scale)
        decayed = state_scale - w * length
        state_scale = torch.maximum(decayed, total_scale[:, n])
        keep, add = torch.exp(decayed - state_scale), torch.exp(total_scale[:, n] - state_scale)
        if total_moment is not None:
            state_moment = (state_moment + length * state) * keep + total_moment[:, :, n] * add
        state = state * keep + total[:, :, n] * add

    outer = torch.stack(states, 2)[:, :, :, None]
    outer_moment = None
    if moments:
        outer_moment = torch.stack(state_moments, 2)[:, :, :, None] + index * outer
    return _Side(
        inner_scale=top - w * (position - 1),
        inner=inner,
        inner_moment=inner_moment,
        outer_scale=torch.stack(state_scales, 1)[:, :, None] - w * index,
        outer=outer,
        outer_moment=outer_moment,
    )


def decayed_sums(
    w: Tensor, u: Tensor, a: Tensor, x: Tensor, *, moments: bool = False, chunk: int = CHUNK
) -> DecayedSums:
    """Bidirectional decayed sums in time linear in T: chunk by chunk, with states between chunks.

    Args:
        w: Decay per token step, (C,).
        u: Bonus of the token itself, (C,).
        a: Log weights, (B, T, C).
        x: What is summed, (X, B, T, C).
        moments: Also compute the sums weighted by |t - s| - 1, over s != t.
        chunk: Chunk length L.

    Returns:
        The sums, see `DecayedSums`.
    """
    batch, tokens, channels = a.shape
    length = min(chunk, tokens)
    padding = -tokens % length
    shape = (batch, (tokens + padding) // length, length, channels)
    a = F.pad(a, (0, 0, 0, padding), value=-torch.inf).view(shape)
    x = F.pad(x, (0, 0, 0, padding)).view(-1, *shape)

    before = _side_before(w, a, x, moments)
    after = _side_before(w, a.flip(1, 2), x.flip(2, 3), moments)  # flipped in time

    def unflip(tensor: Tensor) -> Tensor:
        return tensor.flip(-3, -2)

    scales = [
        a + u,
        before.inner_scale,
        before.outer_scale,
        unflip(after.inner_scale),
        unflip(after.outer_scale),
    ]
    scale = torch.stack(torch.broadcast_tensors(*scales)).amax(0)
    factors = [torch.exp(each - scale) for each in scales]
    parts = [x, before.inner, before.outer, unflip(after.inner), unflip(after.outer)]
    sums = sum(factor * part for factor, part in zip(factors, parts, strict=True))

    def flat(tensor: Tensor) -> Tensor:
        return tensor.reshape(*tensor.shape[:-3], -1, channels)[..., :tokens, :]

    moment = None
    if before.inner_moment is not None and before.outer_moment is not None:
        assert after.inner_moment is not None
        assert after.outer_moment is not None
        moment_parts = [
            before.inner_moment,
            before.outer_moment,
            unflip(after.inner_moment),
            unflip(after.outer_moment),
        ]
        moment = flat(
            sum(factor * part for factor, part in zip(factors[1:], moment_parts, strict=True))
        )
    return DecayedSums(flat(scale), flat(sums), moment)


def bi_wkv_chunked(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, *, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """The linear-time form.

    Args:
        w: Decay per token step, (C,).
        u: Bonus of the token itself, (C,).
        k: Keys, (B, T, C).
        v: Values, (B, T, C).
        chunk: Chunk length; the result does not depend on it.

    Returns:
        y of shape (B, T, C) in the dtype of v, and the logarithm of the softmax' denominator, (B, T, C), in the
        accumulation dtype, which the gradient needs.
    """
    dtype = accumulation_dtype(v.dtype)
    values = v.to(dtype)
    x = torch.stack([values, torch.ones_like(values)])
    scale, sums, _ = decayed_sums(w.to(dtype), u.to(dtype), k.to(dtype), x, chunk=chunk)
    numerator, denominator = sums
    y = (numerator / denominator).to(v.dtype)
    return y.contiguous(), (scale + denominator.log()).contiguous()


def bi_wkv_backward(
    gy: Tensor,
    w: Tensor,
    u: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    *,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient of Bi-WKV, hand-written, in linear time.

    The kernel b[t, s] is symmetric, so the gradients by k and v are decayed sums over t with log weights -lse[t].

    Args:
        gy: Gradient by y, (B, T, C).
        w: Decay per token step, (C,).
        u: Bonus of the token itself, (C,).
        k: Keys, (B, T, C).
        v: Values, (B, T, C).
        y: Output of the forward pass, (B, T, C).
        lse: Log denominator of the forward pass, (B, T, C).
        chunk: Chunk length.

    Returns:
        Gradients by w, u (each (C,), accumulation dtype), k and v (each (B, T, C), dtype of k).
    """
    dtype = accumulation_dtype(v.dtype)
    w, u, lse = w.to(dtype), u.to(dtype), lse.to(dtype)
    keys, values, out, grad = k.to(dtype), v.to(dtype), y.to(dtype), gy.to(dtype)
    x = torch.stack([grad, grad * out])
    scale, sums, moments = decayed_sums(w, u, -lse, x, moments=True, chunk=chunk)
    assert moments is not None
    weight = torch.exp(keys + scale)
    dv = weight * sums[0]
    dk = weight * (values * sums[0] - sums[1])
    dw = (weight * (moments[1] - values * moments[0])).sum((0, 1))
    du = (torch.exp(keys + u - lse) * (values - out) * grad).sum((0, 1))
    return dw, du, dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous()
