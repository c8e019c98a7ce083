"""Tiles of the kernels of attention in linear time: factors of products, loads and stores.

B batch, T tokens, H heads; K and V widths of keys and values, BK and BV those of a tile; L tokens
of a chunk.
"""

import triton
import triton.language as tl

from linvis_ops._triton import interpreting

# The interpreter cuts digits off where a GPU rounds, and takes no bfloat16 in products.
_INTERPRETING = tl.constexpr(interpreting())


@triton.jit
def rounded(x, digits: tl.constexpr):
    """Float32 with that many digits less, rounded to nearest."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = (bits + ((1 << (digits - 1)) - 1) + ((bits >> digits) & 1)) >> digits << digits
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def operand(x, dtype: tl.constexpr):
    """A float32 factor of a product as tensor cores take it.

    dtype is that of the inputs: bfloat16 stays; float16 becomes TF32, which has its digits and the
    exponents of float32.
    """
    if dtype == tl.float16:
        y = rounded(x, 13)
    elif dtype == tl.float32:
        y = x
    elif _INTERPRETING:
        y = rounded(x, 16)
    else:
        y = x.to(dtype)
    return y


@triton.jit
def product(a, b, dtype: tl.constexpr):
    """Matrix product of two operands, in float32."""
    if dtype == tl.float32:
        y = tl.dot(a, b, input_precision='ieee')
    else:
        y = tl.dot(a, b)
    return y


@triton.jit
def add_product(total, a, b, dtype: tl.constexpr):
    """Float32 total + matrix product of two operands."""
    if dtype == tl.float32:
        y = tl.dot(a, b, total, input_precision='ieee')
    else:
        y = tl.dot(a, b, total)
    return y


@triton.jit
def cast(x, pointer):
    """Float32 numbers in the dtype that a pointer points to."""
    if _INTERPRETING and pointer.dtype.element_ty == tl.bfloat16:
        x = rounded(x, 16)
    return x.to(pointer.dtype.element_ty)


@triton.jit
def place(pid, parts, H):
    """Sequence, part of it (a chunk or a segment) and head of a program; heads change fastest."""
    rest = pid // H
    return (rest // parts).to(tl.int64), rest % parts, (pid % H).to(tl.int64)


@triton.jit
def load_rows(
    p, stride, start, T, column, WIDTH: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tokens (L, BLOCK) of a chunk; 0 beyond the sequence and the channels."""
    row = tl.arange(0, L)[:, None]
    c = column + tl.arange(0, BLOCK)[None, :]
    inside = start + row < T
    if WIDTH % BLOCK != 0:
        inside = inside & (c < WIDTH)
    return tl.load(p + start.to(tl.int64) * stride + (row * stride + c), mask=inside, other=0)


@triton.jit
def load_operand(
    p, stride, start, T, column, WIDTH: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr
):
    """Tokens of a chunk as a factor of a product."""
    x = load_rows(p, stride, start, T, column, WIDTH, L, BLOCK)
    if p.dtype.element_ty == tl.float16 or _INTERPRETING:
        x = x.to(tl.float32)
    return x


@triton.jit
def as_operand(x, dtype: tl.constexpr):
    """Elements from memory as a factor of a product, beside factors that `operand` gives."""
    if x.dtype == tl.float32:
        x = operand(x, dtype)
    elif x.dtype == tl.float16 or _INTERPRETING:
        x = x.to(tl.float32)
    return x


@triton.jit
def store_rows(
    p, x, batch, h, H, start, T, column, WIDTH: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr
):
    """Store tokens of a chunk in a contiguous tensor (B, T, H, WIDTH)."""
    row = tl.arange(0, L)[:, None]
    c = column + tl.arange(0, BLOCK)[None, :]
    inside = start + row < T
    if WIDTH % BLOCK != 0:
        inside = inside & (c < WIDTH)
    p += ((batch * T + start) * H + h) * WIDTH
    tl.store(p + (row * (H * WIDTH) + c), cast(x, p), mask=inside)


@triton.jit
def store_rows_at(
    p, stride, x, start, T, column, WIDTH: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr
):
    """Store tokens of a chunk where `load_rows` would load them."""
    row = tl.arange(0, L)[:, None]
    c = column + tl.arange(0, BLOCK)[None, :]
    inside = start + row < T
    if WIDTH % BLOCK != 0:
        inside = inside & (c < WIDTH)
    p += start.to(tl.int64) * stride
    tl.store(p + (row * stride + c), cast(x, p), mask=inside)
