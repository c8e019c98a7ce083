"""Retention in plain PyTorch: the definition, its linear-time forms, the gradient.

B batch, T tokens, H heads, K key width, V value width; R rows and W columns of the token grid,
tiles of I rows and J columns, N tiles across. A plain sequence is a grid of one column. A class
token is a row of its own, whose other columns are empty. Derivations: README.md of this folder.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from linvis_ops._dtypes import accumulation_dtype

# Most tokens of a tile, and most columns of it; most tokens where there is one column.
TILE = 256
TILE_COLUMNS = 32
CHUNK = 64


def _decay(log_gamma: Tensor, distance: Tensor) -> Tensor:
    """gamma^distance, (H, *distance.shape): 0 at negative distances, 1 at 0 even for gamma = 0."""
    log_gamma = log_gamma.view(-1, *[1] * distance.dim())
    exponent = torch.where(distance > 0, log_gamma * distance, 0.0)
    return torch.where(distance < 0, -torch.inf, exponent).exp()


def _scale(scale: float | None, q: Tensor) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


def _distance(tokens: int, columns: int, bidirectional: bool, device: torch.device) -> Tensor:
    """Distance (T, T) of each query from each key; -1 where it does not see the key."""
    position = torch.arange(tokens, device=device)
    row, column = position // columns, position % columns
    if tokens % columns:
        column[-1] = columns - 1  # class token
    d_row, d_column = (each[:, None] - each[None, :] for each in (row, column))
    if bidirectional:
        return d_row.abs() + d_column.abs()
    return torch.where((d_row >= 0) & (d_column >= 0), d_row + d_column, -1)


def retention_parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gamma: Tensor,
    columns: int = 1,
    bidirectional: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The definition: a weight for each of the T x T pairs of tokens.

    Args:
        q: Queries, (B, T, H, K).
        k: Keys, (B, T, H, K).
        v: Values, (B, T, H, V).
        log_gamma: Logarithm of the decay of each head, (H,).
        columns: Columns of the token grid, 1 for a plain sequence. T is a multiple, or one more
            with a class token.
        bidirectional: Tokens see all tokens.
        scale: Factor of the output; None: K**-0.5.

    Returns:
        Tensor of shape (B, T, H, V) in the dtype of v; differentiable any number of times, by
        log_gamma too. Takes O(B H T^2) memory.
    """
    dtype = accumulation_dtype(v.dtype)
    distance = _distance(q.shape[1], columns, bidirectional, q.device)
    decay = _decay(log_gamma.to(dtype), distance)  # (H, T, T)
    weight = torch.einsum('bthk,bshk->bhts', q.to(dtype), k.to(dtype)) * decay
    return (_scale(scale, q) * torch.einsum('bhts,bshv->bthv', weight, v.to(dtype))).to(v.dtype)


