"""The public function of Q-Shift with mixes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from linvis_ops import _checks, _dispatch
from linvis_ops._library import without_autocast
from linvis_ops.q_shift_mix import op
from linvis_ops.q_shift_mix.reference import q_shift_mix_by_index

NAME = 'q_shift_mix'


def q_shift_mix(
    x: Tensor,
    hw: tuple[int, int],
    mus: Sequence[Tensor],
    *,
    norm: tuple[Tensor, Tensor, float] | None = None,
    heads: int = 1,
    dtype: torch.dtype | None = None,
    backend: str = 'auto',
) -> tuple[Tensor, ...]:
    """Blend every token with its four neighbours, by several weights in one pass.

    mix_i = y * mu_i + q_shift(y) * (1 - mu_i), where y is x, or its LayerNorm over the channels if
    `norm` is given. `q_shift` gives the quarters of the channels the token at the left, right, top
    and bottom, and zero outside the picture. What passes it unshifted, which is a trailing class
    token and what is left of the channels beyond four quarters, is y itself in all mixes.

    Args:
        x: Tokens in raster order, shape (B, T, C), float32, float16, bfloat16 or float64; T = rows
            * columns, or one more with a class token at the end.
        hw: (rows, columns) of the token grid.
        mus: At least one weight of the token itself against its neighbours, each of shape (C,),
            float32 (float64 beside float64 tokens); any value.
        norm: Weight (C,), bias (C,), both of the dtype of mus, and eps of a LayerNorm in front, or
            None.
        heads: Equal groups of neighbouring channels, each of which has its own quarters, as in
            VRWKV6.
        dtype: Dtype of the mixes, one of those of x; None: that of x. A layer that computes in
            lower precision next asks for that here, which saves writing and reading them in full.
        backend: 'auto', or one of `available_backends('q_shift_mix')`. 'reference' is the
            definition in differentiable PyTorch.

    Returns:
        For each mu a tensor of shape (B, T, C), contiguous, in `dtype`. Everything is computed in
        float32 (float64 for float64) and rounded once.

    Raises:
        ValueError: If shapes or devices disagree, hw does not match T, heads does not divide C, or
            mus is empty.
        TypeError: If dtypes disagree, or an argument is of another type.
        BackendUnavailableError: If the named backend cannot run these inputs; the message says why.

    Source:
        Vision-RWKV (Duan et al., 2024); order of the quarters and roles of mu and 1 - mu are those
        of the authors' code and checkpoints, which differ from equation 9 of the paper.
    """
    if not isinstance(mus, (tuple, list)):
        raise TypeError(f'{NAME}: mus must be a tuple of tensors, got {type(mus).__name__}.')
    if not mus:
        raise ValueError(f'{NAME}: mus must hold at least one tensor, got none.')
    if norm is not None and not (isinstance(norm, (tuple, list)) and len(norm) == 3):
        raise TypeError(f'{NAME}: norm must be (weight, bias, eps) or None.')
    weight, bias, eps = (None, None, 0.0) if norm is None else norm
    if not isinstance(eps, (int, float)):
        raise TypeError(f'{NAME}: eps must be a number, got {eps!r}.')
    weights = {f'mus[{index}]': mu for index, mu in enumerate(mus)}
    if norm is not None:
        weights |= {'weight': weight, 'bias': bias}
    _checks.check_tensors(NAME, x=x, **weights)
    _checks.check_tokens(NAME, x=x)
    _checks.check_channels(NAME, x.shape[2], x.dtype, **weights)
    _checks.check_device(NAME, [('x', x), *weights.items()])
    _checks.check_grid(NAME, x.shape[1], hw)
    _checks.check_division(NAME, x.shape[2], heads)
    if dtype is not None and dtype not in _checks.TOKEN_DTYPES:
        raise TypeError(
            f'{NAME}: dtype must be float32, float16, bfloat16, float64 or None, got {dtype!r}.'
        )
    backend = _dispatch.requested_backend(NAME, backend)
    if backend == _dispatch.REFERENCE:
        with without_autocast(x):
            return q_shift_mix_by_index(x, hw, mus, norm, heads, dtype)
    outputs = op.q_shift_mix_fwd(x, mus, weight, bias, eps, hw[0], hw[1], heads, dtype, backend)
    return tuple(outputs[: len(mus)])
