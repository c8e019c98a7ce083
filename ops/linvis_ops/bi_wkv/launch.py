"""How the work of the Bi-WKV kernels is divided, by tuned rules."""

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Pass = Literal['fwd', 'bwd']


@dataclass(frozen=True)
class Rule:
    """From which a division is made; `ops/benchmarks/tune.py` finds the best for a GPU.

    Attributes:
        length: Tokens of a block, held in registers.
        channels: Channels of a program; halved for networks that have fewer.
        per_thread: Channels of a thread.
        programs: Programs that are wanted for each multiprocessor of the GPU; lanes get longer
            where there are more.
        most_blocks: Most blocks of a lane.
        group_above: Most lanes of a sequence without groups.
        group: Lanes of a group.
        at_once: Sums of other lanes that are loaded together.
    """

    length: int
    channels: int = 64
    per_thread: int = 1
    programs: int = 8
    most_blocks: int = 16
    group_above: int = 24
    group: int = 8
    at_once: int = 4


@dataclass(frozen=True)
class Launch:
    """Division of (B, T, C) into programs.

    Attributes:
        length: Tokens of a block.
        blocks: Blocks of a lane, which one program walks along.
        lanes: Lanes of a sequence: ceil(T / (length * blocks)).
        group: Lanes of a group whose sums are joined in a launch of their own; all: no groups.
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


# Safe on every GPU; not tuned.
DEFAULT: dict[Pass, Rule] = {'fwd': Rule(length=16), 'bwd': Rule(length=8)}
# By compute capability. 9.0: measured on an H200 in bfloat16.
TUNED: dict[tuple[int, int], dict[Pass, Rule]] = {
    (9, 0): {'fwd': Rule(length=16), 'bwd': Rule(length=16)},
}


@functools.cache
def rules_of(device: torch.device) -> tuple[dict[Pass, Rule], int]:
    """Rules of a device and the number of its multiprocessors."""
    if device.type != 'cuda':
        return DEFAULT, 1
    properties = torch.cuda.get_device_properties(device)
    rules = TUNED.get((properties.major, properties.minor), DEFAULT)
    return rules, properties.multi_processor_count


def launch_for(x: Tensor, of: Pass, rule: Rule | None = None) -> Launch:
    """Division for tokens (B, T, C).

    Args:
        x: Tensor of the shape and on the device in question.
        of: Forward or backward pass.
        rule: Instead of the rule of the device.
    """
    rules, processors = rules_of(x.device)
    rule = rule or rules[of]
    batch, tokens, channels = x.shape
    width = rule.channels
    while width > 32 and width // 2 >= channels:
        width //= 2
    tiles = -(-channels // width)
    all_blocks = -(-tokens // rule.length)
    # enough programs to fill the processors, then long lanes, which ask for fewer sums of others
    wanted = rule.programs * processors
    blocks = min(max(batch * tiles * all_blocks // wanted, 1), rule.most_blocks, all_blocks)
    lanes = -(-all_blocks // blocks)
    return Launch(
        length=rule.length,
        blocks=blocks,
        lanes=lanes,
        group=rule.group if lanes > rule.group_above else lanes,
        channels=width,
        warps=max(width // (32 * rule.per_thread), 1),
        at_once=rule.at_once,
    )


def by_rows(x: Tensor) -> Tensor:
    """The tensor (B, T, C) if its memory is rows of channels at equal distances, else a copy.

    The stride of sequences is then a multiple of the one of tokens, which `rows_between` says. The
    kernels thus see that addresses are multiples of a constant, and move channels in pairs.
    """
    of_sequence, of_token, of_channel = x.stride()
    regular = of_channel == 1 or x.shape[2] == 1
    if regular and of_token > 0 and of_sequence % of_token == 0:
        return x
    # not contiguous(), which keeps odd strides of dimensions of size 1
    return x.clone(memory_format=torch.contiguous_format)


def rows_between(x: Tensor) -> int:
    """Rows of a tensor of `by_rows` from the start of one sequence to the start of the next."""
    of_sequence, of_token, _ = x.stride()
    return of_sequence // of_token
