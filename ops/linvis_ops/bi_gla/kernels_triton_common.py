"""What the Triton kernels of gated linear attention share: gates, their sums, decays and states."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from linvis_ops._triton import interpreting
from linvis_ops._triton_math import LOG2E, exp2
from linvis_ops._triton_tiles import cast, load_rows, operand

_INTERPRETING = tl.constexpr(interpreting())
# A gate below this decays to 0 in float32 as well, and its sums stay numbers.
SHUT = tl.constexpr(-200.0)
# Largest exponent of a factor. Operands of 24 bits ask for exponents that are precise.
RANGE = tl.constexpr(40.0)
RANGE_FLOAT32 = tl.constexpr(11.0)


@triton.jit
def load_row(p, stride, t, column, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Token t, (BLOCK,), as float32."""
    c = column + tl.arange(0, BLOCK)
    return tl.load(p + t.to(tl.int64) * stride + c, mask=c < WIDTH, other=0).to(tl.float32)


@triton.jit
def exp(x):
    """Compute e ** x."""
    return exp2(x * LOG2E)


@triton.jit
def opened(g):
    """Log gates as finite float32 numbers."""
    g = g.to(tl.float32)
    return tl.where(g < SHUT, SHUT, g)


@triton.jit
def load_gates(p, stride, start, T, K: tl.constexpr, L: tl.constexpr, BK: tl.constexpr):
    """Log gates (L, BK) of a chunk, float32 and finite."""
    return opened(load_rows(p, stride, start, T, 0, K, L, BK))


@triton.jit
def choose(L: tl.constexpr, REVERSE: tl.constexpr):
    """Matrix (L, L): for each token itself and those before it, or behind it if REVERSE."""
    t = tl.arange(0, L)[:, None]
    s = tl.arange(0, L)[None, :]
    return s >= t if REVERSE else s <= t


# Rows of a product that is a sum.
LEAST = tl.constexpr(16)
# Matrices of `make_weights`.
WEIGHTS = 6


@triton.jit
def bi_gla_weights_kernel(out, L: tl.constexpr):
    """One of the matrices (6, L, L) that `make_weights` describes."""
    which = tl.program_id(0)
    t = tl.arange(0, L)[:, None]
    s = tl.arange(0, L)[None, :]
    # steps of s behind t, or before it
    steps = tl.where(which % 2 == 0, s - t, t - s)
    chosen = (steps > 0) | ((steps == 0) & (which >= 2))
    x = chosen.to(tl.float32) - tl.where((which == 4) | (which == 5), 0.5, 0.0)
    tl.store(out + which * (L * L) + t * L + s, x)


def make_weights(x: Tensor, length: int) -> Tensor:
    """Matrices (6, L, L) for `load_weights`, in the dtype that products of sums take beside x.

    For each token, 1 for those behind it, for those before it, for it and those behind it, for it
    and those before it, and 0 for others; the last two of these with 1/2 for 1 and -1/2 for 0.
    """
    short = torch.float32 if x.dtype == torch.float32 else torch.bfloat16
    weights = x.new_empty((WEIGHTS, length, length), dtype=short)
    bi_gla_weights_kernel[(WEIGHTS,)](weights, L=length)
    return weights


@triton.jit
def load_weights(p, which, L: tl.constexpr):
    """Matrix number `which` of `make_weights`, a factor of `add_weighted`."""
    x = tl.load(p + which * (L * L) + tl.arange(0, L)[:, None] * L + tl.arange(0, L)[None, :])
    if _INTERPRETING:
        x = x.to(tl.float32)
    return x


@triton.jit
def add_weighted(total, weights, x, dtype: tl.constexpr, digits: tl.constexpr):
    """Float32 total + weights x, for weights that bfloat16 holds without error.

    For short inputs by tensor cores, with x as a sum of as many bfloat16 numbers as hold the digits
    of the dtype called `digits`.
    """
    PIECES: tl.constexpr = 1 if digits == tl.bfloat16 else (2 if digits == tl.float16 else 3)
    if dtype == tl.float32:
        total = tl.dot(weights, x, total, input_precision='ieee')
    else:
        for _ in tl.static_range(PIECES):
            piece = operand(x, tl.bfloat16)
            total = tl.dot(weights, piece, total)
            x -= piece.to(tl.float32)
    return total


