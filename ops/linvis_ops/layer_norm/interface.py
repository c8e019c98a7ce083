"""The public function of the norm over channels."""

import torch
from torch import Tensor

from linvis_ops import _checks, _dispatch
from linvis_ops._library import without_autocast
from linvis_ops.layer_norm import op
from linvis_ops.layer_norm.reference import layer_norm_by_moments, layer_norm_forward

NAME = 'layer_norm'


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    centred: bool = True,
    dtype: torch.dtype | None = None,
    *,
    backend: str = 'auto',
) -> Tensor:
    """LayerNorm or RMSNorm over the last dimension, fast where that is short.

    y = (x - mean) / sqrt(variance + eps) * weight + bias, over the channels of each token; without
    `centred`, y = x / sqrt(mean(x^2) + eps) * weight + bias.

    Args:
        x: Tokens, shape (..., C), C at least 1, float32, float16, bfloat16 or float64.
        weight: (C,), of any of these dtypes.
        bias: (C,), or None for zero.
        eps: Added to the variance.
        centred: LayerNorm; otherwise RMSNorm.
        dtype: Dtype of the result, one of those of x; None: that of x. A layer that computes in
            lower precision next asks for that here, which saves writing and reading it in full.
        backend: 'auto', or one of `available_backends('layer_norm')`. 'torch' is PyTorch's own
            norm, with all that autograd can do; what `torch.compile` and `torch.export` see of
            'auto' is that too, since a compiler fuses it with its neighbours. 'reference' is the
            definition.

    Returns:
        The shape of x, contiguous, in `dtype`. Everything is computed in float32 (float64 for
        float64), whatever autocast asks for, and rounded once.

    Raises:
        ValueError: If shapes or devices disagree, or there are no channels.
        TypeError: If an argument is of another type or dtype.
        BackendUnavailableError: If the named backend cannot run these inputs; the message says why.

    Source:
        Layer Normalization, arXiv:1607.06450; Root Mean Square Layer Normalization,
        arXiv:1910.07467.
    """
    parameters = {'weight': weight} if bias is None else {'weight': weight, 'bias': bias}
    _checks.check_tensors(NAME, x=x, **parameters)
    _checks.check_floating(NAME, x=x, **parameters)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f'{NAME}: x must be (..., C) with channels, got {_checks.shape_text(x)}.')
    for name, tensor in parameters.items():
        if tensor.shape != x.shape[-1:]:
            raise ValueError(
                f'{NAME}: {name} must be ({x.shape[-1]},), got {_checks.shape_text(tensor)}.'
            )
    _checks.check_device(NAME, [('x', x), *parameters.items()])
    if not isinstance(eps, (int, float)) or eps < 0:
        raise TypeError(f'{NAME}: eps must be a number from 0 on, got {eps!r}.')
    if not isinstance(centred, bool):
        raise TypeError(f'{NAME}: centred must be True or False, got {centred!r}.')
    if dtype is not None and dtype not in _checks.TOKEN_DTYPES:
        raise TypeError(
            f'{NAME}: dtype must be float32, float16, bfloat16, float64 or None, got {dtype!r}.'
        )
    backend = _dispatch.requested_backend(NAME, backend)
    if backend == _dispatch.REFERENCE:
        with without_autocast(x):
            return layer_norm_by_moments(x, weight, bias, eps, centred, dtype)
    if torch.compiler.is_compiling():
        plain = backend == 'auto'
    else:
        plain = _dispatch.select(NAME, backend, x, *parameters.values()).name == 'torch'
    if plain or x.numel() == 0:
        with without_autocast(x):
            return layer_norm_forward(x, weight, bias, eps, centred, dtype or x.dtype)
    return op.layer_norm_fwd(x, weight, bias, eps, centred, dtype, backend)
