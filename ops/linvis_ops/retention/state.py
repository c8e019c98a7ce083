"""What a state adds to causal retention of a piece: a few matrix products beside the operator.

Retention is linear in the state, so that the output of a piece is that of the piece by itself and
what its queries read of the state. All of it is differentiable but by log_gamma; there is no loop
over rows, columns or chunks.

B batch, T tokens, H heads, K key width, V value width; R rows and W columns of the piece. A plain
sequence is a grid of one column. A class token is a row of its own, whose other columns are empty.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from linvis_ops._dtypes import accumulation_dtype

# exp of it is 0 in float64, and no product with it is undefined
LEAST_LOG = -1000.0
# Most columns that are summed by one matrix of decays between all of them.
BLOCK = 128


class Powers:
    """Powers gamma^n of the decays of all heads, for n in a range.

    Args:
        log_gamma: Logarithms of the decays, (H,), at least `LEAST_LOG`.
        first: Least exponent; negative ones are only for `triangle`.
        last: Greatest exponent.
    """

    def __init__(self, log_gamma: Tensor, first: int, last: int) -> None:
        steps = torch.arange(first, last + 1, device=log_gamma.device, dtype=log_gamma.dtype)
        self._table = (log_gamma[:, None] * steps).exp()
        self._first = first

    def of(self, first: int, count: int) -> Tensor:
        """Powers of `count` exponents from `first` on, (H, count)."""
        start = first - self._first
        return self._table[:, start : start + count]

    def triangle(self, n: int) -> Tensor:
        """gamma^(i - j) for j <= i, else 0, (H, n, n); needs exponents from 1 - n to n - 1."""
        row = self.of(1 - n, 2 * n - 1)
        # windows of it, [i, j] of exponent 1 - n + i + j; `unfold` takes no symbolic size
        windows = row.as_strided((row.shape[0], n, n), (row.stride(0), 1, 1))
        return windows.flip(2).tril()


def add_state(
    o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gamma: Tensor,
    columns: int,
    scale: float | None,
    state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output and state of a piece that follows a state.

    Args:
        o: Output of the piece by itself, (B, T, H, V), contiguous; without gradients it is
            overwritten.
        q: Queries, (B, T, H, K).
        k: Keys, (B, T, H, K).
        v: Values, (B, T, H, V).
        log_gamma: Logarithm of the decay of each head, (H,), in the dtype of sums.
        columns: Columns of the token grid, 1 for a plain sequence.
        scale: Factor of the output; None: K**-0.5.
        state: What the rows above left, (B, H, W, K, V); None: nothing.

    Returns:
        Output with what the queries read of the state, and the state behind the last row, (B, H,
        W, K, V), float32 (float64 for float64).
    """
    dtype = accumulation_dtype(v.dtype)
    log_gamma = log_gamma.clamp(min=LEAST_LOG)
    q, k, v = (_rows_of(each, columns) for each in (q, k, v))  # (B, R, W, H, K or V)
    rows, block = q.shape[1], _block_of(columns)
    powers = Powers(log_gamma, 1 - block, max(rows, block))
    if state is not None:
        sums = _sums_over_columns(state, log_gamma, powers)
        # q in the order of the states, in one copy
        queries = q.permute(0, 3, 2, 1, 4).to(dtype, memory_format=torch.contiguous_format)
        share = (queries @ sums).permute(0, 3, 2, 1, 4)  # (B, R, W, H, V)
        enter = powers.of(1, rows).T[:, None, :, None]  # (R, 1, H, 1)
        if o.requires_grad:  # it may be a view that autograd does not let change
            o = o.clone()
        _add(o, share, enter, q.shape[-1] ** -0.5 if scale is None else scale)
    leave = powers.of(0, rows).flip(1).T[:, None, :, None]  # (R, 1, H, 1)
    keys = (k * leave).permute(0, 2, 3, 4, 1)  # (B, W, H, K, R), in the dtype of the decays
    added = (keys @ v.to(dtype).permute(0, 2, 3, 1, 4)).transpose(1, 2)
    if state is None:
        return o, added
    return o, torch.addcmul(added, state, powers.of(rows, 1)[:, :, None, None])


def _rows_of(x: Tensor, columns: int) -> Tensor:
    """Tokens (B, T, H, K) as rows (B, R, W, H, K), a view unless there is a class token."""
    if x.shape[1] % columns:
        empty = x.new_zeros(x.shape[0], columns - 1, *x.shape[2:])
        x = torch.cat([x[:, :-1], empty, x[:, -1:]], 1)
    return x.unflatten(1, (x.shape[1] // columns, columns))


def _add(o: Tensor, share: Tensor, decay: Tensor, scale: float) -> None:
    """Add scale * decay * share, (B, R, W, H, V), to tokens (B, T, H, V) in place."""
    tokens, columns = o.shape[1], share.shape[2]
    rows = tokens // columns
    o[:, : rows * columns].unflatten(1, (rows, columns)).addcmul_(
        share[:, :rows], decay[:rows], value=scale
    )
    if tokens % columns:
        o[:, -1].addcmul_(share[:, -1, -1], decay[-1, 0], value=scale)


def _block_of(columns: int) -> int:
    """Columns of equal blocks of at most `BLOCK`, the last of which may have fewer."""
    if columns <= BLOCK:
        return columns
    return -(-columns // -(-columns // BLOCK))


def _sums_over_columns(state: Tensor, log_gamma: Tensor, powers: Powers) -> Tensor:
    """Sum over the columns up to each, decayed by their distance, of states (B, H, W, K, V)."""
    columns = state.shape[2]
    if columns == 1:
        return state
    block = _block_of(columns)
    states = state.flatten(3)  # (B, H, W, K V)
    if block == columns:
        return (powers.triangle(block) @ states).unflatten(3, state.shape[3:])
    # within blocks, then what each leaves at its last column to those behind it
    blocks = -(-columns // block)
    states = F.pad(states, (0, 0, 0, blocks * block - columns))
    sums = powers.triangle(block)[:, None] @ states.unflatten(2, (blocks, block))
    others = Powers(log_gamma * block, 2 - blocks, blocks - 2).triangle(blocks - 1)
    before = others @ sums[:, :, :-1, -1]  # (B, H, blocks - 1, K V)
    enter = powers.of(1, block)[:, None, :, None]
    sums = torch.cat(
        [sums[:, :, :1], torch.addcmul(sums[:, :, 1:], enter, before[:, :, :, None])], 2
    )
    return sums.flatten(2, 3)[:, :, :columns].unflatten(3, state.shape[3:])
