"""Triton kernels of the backward pass of Q-Shift with mixes, without and with a norm.

B batch, T tokens, C channels, M weights. Everything is float32 inside.

Without a norm, a thread walks along one line of the grid, a row for channels with neighbours in the
row and a column for those with neighbours in the column, and keeps the gradients of one token for
the next: nothing is loaded twice. With a norm, a program takes tiles of all channels, one after
another, because the norm's gradient has sums over the channels of a token.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from linvis_ops._sizes import ceil_div, next_power_of_two
from linvis_ops._triton import on_device
from linvis_ops._triton_sum import sum_rows
from linvis_ops.q_shift.kernels_triton import neighbours, vector_size
from linvis_ops.q_shift_mix.kernels_triton import load_rows, load_stats, warps_for

# Lines of a program, its channels (64 bytes in 16 bits), tokens of a line that are under way.
LINES = 8
LINE_CHANNELS = 32
LINE_STAGES = 4
# Lines are cut into pieces until there are so many programs, but not shorter than LEAST_STEPS.
LINE_PROGRAMS = 640
LEAST_STEPS = 8
# Each program leaves sums to add up. Where there would be more lots of them, programs take several
# strips of LINES lines, one after another.
MOST_RUNS = 2048

# With a norm: elements of a tile, where a thread holds one vector and its running sums.
TILE_ELEMENTS = 1024
# As many programs as a large GPU runs at once, but for their registers. Each writes a partial sum
# for every channel, so more of them cost traffic.
TILE_PROGRAMS = 384
# Tiles that are under way, as far as they fit into the shared memory of most GPUs.
TILE_STAGES = 3
TILE_BYTES = 96 * 1024


@triton.jit
def choose_rows(condition, first, second):
    """Of two parts of several rows the first where the condition holds, else the second."""
    chosen = ()
    for i in tl.static_range(len(first)):
        chosen = chosen + (tl.where(condition, first[i], second[i]),)
    return chosen


@triton.jit
def to_float(tiles):
    """Each of several tiles in float32."""
    result = ()
    for i in tl.static_range(len(tiles)):
        result = result + (tiles[i].to(tl.float32),)
    return result


@triton.jit
def mix_gradients(b_grads, b_others, b_y, b_mus, sums):
    """Gradient by y of a tile, and sums for the gradients by the weights with the tile added."""
    b_dy = b_others[0]
    for i in tl.static_range(1, len(b_others)):
        b_dy += b_others[i]
    new_sums = ()
    for i in tl.static_range(len(b_grads)):
        difference = b_grads[i] - b_others[i]
        b_dy += b_mus[i] * difference
        # over all tokens, g (y - shift(y)) and (g - adjoint(g)) y have one sum
        new_sums = new_sums + (sums[i] + b_y * difference,)
    return b_dy, new_sums


@triton.jit
def walk_lines(
    grads, x, dx, number, c, in_part, behind, passes, b_weights, sums, batch, rows, columns, down,
    lines, steps, begin, end, C: tl.constexpr, HEAD: tl.constexpr, CLASS_TOKEN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of the steps begin..end - 1 of numbered lines: dx, and `sums` with theirs."""
    stride = tl.where(down, columns, 1).to(tl.int64) * C
    end_x = end
    end_grads = tl.minimum(end, steps - behind)
    first_step = 0
    if CLASS_TOKEN:
        picture = number // (lines + 1)
        line = number % (lines + 1)
        # every step on this line is the class token
        is_class = line == lines
        token = tl.where(is_class, rows * columns, line * tl.where(down, 1, columns))
        token += picture.to(tl.int64) * (rows * columns + 1)
        stride = tl.where(is_class, 0, stride)
        end_x = tl.where(is_class, 1, end)
        end_grads = tl.where(is_class, 2 - behind, end_grads)
        first_step = tl.where(is_class, -1, 0)
    else:
        picture = number // lines
        line = number % lines
        token = picture.to(tl.int64) * (rows * columns) + line * tl.where(down, 1, columns)
    mask = (picture < batch) & in_part
    p_x = token * C + c + begin * stride
    p_grads = p_x + (behind - 1) * stride
    b_before = load_rows(grads, p_grads, mask & (begin - 1 + behind >= first_step))
    for step in tl.range(begin, end, num_stages=STAGES):
        p_grads += stride
        b_loaded = load_rows(grads, p_grads, mask & (step < end_grads))
        b_y = tl.load(x + p_x, mask=mask & (step < end_x), other=0.0).to(tl.float32)
        b_other = b_before
        if HEAD % 4 != 0:
            # a difference that is exactly 0, whatever the token before has
            b_other = choose_rows(passes, b_loaded, b_before)
        b_dx, sums = mix_gradients(to_float(b_loaded), to_float(b_other), b_y, b_weights, sums)
        tl.store(dx + p_x, b_dx.to(dx.dtype.element_ty), mask=mask & (step < end_x))
        b_before = b_loaded
        p_x += stride
    return sums


