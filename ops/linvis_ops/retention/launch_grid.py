"""How the kernels of retention on grids divide a grid into blocks and tiles, by rules."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from linvis_ops._chunks import LEAST, capability_of, power_of_two


@dataclass(frozen=True)
class GridRule:
    """From which a division is made.

    Attributes:
        length: Tokens of a block, a power of two of at least 16.
        at_once: Most tokens of a grid that is one tile, so that no state goes through memory.
        columns: Columns of a block of a grid that is wide and high enough.
        tile_rows: Rows of a tile of larger grids, but for what makes tiles even.
        tile_columns: Columns of a tile of larger grids, likewise.
        warps: Warps of a program.
        stages: Steps of a loop whose loads are under way together, as `num_stages` of Triton.
        state_bytes: Most bytes of a state as a factor of products; wide values are cut into slices
            for which programs of their own run.
    """

    length: int
    at_once: int = 1100
    columns: int = 8
    tile_rows: int = 40
    tile_columns: int = 40
    warps: int = 4
    stages: int = 2
    state_bytes: int = 16384


@dataclass(frozen=True)
class GridLaunch:
    """Division of a grid into tiles, and of those into blocks, one for a program.

    Attributes:
        block_rows: Rows of a block, a power of two.
        block_columns: Columns of a block, a power of two.
        tile_rows: Rows of a tile, a multiple of those of a block.
        tile_columns: Columns of a tile, likewise.
        warps: Warps of a program.
        stages: As `num_stages` of Triton.
        state_bytes: As in the rule.
    """

    block_rows: int
    block_columns: int
    tile_rows: int
    tile_columns: int
    warps: int = 4
    stages: int = 2
    state_bytes: int = 16384

    def widths(self, keys: int, values: int, dtype: torch.dtype) -> tuple[int, int]:
        """Key and value channels that a program takes of heads so wide."""
        keys, values = power_of_two(keys), power_of_two(values)
        size = 2 if dtype == torch.bfloat16 else 4  # of a factor of products
        return keys, min(values, max(self.state_bytes // (keys * size), LEAST))


Size = Literal['small', 'large', 'wide']
# bfloat16 up to a width of 64 is small, wider is large; other dtypes, whose factors take four
# bytes, are wide. By compute capability; (0, 0) is for all others.
RULES: dict[tuple[int, int], dict[Size, GridRule]] = {
    (0, 0): {
        'small': GridRule(length=64, tile_rows=32, tile_columns=32),
        'large': GridRule(length=64, warps=8),
        # lines of tiles of up to 32 rows and columns: longer ones spill registers
        'wide': GridRule(length=32, tile_rows=24, tile_columns=24, warps=8, state_bytes=8192),
    },
}
# For bfloat16 whose rows are moved element by element or masked: two warps form no warpgroup.
UNEVEN = GridRule(length=32, warps=2, state_bytes=4096)


def _tile(steps: int, side: int, block: int) -> int:
    """Steps of equal tiles, in whole blocks, of about as many as `side`."""
    tiles = max(round(steps / side), 1)
    return -(-steps // (tiles * block)) * block


def launch_for(rows: int, columns: int, rule: GridRule) -> GridLaunch:
    """Division of a grid of so many rows, that of a class token included, and columns."""
    block_columns = min(rule.columns, power_of_two(columns, 1))
    block_columns = max(block_columns, rule.length // power_of_two(rows, 1))
    block_rows = rule.length // block_columns
    high, wide = rule.tile_rows, rule.tile_columns
    if rows * columns <= rule.at_once:
        high, wide = rows, columns
    return GridLaunch(
        block_rows=block_rows,
        block_columns=block_columns,
        tile_rows=_tile(rows, high, block_rows),
        tile_columns=_tile(columns, wide, block_columns),
        warps=rule.warps,
        stages=rule.stages,
        state_bytes=rule.state_bytes,
    )


def rule_for(q: Tensor, v: Tensor, *, even: bool) -> GridRule:
    """The rule for queries (B, T, H, K) and values (B, T, H, V).

    Args:
        q: Tensor of the shape and dtype of the queries, on the device in question.
        v: Tensor of the shape of the values.
        even: Whether all rows are whole vectors and fill their tiles.
    """
    rules = RULES.get(capability_of(q.device), RULES[0, 0])
    if q.dtype != torch.float32 and not even:
        return UNEVEN
    if q.dtype != torch.bfloat16:
        return rules['wide']
    return rules['small' if max(q.shape[-1], v.shape[-1]) <= 64 else 'large']
