"""Q-Shift in plain PyTorch: the definition, and the form with one write of each element."""

import torch
from torch import Tensor

# (row, column) step from a token to the neighbour that each quarter of the channels takes: left,
# right, top, bottom
STEPS = ((0, -1), (0, 1), (-1, 0), (1, 0))


def q_shift_by_index(x: Tensor, hw: tuple[int, int], heads: int = 1) -> Tensor:
    """The definition: y[t, c] = x[neighbour of t for the quarter of c, c], 0 outside the picture.

    Args:
        x: Tokens, (B, T, C), T = rows * columns or one more (a trailing class token, which is
            passed on).
        hw: (rows, columns) of the token grid.
        heads: Equal groups of channels, each of which has its own quarters.

    Returns:
        Tensor of shape (B, T, C); differentiable any number of times.
    """
    rows, columns = hw
    head = x.shape[2] // heads
    quarter = head // len(STEPS)
    token = torch.arange(x.shape[1], device=x.device)[:, None]
    group = torch.arange(x.shape[2], device=x.device)[None, :] % head // max(quarter, 1)
    passes = (group >= len(STEPS)) | (token >= rows * columns) | (quarter == 0)
    steps = torch.tensor([*STEPS, (0, 0)], device=x.device)[
        group.clamp(max=len(STEPS))
    ]  # (1, C, 2)
    row = token // columns + steps[..., 0]
    column = token % columns + steps[..., 1]
    inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
    source = torch.where(passes, token, torch.where(inside, row * columns + column, 0))
    shifted = x.gather(1, source.expand(x.shape[0], -1, -1))
    return torch.where(passes | inside, shifted, torch.zeros_like(shifted))


def q_shift_sliced(x: Tensor, rows: int, columns: int, heads: int, adjoint: bool) -> Tensor:
    """Q-Shift, or its adjoint (which takes the opposite neighbours), by slices of the grid.

    Args:
        x: Tokens, (B, T, C).
        rows: Rows of the token grid.
        columns: Columns of the token grid.
        heads: Equal groups of channels, each of which has its own quarters.
        adjoint: Shift the other way: the gradient of Q-Shift.

    Returns:
        Contiguous tensor of shape (B, T, C).
    """
    batch, _, channels = x.shape
    grid = rows * columns
    head = channels // heads
    quarter = head // len(STEPS)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    y[:, grid:] = x[:, grid:]
    shape = (batch, rows, columns, heads, head)
    source = x[:, :grid].unflatten(1, (rows, columns)).unflatten(3, (heads, head))
    target = y[:, :grid].view(shape)
    target[..., len(STEPS) * quarter :] = source[..., len(STEPS) * quarter :]
    for index, step in enumerate(STEPS):
        dim = 1 if step[0] else 2
        delta = step[dim - 1] * (-1 if adjoint else 1)
        part = slice(index * quarter, (index + 1) * quarter)
        inside, outside = (slice(1, None), 0) if delta < 0 else (slice(None, -1), shape[dim] - 1)
        taken = slice(None, -1) if delta < 0 else slice(1, None)
        if dim == 1:
            target[:, inside, ..., part] = source[:, taken, ..., part]
            target[:, outside, ..., part] = 0
        else:
            target[:, :, inside, :, part] = source[:, :, taken, :, part]
            target[:, :, outside, :, part] = 0
    return y