@triton.jit(
    do_not_specialize=[
        'batch', 'rows', 'columns', 'length_along', 'length_down', 'strips_along', 'strips_down'
    ]
)  # fmt: skip
def q_shift_mix_bwd_kernel(
    grads,  # M times (B, T, C), contiguous
    x,  # (B, T, C), contiguous
    mus,  # M times (C,)
    dx,  # (B, T, C), contiguous
    partial,  # (runs of tokens, M, C), float32
    batch,
    rows,
    columns,
    length_along,  # tokens of a piece of a row
    length_down,  # tokens of a piece of a column
    strips_along,  # strips of BL lines of a program, one after another
    strips_down,
    C: tl.constexpr,
    HEAD: tl.constexpr,
    CLASS_TOKEN: tl.constexpr,
    BL: tl.constexpr,  # lines
    BC: tl.constexpr,
    VEC: tl.constexpr,
    STAGES: tl.constexpr,
    SEVERAL: tl.constexpr,  # whether there are programs of more than one strip
):
    """Gradients of pieces of strips: dx, and sums over the pieces for the weights.

    The lines of all pictures are numbered through. A class token is one more line of one token,
    which is its own neighbour. There are as many programs for rows as for columns; where one of the
    two needs fewer, the last ones have no lines and write zeros for sums.
    """
    M: tl.constexpr = len(mus)
    quarter: tl.constexpr = HEAD // 4
    DOWN: tl.constexpr = 2 * quarter  # channels of a head with neighbours in the column
    ALONG: tl.constexpr = HEAD - DOWN  # the others: neighbours in the row, or none
    parts_along: tl.constexpr = (ALONG + BC - 1) // BC
    parts: tl.constexpr = parts_along + (DOWN + BC - 1) // BC  # of a head
    part = tl.program_id(0) % (parts * (C // HEAD))
    run = tl.program_id(0) // (parts * (C // HEAD))
    down = part % parts >= parts_along
    n = (part % parts - tl.where(down, parts_along, 0)) * BC + tl.arange(0, BC)[None, :]
    in_part = n < tl.where(down, DOWN, ALONG)
    c = n + (part // parts * HEAD + tl.where(down, DOWN, 0))
    if ALONG > DOWN:
        c += tl.where(down | (n < DOWN), 0, DOWN)
    # said of the first channel of a vector, so that the compiler sees one answer for it
    group = tl.zeros_like(c) + 4
    if quarter > 0:
        group = c // VEC * VEC % HEAD // quarter
    # The token itself, whose gradient is wanted, comes one step behind the gradients that are
    # loaded, and its neighbour with them; or it comes with them, and its neighbour is behind.
    behind = ((group % 2 == 0) & (group < 4)).to(tl.int32)
    # what passes is walked along like the second quarter, but is its own neighbour
    passes = group > 3
    b_mus = load_rows(mus, c, in_part)

    lines = tl.where(down, columns, rows)
    steps = tl.where(down, rows, columns)
    length = tl.where(down, length_down, length_along)
    pieces = (steps + length - 1) // length
    begin = run % pieces * length
    end = tl.minimum(begin + length, steps)
    b_weights = ()
    for i in tl.static_range(M):
        # of the loaded gradients: those of the token, or those of its neighbour
        b_weight = tl.where(behind > 0, 1 - b_mus[i], b_mus[i])
        b_weights = b_weights + (tl.where(passes, 1.0, b_weight),)
    sums = (tl.zeros((BL, BC), tl.float32),) * M
    if SEVERAL:
        strips = tl.where(down, strips_down, strips_along)
        for i in range(strips):
            number = (run // pieces * strips + i) * BL + tl.arange(0, BL)[:, None]
            sums = walk_lines(
                grads, x, dx, number, c, in_part, behind, passes, b_weights, sums, batch, rows,
                columns, down, lines, steps, begin, end, C, HEAD, CLASS_TOKEN, STAGES,
            )  # fmt: skip
    else:
        number = run // pieces * BL + tl.arange(0, BL)[:, None]
        sums = walk_lines(
            grads, x, dx, number, c, in_part, behind, passes, b_weights, sums, batch, rows,
            columns, down, lines, steps, begin, end, C, HEAD, CLASS_TOKEN, STAGES,
        )  # fmt: skip
    # where the token is behind, the differences are those of the neighbour from the token
    sign = tl.where(passes, 0.0, tl.where(behind > 0, -1.0, 1.0))
    p_partial = partial + run.to(tl.int64) * (M * C) + c
    for i in tl.static_range(M):
        tl.store(p_partial + i * C, tl.sum(sums[i], 0, keep_dims=True) * sign, mask=in_part)


@triton.jit
def load_gradients(grads, own, other, valid, inside, b_y, b_mus, sums):
    """`mix_gradients` of tiles at two places, each pair loaded when its turn comes."""
    b_dy = tl.zeros_like(b_y)
    new_sums = ()
    for i in tl.static_range(len(grads)):
        b_g = tl.load(grads[i] + own, mask=valid, other=0.0).to(tl.float32)
        b_s = tl.load(grads[i] + other, mask=inside, other=0.0).to(tl.float32)
        difference = b_g - b_s
        b_dy += b_s + b_mus[i] * difference
        new_sums = new_sums + (sums[i] + b_y * difference,)
    return b_dy, new_sums


@triton.jit(do_not_specialize=['total', 'T', 'rows', 'columns', 'tiles'])
def q_shift_mix_norm_bwd_kernel(
    grads,  # M times (B, T, C), contiguous
    x,  # (B, T, C), contiguous
    mus,  # M times (C,)
    weight,  # (C,)
    bias,  # (C,)
    stats,  # (2, B, T)
    dx,  # (B, T, C), contiguous
    partial,  # (runs of tokens, M + 2, C), float32
    total,  # B * T
    T,
    rows,
    columns,
    tiles,  # of a program, one after another
    C: tl.constexpr,
    HEAD: tl.constexpr,
    CLASS_TOKEN: tl.constexpr,
    BT: tl.constexpr,
    BC: tl.constexpr,  # at least C
    VEC: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of one run of tokens: dx, and sums over the run for the weights of channels."""
    M: tl.constexpr = len(mus)
    run = tl.program_id(0)
    c = tl.arange(0, BC)[None, :]
    b_mus = load_rows(mus, c, c < C)
    b_weight, b_bias = load_rows((weight, bias), c, c < C)
    zero = tl.zeros((BT, BC), tl.float32)
    dmus = (zero,) * M
    dweight = zero
    dbias = zero
    for tile in tl.range(tiles, num_stages=STAGES):
        g = (run * tiles + tile) * BT + tl.arange(0, BT)[:, None]
        valid = (g < total) & (c < C)
        distance, inside = neighbours(g, c, T, rows, columns, HEAD, VEC, -1, CLASS_TOKEN)
        own = g.to(tl.int64) * C + c
        other = (g + distance).to(tl.int64) * C + c
        b_x = tl.load(x + own, mask=valid, other=0.0).to(tl.float32)
        mean, scale = load_stats(stats, g, total)
        xhat = (b_x - mean) * scale
        b_y = xhat * b_weight + b_bias
        b_dy, dmus = load_gradients(grads, own, other, valid, valid & inside, b_y, b_mus, dmus)
        dweight += b_dy * xhat
        dbias += b_dy
        # zero in channels beyond C, as dy is
        dxhat = b_dy * b_weight
        along = tl.sum(dxhat * xhat, 1, keep_dims=True) / C
        b_dx = (dxhat - tl.sum(dxhat, 1, keep_dims=True) / C - xhat * along) * scale
        tl.store(dx + own, b_dx.to(dx.dtype.element_ty), mask=valid)
    p_partial = partial + run * ((M + 2) * C) + c
    for i in tl.static_range(M):
        tl.store(p_partial + i * C, tl.sum(dmus[i], 0, keep_dims=True), mask=c < C)
    tl.store(p_partial + M * C, tl.sum(dweight, 0, keep_dims=True), mask=c < C)
    tl.store(p_partial + (M + 1) * C, tl.sum(dbias, 0, keep_dims=True), mask=c < C)


class Division(NamedTuple):
    """Division of the lines of a grid into programs, each way: along rows, down columns.

    Attributes:
        lengths: Tokens of a piece of a line.
        strips: Strips of LINES lines of a program.
        runs: Programs for each part of the channels: the more of both ways.
    """

    lengths: tuple[int, int]
    strips: tuple[int, int]
    runs: int


def divide(batch: int, rows: int, columns: int, class_token: bool, parts: int) -> Division:
    """Division of `batch` grids whose channels are in so many parts."""
    ways = (rows, columns), (columns, rows)  # lines and their lengths
    strips = [ceil_div(batch * (lines + class_token), LINES) for lines, _ in ways]
    of_program = [ceil_div(n, MOST_RUNS) for n in strips]
    groups = [ceil_div(n, of) for n, of in zip(strips, of_program, strict=True)]
    lengths = []
    for n, (_, steps) in zip(groups, ways, strict=True):
        # the way with fewer lines has programs as many as the other, in any case
        pieces = max(ceil_div(LINE_PROGRAMS, n * parts), max(groups) // n)
        lengths.append(max(ceil_div(steps, pieces), LEAST_STEPS))
    runs = max(
        n * ceil_div(steps, length)
        for n, (_, steps), length in zip(groups, ways, lengths, strict=True)
    )
    return Division((lengths[0], lengths[1]), (of_program[0], of_program[1]), runs)


def q_shift_mix_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    mus: Sequence[Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor | None,
    rows: int,
    columns: int,
    heads: int,
) -> tuple[Tensor, Tensor]:
    """Gradient by x (B, T, C), and by all channel weights (M, C): mus, then weight and bias."""
    x = x.contiguous()
    grads = tuple(grad.contiguous() for grad in grads)
    weights = tuple(mu.contiguous() for mu in mus)
    with on_device(x):
        if weight is None or bias is None or stats is None:
            dx, partial = _plain(grads, x, weights, rows, columns, heads)
        else:
            affine = weight.contiguous(), bias.contiguous(), stats.contiguous()
            dx, partial = _with_norm(grads, x, weights, *affine, rows, columns, heads)
    (sums,) = sum_rows(partial)
    return dx, sums.view(-1, x.shape[2])


def _plain(
    grads: tuple[Tensor, ...],
    x: Tensor,
    mus: tuple[Tensor, ...],
    rows: int,
    columns: int,
    heads: int,
) -> tuple[Tensor, Tensor]:
    """dx, and sums for the weights over parts of the tokens, (parts, M C)."""
    batch, tokens, channels = x.shape
    class_token = tokens != rows * columns
    head = channels // heads
    down = head // 4 * 2  # channels with neighbours in the column
    parts = ceil_div(head - down, LINE_CHANNELS) + ceil_div(down, LINE_CHANNELS)
    parts *= heads
    division = divide(batch, rows, columns, class_token, parts)
    dx = torch.empty_like(x)
    partial = x.new_empty((division.runs, len(mus) * channels), dtype=torch.float32)
    vector = vector_size(x, heads)
    q_shift_mix_bwd_kernel[(division.runs * parts,)](
        grads,
        x,
        mus,
        dx,
        partial,
        batch,
        rows,
        columns,
        *division.lengths,
        *division.strips,
        C=channels,
        HEAD=head,
        CLASS_TOKEN=class_token,
        BL=LINES,
        BC=LINE_CHANNELS,
        VEC=vector,
        STAGES=LINE_STAGES,
        SEVERAL=max(division.strips) > 1,
        num_warps=min(LINES * LINE_CHANNELS // vector // 32, 4),
        num_stages=1,
    )
    return dx, partial


def _with_norm(
    grads: tuple[Tensor, ...],
    x: Tensor,
    mus: tuple[Tensor, ...],
    weight: Tensor,
    bias: Tensor,
    stats: Tensor,
    rows: int,
    columns: int,
    heads: int,
) -> tuple[Tensor, Tensor]:
    """dx, and sums for mus, weight and bias over parts of the tokens, (parts, (M + 2) C)."""
    batch, tokens, channels = x.shape
    width = next_power_of_two(channels)
    block = max(TILE_ELEMENTS // width, 1)
    blocks = ceil_div(batch * tokens, block)
    tiles = ceil_div(blocks, TILE_PROGRAMS)
    runs = ceil_div(blocks, tiles)
    dx = torch.empty_like(x)
    partial = x.new_empty((runs, (len(mus) + 2) * channels), dtype=torch.float32)
    # x, gradients and gradients of the neighbours; the stage that is worked on is in registers
    stage_bytes = (1 + 2 * len(grads)) * block * width * x.element_size()
    q_shift_mix_norm_bwd_kernel[(runs,)](
        grads,
        x,
        mus,
        weight,
        bias,
        stats,
        dx,
        partial,
        batch * tokens,
        tokens,
        rows,
        columns,
        tiles,
        C=channels,
        HEAD=channels // heads,
        CLASS_TOKEN=tokens != rows * columns,
        BT=block,
        BC=width,
        VEC=vector_size(x, heads),
        STAGES=TILE_STAGES if (TILE_STAGES - 1) * stage_bytes <= TILE_BYTES else 1,
        num_warps=warps_for(block * width),
        num_stages=1,
    )
    return dx, partial
