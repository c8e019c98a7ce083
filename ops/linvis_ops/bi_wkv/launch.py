"""How the work of the Bi-WKV kernels is divided."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """Division of (B, T, C) into programs.

    Attributes:
        length: Tokens of a block, held in registers.
        blocks: Blocks of a lane, which one program walks along.
        lanes: Lanes of a sequence: ceil(T / (length * blocks)).
        group: Lanes of a group whose sums are joined in a launch of their own; 0: no groups.
        channels: Channels of a program.
        warps: Warps of a program.
        at_once: Sums of other lanes that are loaded together.
    """

    length: int
    blocks: int
    lanes: int
    group: int
    channels: int
    warps: int
    at_once: int = 4


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != 'cuda':
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _divide(x: Tensor, length: int, most_blocks: int) -> Launch:
    batch, tokens, channels = x.shape
    width = 64 if channels > 32 else 32
    tiles = -(-channels // width)
    # enough programs to fill the processors, then long lanes, which need to know of fewer others
    all_blocks = -(-tokens // length)
    wanted = 8 * _processors(x.device)
    blocks = min(max(batch * tiles * all_blocks // wanted, 4), most_blocks)
    lanes = -(-all_blocks // blocks)
    return Launch(
        length=length,
        blocks=blocks,
        lanes=lanes,
        group=8 if lanes > 24 else 0,
        channels=width,
        warps=width // 32,
    )


def forward_launch(x: Tensor) -> Launch:
    """Division of the forward pass for tokens (B, T, C)."""
    return _divide(x, length=16, most_blocks=16)


def backward_launch(x: Tensor) -> Launch:
    """Division of the backward pass for tokens (B, T, C)."""
    return _divide(x, length=8, most_blocks=16)
