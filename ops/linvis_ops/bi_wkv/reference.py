"""Bi-WKV in plain PyTorch: the definition, the linear-time form and its gradient.

B batch, T tokens, C channels, L chunk length, N chunks. Derivations: README.md of this folder.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Within a chunk, decays are factored around its middle: the factors span exp(+-|w| L), which
# float32 holds for |w| <= 2 a token whatever the keys are.
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
        Tensor of shape (B, T, C) in the dtype of v; differentiable any number of times. Takes O(B
        T^2 C) memory.
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
        moments: (X, B, T, C), the same sums over s != t with the further factor |t - s| - 1; None
            if not asked for.
    """

    scale: Tensor
    sums: Tensor
    moments: Tensor | None


class _Side(NamedTuple):
    """Sums over the tokens on one side of t, each as exp(log-scale) * sums, in chunked shapes."""

    inner_scale: Tensor  # (B, N, L, C)
    inner: Tensor  # (X, B, N, L, C): tokens of the same chunk
    inner_moment: Tensor | None
    outer_scale: Tensor  # (B, N, L, C)
    outer: Tensor  # (X, B, N, 1, C): tokens of the chunks on that side
    outer_moment: Tensor | None


def _side(w: Tensor, a: Tensor, x: Tensor, *, after: bool, moments: bool) -> _Side:
    """Sums over s < t (s > t if `after`) of exp(-w (|t - s| - 1) + a[s]) x[s], chunk by chunk."""
    batch, chunks, length, channels = a.shape
    sign = -1 if after else 1
    middle = (length - 1) / 2
    position = sign * (torch.arange(length, device=a.device, dtype=a.dtype)[:, None] - middle)
    # Sums over the earlier tokens of a chunk are one small matrix product. (A cumulative sum less
    # its own element would cancel where that element dominates.)
    earlier = (position > position.T).to(a.dtype)  # (L, L)
    logit = a + w * position
    top = logit.amax(2, keepdim=True)  # (B, N, 1, C)
    weighted = (logit - top).exp_() * x
    inner = earlier @ weighted
    total = weighted.sum(3)  # (X, B, N, C)
    total_scale = (top - w * middle)[:, :, 0]  # as seen by the next token beyond the chunk
    inner_moment = total_moment = None
    if moments:
        inner_moment = ((position - position.T - 1) * earlier) @ weighted
        total_moment = ((middle - position) * weighted).sum(3)

    outer_scales = a.new_empty((batch, chunks, channels))
    outer = x.new_empty((len(x), batch, chunks, channels))
    outer_moment = torch.empty_like(outer) if moments else None
    scale = a.new_full((batch, channels), -torch.inf)
    state = x.new_zeros((len(x), batch, channels))
    state_moment = torch.zeros_like(state)
    for n in reversed(range(chunks)) if after else range(chunks):
        outer_scales[:, n], outer[:, :, n] = scale, state
        decayed = scale - w * length
        scale = torch.maximum(decayed, total_scale[:, n])
        keep, add = torch.exp(decayed - scale), torch.exp(total_scale[:, n] - scale)
        if outer_moment is not None and total_moment is not None:
            outer_moment[:, :, n] = state_moment
            state_moment = (state_moment + length * state) * keep + total_moment[:, :, n] * add
        state = state * keep + total[:, :, n] * add

    steps = position + middle  # from the edge of the chunk
    outer = outer.unsqueeze(3)
    if outer_moment is not None:
        outer_moment = outer_moment.unsqueeze(3) + steps * outer
    return _Side(
        inner_scale=top - w * (position - 1),
        inner=inner,
        inner_moment=inner_moment,
        outer_scale=outer_scales[:, :, None] - w * steps,
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
        The sums, see `DecayedSums`. Not differentiable: it works in place.
    """
    batch, tokens, channels = a.shape
    length = min(chunk, tokens)
    padding = -tokens % length
    shape = (batch, (tokens + padding) // length, length, channels)
    if padding:
        a = F.pad(a, (0, 0, 0, padding), value=-torch.inf)
        x = F.pad(x, (0, 0, 0, padding))
    a, x = a.reshape(shape), x.reshape(-1, *shape)

    sides = [_side(w, a, x, after=after, moments=moments) for after in (False, True)]
    own = a + u
    scale = own
    for side in sides:
        scale = torch.maximum(scale, side.inner_scale)
        scale = torch.maximum(scale, side.outer_scale)
    sums = (own - scale).exp_() * x
    moment = torch.zeros_like(sums) if moments else None
    for side in sides:
        inner = (side.inner_scale - scale).exp_()
        outer = (side.outer_scale - scale).exp_()
        sums.addcmul_(inner, side.inner).addcmul_(outer, side.outer)
        if moment is not None:
            assert side.inner_moment is not None
            assert side.outer_moment is not None
            moment.addcmul_(inner, side.inner_moment).addcmul_(outer, side.outer_moment)

    def flat(tensor: Tensor) -> Tensor:
        return tensor.reshape(*tensor.shape[:-3], -1, channels)[..., :tokens, :]

    return DecayedSums(flat(scale), flat(sums), None if moment is None else flat(moment))


def _less_top(k: Tensor) -> Tensor:
    """Keys less their maximum over tokens: the same softmax, but logarithms near 0 round finely."""
    return k - k.amax(1, keepdim=True)


def _softmax_sums(w: Tensor, u: Tensor, k: Tensor, v: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Output and logarithm of the softmax' denominator; inputs in the accumulation dtype."""
    x = torch.stack([v, torch.ones_like(v)])
    scale, (numerator, denominator), _ = decayed_sums(w, u, k, x, chunk=chunk)
    return numerator / denominator, scale + denominator.log()


def bi_wkv_chunked(w: Tensor, u: Tensor, k: Tensor, v: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """The linear-time form.

    Args:
        w: Decay per token step, (C,).
        u: Bonus of the token itself, (C,).
        k: Keys, (B, T, C).
        v: Values, (B, T, C).
        chunk: Chunk length; the result does not depend on it.

    Returns:
        Contiguous tensor of shape (B, T, C) in the dtype of v.
    """
    dtype = accumulation_dtype(v.dtype)
    y, _ = _softmax_sums(w.to(dtype), u.to(dtype), _less_top(k.to(dtype)), v.to(dtype), chunk)
    return y.to(v.dtype).contiguous()


def bi_wkv_backward(
    gy: Tensor, w: Tensor, u: Tensor, k: Tensor, v: Tensor, *, chunk: int = CHUNK
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient of Bi-WKV, hand-written, in linear time.

    The kernel b[t, s] is symmetric, so the gradients by k and v are decayed sums over t with log
    weights -lse[t], lse being the log denominator. It and y are computed again: y in a short dtype
    would spoil the gradient by w.

    Args:
        gy: Gradient by y, (B, T, C).
        w: Decay per token step, (C,).
        u: Bonus of the token itself, (C,).
        k: Keys, (B, T, C).
        v: Values, (B, T, C).
        chunk: Chunk length.

    Returns:
        Gradients by w, u (each (C,), accumulation dtype), k and v (each (B, T, C), in their dtype).
    """
    dtype = accumulation_dtype(v.dtype)
    w, u, keys, values, grad = (each.to(dtype) for each in (w, u, k, v, gy))
    keys = _less_top(keys)
    y, lse = _softmax_sums(w, u, keys, values, chunk)
    x = torch.stack([grad, grad * y])
    scale, sums, moments = decayed_sums(w, u, -lse, x, moments=True, chunk=chunk)
    assert moments is not None
    weight = torch.exp(keys + scale)
    dv = weight * sums[0]
    dk = weight * (values * sums[0] - sums[1])
    dw = (weight * (moments[1] - values * moments[0])).sum((0, 1))
    du = (torch.exp(keys + u - lse) * (values - y) * grad).sum((0, 1))
    return dw, du, dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous()
