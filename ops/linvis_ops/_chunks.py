"""How the work of kernels of attention in linear time is divided into chunks and segments."""

import functools
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from linvis_ops._sizes import next_power_of_two

Pass = Literal['fwd', 'bwd']
# A vector of a GPU's memory access, in elements of the shortest dtype.
VECTOR = 8
# Least size of a matrix product of Triton.
LEAST = 16


@dataclass(frozen=True)
class Rule:
    """From which a division is made.

    Attributes:
        length: Tokens of a chunk, a power of two of at least 16.
        warps: Warps of a program.
        at_once: Most tokens of a sequence that is one segment, so that no state goes through
            memory.
        segment: Most tokens of a segment of longer sequences.
        programs: Programs that are wanted for each multiprocessor of the GPU; segments get longer
            where there are more.
        state_bytes: Most bytes of a state as a factor of products; wide values are cut into slices
            for which programs of their own run.
        stages: Chunks of a loop whose loads are under way together, as `num_stages` of Triton.
    """

    length: int
    warps: int = 4
    at_once: int = 256
    segment: int = 256
    programs: int = 4
    state_bytes: int = 8192
    stages: int = 2


@dataclass(frozen=True)
class Launch:
    """Division of (B, T, H, K) and (B, T, H, V) into programs.

    Attributes:
        length: Tokens of a chunk.
        chunks: Chunks of a sequence.
        segment: Chunks of a segment.
        segments: Segments of a sequence.
        keys: Key channels of a tile, a power of two.
        values: Value channels of a tile, a power of two.
        warps: Warps of a program.
        stages: As `num_stages` of Triton.
    """

    length: int
    chunks: int
    segment: int
    segments: int
    keys: int
    values: int
    warps: int = 4
    stages: int = 2


# By pass and by size: bfloat16 up to a width of 64 is small, one of the two is large, neither is
# wide.
Rules = dict[tuple[Pass, str], Rule]
# By compute capability; (0, 0) is for all others.
RulesByDevice = dict[tuple[int, int], Rules]


@functools.cache
def capability_and_processors(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability of a device, (0, 0) if it has none, and number of its multiprocessors."""
    if device.type != 'cuda':
        return (0, 0), 1
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count


def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability of a device, (0, 0) if it has none."""
    return capability_and_processors(device)[0]


def power_of_two(size: int, least: int = LEAST) -> int:
    """The least power of two that is neither below `size` nor below `least`."""
    return max(next_power_of_two(size), least)


def divide(q: Tensor, v: Tensor, of: Pass, rules: RulesByDevice, rule: Rule | None) -> Launch:
    """Division for queries (B, T, H, K) and values (B, T, H, V).

    Args:
        q: Tensor of the shape and dtype of the queries, on the device in question.
        v: Tensor of the shape of the values.
        of: Forward or backward pass.
        rules: Rules of the operator.
        rule: Instead of the rule of the device.
    """
    capability, processors = capability_and_processors(q.device)
    batch, tokens, heads, key_width = q.shape
    keys, values = power_of_two(key_width), power_of_two(v.shape[-1])
    short = q.dtype == torch.bfloat16
    sizes = ('wide', 'large', 'small')
    size = sizes[short + (max(keys, values) <= 64)]
    rule = rule or rules.get(capability, rules[0, 0])[of, size]
    most_values = rule.state_bytes // (keys * (2 if short else 4))
    length = min(rule.length, power_of_two(tokens))
    chunks = -(-tokens // length)
    if tokens <= rule.at_once:
        segment = chunks
    else:
        fair = batch * heads * chunks // (rule.programs * processors)
        segment = max(min(fair, rule.segment // length, chunks), 1)
    return Launch(
        length=length,
        chunks=chunks,
        segment=segment,
        segments=-(-chunks // segment),
        keys=keys,
        values=min(values, max(most_values, LEAST)),
        warps=rule.warps,
        stages=rule.stages,
    )


class Rows(NamedTuple):
    """Tensors (B, T, H, channels) as kernels take them.

    Attributes:
        tensors: The tensors; copies where the channels of a token do not lie side by side.
        strides: Of sequences, tokens and heads of each tensor in turn, in units of `align`.
        align: Elements that all strides are multiples of, up to the size of a vector. It is a
            constant of the compiled kernels, which thus see that rows can be moved in vectors,
            whatever B and T.
    """

    tensors: tuple[Tensor, ...]
    strides: tuple[int, ...]
    align: int


def rows_of(*tensors: Tensor, length: int) -> Rows:
    """Tensors and strides for kernels with chunks of `length` tokens."""
    regular: list[Tensor] = []
    strides: list[int] = []
    for x in tensors:
        steps = x.stride()
        # offsets within a chunk are numbers of 32 bits
        if steps[3] != 1 or not 0 <= steps[1] * length < 2**30:
            x = x.contiguous()
            steps = x.stride()
        regular.append(x)
        strides += steps[:3]
    align = math.gcd(VECTOR, *strides)
    return Rows(tuple(regular), tuple([stride // align for stride in strides]), align)
