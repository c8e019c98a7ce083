"""Triton kernels of retention on grids: states of lines and their mixture.

R rows and W columns of the grid, without the class token, which is a row of its own with one token
in the last column. A line is one row or one column of the grid, a tile some rows and columns.
README.md of this folder, Implementation in Triton, has the formulas.
"""

import triton
import triton.language as tl

from linvis_ops._triton_tiles import add_product, as_operand, cast, operand, place, product
from linvis_ops.retention.kernels_triton import decay, load_log2

# Which tokens are seen: those above and to the left, those below and to the right, all.
BEFORE = tl.constexpr(0)
BEHIND = tl.constexpr(1)
BOTH = tl.constexpr(2)


@triton.jit
def tokens_at(y, x, R, W, T):
    """Number of the token at row y and column x, and whether there is one."""
    number = y * W + x
    last = T - 1  # is the class token where T > R * W
    exist = (x < W) & ((y < R) | ((y == R) & (x == W - 1) & (R * W < T)))
    return tl.minimum(number, last).to(tl.int64), exist


@triton.jit
def load_tokens(
    p, stride, number, exist, column, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Tokens of these numbers as they are in memory, (n, BLOCK); 0 where there is none."""
    c = column + tl.arange(0, BLOCK)[None, :]
    inside = exist[:, None]
    if WIDTH % BLOCK != 0:
        inside = inside & (c < WIDTH)
    return tl.load(p + (number * stride)[:, None] + c, mask=inside, other=0)


@triton.jit(
    do_not_specialize=[
        'T', 'H', 'R', 'W', 'N', 'length', 'lines', 'x_b', 'x_t', 'x_h', 'y_b', 'y_t', 'y_h',
    ]
)  # fmt: skip
def retention_line_kernel(
    x,  # (B, T, H, K), any strides that are multiples of ALIGN, the last one 1
    y,  # (B, T, H, V)
    log_gamma,  # (H,), float32
    states,  # (1 or 2, B, H, N - 1, lines, K, V), in the dtype of products
    T,
    H,
    R,
    W,
    N,  # tiles of a line
    length,  # tokens of a line in a tile
    lines,
    x_b, x_t, x_h, y_b, y_t, y_h,
    ALIGN: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    L: tl.constexpr,  # at least length
    BK: tl.constexpr,
    BV: tl.constexpr,
    VERTICAL: tl.constexpr,  # lines are columns
    SEEN: tl.constexpr,
):  # fmt: skip
    """Sums of x y^T over the tokens of a line before each tile but the first, decayed up to it.

    Or behind each tile but the last, or if SEEN is BOTH the two, one after the other in memory.
    """
    batch, line, h = place(tl.program_id(0), lines, H)
    column = tl.program_id(1) * BV
    dtype: tl.constexpr = x.dtype.element_ty
    x += (batch * x_b + h * x_h) * ALIGN
    y += (batch * y_b + h * y_h) * ALIGN
    log2 = load_log2(log_gamma, h)
    behind = tl.program_id(2)
    if SEEN == BEHIND:
        behind += 1
    across = decay(log2, length)
    step = tl.arange(0, L)
    decays = decay(log2, tl.where(behind == 1, step, length - 1 - step))
    index = tl.program_id(2) * (tl.num_programs(0).to(tl.int64) // lines)
    index = ((index + batch * H + h) * (N - 1)) * lines + line
    i = tl.arange(0, BK)[:, None]
    c = column + tl.arange(0, BV)[None, :]
    states += i * V + c
    state = tl.zeros((BK, BV), tl.float32)
    for m in range(N - 1):
        n = tl.where(behind == 1, N - 1 - m, m)
        position = n * length + step
        if VERTICAL:
            number, exist = tokens_at(position, line, R, W, T)
        else:
            number, exist = tokens_at(line, position, R, W, T)
        exist = exist & (step < length)
        b_x = as_operand(load_tokens(x, x_t * ALIGN, number, exist, 0, K, BK), dtype)
        b_y = load_tokens(y, y_t * ALIGN, number, exist, column, V, BV).to(tl.float32)
        decayed = operand(b_y * decays[:, None], dtype)
        state = add_product(state * across, tl.trans(b_x), decayed, dtype)
        slot = index + (n - behind) * lines
        p = states + slot * (K * V)
        tl.store(p, cast(state, p), mask=(i < K) & (c < V))


@triton.jit
def load_lines(p, start, stop, e, STATE: tl.constexpr, LINES: tl.constexpr):
    """States of lines start .. stop - 1, (LINES, elements), float32; 0 beyond them."""
    line = start + tl.arange(0, LINES)
    mask = (line < stop)[:, None] & (e < STATE)[None, :]
    x = tl.load(p + line.to(tl.int64)[:, None] * STATE + e[None, :], mask=mask, other=0.0)
    return x.to(tl.float32)


@triton.jit
def store_lines(p, x, start, stop, e, STATE: tl.constexpr, LINES: tl.constexpr):
    """Store what `load_lines` loads."""
    line = start + tl.arange(0, LINES)
    mask = (line < stop)[:, None] & (e < STATE)[None, :]
    tl.store(p + line.to(tl.int64)[:, None] * STATE + e[None, :], cast(x, p), mask=mask)


@triton.jit(do_not_specialize=['H', 'slots', 'lines', 'N', 'length'])
def retention_mix_kernel(
    states,  # (kinds, B, H, slots, lines, K, V)
    mixed,  # the same
    log_gamma,  # (H,), float32
    H,
    slots,
    lines,
    N,  # tiles
    length,  # lines of a tile
    STATE: tl.constexpr,  # K * V
    LINES: tl.constexpr,  # at least length
    BLOCK: tl.constexpr,
    SEEN: tl.constexpr,
    ACROSS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Sums of the states of the lines that are seen, decayed from line to line.

    Lines of the same tile only, unless ACROSS.
    """
    row = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    log2 = load_log2(log_gamma, row // slots % H)
    states += row * lines * STATE
    mixed += row * lines * STATE
    i = tl.arange(0, LINES)
    distance = i[:, None] - i[None, :]
    decays = decay(log2, distance)
    if SEEN == BEFORE:
        decays = tl.where(distance >= 0, decays, 0.0)
    elif SEEN == BEHIND:
        decays = tl.where(distance <= 0, decays, 0.0)
    decays = operand(decays, DTYPE)
    across = decay(log2, length)
    from_before = decay(log2, i + 1)
    from_behind = decay(log2, length - i)
    from_last = decay(log2, length - 1 - i)
    from_first = decay(log2, i)
    carried = tl.zeros((BLOCK,), tl.float32)
    for m in range(N):
        n = m if SEEN == BEFORE else N - 1 - m
        start = n * length
        stop = tl.minimum(start + length, lines)
        x = load_lines(states, start, stop, e, STATE, LINES)
        y = product(decays, operand(x, DTYPE), DTYPE)
        if ACROSS:
            if SEEN == BEFORE:
                y += from_before[:, None] * carried[None, :]
                carried = carried * across + tl.sum(x * from_last[:, None], 0)
            else:
                y += from_behind[:, None] * carried[None, :]
                carried = carried * across + tl.sum(x * from_first[:, None], 0)
        store_lines(mixed, y, start, stop, e, STATE, LINES)
    if ACROSS and SEEN == BOTH:
        tl.debug_barrier()  # what other threads have stored is read again
        carried = tl.zeros((BLOCK,), tl.float32)
        for n in range(N):
            start = n * length
            stop = tl.minimum(start + length, lines)
            x = load_lines(states, start, stop, e, STATE, LINES)
            y = load_lines(mixed, start, stop, e, STATE, LINES)
            y += from_before[:, None] * carried[None, :]
            carried = carried * across + tl.sum(x * from_last[:, None], 0)
            store_lines(mixed, y, start, stop, e, STATE, LINES)
