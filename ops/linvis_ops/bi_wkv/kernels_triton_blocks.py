"""What Bi-WKV computes on one block of tokens in registers, for Triton kernels.

A block is a tuple of L tensors, one a token, of one channel a thread. Sums over tokens are in units
of the exponential of a reference, beside which the weights of the block were computed.
"""

import triton
import triton.language as tl

from linvis_ops._triton_math import LOG2E, divide, exp2

# Largest |w| * L and largest |u| for which a block is computed with one reference.
SPAN = tl.constexpr(20.0)


@triton.jit
def block_decay(w, w2, L: tl.constexpr):
    """exp(-w) in float32, and what L multiplications by it lack of exp(-w L)."""
    p = 1.0 - w / 14  # 1 - exp(-w) as a series, so that it is precise where w is small
    for i in tl.static_range(12):
        p = 1.0 - w / (13 - i) * p
    p *= w
    d = 1.0 - p
    residual = (1.0 - d) - p
    return d, exp2(-w2 * L) * (L * residual) / d


@triton.jit
def in_range(w, u, L: tl.constexpr):
    """Whether the weights of a block stay in the range of float32 beside one reference."""
    return (tl.max(tl.abs(w)) * L <= SPAN) & (tl.max(tl.abs(u)) <= SPAN)


