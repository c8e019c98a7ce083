"""Bi-WKV in plain PyTorch: the definition, the linear-time form and its gradient.

B batch, T tokens, C channels, L chunk length, N chunks. Derivations: README.md of this folder.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from linvis_ops._dtypes import accumulation_dtype

# Tokens of a chunk. Within one, decays are factored around its middle; together with the joining of
# its parts this spans exp(3 |w| CHUNK), of which float32 holds exp(SPAN).
CHUNK = 16
SPAN = 80.0
# Value of the scale of sums over tokens whose keys are all -inf.
NOTHING = -1e30


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


class Scale(NamedTuple):
    """A logarithm in two parts, value - w * distance.

    The distance, a multiple of 1/2, is exact, so the difference of two scales is precise where both
    are large: float32 resolves w * distance = 1000 to 6e-5 only.
    """

    value: Tensor
    distance: Tensor

    def rounded(self, w: Tensor) -> Tensor:
        """The logarithm in one number."""
        return self.value - w * self.distance

    def less(self, other: Scale, w: Tensor) -> Tensor:
        """The difference of two logarithms."""
        return (self.value - other.value) - w * (self.distance - other.distance)

    def further(self, steps: Tensor | float) -> Scale:
        """The scale as seen from `steps` tokens further away."""
        return Scale(self.value, self.distance + steps)


def _larger(first: Scale, second: Scale, w: Tensor) -> Scale:
    second_wins = second.rounded(w) > first.rounded(w)
    return Scale(
        torch.where(second_wins, second.value, first.value),
        torch.where(second_wins, second.distance, first.distance),
    )


class Sums(NamedTuple):
    """Sums of terms exp(log weight) * x over some tokens, each of them exp(scale) * tensor.

    Moments are the same sums with the further factor of the distance that the logarithm of a term
    holds, beyond the distance of the scale. So they do not change as the target moves away, the
    dominant term adds nothing to them, and nothing large cancels. They are None if not asked for.
    """

    scale: Scale
    sums: Tensor  # (X, ...)
    moments: Tensor | None

    def join(self, other: Sums, w: Tensor) -> Sums:
        """The sums over the tokens of both."""
        scale = _larger(self.scale, other.scale, w)
        mine, others = self.at(scale, w), other.at(scale, w)
        moments = None
        if mine.moments is not None and others.moments is not None:
            moments = mine.moments + others.moments
        return Sums(scale, mine.sums + others.sums, moments)

    def at(self, scale: Scale, w: Tensor) -> Sums:
        """The same sums at another scale."""
        # without a bound, sums of nothing, whose value rounds distances away, become 0 * inf
        factor = self.scale.less(scale, w).clamp_(max=SPAN).exp_()
        moments = self.moments
        if moments is not None:
            beyond = self.scale.distance - scale.distance
            moments = (moments + beyond * self.sums) * factor
        return Sums(scale, self.sums * factor, moments)


def _peak(a: Scale, w: Tensor) -> Scale:
    """The largest of each chunk, (B, N, 1, C), of log weights (B, N, L, C)."""
    rounded = a.rounded(w)
    is_peak = rounded == rounded.amax(2, keepdim=True)
    distance = torch.where(is_peak, a.distance, -torch.inf).amax(2, keepdim=True)
    value = torch.where(is_peak & (a.distance == distance), a.value, -torch.inf)
    return Scale(value.amax(2, keepdim=True).clamp(min=NOTHING), distance)


def _side(
    w: Tensor, a: Scale, peak: Scale, weighted: Tensor, *, after: bool, moments: bool
) -> tuple[Sums, Tensor]:
    """Sums over the earlier tokens (the later ones if `after`), for each token of each chunk.

    Args:
        w: Decay, (C,).
        a: Log weights, (B, N, L, C).
        peak: Largest log weight of each chunk, (B, N, 1, C).
        weighted: exp(a - peak) x, (X, B, N, L, C).
        after: Sum over later tokens instead of earlier ones.
        moments: Also give the moments.

    Returns:
        The sums at one scale a chunk, and the position of each token, (L, 1), by which they are
        still to be moved away.
    """
    _, batch, chunks, length, channels = weighted.shape
    middle = (length - 1) / 2
    position = torch.arange(length, device=w.device, dtype=w.dtype)[:, None] - middle
    position = -position if after else position
    # Sums over the earlier tokens of a chunk are one small matrix product. (A cumulative sum less
    # its own element would cancel where that element dominates.)
    earlier = (position > position.T).to(w.dtype)  # (L, L)
    placed = weighted * torch.exp(w * position)
    placed_moment = (a.distance - position - peak.distance) * placed if moments else None
    inner = Sums(
        peak.further(-1),
        earlier @ placed,
        None if placed_moment is None else earlier @ placed_moment,
    )
    # as seen by the next token beyond the chunk
    totals = Sums(
        peak.further(middle),
        placed.sum(3, keepdim=True),
        None if placed_moment is None else placed_moment.sum(3, keepdim=True),
    )

    shape = (batch, chunks, 1, channels)
    outer = Sums(
        Scale(w.new_empty(shape), w.new_empty(shape)),
        w.new_empty((len(weighted), *shape)),
        w.new_empty((len(weighted), *shape)) if moments else None,
    )
    zero = torch.zeros_like(totals.sums[:, :, 0])
    nothing = torch.full_like(zero[0], -torch.inf)
    state = Sums(Scale(nothing, zero[0]), zero, zero if moments else None)
    for n in reversed(range(chunks)) if after else range(chunks):
        for kept, current in zip(_tensors(outer), _tensors(state), strict=True):
            kept.select(-3, n).copy_(current)
        own = Sums(
            Scale(totals.scale.value[:, n], totals.scale.distance[:, n]),
            totals.sums[:, :, n],
            None if totals.moments is None else totals.moments[:, :, n],
        )
        state = state._replace(scale=state.scale.further(length)).join(own, w)
    outer = outer._replace(scale=outer.scale.further(middle))
    return inner.join(outer, w), position


def _tensors(sums: Sums) -> tuple[Tensor, ...]:
    tensors = (*sums.scale, sums.sums)
    return tensors if sums.moments is None else (*tensors, sums.moments)


def _safe_chunk(w: Tensor, chunk: int) -> int:
    """Chunk length whose factors float32 holds; decays over 1.6 a token need a shorter one."""
    largest = w.abs().max().item()
    while chunk > 1 and 3 * largest * chunk > SPAN:
        chunk //= 2
    return chunk


def decayed_sums(
    w: Tensor, u: Tensor, a: Scale, x: Tensor, *, moments: bool = False, chunk: int = CHUNK
) -> Sums:
    """Sums over s of exp(b[t, s] + a[s]) x[s] in linear time: chunks, and states between them.

    Args:
        w: Decay per token step, (C,).
        u: Bonus of the token itself, (C,).
        a: Log weights, (B, T, C).
        x: What is summed, (X, B, T, C).
        moments: Also give the moments.
        chunk: Chunk length L; a shorter one is taken if |w| is large.

    Returns:
        Sums of shape (X, B, T, C) with a scale of shape (B, T, C).
    """
    batch, tokens, channels = a.value.shape
    length = min(_safe_chunk(w, chunk), tokens)
    padding = -tokens % length
    shape = (batch, (tokens + padding) // length, length, channels)

    def chunked(tensor: Tensor, value: float = 0.0) -> Tensor:
        if padding:
            tensor = F.pad(tensor, (0, 0, 0, padding), value=value)
        return tensor.reshape(*tensor.shape[:-3], *shape)

    a = Scale(chunked(a.value, -torch.inf), chunked(a.distance))
    x = chunked(x)
    peak = _peak(a, w)
    weighted = a.less(peak, w).exp_() * x

    before, position = _side(w, a, peak, weighted, after=False, moments=moments)
    after, _ = _side(w, a, peak, weighted, after=True, moments=moments)
    scale = _larger(before.scale, after.scale, w)  # (B, N, 1, C)
    total: Tensor | None = None
    total_moment: Tensor | None = None
    for side, steps in ((before, position), (after, -position)):
        part = side.at(scale, w)
        decay = torch.exp(-w * steps)
        sums = part.sums * decay
        total = sums if total is None else total + sums
        if part.moments is not None:
            moment = part.moments * decay + steps * sums
            total_moment = moment if total_moment is None else total_moment + moment
    assert total is not None
    others = Sums(scale, total, total_moment)
    own = Sums(Scale(a.value + u, a.distance), x, torch.zeros_like(x) if moments else None)
    joined = own.join(others, w)

    def flat(tensor: Tensor) -> Tensor:
        return tensor.reshape(*tensor.shape[:-3], -1, channels)[..., :tokens, :]

    return Sums(
        Scale(flat(joined.scale.value), flat(joined.scale.distance)),
        flat(joined.sums),
        None if joined.moments is None else flat(joined.moments),
    )


def _less_top(k: Tensor) -> Tensor:
    """Keys less their maximum over tokens: the same softmax, but logarithms near 0 round finely."""
    return k - k.amax(1, keepdim=True)


def _softmax_sums(w: Tensor, u: Tensor, k: Tensor, v: Tensor, chunk: int) -> tuple[Tensor, Scale]:
    """Output and logarithm of the softmax' denominator; inputs in the accumulation dtype."""
    x = torch.stack([v, torch.ones_like(v)])
    scale, (numerator, denominator), _ = decayed_sums(
        w, u, Scale(k, torch.zeros_like(k)), x, chunk=chunk
    )
    return numerator / denominator, Scale(scale.value + denominator.log(), scale.distance)


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
    log_weight = Scale(-lse.value, -lse.distance)
    scale, sums, moments = decayed_sums(w, u, log_weight, x, moments=True, chunk=chunk)
    assert moments is not None
    moments = moments + scale.distance * sums
    weight = torch.exp(keys + scale.value - w * scale.distance)
    dv = weight * sums[0]
    dk = weight * (values * sums[0] - sums[1])
    dw = (weight * (moments[1] - values * moments[0])).sum((0, 1))
    own = torch.exp(keys + u - lse.value + w * lse.distance)
    du = (own * (values - y) * grad).sum((0, 1))
    return dw, du, dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous()
