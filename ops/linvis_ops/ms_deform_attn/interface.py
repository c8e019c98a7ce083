"""The public function of the operator: argument checks, then the implementation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from linvis_ops.ms_deform_attn.reference import ms_deform_attn_reference

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor | Sequence[Sequence[int]],
    level_start_index: Tensor | Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Multi-scale deformable attention: a weighted sum of bilinear samples from several maps.

    y[b, q, h] = sum over l, p of A[b, q, h, l, p] * bilinear(V[b, h, l], X[b, q, h, l, p]), where
    the map V[b, h, l] is `value[b, :, h]` from `level_start_index[l]` on, laid out row by row as
    `spatial_shapes[l]` says. A location (x, y) = (0, 0) is the upper left corner of the first
    pixel and (1, 1) the lower right corner of the last one; a map is zero outside.

    Args:
        value: Features of all levels, shape (B, S, H, K), float16, bfloat16, float32 or float64.
        spatial_shapes: (rows, columns) of each of the L levels, a tensor of shape (L, 2) or a
            nested list. A list spares a CUDA device one synchronisation.
        level_start_index: Index in S of the first pixel of each level, shape (L,), or a list.
        sampling_locations: Normalised (x, y), shape (B, Q, H, L, P, 2), any dtype of the above.
            Keep it in float32 under autocast: bfloat16 moves points by up to a pixel on wide maps.
        attention_weights: Weight of each point, shape (B, Q, H, L, P), any dtype of the above.

    Returns:
        Tensor of shape (B, Q, H * K), contiguous, in the dtype of value.

    Raises:
        ValueError: If shapes or devices disagree, or a level lies outside of value.
        TypeError: If a tensor is not floating point, or a shape or start is not an integer.

    Source:
        Deformable DETR (arXiv 2010.04159), equation 3.

    Note:
        Half-precision inputs are accumulated in float32 and rounded once.
    """
    shapes = _shapes(spatial_shapes)
    starts = _integers(level_start_index, 'level_start_index')
    _check_tensors(value, sampling_locations, attention_weights, len(shapes))
    if len(starts) != len(shapes):
        raise ValueError(
            'ms_deform_attn: level_start_index must have one entry for each level of '
            f'spatial_shapes, got {len(starts)} entries for {len(shapes)} levels.'
        )
    for (rows, columns), start in zip(shapes, starts, strict=True):
        if rows < 1 or columns < 1 or start < 0 or start + rows * columns > value.shape[1]:
            raise ValueError(
                f'ms_deform_attn: a level of {rows} x {columns} pixels starting at {start} '
                f'must have pixels and lie within the {value.shape[1]} positions of value.'
            )
    return ms_deform_attn_reference(value, shapes, starts, sampling_locations, attention_weights)


def _integers(numbers: Tensor | Sequence[int], name: str) -> list[int]:
    if isinstance(numbers, Tensor):
        if numbers.dim() != 1:
            raise ValueError(
                f'ms_deform_attn: {name} must have one dimension, got shape {tuple(numbers.shape)}.'
            )
        numbers = numbers.tolist()
    integers = list(numbers)
    if not all(isinstance(number, int) for number in integers):
        raise TypeError(f'ms_deform_attn: {name} must hold integers, got {integers}.')
    return integers


def _shapes(spatial_shapes: Tensor | Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    rows = spatial_shapes.tolist() if isinstance(spatial_shapes, Tensor) else spatial_shapes
    shapes = [_integers(row, 'spatial_shapes') for row in rows]
    if not shapes or any(len(shape) != 2 for shape in shapes):
        raise ValueError(
            'ms_deform_attn: spatial_shapes must hold (rows, columns) for at least one level, '
            f'got {shapes}.'
        )
    return [(shape[0], shape[1]) for shape in shapes]


def _check_tensors(value: Tensor, locations: Tensor, weights: Tensor, levels: int) -> None:
    named = {'value': value, 'sampling_locations': locations, 'attention_weights': weights}
    for name, tensor in named.items():
        if tensor.dtype not in _DTYPES:
            raise TypeError(
                f'ms_deform_attn: {name} must be float16, bfloat16, float32 or float64, '
                f'got {tensor.dtype}.'
            )
        if tensor.device != value.device:
            raise ValueError(
                f'ms_deform_attn: {name} must be on the device of value, {value.device}, '
                f'got {tensor.device}.'
            )
    if value.dim() != 4 or locations.dim() != 6:
        raise ValueError(
            'ms_deform_attn: value must be (B, S, H, K) and sampling_locations (B, Q, H, L, P, 2), '
            f'got {tuple(value.shape)} and {tuple(locations.shape)}.'
        )
    batch, _, heads, _ = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    if locations.shape != (batch, queries, heads, levels, points, 2):
        raise ValueError(
            'ms_deform_attn: sampling_locations must be (B, Q, H, L, P, 2) with '
            f'B = {batch}, H = {heads} as in value and L = {levels} as in spatial_shapes, '
            f'got {tuple(locations.shape)}.'
        )
    if weights.shape != locations.shape[:-1]:
        raise ValueError(
            'ms_deform_attn: attention_weights must have the shape of sampling_locations without '
            f'its last dimension, {tuple(locations.shape[:-1])}, got {tuple(weights.shape)}.'
        )
