from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.logging import print_log
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true


def resize_position_embedding(
    pos_embed: Tensor, source_hw: tuple[int, int], target_hw: tuple[int, int]
) -> Tensor:
    """Resample a learnt position embedding for another token grid (bicubic, pixel centres aligned).

    Args:
        pos_embed: Shape (1, rows * columns of source_hw, C).
        source_hw: Grid (rows, columns) of pos_embed.
        target_hw: Grid wanted.

    Returns:
        Shape (1, rows * columns of target_hw, C); pos_embed itself if the grids are equal.

    Raises:
        ValueError: If the number of tokens is not that of source_hw.
    """
    if pos_embed.shape[1] != source_hw[0] * source_hw[1]:
        raise ValueError(
            f'A position embedding of {pos_embed.shape[1]} tokens is not a grid of '
            f'{source_hw[0]} x {source_hw[1]}; pass the grid it was trained with as source_hw.'
        )
    # A grid that is symbolic, in an export or compilation for all sizes, is always resampled: `==`
    # would tie the program to the answer. Bicubic resampling to the same grid changes no bit.
    if all(statically_known_true(s == t) for s, t in zip(source_hw, target_hw, strict=True)):
        return pos_embed
    grid = pos_embed.transpose(1, 2).unflatten(2, source_hw)  # (1, C, rows, columns)
    grid = F.interpolate(grid, size=target_hw, mode='bicubic', align_corners=False)
    return grid.flatten(2).transpose(1, 2)


def resize_position_embedding_rows(
    pos_embed: Tensor, source_hw: tuple[int, int], target_hw: tuple[int, int], rows: range
) -> Tensor:
    """Some rows of what `resize_position_embedding` gives, without the others.

    Args:
        pos_embed: Shape (1, rows * columns of source_hw, C).
        source_hw: Grid (rows, columns) of pos_embed.
        target_hw: Grid wanted.
        rows: Rows of target_hw that are wanted, one after the other.

    Returns:
        Shape (1, len(rows) * columns of target_hw, C).

    Raises:
        ValueError: As `resize_position_embedding`.
    """
    # bicubic resampling is separable: columns first, then the rows by a matrix
    exact = pos_embed.to(torch.promote_types(pos_embed.dtype, torch.float32))
    wide = resize_position_embedding(exact, source_hw, (source_hw[0], target_hw[1]))
    grid = wide.unflatten(1, (source_hw[0], target_hw[1]))  # (1, rows, columns, C)
    if source_hw[0] == target_hw[0]:
        grid = grid[:, rows.start : rows.stop]
    else:
        weights = _cubic_weights(source_hw[0], target_hw[0], rows, grid)
        grid = torch.einsum('rs,bswc->brwc', weights, grid)
    return grid.flatten(1, 2).to(pos_embed.dtype)


def _cubic_weights(source: int, target: int, rows: range, like: Tensor) -> Tensor:
    """Shares of `source` rows in some of `target` rows by bicubic resampling.

    Args:
        source: Number of rows that are resampled.
        target: Number of rows that they become.
        rows: Those of the target that are wanted.
        like: Tensor whose dtype and device the result has.

    Returns:
        Shape (len(rows), source); a row outside counts as the one at the edge, as in PyTorch.
    """
    wanted = torch.arange(rows.start, rows.stop, dtype=torch.float64, device=like.device)
    place = (wanted + 0.5) * (source / target) - 0.5
    taps = place.floor()[:, None] + torch.arange(-1, 3, device=like.device)  # (rows wanted, 4)
    distance = (place[:, None] - taps).abs()
    # Keys' kernel with a = -0.75, the one of F.interpolate
    near = (1.25 * distance - 2.25) * distance**2 + 1
    far = ((-0.75 * distance + 3.75) * distance - 6) * distance + 3
    shares = torch.where(distance <= 1, near, far)
    weights = shares.new_zeros(len(rows), source)
    return weights.scatter_add(1, taps.long().clamp(0, source - 1), shares).to(like.dtype)


def resize_position_embedding_on_load(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    """Fit `pos_embed` of a state dict to a module that has `pos_embed` and its grid `pos_grid`.

    To be registered with `register_load_state_dict_pre_hook`. A token count other than the
    module's is taken for a square grid.

    Raises:
        ValueError: If it is no square number, since the grid is then unknown.
    """
    key = f'{prefix}pos_embed'
    loaded = state_dict.get(key)
    target_hw: tuple[int, int] = module.pos_grid  # type: ignore[assignment]
    if loaded is None or loaded.ndim != 3 or loaded.shape[1] == target_hw[0] * target_hw[1]:
        return
    tokens = loaded.shape[1]
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ValueError(
            f'{key} of the checkpoint has {tokens} tokens, which is neither the grid '
            f'{target_hw[0]} x {target_hw[1]} of this model nor a square; resample it with '
            'resize_position_embedding(source_hw=...) before loading.'
        )
    state_dict[key] = resize_position_embedding(loaded, (side, side), target_hw)
    print_log(
        f'{key}: resized from {side} x {side} to {target_hw[0]} x {target_hw[1]} tokens.',
        logger='current',
    )