@triton.jit
def place(pid, N, C: tl.constexpr, BC: tl.constexpr):
    """Sequence, lane, channels of a program, and which of the channels exist."""
    tiles: tl.constexpr = (C + BC - 1) // BC
    c = (pid % tiles) * BC + tl.arange(0, BC)
    if C % BC == 0:
        mask = tl.full((BC,), True, tl.int1)
    else:
        mask = c < C
    return (pid // tiles // N).to(tl.int64), (pid // tiles) % N, c, mask


@triton.jit
def load_block(p, stride: tl.constexpr, left, mask, other: tl.constexpr, L: tl.constexpr):
    """L tokens as float32; `other` beyond the last `left` of the sequence."""
    x = ()
    for r in tl.static_range(L):
        x = x + (tl.load(p + r * stride, mask=mask & (r < left), other=other).to(tl.float32),)
    return x


@triton.jit
def largest(x, L: tl.constexpr):
    """The largest of L tokens."""
    top = x[0]
    for r in tl.static_range(1, L):
        top = tl.maximum(top, x[r])
    return top


@triton.jit
def weigh(k, v, value, shift, L: tl.constexpr):
    """Weights exp(k - reference) of the tokens of a block, and their products with v."""
    e, x = (), ()
    for r in tl.static_range(L):
        weight = exp2((k[r] - value) * LOG2E + shift)
        e = e + (weight,)
        x = x + (weight * v[r],)
    return e, x


@triton.jit
def sweep(a, d, x, L: tl.constexpr, REVERSE: tl.constexpr):
    """What each token sees of the tokens before it (or after it), and what the next block sees."""
    seen = ()
    for i in tl.static_range(L):
        seen = seen + (a,)
        a = a * d + x[L - 1 - i if REVERSE else i]
    return seen, a


@triton.jit
def fold(a, d, x, L: tl.constexpr, REVERSE: tl.constexpr):
    """What the next block sees of this one: the second result of `sweep`."""
    for i in tl.static_range(L):
        a = a * d + x[L - 1 - i if REVERSE else i]
    return a


@triton.jit
def block_outputs(
    d, lack, own, e, x, q0, q1, b0, b1, y, left, mask, C: tl.constexpr, L: tl.constexpr
):
    """Store the outputs of a block; returns the sums of it and of what is behind it."""
    behind0, a0 = sweep(b0, d, x, L, True)
    behind1, a1 = sweep(b1, d, e, L, True)
    for r in tl.static_range(L):
        numerator = (q0 + behind0[L - 1 - r]) + own * x[r]
        denominator = (q1 + behind1[L - 1 - r]) + own * e[r]
        out = divide(numerator, denominator).to(y.dtype.element_ty)
        tl.store(y + r * C, out, mask=mask & (r < left))
        q0 = q0 * d + x[r]
        q1 = q1 * d + e[r]
    return a0 + lack * b0, a1 + lack * b1


@triton.jit
def gradient_terms(g, numerator, denominator):
    """Return p = g / denominator and q = p * y; y to the last place, since v - y may cancel."""
    inverse = divide(1.0, denominator)
    y = numerator * inverse
    y += (numerator - y * denominator) * inverse
    p = g * inverse
    return p, p * y


@triton.jit
def block_adjoints(d, lack, own, e, x, g, q0, q1, b0, b1, a0, a1, L: tl.constexpr):
    """Sums of p and q of a block for the tokens after it, then what the tokens before it see."""
    zero = tl.zeros_like(d)
    behind0, next0 = sweep(b0, d, x, L, True)
    behind1, next1 = sweep(b1, d, e, L, True)
    b0 = next0 + lack * b0
    b1 = next1 + lack * b1
    p, q = (), ()
    for r in tl.static_range(L):
        numerator = (q0 + behind0[L - 1 - r]) + own * x[r]
        denominator = (q1 + behind1[L - 1 - r]) + own * e[r]
        b_p, b_q = gradient_terms(g[r], numerator, denominator)
        p = p + (b_p,)
        q = q + (b_q,)
        q0 = q0 * d + x[r]
        q1 = q1 * d + e[r]
    s0 = fold(zero, d, p, L, False)
    s1 = fold(zero, d, q, L, False)
    next0 = fold(a0, d, p, L, True)
    next1 = fold(a1, d, q, L, True)
    return s0, s1, b0, b1, next0 + lack * a0, next1 + lack * a1


@triton.jit
def block_gradients(
    d, lack, own, e, x, g, f0, f1, b0, b1, a0, a1, p0, p1, dk, dv, left, mask,
    C: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Store the gradients of a block; returns what the next block sees before it, dw and du.

    f and b are sums of (v, 1) before and behind the block, p and a those of p and q.
    """
    before0, next0 = sweep(f0, d, x, L, False)
    before1, next1 = sweep(f1, d, e, L, False)
    f0 = next0 + lack * f0
    f1 = next1 + lack * f1
    behind0, behind1, p, q, sum0, sum1 = (), (), (), (), (), ()
    by_w = tl.zeros_like(d)
    by_u = tl.zeros_like(d)
    for i in tl.static_range(L):
        numerator = (before0[L - 1 - i] + b0) + own * x[L - 1 - i]
        denominator = (before1[L - 1 - i] + b1) + own * e[L - 1 - i]
        b_p, b_q = gradient_terms(g[L - 1 - i], numerator, denominator)
        by_w += a0 * before0[L - 1 - i] - a1 * before1[L - 1 - i]
        behind0 = behind0 + (b0,)
        behind1 = behind1 + (b1,)
        p = p + (b_p,)
        q = q + (b_q,)
        sum0 = sum0 + (a0 + own * b_p,)
        sum1 = sum1 + (a1 + own * b_q,)
        b0 = b0 * d + x[L - 1 - i]
        b1 = b1 * d + e[L - 1 - i]
        a0 = a0 * d + b_p
        a1 = a1 * d + b_q
    start0 = p0
    start1 = p1
    for r in tl.static_range(L):
        by_w += p0 * behind0[L - 1 - r] - p1 * behind1[L - 1 - r]
        total0 = sum0[L - 1 - r] + p0
        total1 = sum1[L - 1 - r] + p1
        b_dk = x[r] * total0 - e[r] * total1
        valid = mask & (r < left)
        tl.store(dv + r * C, (e[r] * total0).to(dv.dtype.element_ty), mask=valid)
        tl.store(dk + r * C, b_dk.to(dk.dtype.element_ty), mask=valid)
        by_u += x[r] * p[L - 1 - r] - e[r] * q[L - 1 - r]
        p0 = p0 * d + p[L - 1 - r]
        p1 = p1 * d + q[L - 1 - r]
    return f0, f1, p0 + lack * start0, p1 + lack * start1, by_w, by_u
