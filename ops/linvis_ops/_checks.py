"""Checks of user input, with one form of message: what was expected, what came."""

from collections.abc import Iterable

import torch
from torch import Tensor

TOKEN_DTYPES = frozenset((torch.float32, torch.float16, torch.bfloat16, torch.float64))


def shape_text(tensor: Tensor) -> str:
    """Shape as it is printed in messages, e.g. (2, 196, 192)."""
    return str(tuple(tensor.shape))


def check_tensors(op: str, **tensors: Tensor) -> None:
    """Raise TypeError unless every argument is a tensor."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f'{op}: {name} must be a tensor, got {type(tensor).__name__}.')


def check_floating(op: str, **tensors: Tensor) -> None:
    """Raise TypeError unless every tensor is of a floating dtype that operators take."""
    for name, tensor in tensors.items():
        _check_dtype(op, name, tensor.dtype)


def _check_dtype(op: str, name: str, dtype: torch.dtype) -> None:
    if dtype not in TOKEN_DTYPES:
        raise TypeError(f'{op}: {name} must be float32, float16, bfloat16 or float64, got {dtype}.')


def check_tokens(op: str, **tensors: Tensor) -> None:
    """Raise unless all tensors are (B, T, C) of one shape, dtype and device, not empty."""
    (first_name, first), *others = tensors.items()
    for name, tensor in tensors.items():
        if tensor.dim() != 3:
            raise ValueError(f'{op}: {name} must be (B, T, C), got {shape_text(tensor)}.')
        if tensor.numel() == 0:
            raise ValueError(f'{op}: {name} must not be empty, got {shape_text(tensor)}.')
        _check_dtype(op, name, tensor.dtype)
    for name, tensor in others:
        if tensor.shape != first.shape:
            raise ValueError(
                f'{op}: {first_name} and {name} must have one shape, '
                f'got {first_name} {shape_text(first)}, {name} {shape_text(tensor)}.'
            )
        if tensor.dtype != first.dtype:
            raise TypeError(
                f'{op}: {first_name} and {name} must have one dtype, '
                f'got {first.dtype} and {tensor.dtype}.'
            )
    check_device(op, tensors.items())


def check_division(op: str, channels: int, heads: int) -> None:
    """Raise unless heads is an int that divides the channels."""
    if not isinstance(heads, int) or isinstance(heads, bool):
        raise TypeError(f'{op}: heads must be an int, got {heads!r}.')
    if heads < 1 or channels % heads:
        raise ValueError(f'{op}: heads must divide the {channels} channels, got {heads}.')


def check_heads(op: str, q: Tensor, k: Tensor, v: Tensor, least_tokens: int = 1) -> None:
    """Raise unless q and k are (B, T, H, K) and v (B, T, H, V), of one dtype, not empty.

    With 0 as the least number of tokens only the other sizes have to be 1 or more.
    """
    for name, tensor, width in (('q', q, 'K'), ('k', k, 'K'), ('v', v, 'V')):
        if tensor.dim() != 4:
            raise ValueError(f'{op}: {name} must be (B, T, H, {width}), got {shape_text(tensor)}.')
        batch, tokens, *sizes = tensor.shape
        if 0 in (batch, *sizes) or tokens < least_tokens:
            raise ValueError(f'{op}: {name} must not be empty, got {shape_text(tensor)}.')
        _check_dtype(op, name, tensor.dtype)
        if tensor.dtype != q.dtype:
            raise TypeError(
                f'{op}: q and {name} must have one dtype, got {q.dtype} and {tensor.dtype}.'
            )
    if k.shape != q.shape:
        raise ValueError(
            f'{op}: q and k must have one shape, got q {shape_text(q)}, k {shape_text(k)}.'
        )
    if v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f'{op}: q and v must agree in (B, T, H), got q {shape_text(q)}, v {shape_text(v)}.'
        )


def check_scale(op: str, scale: object) -> None:
    """Raise TypeError unless scale is a number or None."""
    # a number that follows from sizes is a torch.SymFloat while a network is exported
    if scale is not None and not isinstance(scale, (float, int, torch.SymFloat)):
        raise TypeError(f'{op}: scale must be a number or None, got {type(scale).__name__}.')


def check_channels(op: str, channels: int, dtype: torch.dtype, **tensors: Tensor) -> None:
    """Raise unless all tensors are (C,) and float32 (float64 beside float64 tokens)."""
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    for name, tensor in tensors.items():
        if tensor.shape != (channels,):
            raise ValueError(f'{op}: {name} must be ({channels},), got {shape_text(tensor)}.')
        if tensor.dtype != expected:
            raise TypeError(
                f'{op}: {name} must be {expected} beside {dtype} tokens, got {tensor.dtype}; '
                f'cast it first.'
            )


def check_device(op: str, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise ValueError unless all named tensors are on one device."""
    (first_name, first), *others = tensors
    device = first.device
    for name, tensor in others:
        if tensor.device != device:
            raise ValueError(
                f'{op}: {first_name} is on {device} and {name} on {tensor.device}; '
                f'move them to one device.'
            )


def check_grid(op: str, tokens: int, hw: tuple[int, int], least_rows: int = 1) -> None:
    """Raise unless hw is (rows, columns) and the tokens fill this grid, or it and a class token."""
    # sizes are torch.SymInt, which is no int, while a network is exported
    whole = (int, torch.SymInt)
    if not isinstance(hw, (tuple, list)) or not all(isinstance(number, whole) for number in hw):
        raise TypeError(f'{op}: hw must be (rows, columns) of type int, got {hw!r}.')
    if len(hw) != 2 or hw[0] < least_rows or hw[1] < 1:
        least = 'both at least 1' if least_rows == 1 else f'at least ({least_rows}, 1)'
        raise ValueError(f'{op}: hw must be (rows, columns), {least}, got {tuple(hw)}.')
    grid = hw[0] * hw[1]
    if tokens not in (grid, grid + 1):
        raise ValueError(
            f'{op}: hw {tuple(hw)} stands for {grid} tokens ({grid + 1} with a class token), '
            f'got {tokens}.'
        )