def _grid(x: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Tokens (B, T, H, K) as a grid (B, H, R, W, K)."""
    x = x.to(dtype)
    if x.shape[1] % columns:
        x = torch.cat([F.pad(x[:, :-1], (0, 0, 0, 0, 0, columns - 1)), x[:, -1:]], 1)
    return x.unflatten(1, (-1, columns)).permute(0, 3, 1, 2, 4)


def _tokens(x: Tensor, like: Tensor) -> Tensor:
    """A grid (B, H, R, W, V) as tokens (B, T, H, V) in the dtype of `like`, contiguous."""
    tokens = like.shape[1]
    x = x.to(like.dtype).permute(0, 2, 3, 1, 4).flatten(1, 2)
    if tokens != x.shape[1]:
        x = torch.cat([x[:, : tokens - 1], x[:, -1:]], 1)
    return x.contiguous()


def retention_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gamma: Tensor,
    columns: int = 1,
    scale: float | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrent form, causal: a state for each column, row by row and token by token.

    Args:
        q: Queries, (B, T, H, K).
        k: Keys, (B, T, H, K).
        v: Values, (B, T, H, V).
        log_gamma: Logarithm of the decay of each head, (H,).
        columns: Columns of the token grid, 1 for a plain sequence.
        scale: Factor of the output; None: K**-0.5.
        state: What the rows above left, (B, H, W, K, V); None: nothing.

    Returns:
        Tensor of shape (B, T, H, V) in the dtype of v, and the state behind the last row, (B, H, W,
        K, V), float32 (float64 for float64).
    """
    dtype = accumulation_dtype(v.dtype)
    gamma = log_gamma.to(dtype).exp()[:, None, None]
    queries, keys, values = (_grid(each, columns, dtype) for each in (q, k, v))
    if state is None:
        state = keys.new_zeros(*keys.shape[:2], columns, k.shape[-1], v.shape[-1])
    outputs = []
    for row in range(keys.shape[2]):
        added = keys[:, :, row, :, :, None] * values[:, :, row, :, None]  # (B, H, W, K, V)
        state = gamma[:, None] * state + added
        left = torch.zeros_like(state[:, :, 0])
        for column in range(columns):
            left = gamma * left + state[:, :, column]
            outputs.append((queries[:, :, row, column, :, None] * left).sum(-2))
    out = torch.stack(outputs, 2).unflatten(2, (-1, columns))
    return _tokens(out * _scale(scale, q), v), state


class Decays(NamedTuple):
    """Decays of n steps along one side of a tile.

    Attributes:
        between: From each step to each, (H, n, n), [later, earlier]; symmetric if bidirectional,
            else lower triangular.
        enter: From the last step before the tile to each, (H, n).
        leave: From each step to the last one, (H, n).
        across: From the last step before the tile to the last one, (H,).
    """

    between: Tensor
    enter: Tensor
    leave: Tensor
    across: Tensor

    def first(self, n: int) -> Decays:
        """The same of a tile of n steps only."""
        return Decays(
            self.between[:, :n, :n], self.enter[:, :n], self.leave[:, -n:], self.enter[:, n - 1]
        )

    def reversed(self) -> Decays:
        """The same of a tile that is walked through from its end."""
        return Decays(self.between.mT, self.enter.flip(1), self.leave.flip(1), self.across)


def _decays(log_gamma: Tensor, n: int, bidirectional: bool) -> Decays:
    step = torch.arange(n, device=log_gamma.device)
    distance = step[:, None] - step
    between = _decay(log_gamma, distance.abs() if bidirectional else distance)
    enter, leave = _decay(log_gamma, step + 1), _decay(log_gamma, n - 1 - step)
    return Decays(between, enter, leave, enter[:, -1])


class Tiling(NamedTuple):
    """Decays along rows and columns of a tile."""

    rows: Decays
    columns: Decays
    bidirectional: bool

    def sweeps(self) -> list[tuple[Decays, bool]]:
        """Decays along the columns for each direction, and whether it is from right to left."""
        rightward = (self.columns, False)
        return [rightward, (self.columns.reversed(), True)] if self.bidirectional else [rightward]


def _even(length: int, most: int) -> int:
    """Length of equal parts that have at most so many steps."""
    parts = -(-length // most)
    return -(-length // parts)


def _tile_of(rows: int, columns: int) -> tuple[int, int]:
    """Rows and columns of a tile."""
    if columns == 1:
        return _even(rows, CHUNK), 1
    width = _even(columns, TILE_COLUMNS)
    return _even(rows, TILE // width), width


def _mixed(decay: Tensor, states: Tensor) -> Tensor:
    """Sums of n states (B, H, N, n, K, V) weighted by (H, m, n), (B, H, N, m, K, V)."""
    return (decay[:, None] @ states.flatten(-2)).unflatten(-1, states.shape[-2:])


def _before(left: Tensor, across: Tensor, leftward: bool) -> Tensor:
    """States (B, H, N, n, K, V) that enter each of N tiles, of what each tile leaves.

    Args:
        left: What each tile adds to the states behind it, (B, H, N, n, K, V).
        across: Decay of a state that crosses a tile, (H,).
        leftward: Walk from the last tile to the first.
    """
    across = across[:, None, None, None]
    state = torch.zeros_like(left[:, :, 0])
    states = []
    tiles = range(left.shape[2])
    for n in reversed(tiles) if leftward else tiles:
        states.append(state)
        state = left[:, :, n] + across * state
    return torch.stack(states[::-1] if leftward else states, 2)


def _own_band(q: Tensor, k: Tensor, v: Tensor, tiling: Tiling) -> Tensor:
    """What tokens read of their band of rows, (B, H, N, I, J, V); inputs are tiles."""
    rows, columns, _ = tiling
    decay = rows.between[:, :, None, :, None] * columns.between[:, None, :, None, :]
    decay = decay.flatten(3, 4).flatten(1, 2)[:, None]  # (H, 1, I J, I J)
    weight = (q.flatten(3, 4) @ k.flatten(3, 4).mT) * decay
    out = (weight @ v.flatten(3, 4)).unflatten(3, q.shape[3:5])
    if q.shape[2] == 1:
        return out
    for decays, leftward in tiling.sweeps():  # other tiles: a state for each row
        left = (k * decays.leave[:, None, None, :, None]).mT @ v
        states = _mixed(rows.between, _before(left, decays.across, leftward))
        out = out + (q * decays.enter[:, None, None, :, None]) @ states
    return out


def _other_bands(q: Tensor, state: Tensor, tiling: Tiling) -> Tensor:
    """What tokens (B, H, N, I, J, K) read of the states of all columns, (B, H, N, J, K, V)."""
    seen = _mixed(tiling.columns.between, state)
    if state.shape[2] > 1:
        for decays, leftward in tiling.sweeps():
            left = _mixed(decays.leave[:, None], state)
            states = _before(left, decays.across, leftward)
            seen = seen + _mixed(decays.enter[:, :, None], states)
    q = q * tiling.rows.enter[:, None, :, None, None]
    return (q.transpose(3, 4) @ seen).transpose(3, 4)


def _walk(
    tokens: list[Tensor],
    tiling: Tiling,
    state: Tensor | None = None,
    *,
    upward: bool = False,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Walk through the bands of rows with a state for each column.

    Args:
        tokens: Queries, keys and values, each (B, H, N, R, J, K or V).
        tiling: Decays of a tile.
        state: Of the rows above, (B, H, N, J, K, V); None: nothing.
        upward: From the last row to the first, and without what tokens read of their own band.
        keep: Take what the last band adds into the state, too.

    Returns:
        What tokens read, (B, H, N, R, J, V), and the state.
    """
    height, rows = tiling.rows.leave.shape[1], tokens[0].shape[3]
    outputs = []
    starts = range(0, rows, height)
    for start in reversed(starts) if upward else starts:
        decays = tiling.rows.first(min(height, rows - start))
        band = tiling._replace(rows=decays.reversed() if upward else decays)
        q, k, v = (each[:, :, :, start : start + height] for each in tokens)
        out = torch.zeros_like(v) if upward else _own_band(q, k, v, band)
        if state is not None:
            out = out + _other_bands(q, state, band)
        outputs.append(out)
        if keep or len(outputs) < len(starts):
            left = (k * band.rows.leave[:, None, :, None, None]).transpose(3, 4)
            left = left.mT @ v.transpose(3, 4)
            across = band.rows.across[:, None, None, None, None]
            state = left if state is None else left + across * state
    return torch.cat(outputs[::-1] if upward else outputs, 3), state


def _tiles(x: Tensor, width: int) -> Tensor:
    """A grid (B, H, R, W, K) as tiles that are J columns wide, (B, H, N, R, J, K)."""
    x = F.pad(x, (0, 0, 0, -x.shape[3] % width))
    return x.unflatten(3, (-1, width)).transpose(2, 3).contiguous()


def _untiled(x: Tensor, columns: int) -> Tensor:
    """Tiles (B, H, N, R, J, V) as a grid (B, H, R, W, V)."""
    return x.transpose(2, 3).flatten(3, 4)[:, :, :, :columns]


def _tiling(
    log_gamma: Tensor,
    rows: int,
    columns: int,
    bidirectional: bool,
    tile: tuple[int, int] | None,
) -> Tiling:
    height, width = _tile_of(rows, columns) if tile is None else tile
    rows_of_tile = _decays(log_gamma, height, bidirectional)
    return Tiling(rows_of_tile, _decays(log_gamma, width, bidirectional), bidirectional)


def retention_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gamma: Tensor,
    columns: int = 1,
    bidirectional: bool = False,
    scale: float | None = None,
    *,
    transposed: bool = False,
    tile: tuple[int, int] | None = None,
) -> Tensor:
    """The linear-time form: weights within tiles of the grid, and states between them.

    Args:
        q: Queries, (B, T, H, K).
        k: Keys, (B, T, H, K).
        v: Values, (B, T, H, V).
        log_gamma: Logarithm of the decay of each head, (H,).
        columns: Columns of the token grid, 1 for a plain sequence. T is a multiple, or one more
            with a class token.
        bidirectional: Tokens see all tokens.
        scale: Factor of the output; None: K**-0.5.
        transposed: Decays D_st in place of D_ts: tokens see what saw them. The gradient asks it.
        tile: Rows and columns of a tile; None: chosen. The result does not depend on it.

    Returns:
        Contiguous tensor of shape (B, T, H, V) in the dtype of v.
    """
    dtype = accumulation_dtype(v.dtype)
    grids = [_grid(each, columns, dtype) for each in (q, k, v)]
    flipped = transposed and not bidirectional  # distances of all tokens are symmetric
    if flipped:
        grids = [each.flip(2, 3) for each in grids]
    rows = grids[0].shape[2]
    tiling = _tiling(log_gamma.to(dtype), rows, columns, bidirectional, tile)
    height, width = (side.leave.shape[1] for side in (tiling.rows, tiling.columns))
    tiles = [_tiles(each, width) for each in grids]
    out, _ = _walk(tiles, tiling)
    if bidirectional and rows > height:
        out = out + _walk(tiles, tiling, upward=True)[0]
    out = _untiled(out, columns) * _scale(scale, q)
    return _tokens(out.flip(2, 3) if flipped else out, v)


def retention_chunked_with_state(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gamma: Tensor,
    columns: int = 1,
    scale: float | None = None,
    state: Tensor | None = None,
    *,
    tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The linear-time form, causal, of a sequence that comes in pieces of whole rows.

    Args:
        q: Queries, (B, T, H, K).
        k: Keys, (B, T, H, K).
        v: Values, (B, T, H, V).
        log_gamma: Logarithm of the decay of each head, (H,).
        columns: Columns of the token grid, 1 for a plain sequence.
        scale: Factor of the output; None: K**-0.5.
        state: What the rows above left, (B, H, W, K, V); None: nothing.
        tile: Rows and columns of a tile; None: chosen.

    Returns:
        Contiguous tensor of shape (B, T, H, V) in the dtype of v, and the state behind the last
        row, (B, H, W, K, V), float32 (float64 for float64). Both are differentiable.
    """
    dtype = accumulation_dtype(v.dtype)
    grids = [_grid(each, columns, dtype) for each in (q, k, v)]
    tiling = _tiling(log_gamma.to(dtype), grids[0].shape[2], columns, False, tile)
    width = tiling.columns.leave.shape[1]
    if state is not None:
        state = F.pad(state.to(dtype), (0, 0, 0, 0, 0, -columns % width)).unflatten(2, (-1, width))
    out, state = _walk([_tiles(each, width) for each in grids], tiling, state, keep=True)
    assert state is not None
    out = _untiled(out, columns) * _scale(scale, q)
    return _tokens(out, v), state.flatten(2, 3)[:, :, :columns].contiguous()


def retention_backward(
    go: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gamma: Tensor,
    columns: int = 1,
    bidirectional: bool = False,
    scale: float | None = None,
    *,
    tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of retention, hand-written: three retentions whose roles are exchanged.

    Nothing but the inputs is needed. log_gamma is a constant: there is no gradient by it.

    Args:
        go: Gradient by the output, (B, T, H, V).
        q: Queries, (B, T, H, K).
        k: Keys, (B, T, H, K).
        v: Values, (B, T, H, V).
        log_gamma: Logarithm of the decay of each head, (H,).
        columns: Columns of the token grid, 1 for a plain sequence.
        bidirectional: Tokens see all tokens.
        scale: Factor of the output; None: K**-0.5.
        tile: Rows and columns of a tile; None: chosen.

    Returns:
        Gradients by q, k and v, contiguous, each in the shape and dtype of its tensor.
    """
    rest = (log_gamma, columns, bidirectional, _scale(scale, q))
    dq = retention_chunked(go, v, k, *rest, tile=tile)
    dk = retention_chunked(v, go, q, *rest, transposed=True, tile=tile)
    dv = retention_chunked(k, q, go, *rest, transposed=True, tile=tile)
    return dq, dk, dv