@triton.jit
def log_decays_from_middle(
    weights, which, p, stride, start, T, dtype: tl.constexpr, K: tl.constexpr, L: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Log decays (L, BK) of a chunk up to each token, its own gate included.

    They are counted from the middle of their range: half of the gates up to a token less half of
    those behind it, by matrix number `which`. No number where a gate is infinite.
    """
    g = load_rows(p, stride, start, T, 0, K, L, BK).to(tl.float32)
    centred = load_weights(weights, which, L)
    return add_weighted(tl.zeros((L, BK), tl.float32), centred, g, dtype, p.dtype.element_ty)


@triton.jit
def log_decays_behind(p, stride, start, T, K: tl.constexpr, L: tl.constexpr, BK: tl.constexpr):
    """Sums of the gates behind each token of a chunk, (L, BK)."""
    row = tl.arange(0, L)[:, None]
    g = tl.where(row < L - 1, load_gates(p, stride, start + 1, T, K, L, BK), 0.0)
    return tl.cumsum(g, 0, reverse=True)


@triton.jit
def bound(dtype: tl.constexpr):
    """Largest exponent of a factor of products, for inputs of a dtype."""
    return RANGE_FLOAT32 if dtype == tl.float32 else RANGE


@triton.jit
def magnitude(x):
    """Absolute float32 numbers as integers of the same order; what is no number is the largest."""
    return tl.abs(x).to(tl.int32, bitcast=True)


@triton.jit
def any_beyond(magnitudes, limit):
    """Whether one of a tile of magnitudes is that of a number above the limit, or of no number."""
    largest = tl.max(magnitudes).to(tl.float32, bitcast=True)
    return (largest > limit) | (largest != largest)


@triton.jit
def to_middle(total, dtype: tl.constexpr):
    """Log decay from the edge of a chunk to where a state in memory is, of that over the chunk.

    That place is the middle of the chunk's range where the chunk is in range, and otherwise as far
    as exponents are bounded.
    """
    return tl.maximum(total * 0.5, -bound(dtype))


@triton.jit
def sum_over_tokens(g, dtype: tl.constexpr, digits: tl.constexpr):
    """Sums (BK,) of gates (L, BK), by the products of `add_weighted`."""
    if dtype == tl.float32:
        total = tl.sum(g, 0)
    else:
        ones = operand(tl.full((LEAST, g.shape[0]), 1.0, tl.float32), tl.bfloat16)
        rows = tl.zeros((LEAST, g.shape[1]), tl.float32)
        # all of them are alike
        total = tl.max(add_weighted(rows, ones, g, dtype, digits), 0)
    return total


@triton.jit
def state_places(column, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """Where the elements (BK, BV) of a state are in memory, and which of them exist."""
    i = tl.arange(0, BK)[:, None]
    c = column + tl.arange(0, BV)[None, :]
    exist = tl.full((BK, BV), True, tl.int1)
    if K < BK or V % BV != 0:
        exist = (i < K) & (c < V)
    return i * V + c, exist


@triton.jit
def load_state(
    p, index, column, dtype: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """State (BK, BV) number `index` of memory, an operand for inputs of a dtype."""
    places, exist = state_places(column, K, V, BK, BV)
    x = tl.load(p + index * (K * V) + places, mask=exist, other=0.0)
    if dtype != tl.bfloat16 or _INTERPRETING:
        x = operand(x.to(tl.float32), dtype)
    return x


@triton.jit
def store_state(
    p, x, index, column, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr
):
    """Store a state (BK, BV) as number `index` of memory."""
    places, exist = state_places(column, K, V, BK, BV)
    tl.store(p + index * (K * V) + places, cast(x, p), mask=exist)


@triton.jit
def kept(x, chosen):
    """Operand x where a matrix of ones and zeros has ones; the rest may be infinite."""
    return tl.where(chosen != 0, x, 0.0)


@triton.jit
def multiplied(a, b, dtype: tl.constexpr):
    """Product, element by element, of two operands, as an operand."""
    if dtype == tl.bfloat16 and not _INTERPRETING:
        y = a * b
    else:
        y = operand(a.to(tl.float32) * b.to(tl.float32), dtype)
    return y
