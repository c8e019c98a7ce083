"""Triton kernel of retention on grids, and what launches all that a pass takes.

A block of tokens is BY rows and BX columns and one program's, a tile some blocks. Otherwise as in
kernels_triton_grid_states.py. README.md of this folder, Implementation in Triton, has the formulas.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from linvis_ops._chunks import Rows, rows_of
from linvis_ops._sizes import ceil_div, next_power_of_two
from linvis_ops._triton import on_device
from linvis_ops._triton_math import exp2
from linvis_ops._triton_tiles import add_product, as_operand, cast, operand, place, product
from linvis_ops.retention.kernels_triton import decay, load_log2
from linvis_ops.retention.kernels_triton_grid_states import (
    BEFORE,
    BEHIND,
    BOTH,
    load_tokens,
    retention_line_kernel,
    retention_mix_kernel,
    tokens_at,
)
from linvis_ops.retention.launch import is_even
from linvis_ops.retention.launch_grid import GridLaunch, launch_for, rule_for

# Elements of a state in one program of the mixture, for bfloat16 and for longer factors.
MIX_ELEMENTS = (64, 16)


@triton.jit
def steps_to_edge(local, ahead, B: tl.constexpr):
    """Steps from each of B steps to the edge of its block, the last one if ahead, or the first."""
    return tl.where(ahead, B - 1 - local, local)


@triton.jit
def near_decays(
    log2, d_y, d_x, BY: tl.constexpr, BX: tl.constexpr, SEEN: tl.constexpr
):  # fmt: skip
    """Decays between the tokens of two blocks, [query, key]; the first is d_y, d_x further."""
    token = tl.arange(0, BY * BX)
    row = token // BX
    col = token % BX
    y = (row + d_y * BY).to(tl.float32)[:, None] - row.to(tl.float32)[None, :]
    x = (col + d_x * BX).to(tl.float32)[:, None] - col.to(tl.float32)[None, :]
    decays = exp2(log2 * (tl.abs(y) + tl.abs(x)))
    if SEEN == BEFORE:
        decays = tl.where(tl.minimum(y, x) >= 0, decays, 0.0)
    elif SEEN == BEHIND:
        decays = tl.where(tl.maximum(y, x) <= 0, decays, 0.0)
    return decays


@triton.jit
def read_states(
    p_q, stride, states, y, x, R, W, T, lines, edge, log2, column, dtype: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BY: tl.constexpr, BX: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, ROWS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """What the tokens of a block read of the states of their lines, (tokens, BV).

    Args:
        p_q: Queries of one head, (T, K).
        stride: Of tokens.
        states: Of the first line of the block, (.., K, V) or, TRANSPOSED, (.., V, K).
        y: First row of the block.
        x: First column of the block.
        R: Rows.
        W: Columns.
        T: Tokens.
        lines: Lines of the block that exist.
        edge: Place along the lines up to which states are decayed.
        log2: As `load_log2` gives it.
        column: First value channel.
        dtype: Of the products.
        K: Key channels.
        V: Value channels.
        BY: Rows of the block.
        BX: Columns of the block.
        BK: Key channels of a tile.
        BV: Value channels of a tile.
        ROWS: Lines are rows.
        TRANSPOSED: See states.
    """
    # a product for each line; keys in parts, since there is a state for each line
    PART: tl.constexpr = 16
    N: tl.constexpr = BY if ROWS else BX
    M: tl.constexpr = BX if ROWS else BY
    line = tl.arange(0, N)
    step = tl.arange(0, M)
    if ROWS:
        number, exist = tokens_at(y + line[:, None], x + step[None, :], R, W, T)
        distance = x + step - edge
    else:
        number, exist = tokens_at(y + step[None, :], x + line[:, None], R, W, T)
        distance = y + step - edge
    factor = decay(log2, distance)[None, :, None]
    p_q += (number * stride)[:, :, None]
    states += line[:, None, None] * (K * V)
    c = column + tl.arange(0, BV)
    out = tl.zeros((N, M, BV), tl.float32)
    for part in range(BK // PART):
        i = part * PART + tl.arange(0, PART)
        inside = exist[:, :, None] & (i < K)[None, None, :]
        b_q = tl.load(p_q + i[None, None, :], mask=inside, other=0.0).to(tl.float32)
        inside = (line < lines)[:, None, None]
        if TRANSPOSED:
            inside = inside & (c < V)[None, :, None] & (i < K)[None, None, :]
            state = tl.load(states + c[None, :, None] * K + i[None, None, :], inside, other=0.0)
            state = tl.permute(state, (0, 2, 1))
        else:
            inside = inside & (i < K)[None, :, None] & (c < V)[None, None, :]
            state = tl.load(states + i[None, :, None] * V + c[None, None, :], inside, other=0.0)
        out = add_product(out, operand(b_q * factor, dtype), as_operand(state, dtype), dtype)
    if not ROWS:
        out = tl.permute(out, (1, 0, 2))
    return tl.reshape(out, (BY * BX, BV))


@triton.jit(
    do_not_specialize=[
        'T', 'H', 'R', 'W', 'tile_rows', 'tile_columns', 'scale', 'q_b', 'q_t', 'q_h', 'k_b', 'k_t',
        'k_h', 'v_b', 'v_t', 'v_h', 'r_b', 'r_t', 'r_h',
    ]
)  # fmt: skip
def retention_block_kernel(
    q,  # (B, T, H, K), any strides that are multiples of ALIGN, the last one 1
    k,
    v,  # (B, T, H, V)
    r,  # (B, T, H, V) or None: queries for which v are the keys and k the values
    log_gamma,  # (H,), float32
    o,  # (B, T, H, V), contiguous
    other_o,  # (B, T, H, K), contiguous, of r; or None
    of_columns,  # mixed states of columns, (1 or 2, B, H, tiles down - 1, W, K, V), or None
    of_rows,  # of rows, (1 or 2, B, H, tiles across - 1, rows, K, V), or None
    T,
    H,
    R,
    W,
    tile_rows,  # in blocks
    tile_columns,
    scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, r_b, r_t, r_h,
    ALIGN: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BY: tl.constexpr,
    BX: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SEEN: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # states are (V, K)
):  # fmt: skip
    """Outputs of one block."""
    down = tl.cdiv(R, BY)  # blocks, without one that has nothing but the class token
    across = tl.cdiv(W, BX)
    rows = R + T - R * W
    extra = tl.cdiv(rows, BY) - down
    batch, part, h = place(tl.program_id(0), down * across + extra, H)
    by = part // across
    bx = tl.where(by == down, across - 1, part % across)
    ty = by // tile_rows
    tx = bx // tile_columns
    column = tl.program_id(1) * BV
    dtype: tl.constexpr = q.dtype.element_ty
    q += (batch * q_b + h * q_h) * ALIGN
    k += (batch * k_b + h * k_h) * ALIGN
    v += (batch * v_b + h * v_h) * ALIGN
    log2 = load_log2(log_gamma, h)

    token = tl.arange(0, BY * BX)
    row = token // BX
    col = token % BX
    number, exist = tokens_at(by * BY + row, bx * BX + col, R, W, T)
    b_q = as_operand(load_tokens(q, q_t * ALIGN, number, exist, 0, K, BK), dtype)
    b_r = None
    if r is not None:
        r += (batch * r_b + h * r_h) * ALIGN
        b_r = as_operand(load_tokens(r, r_t * ALIGN, number, exist, column, V, BV), dtype)

    # blocks of the tile that are seen: those of a rectangle, and that of the class token
    first_y = ty * tile_rows
    first_x = tx * tile_columns
    last_y = tl.minimum(first_y + tile_rows, down)
    last_x = tl.minimum(first_x + tile_columns, across)
    more = tl.where((first_y + tile_rows > down) & (last_x == across), extra, 0)
    if SEEN == BEFORE:
        last_y = tl.minimum(last_y, by + 1)
        last_x = tl.minimum(last_x, bx + 1)
        more = tl.where(by == down, more, 0)
    elif SEEN == BEHIND:
        first_y = by
        first_x = bx
    wide = last_x - first_x
    count = tl.maximum(last_y - first_y, 0) * wide
    out = tl.zeros((BY * BX, BV), tl.float32)
    other_out = tl.zeros((BY * BX, BK), tl.float32)
    behind = SEEN == BEHIND
    of_q = decay(log2, steps_to_edge(row, behind, BY) + steps_to_edge(col, behind, BX))
    of_k = decay(log2, steps_to_edge(row, not behind, BY) + steps_to_edge(col, not behind, BX))
    for i in range(count + more):
        k_y = tl.where(i < count, first_y + i // wide, down)
        k_x = tl.where(i < count, first_x + i % wide, across - 1)
        k_number, k_exist = tokens_at(k_y * BY + row, k_x * BX + col, R, W, T)
        b_k = as_operand(load_tokens(k, k_t * ALIGN, k_number, k_exist, 0, K, BK), dtype)
        b_v = as_operand(load_tokens(v, v_t * ALIGN, k_number, k_exist, column, V, BV), dtype)
        d_y = by - k_y
        d_x = bx - k_x
        if (d_y != 0) & (d_x != 0):
            # from edge to edge, and from tokens to the edges: no exponential for each pair
            if SEEN == BOTH:
                of_q = decay(
                    log2, steps_to_edge(row, d_y < 0, BY) + steps_to_edge(col, d_x < 0, BX)
                )
                of_k = decay(
                    log2, steps_to_edge(row, d_y > 0, BY) + steps_to_edge(col, d_x > 0, BX)
                )
            steps = (tl.abs(d_y) - 1) * BY + (tl.abs(d_x) - 1) * BX + 2
            decays = (of_q * decay(log2, steps))[:, None] * of_k[None, :]
        else:
            decays = near_decays(log2, d_y, d_x, BY, BX, SEEN)
        weight = product(b_q, tl.trans(b_k), dtype) * decays
        out = add_product(out, operand(weight, dtype), b_v, dtype)
        if r is not None:
            weight = product(b_r, tl.trans(b_v), dtype) * decays
            other_out = add_product(other_out, operand(weight, dtype), b_k, dtype)

    heads = tl.num_programs(0).to(tl.int64) // (down * across + extra)  # of all sequences
    FIRST_SIDE: tl.constexpr = 1 if SEEN == BEHIND else 0
    LAST_SIDE: tl.constexpr = 0 if SEEN == BEFORE else 1
    if of_columns is not None:
        tiles = tl.cdiv(down + extra, tile_rows)
        for side in range(FIRST_SIDE, LAST_SIDE + 1):
            if (side == 0) & (ty > 0) | (side == 1) & (ty < tiles - 1):
                # kinds, sequences, heads, tiles, lines
                kind = (side - FIRST_SIDE) * heads + batch * H + h
                p = of_columns + ((kind * (tiles - 1) + ty - 1 + side) * W + bx * BX) * (K * V)
                edge = (ty + side) * tile_rows * BY - 1 + side
                out += read_states(
                    q, q_t * ALIGN, p, by * BY, bx * BX, R, W, T, W - bx * BX, edge, log2,
                    column, dtype, K, V, BY, BX, BK, BV, False, TRANSPOSED,
                )  # fmt: skip
                if r is not None:
                    other_out += read_states(
                        r, r_t * ALIGN, p, by * BY, bx * BX, R, W, T, W - bx * BX, edge,
                        log2, 0, dtype, V, K, BY, BX, BV, BK, False, not TRANSPOSED,
                    )  # fmt: skip
    if of_rows is not None:
        tiles = tl.cdiv(across, tile_columns)
        for side in range(FIRST_SIDE, LAST_SIDE + 1):
            if (side == 0) & (tx > 0) | (side == 1) & (tx < tiles - 1):
                # kinds, sequences, heads, tiles, lines
                kind = (side - FIRST_SIDE) * heads + batch * H + h
                p = of_rows + ((kind * (tiles - 1) + tx - 1 + side) * rows + by * BY) * (K * V)
                edge = (tx + side) * tile_columns * BX - 1 + side
                out += read_states(
                    q, q_t * ALIGN, p, by * BY, bx * BX, R, W, T, rows - by * BY, edge, log2,
                    column, dtype, K, V, BY, BX, BK, BV, True, TRANSPOSED,
                )  # fmt: skip
                if r is not None:
                    other_out += read_states(
                        r, r_t * ALIGN, p, by * BY, bx * BX, R, W, T, rows - by * BY, edge,
                        log2, 0, dtype, V, K, BY, BX, BV, BK, True, not TRANSPOSED,
                    )  # fmt: skip

    c = column + tl.arange(0, BV)[None, :]
    o += ((batch * T + number) * H + h)[:, None] * V + c
    tl.store(o, cast(out * scale, o), mask=exist[:, None] & (c < V))
    if r is not None:
        c = tl.arange(0, BK)[None, :]
        other_o += ((batch * T + number) * H + h)[:, None] * K + c
        tl.store(other_o, cast(other_out * scale, other_o), mask=exist[:, None] & (c < K))


class Grid:
    """Retention on grids of one shape: of forward and backward pass, which differ in arguments."""

    def __init__(
        self, tokens: int, columns: int, log_gamma: Tensor, bidirectional: bool, launch: GridLaunch
    ) -> None:
        self.tokens, self.columns, self.rows = tokens, columns, tokens // columns
        self.all_rows = -(-tokens // columns)
        self.log_gamma = log_gamma.contiguous()
        self.bidirectional = bidirectional
        self.launch = launch
        self.tiles = (
            -(-self.all_rows // launch.tile_rows), -(-columns // launch.tile_columns)
        )  # fmt: skip

    def seen(self, reverse: bool) -> int:
        """Which tokens are seen."""
        return (BOTH if self.bidirectional else BEHIND if reverse else BEFORE).value

    def states(self, keys: Rows, reverse: bool) -> tuple[Tensor | None, Tensor | None]:
        """Mixed states of columns and of rows; None where there is one tile in that direction."""
        launch = self.launch
        of_columns = of_rows = None
        down, across = self.tiles
        if down > 1:
            lines, length = self.columns, launch.tile_rows
            of_columns = self._mixed(
                keys, reverse, down, length, lines, across, launch.tile_columns, vertical=True
            )
        if across > 1:
            lines, length = self.all_rows, launch.tile_columns
            of_rows = self._mixed(
                keys, reverse, across, length, lines, down, launch.tile_rows, vertical=False
            )
        return of_columns, of_rows

    def _mixed(
        self,
        keys: Rows,
        reverse: bool,
        tiles: int,
        length: int,
        lines: int,
        other_tiles: int,
        other_length: int,
        *,
        vertical: bool,
    ) -> Tensor:
        launch, (x, y) = self.launch, keys.tensors
        batch, _, heads, key_width = x.shape
        value_width = y.shape[-1]
        short = x.dtype == torch.bfloat16
        kinds = 2 if self.bidirectional else 1
        shape = (kinds, batch, heads, tiles - 1, lines, key_width, value_width)
        states, mixed = (
            x.new_empty(shape, dtype=torch.bfloat16 if short else torch.float32) for _ in range(2)
        )
        bk, bv = launch.widths(key_width, value_width, x.dtype)
        seen = self.seen(reverse)
        retention_line_kernel[(batch * heads * lines, ceil_div(value_width, bv), kinds)](
            x, y, self.log_gamma, states, self.tokens, heads, self.rows, self.columns, tiles,
            length, lines, *keys.strides, ALIGN=keys.align, K=key_width, V=value_width,
            L=max(next_power_of_two(length), 16), BK=bk, BV=bv, VERTICAL=vertical, SEEN=seen,
            num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
        state = key_width * value_width
        block = MIX_ELEMENTS[0 if short else 1]
        grid = (kinds * batch * heads * (tiles - 1), ceil_div(state, block))
        dtype = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(x.dtype, tl.float32)
        retention_mix_kernel[grid](
            states, mixed, self.log_gamma, heads, tiles - 1, lines, other_tiles, other_length,
            STATE=state, LINES=max(next_power_of_two(other_length), 16), BLOCK=block,
            SEEN=seen, ACROSS=vertical and other_tiles > 1, DTYPE=dtype, num_warps=2,
        )  # fmt: skip
        return mixed

    def out(
        self,
        tokens: Rows,
        states: tuple[Tensor | None, Tensor | None],
        scale: float,
        *,
        reverse: bool = False,
        transposed: bool = False,
    ) -> list[Tensor]:
        """Retention of queries, keys and values, and of other queries with these two exchanged."""
        launch, (q, k, v, *r) = self.launch, tokens.tensors
        batch, _, heads, key_width = q.shape
        value_width = v.shape[-1]
        o, other_o = v.new_empty(v.shape), k.new_empty(k.shape) if r else None
        bk, bv = launch.widths(key_width, value_width, q.dtype)
        by, bx = launch.block_rows, launch.block_columns
        blocks = -(-self.rows // by) * -(-self.columns // bx)
        blocks += -(-self.all_rows // by) - -(-self.rows // by)
        retention_block_kernel[(batch * heads * blocks, ceil_div(value_width, bv))](
            q, k, v, r[0] if r else None, self.log_gamma, o, other_o, *states, self.tokens, heads,
            self.rows, self.columns, launch.tile_rows // by, launch.tile_columns // bx, scale,
            *tokens.strides, *(() if r else (0, 0, 0)), ALIGN=tokens.align, K=key_width,
            V=value_width, BY=by, BX=bx, BK=bk, BV=bv, SEEN=self.seen(reverse),
            TRANSPOSED=transposed, num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip
        return [o] if other_o is None else [o, other_o]


def _some(rows: Rows, *numbers: int) -> Rows:
    """Some of the tensors, in this order."""
    strides = [stride for n in numbers for stride in rows.strides[3 * n : 3 * n + 3]]
    return Rows(tuple(rows.tensors[n] for n in numbers), tuple(strides), rows.align)


def _grid(
    rows: Rows, columns: int, log_gamma: Tensor, bidirectional: bool, launch: GridLaunch | None
) -> Grid:
    q, _, v, *_ = rows.tensors
    tokens = q.shape[1]
    if launch is None:
        rule = rule_for(q, v, even=is_even(rows))
        launch = launch_for(-(-tokens // columns), columns, rule)
    return Grid(tokens, columns, log_gamma, bidirectional, launch)


def retention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gamma: Tensor,
    columns: int,
    bidirectional: bool = False,
    scale: float | None = None,
    launch: GridLaunch | None = None,
) -> Tensor:
    """Output (B, T, H, V), contiguous, in the dtype of v."""
    rows = rows_of(q, k, v, length=1)
    grid = _grid(rows, columns, log_gamma, bidirectional, launch)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with on_device(v):
        states = grid.states(_some(rows, 1, 2), reverse=False)
        (o,) = grid.out(rows, states, scale)
    return o


def retention_backward(
    go: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gamma: Tensor,
    columns: int,
    bidirectional: bool = False,
    scale: float | None = None,
    launch: GridLaunch | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by q, k and v, contiguous, each in the dtype of its tensor."""
    rows = rows_of(q, k, v, go, length=1)
    grid = _grid(rows, columns, log_gamma, bidirectional, launch)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with on_device(v):
        states = grid.states(_some(rows, 1, 2), reverse=False)
        (dq,) = grid.out(_some(rows, 3, 2, 1), states, scale, transposed=True)
        states = grid.states(_some(rows, 0, 3), reverse=True)
        _, values = grid.launch.widths(v.shape[-1], q.shape[-1], q.dtype)
        if values >= q.shape[-1] and not (bidirectional and max(grid.tiles) > 1):
            dk, dv = grid.out(_some(rows, 2, 3, 0, 1), states, scale, reverse=True, transposed=True)
        else:
            (dk,) = grid.out(_some(rows, 2, 3, 0), states, scale, reverse=True, transposed=True)
            (dv,) = grid.out(_some(rows, 1, 0, 3), states, scale, reverse=True)
    return dq, dk, dv
