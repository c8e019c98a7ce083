"""What the Triton kernels of gated linear attention share: gates, their sums and decays."""

import triton
import triton.language as tl

from linvis_ops._triton_math import LOG2E, exp2
from linvis_ops._triton_tiles import load_rows, operand

# A gate below this decays to 0 in float32 as well, and its sums stay numbers.
SHUT = tl.constexpr(-200.0)
# Largest exponent of a factor. Operands of 24 bits ask for exponents that are precise.
RANGE = tl.constexpr(40.0)
RANGE_FLOAT32 = tl.constexpr(11.0)


@triton.jit
def load_row(p, stride, t, valid, column, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Token t, (BLOCK,), as float32; 0 unless `valid`."""
    c = column + tl.arange(0, BLOCK)
    inside = valid & (c < WIDTH)
    return tl.load(p + t.to(tl.int64) * stride + c, mask=inside, other=0).to(tl.float32)


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
def add_chosen(total, choice, x, dtype: tl.constexpr, digits: tl.constexpr):
    """Float32 total + choice x, where choice is a matrix of zeros and ones.

    For short inputs by tensor cores, with x as a sum of as many bfloat16 numbers as hold the digits
    of the dtype called `digits`.
    """
    PIECES: tl.constexpr = 1 if digits == tl.bfloat16 else (2 if digits == tl.float16 else 3)
    if dtype == tl.float32:
        total = tl.dot(tl.where(choice, 1.0, 0.0), x, total, input_precision='ieee')
    else:
        one = operand(tl.full((1, 1), 1.0, tl.float32), tl.bfloat16)
        chosen = tl.where(choice, one, tl.zeros_like(one))
        for _ in tl.static_range(PIECES):
            piece = operand(x, tl.bfloat16)
            total = tl.dot(chosen, piece, total)
            x -= piece.to(tl.float32)
    return total


@triton.jit
def whole(passed):
    """A row of a tile whose rows are alike, as a column."""
    return tl.max(passed, 0)[:, None]


@triton.jit
def choose(L: tl.constexpr, REVERSE: tl.constexpr, OWN: tl.constexpr):
    """Matrix (L, L): for each token those before it, those behind it if REVERSE; itself if OWN."""
    t = tl.arange(0, L)[:, None]
    s = tl.arange(0, L)[None, :]
    if REVERSE:
        chosen = s >= t if OWN else s > t
    else:
        chosen = s <= t if OWN else s < t
    return chosen


@triton.jit
def add_all(total, x, dtype: tl.constexpr, digits: tl.constexpr):
    """Total + the sum of all rows of x, (L, BK), in each row."""
    ones = tl.full((x.shape[0], x.shape[0]), True, tl.int1)
    return add_chosen(total, ones, x, dtype, digits)


@triton.jit
def gate_sums(
    g, dtype: tl.constexpr, digits: tl.constexpr, REVERSE: tl.constexpr, OWN: tl.constexpr
):
    """Sums of the gates (L, BK) that `choose` chooses, and of all, every row alike."""
    L: tl.constexpr = g.shape[0]
    total = add_all(tl.zeros_like(g), g, dtype, digits)
    if dtype == tl.float32:
        sums = add_chosen(tl.zeros_like(g), choose(L, REVERSE, OWN), g, dtype, digits)
    else:
        # what differences lose is little beside short inputs, and one matrix takes less registers
        sums = add_chosen(tl.zeros_like(g), choose(L, False, True), g, dtype, digits)
        if REVERSE:
            sums = total - sums
        if REVERSE == OWN:
            sums = sums + g if OWN else sums - g
    return sums, total


@triton.jit
def add_crossing(
    crossing, keys, queries, dtype: tl.constexpr, digits: tl.constexpr, REVERSE: tl.constexpr
):
    """Crossing + keys before each gate + queries behind it, (L, BK); exchanged if REVERSE."""
    L: tl.constexpr = keys.shape[0]
    if REVERSE:
        crossing = add_all(crossing, keys, dtype, digits)
        crossing = add_chosen(crossing, choose(L, False, True), queries - keys, dtype, digits)
    else:
        crossing = add_all(crossing, queries, dtype, digits)
        difference = keys - queries
        crossing = add_chosen(
            crossing - difference, choose(L, False, True), difference, dtype, digits
        )
    return crossing


@triton.jit
def own_log_decays(
    p, stride, start, T, dtype: tl.constexpr, K: tl.constexpr, L: tl.constexpr, BK: tl.constexpr,
    REVERSE: tl.constexpr,
):  # fmt: skip
    """Log decays (L, BK) from the edge where a direction enters a chunk up to each token.

    The second result is half the log decay over the chunk, every row alike.
    """
    g = load_gates(p, stride, start, T, K, L, BK)
    sums, total = gate_sums(g, dtype, p.dtype.element_ty, REVERSE, True)
    return sums, total * 0.5


@triton.jit
def in_range(from_middle, from_middle2, dtype: tl.constexpr):
    """Whether log decays, counted from the middle of their range, fit factors of products."""
    largest = tl.max(tl.maximum(tl.abs(from_middle), tl.abs(from_middle2)))
    if dtype == tl.float32:
        fits = largest <= RANGE_FLOAT32
    else:
        fits = largest <= RANGE
    return fits
